"""`jaxlm prepare instructions` against a server with a fake engine, and the parts it is made of."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.prepare import main
from jaxlm.config.instructions import InstructionsConfig
from jaxlm.data.prepare.instructions.endpoint import Reply
from jaxlm.data.prepare.instructions.filters import Likeness, Rules
from jaxlm.data.prepare.instructions.report import count_verbs
from jaxlm.data.prepare.instructions.rounds import Replies, Round, run_round
from jaxlm.data.prepare.instructions.tasks import Task, choose, make_prompt, parse_reply, read_seed_tasks
from jaxlm.data.prepare.instructions.verbs import verb_and_noun
from jaxlm.errors import UserError
from jaxlm.inference.paged.requests import Query
from jaxlm.tokenizer import Tokenizer
from tests.serve.fake import FakeEngine
from tests.serve.model import running, served, small_tokenizer

SEEDS = [
    {"instruction": "Name a rock that floats on water.", "input": "", "output": "Pumice."},
    {"instruction": "Sort the stones by hardness:", "input": "quartz, talc", "output": "talc, quartz"},
    {"instruction": "Explain in a sentence why ice floats.", "input": "", "output": "It is less dense than water."},
]
WORDS = [
    "granite", "basalt", "marble", "slate", "chalk", "gneiss", "flint", "shale", "amber", "opal", "jade", "onyx",
    "beryl", "topaz", "garnet", "zircon",
]  # fmt: skip


# --- prompt and reply -------------------------------------------------------------------------------------------------


def test_the_prompt_has_the_form_of_alpacas_script() -> None:
    tasks = [Task("Add  the\nnumbers:", "1, 2", "3"), Task("Say hello to me.", "", "Hello.")]
    assert make_prompt(tasks, 5, "Up to {number}; none: {no_input}\n") == (
        "Up to 5; none: <noinput>\n###\n1. Instruction: Add the numbers\n1. Input:\n1, 2\n1. Output:\n3\n"
        "###\n2. Instruction: Say hello to me.\n2. Input:\n<noinput>\n2. Output:\nHello.\n###\n3. Instruction:"
    )


REPLY = """ Count the legs of a spider.
4. Input:
<noinput>
4. Output:
Eight.
###
5. Instruction: Add the numbers.
5. Input:
2. Instruction 7
5. Output:
9
###
6. Input:
lost
###
7. Instruction: Tell a story
7. Input:
<NoInput>
7. Output:
Once upon"""


def test_tasks_of_a_reply_are_read_and_what_is_cut_is_left_out() -> None:
    tasks = list(parse_reply(REPLY, 4, is_cut=True))
    assert tasks == [
        Task("Count the legs of a spider.", "", "Eight."),
        Task("Add the numbers.", "2. Instruction 7", "9"),
        None,
    ]
    assert list(parse_reply(REPLY, 4, is_cut=False))[3] == Task("Tell a story", "", "Once upon")


def test_a_reply_may_say_the_beginning_again() -> None:
    again = "###\n4. Instruction:" + REPLY
    assert list(parse_reply(again, 4, is_cut=False)) == list(parse_reply(REPLY, 4, is_cut=False))


def test_what_was_prompted_is_read_again() -> None:
    tasks = [Task(f"Do {word} now, please.", "" if at % 2 else word, word.upper()) for at, word in enumerate(WORDS)]
    prompt = make_prompt(tasks, 20, "")
    reply = prompt.split("###\n1. Instruction:")[1].rsplit("###", 1)[0]
    assert list(parse_reply(reply, 1, is_cut=False)) == tasks


def test_examples_depend_on_the_seed_and_the_number_alone() -> None:
    tasks = [Task(word, "", word) for word in WORDS]
    chosen = [choose(tasks, 3, 0, number) for number in range(20)]
    assert (
        chosen == [choose(tasks, 3, 0, number) for number in range(20)] != [choose(tasks, 3, 1, n) for n in range(20)]
    )
    assert all(len(set(each)) == 3 for each in chosen)


def test_seed_tasks_of_both_forms(tmp_path: Path) -> None:
    old = {"id": "seed_task_0", "instruction": "Add them.", "instances": [{"input": "1 2", "output": "3"}]}
    (tmp_path / "seeds.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(SEEDS[0]) + "\n")
    assert read_seed_tasks(str(tmp_path / "seeds.jsonl")) == [
        Task("Add them.", "1 2", "3"),
        Task("Name a rock that floats on water.", "", "Pumice."),
    ]
    (tmp_path / "bad.jsonl").write_text(json.dumps(old) + '\n{"instruction": "Add", "output": ""}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: no output"):
        read_seed_tasks(str(tmp_path / "bad.jsonl"))


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "rule"),
    [
        ("Name three rocks.", "too short"),
        ("Name four rocks now.", None),
        ("word " * 151, "too long"),
        ("Describe the Image of a rock.", "not for a model of texts"),
        ("Imagine a rock that sings.", None),
        ("Go to the next page, please.", "not for a model of texts"),
        ("Write a program that adds numbers.", "asks for a program"),
        ("(a) name all the rocks.", "first character"),
        ("Été is which season, please?", "first character"),
    ],
)
def test_rules_are_alpacas(instruction: str, rule: str | None) -> None:
    assert Rules().broken_by(Task(instruction, "", "x")) == rule


def test_a_task_needs_an_output() -> None:
    assert Rules().broken_by(Task("Name four rocks now.", "", "")) == "no output"


def test_likeness_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer, draw = RougeScorer(["rougeL"], use_stemmer=False), random.Random(0)
    texts = [" ".join(draw.choices(["The", "a-b", "c's", *WORDS[:5]], k=draw.randint(0, 9))) for _ in range(60)]
    likeness = Likeness(texts[:30])
    for text in texts[30:]:
        expected = [scorer.score(other, text)["rougeL"].fmeasure for other in texts[:30]]
        assert likeness.to_all(text) == pytest.approx(expected, abs=1e-12)


# --- verbs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "pair"),
    [
        ("Write a short story about rain. It must rhyme.", ("write", "story")),
        ("Please give me three tips for staying healthy.", ("give", "tip")),
        ("Could you list the primary colours?", ("list", "colour")),
        ("Explain how a rainbow forms.", ("explain", None)),
        ('Translate "good morning" into French.', ("translate", None)),
        ("Classify these animals into mammals and birds.", ("classify", "animal")),
        ("List the following countries: France, Chad.", ("list", "country")),
        ("What is the capital of France?", None),
        ("", None),
    ],
)
def test_verb_and_object(instruction: str, pair: tuple[str, str | None] | None) -> None:
    assert verb_and_noun(instruction) == pair


def test_verbs_are_counted_the_most_frequent_first() -> None:
    counts = count_verbs(["Name a rock.", "Sort the rocks.", "Name two rocks.", "Name stars.", "Why?"])
    assert {verb: dict(nouns) for verb, nouns in counts.items()} == {
        "name": {"rock": 2, "star": 1},
        "sort": {"rock": 1},
    }
    assert list(counts) == ["name", "sort"]


# --- the job ----------------------------------------------------------------------------------------------------------


def written(seed: int) -> str:
    """A reply of four tasks, made of three words that the seed draws: many are alike, one breaks a rule."""
    draw = random.Random(seed)
    text = ""
    for number in (3, 4, 5, 6):
        first, second, third = draw.sample(WORDS, 3)
        instruction = f"Compare {first}, {second} and {third}." if number < 6 else "Draw a stone for us."
        text += (
            f" {instruction}\n{number}. Input:\n<noinput>\n{number}. Output:\n{first}\n###\n{number + 1}. Instruction:"
        )
    return text


class FakeModel:
    """Answers after a pause that makes later requests come first."""

    def __init__(self, failing: int | None = None) -> None:
        self.asked, self.failing = 0, failing

    async def ask(self, prompt: str, seed: int) -> Reply:
        self.asked += 1
        if self.asked == self.failing:
            raise UserError("url: it is gone")
        await asyncio.sleep(0.0005 * (seed % 5))
        return Reply(written(seed), False, 10, 5)


def config(folder: Path, **more: Any) -> InstructionsConfig:
    values = {"examples": 2, "tasks": 6, "count": 40, "patience": 20, **more}
    return InstructionsConfig(seed_tasks="", output_dir=str(folder), **values)


def run(settings: InstructionsConfig, model: FakeModel) -> Round:
    replies = Replies(Path(settings.output_dir) / "replies.jsonl", {"model": "fake"})
    try:
        seeds = [Task(*(each[name] for name in ("instruction", "input", "output"))) for each in SEEDS]
        return asyncio.run(run_round(settings, seeds, model, replies, lambda result: None))
    finally:
        replies.close()


def test_the_result_does_not_depend_on_the_order_of_replies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, many = run(config(tmp_path / "a", at_once=1), FakeModel()), run(config(tmp_path / "b", at_once=7), FakeModel())
    assert one.kept == many.kept and len(one.kept) == 40
    assert one.dropped == many.dropped and {"not for a model of texts", "like one that is there"} <= set(one.dropped)
    instructions = [task.instruction for task, _, _ in one.kept]
    for at, text in enumerate(instructions):
        before = Likeness([*(each["instruction"] for each in SEEDS), *instructions[:at]]).to_all(text)
        assert before.max() <= 0.7 and before.max() == one.kept[at][1]
    assert one.tokens_in == 10 * one.replies and one.tokens_out == 5 * one.replies


def test_replies_that_are_there_are_not_asked_for_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is gone"):
        run(config(tmp_path), FakeModel(failing=9))
    there = (tmp_path / "replies.jsonl").read_bytes().count(b"\n") - 1
    assert there > 0
    with (tmp_path / "replies.jsonl").open("ab") as file:
        file.write(b'{"request": 3, "re')  # killed while it wrote
    model = FakeModel()
    result = run(config(tmp_path, at_once=1), model)
    assert model.asked == result.replies - there
    assert result.kept == run(config(tmp_path, max_similarity=0.7), FakeModel(failing=1)).kept  # nothing is asked
    strict = run(config(tmp_path, max_similarity=0.5, count=5), FakeModel(failing=1))
    assert len(strict.kept) == 5 and max(score for _, score, _ in strict.kept) <= 0.5


def test_a_round_ends_where_nothing_new_comes(tmp_path: Path) -> None:
    result = run(config(tmp_path, count=10_000, max_similarity=0.3, patience=6), FakeModel())
    assert result.is_barren and not result.is_full and result.fruitless == 6


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Replies(tmp_path / "replies.jsonl", {"model": "a", "seed": 0}).close()
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        Replies(tmp_path / "replies.jsonl", {"model": "a", "seed": 1})
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="is not a file of replies"):
        Replies(tmp_path / "other.jsonl", {"model": "a"})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server whose model writes tasks that its seed draws."""
    tokenizer = small_tokenizer()
    assert tokenizer.eos_id is not None
    engine = FakeEngine(
        lambda query, sample: _ids(tokenizer, query), tokenizer.vocab_size, tokenizer.eos_id, 4096, 0.001, chunk=50
    )
    with running(served(tokenizer, engine, context=4096)) as (address, _):
        yield f"{address}/v1"


