"""Files of prompts: reading, the journal of an interrupted run, writing."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.batch import FilePrompt, Journal, Result, answer_all, read_prompts, write_results
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights
from jaxlm.inference.prompts import Prompter
from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tests.inference.test_generation import CONFIG, TreeSource


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("the crust of the earth is made of rock and more rock\n" * 40)
    train_sentencepiece([folder / "text.txt"], 290, folder / "model")
    return load_tokenizer(folder / "model")


@pytest.fixture(scope="module")
def generator() -> Generator:
    import dataclasses

    import flax.linen as nn

    from jaxlm.models.decoder import Decoder, abstract_variables
    from tests.models.compare import random_tree

    config = dataclasses.replace(CONFIG, vocab_size=290)
    tree = random_tree(nn.unbox(abstract_variables(Decoder(config)))["params"], 0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    decoder = Decoder(config)
    return Generator(decoder, load_weights(decoder, mesh, TreeSource(tree)), mesh, [2])


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    k2 = read_prompts(write(tmp_path / "a.json", '["one", "two\\nlines"]'))
    assert [prompt.question for prompt in k2] == ["one", "two\nlines"]
    records = read_prompts(write(tmp_path / "b.jsonl", '{"instruction": "one"}\n\n"two"\n'))
    assert (records[0].fields, records[1].question) == ({"instruction": "one"}, "two")
    assert [prompt.name[-1] for prompt in records] == ["1", "3"]
    table = read_prompts(write(tmp_path / "c.csv", 'question,input\n"a, b",x\nc,\n'))
    assert [prompt.fields for prompt in table] == [{"question": "a, b", "input": "x"}, {"question": "c", "input": ""}]
    wide = read_prompts(write(tmp_path / "w.csv", "question\n" + "x" * 200_000 + "\n"))
    assert wide[0].fields == {"question": "x" * 200_000}
    odd = read_prompts(write(tmp_path / "o.txt", "one\u2028still one\x0c\r\ntwo"))
    assert [prompt.question for prompt in odd] == ["one\u2028still one\x0c", "two"]
    scimind = read_prompts(write(tmp_path / "d.txt", "one\\ntwo\nthree\n"))
    assert [prompt.question for prompt in scimind] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"instruction": "one"}\n{"instruct\n"three"\n', r"a\.jsonl:2.*broken JSON"),
        ("a.json", '["one", 2, "three"]', r"found int"),
        ("a.csv", "instruction,input\na,b\nc\nd,e\n", r"header's 2 columns"),
        ("a.json", '["one", "\\ud83d", "three"]', r"lone surrogate"),
        ("a.jsonl", '"one"\n' + "9" * 5000 + '\n"three"\n', r"broken JSON"),
        ("a.jsonl", '"one"\n' + "[" * 100000 + '\n"three"\n', r"broken JSON"),
        ("a.jsonl", '"one"\n{"instruction": " "}\n"three"\n', r"is empty"),
        (
            "a.json",
            '["one", {"quest": "two"}, "three"]',
            r"no column 'instruction'.* it has 'quest'; set columns: \{inst",
        ),
    ],
)
def test_a_broken_prompt_does_not_lose_the_others(
    tmp_path: Path, name: str, content: str, message: str, generator: Generator, tokenizer: Tokenizer
) -> None:
    prompts = read_prompts(write(tmp_path / name, content))
    journal = Journal(tmp_path / "journal", {})
    answer_all(prompts, generator, Prompter("alpaca_short", tokenizer), Decoding(max_new_tokens=3), 8, journal, _ignore)
    assert [result.error is None for _, result in sorted(journal.results.items())] == [True, False, True]
    assert f"{name}:" in str(journal.results[1].error)
    with pytest.raises(AssertionError, match="No match"):
        assert_matches("something else", message)
    assert_matches(str(journal.results[1].error), message)


def assert_matches(text: str, pattern: str) -> None:
    import re

    assert re.search(pattern, text), f"No match: {text}"


def _ignore(prompts: int, tokens: int) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "x", "ending must be one of"),
        ("a.json", '"a"', "must hold an array"),
        ("a.json", "[1,", "broken JSON"),
        ("a.txt", "", "holds no prompt"),
        ("a.csv", "a,a\n1,2\n", "two columns of the name 'a'"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


PROMPTS = [
    "rock",
    "the crust of the earth is made of",
    "more",
    "earth and rock and earth",
    "",
    "the",
    "rock and " * 200,
]


def items_of(prompts: list[str]) -> list[FilePrompt]:
    return [FilePrompt(f"p:{number}", question=prompt) for number, prompt in enumerate(prompts, 1)]


OPTIONS = Decoding(max_new_tokens=6, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def run(generator: Generator, tokenizer: Tokenizer) -> Callable[..., dict[int, Result]]:
    def answer(path: Path, batch_size: int = 2, advance: Any = _ignore, options: Decoding = OPTIONS) -> Any:
        journal = Journal(path, {"seed": options.seed})
        try:
            answer_all(items_of(PROMPTS), generator, Prompter("text", tokenizer), options, batch_size, journal, advance)
        finally:
            journal.close()
        return journal.results

    return answer


def test_a_run_that_was_killed_goes_on(tmp_path: Path, run: Callable[..., dict[int, Result]]) -> None:
    """Killed after each batch in turn, once with a half-written line: nothing is lost, doubled or changed."""
    expected = run(tmp_path / "whole")
    assert [number for number, result in expected.items() if result.error] == [4, 6]
    assert "has" in str(expected[6].error) and "tokens, the model's context is 128" in str(expected[6].error)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in (1, 2, 4, len(lines)):
        path = tmp_path / f"killed{kept}"
        path.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept : kept + 1])[:-5])
        done: list[int] = []
        assert run(path, 3, lambda prompts, tokens, done=done: done.append(prompts)) == expected
        assert sum(done) == len(PROMPTS) - (kept - 1)
        numbers = [json.loads(line)["number"] for line in path.read_text().splitlines()[1:]]
        assert sorted(numbers) == list(range(len(PROMPTS)))


def test_other_settings_do_not_go_on(tmp_path: Path, run: Callable[..., dict[int, Result]]) -> None:
    run(tmp_path / "journal")
    with pytest.raises(UserError, match=r"begun with seed 1, now it is 2.*--overwrite"):
        Journal(tmp_path / "journal", {"seed": 2})


def test_a_file_that_is_not_a_journal_is_left_alone(tmp_path: Path) -> None:
    for content in ("garbage\nline\n", "garbage", '{"a": 1}\n', "[1]\n"):
        path = write(tmp_path / "notes.partial", content)
        with pytest.raises(UserError, match="is not the journal"):
            Journal(path, {})
        assert path.read_text() == content


def test_beginning_anew_keeps_what_has_the_same_settings(tmp_path: Path, run: Callable[..., dict[int, Result]]) -> None:
    found = run(tmp_path / "journal")
    same = Journal(tmp_path / "journal", {"seed": 1}, discard=True)
    assert same.results == found
    same.close()
    other = Journal(tmp_path / "journal", {"seed": 2}, discard=True)
    assert not other.results
    with pytest.raises(UserError, match="another run"):
        Journal(tmp_path / "journal", {"seed": 2}, discard=True)
    other.close(remove=True)
    assert not (tmp_path / "journal").exists()


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal", {})
    with pytest.raises(UserError, match="another run"):
        Journal(tmp_path / "journal", {})
    first.close()
    Journal(tmp_path / "journal", {}).close()


def test_stop_texts_end_answers(tmp_path: Path, generator: Generator, tokenizer: Tokenizer) -> None:
    """Cut at the stop text, whichever flush it came in."""
    free = Journal(tmp_path / "free", {})
    options = Decoding(max_new_tokens=60, temperature=1.0, seed=2)
    prompts = items_of(["rock", "the earth", "more"])
    answer_all(prompts, generator, Prompter("text", tokenizer), options, 8, free, _ignore)
    texts = [free.results[number].answers[0] for number in range(3)]
    import dataclasses

    stop = next(char for char in texts[0][5:] if char.strip() and char not in texts[0][:3])
    held = Journal(tmp_path / "held", {})
    answer_all(
        prompts, generator, Prompter("text", tokenizer), dataclasses.replace(options, stop=(stop,)), 8, held, _ignore
    )
    for number, text in enumerate(texts):
        found = held.results[number]
        assert found.answers[0] == text.split(stop)[0]
        assert found.finish[0] == ("stop" if stop in text else free.results[number].finish[0])


def test_results_are_written_to_every_kind_of_file(tmp_path: Path) -> None:
    prompts = [
        FilePrompt("p:1", question="one"),
        FilePrompt("p:2", fields={"instruction": "two", "answer": "right"}),
        FilePrompt("p:3", error="broken"),
    ]
    results = {0: Result(("a\nb \\C=C",), ("stop",)), 1: Result(("c",), ("length",)), 2: Result(error="p:3: broken")}
    write_results(tmp_path / "o.json", prompts, results)
    assert json.loads((tmp_path / "o.json").read_text()) == [
        {"question": "one", "answer": "a\nb \\C=C"},
        {"instruction": "two", "answer": "right", "prediction": "c"},
        {"error": "p:3: broken"},
    ]
    write_results(tmp_path / "o.jsonl", prompts, results)
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 3
    write_results(tmp_path / "o.csv", prompts, results)
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["answer"] == "a\nb \\C=C" and rows[1]["prediction"] == "c" and rows[2]["error"] == "p:3: broken"
    write_results(tmp_path / "o.txt", prompts, results)
    assert (tmp_path / "o.txt").read_text() == "a\\nb \\C=C\nc\n[error] p:3: broken\n"
    several = {0: Result(("a", "b"), ("stop", "stop"))}
    write_results(tmp_path / "s.json", prompts[:1], several)
    assert json.loads((tmp_path / "s.json").read_text()) == [{"question": "one", "answers": ["a", "b"]}]