def _ids(tokenizer: Tokenizer, query: Query) -> Sequence[int]:
    return tokenizer.encode(written(query.options.seed)).ids


@pytest.fixture
def words(tmp_path: Path, url: str) -> list[str]:
    (tmp_path / "seeds.json").write_text(json.dumps(SEEDS))
    (tmp_path / "prompt.txt").write_text("Tasks up to {number}:\n")
    return [
        "instructions", "--seed_tasks", str(tmp_path / "seeds.json"), "--prompt", str(tmp_path / "prompt.txt"),
        "--url", url, "--examples", "2", "--tasks", "6", "--max_tokens", "1500", "--count", "30",
    ]  # fmt: skip


def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path: Path, words: list[str], capsys: Any) -> None:
    assert main([*words, "--output_dir", str(tmp_path / "whole"), "--at_once", "3"]) == 0
    assert "kept share" in capsys.readouterr().out
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "jaxlm.prepare", *words, "--output_dir", str(killed), "--at_once", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    replies = killed / "replies.jsonl"
    while process.poll() is None and not (replies.exists() and replies.read_bytes().count(b"\n") >= 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "instructions.json").exists()
    assert main([*words, "--output_dir", str(killed)]) == 0
    first, second = ((tmp_path / name / "instructions.json").read_bytes() for name in ("whole", "killed"))
    assert first == second
    records = json.loads(first)
    assert len(records) == 30 and set(records[0]) == {"instruction", "input", "output", "similarity", "most_similar"}
    report = json.loads((killed / "report.json").read_text())
    assert report["kept"] == 30 and report["written"] == 30 + sum(report["dropped"].values())
    assert report["tokens_out"] > 0 and report["most_frequent"]["compare"]
    assert (killed / "diversity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "2"], "tasks: 2 must be more than examples (2)"),
        (["--max_similarity", "1.5"], "max_similarity: 1.5 must be above 0"),
        (["--url", "http://127.0.0.1:9/v1", "--retries", "0"], "cannot be reached"),
        (["--model", "llama"], "--model"),
        (["--fields.best_off", "2"], "best_off"),
        (["--prompt", "none.txt"], "prompt: none.txt: No such file"),
        (["--examples", "4"], "holds 3 tasks; a prompt shows 4"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, words: list[str], capsys: Any, more: list[str], message: str) -> None:
    assert main([*words, "--output_dir", str(tmp_path / "out"), *more]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
