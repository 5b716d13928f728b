"""`jaxlm evaluate --task perplexity` by text: its files, its standard errors, going on after a kill, comparisons."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.cli.evaluate import main
from jaxlm.evaluation.journal import JournalFile
from jaxlm.evaluation.outputs import JOURNAL
from jaxlm.evaluation.task import Answer
from jaxlm.evaluation.tasks.perplexity import TASK, Options
from jaxlm.tokenizer import load_tokenizer
from tests.e2e.conftest import WORDS
from tests.evaluation.test_tasks import FILES, QUESTIONS, contents, scores_of, write

TEXTS = [" ".join(WORDS[n % 11 : n % 11 + 1 + n % 9]) for n in range(40)]
SHORT = ("--batch_size", "1", "--mesh.data", "1", "--mesh.fsdp", "8", "--sequence_length", "32")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def words(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = ["--task", "perplexity", "--model", str(model), "--data", str(data), "--output", str(output)]
    return [*given, "--compilation_cache", "none", *more]


def measured(model: Path, data: Path, output: Path, *more: str, status: int = 0) -> Path:
    assert main(words(model, data, output, *more)) == status
    return output / "perplexity"


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]


def test_each_text_has_the_log_likelihood_of_transformers(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    """Long ones too, in windows; the figures are those of --save_file."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    module = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(tiny_model)
    long = " ".join(WORDS * 3)
    texts.write_text("\n".join([*TEXTS[:6], long]) + "\n")
    out = measured(tiny_model, texts, tmp_path / "out", *SHORT, "--save_file", str(tmp_path / "ppl.json"))
    assert sorted(contents(out)) == FILES
    lines = lines_of(out)
    assert [line["record"]["name"] for line in lines] == [f"{texts}:{n}" for n in range(1, 8)]
    losses = []
    for line, text in zip(lines, [*TEXTS[:6], long], strict=True):
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text).ids])
        total, right, done = 0.0, 0, 1
        for start in range(0, len(ids), 31):
            piece = ids[start : start + 32]
            with torch.no_grad():
                logs = torch.log_softmax(module(piece[None]).logits[0], -1)
            for place in range(done - start, len(piece)):
                total += float(logs[place - 1, piece[place]])
                right += int(logs[place - 1].argmax() == piece[place])
            done = start + len(piece)
            if done == len(ids):
                break
        answer = line["answers"]["text"]
        assert answer["log_probs"][0] == pytest.approx(total, abs=1e-4)
        assert answer["num_tokens"] == [len(ids) - 1] and answer["num_correct"] == [right]
        assert answer["num_bytes"] == [len(text.encode())] and answer["num_characters"] == [len(text)]
        losses.append(-total)
    assert len(tokenizer.encode(long).ids) > 64
    scores, saved = scores_of(out), json.loads((tmp_path / "ppl.json").read_text())
    for name, figure in scores["figures"].items():
        assert figure["value"] == pytest.approx(saved[name], rel=1e-6) and figure["n"] == 7
    assert saved["tokens"] == sum(line["answers"]["text"]["num_tokens"][0] for line in lines)
    assert saved["loss"] == pytest.approx(sum(losses) / saved["tokens"], abs=1e-5) and saved["long"] == 1
    assert scores["first_request"]["text"] == f"<s> {TEXTS[0]}" and scores["bos"] == "bos <s> first"
    # Evaluated before: nothing is scored again, and all files are written again as they were.
    before = contents(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.evaluation.scorer.place", None)
        (tmp_path / "ppl.json").unlink()
        measured(tiny_model, texts, tmp_path / "out", *SHORT, "--save_file", str(tmp_path / "ppl.json"))
    assert contents(out) == before and json.loads((tmp_path / "ppl.json").read_text()) == saved


def answers_of(rng: np.random.Generator, count: int) -> list[dict[str, Answer]]:
    """Texts of different lengths, and losses that go with them."""
    result = []
    for tokens in rng.integers(1, 60, count).tolist():
        loss = float(rng.gamma(2.0, 1.0) * tokens)
        size = tokens * 4 + int(rng.integers(0, 9))
        result.append(
            {
                "text": Answer(
                    log_probs=(-loss,),
                    num_tokens=(tokens,),
                    num_correct=(int(rng.integers(0, tokens + 1)),),
                    num_bytes=(size,),
                    num_characters=(size - 1,),
                )
            }
        )
    return result


def test_standard_errors_are_those_of_resampled_texts() -> None:
    """Against a bootstrap, which knows no formula."""
    rng = np.random.default_rng(0)
    answers = answers_of(rng, 400)
    figures = TASK.score([], answers, Options())
    draws: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(600):
        again = TASK.score([], [answers[at] for at in rng.integers(0, 400, 400)], Options())
        for name, figure in again.items():
            draws[name].append(figure.value)
    for name, figure in figures.items():
        assert figure.n == 400 and figure.stderr == pytest.approx(float(np.std(draws[name])), rel=0.15), name
    nats = sum(-each["text"].log_probs[0] for each in answers)
    assert figures["bits_per_byte"].value == pytest.approx(
        nats / math.log(2) / sum(each["text"].num_bytes[0] for each in answers)
    )


def test_texts_with_nothing_to_score_count_nowhere() -> None:
    answers = answers_of(np.random.default_rng(1), 5)
    nothing = {"text": Answer((0.0,), num_tokens=(0,), num_correct=(0,), num_bytes=(0,), num_characters=(0,))}
    assert TASK.score([], [*answers, nothing], Options()) == TASK.score([], answers, Options())
    assert TASK.score([], answers[:1], Options())["loss"].stderr is None
    assert math.isnan(TASK.score([], [nothing], Options())["loss"].value)


def test_an_interrupted_run_goes_on(tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """And leaves the bytes of one that was not interrupted."""
    small = ("--sequence_length", "12", "--batch_size", "1", "--mesh.data", "2", "--mesh.fsdp", "4")
    small = (*small, "--save_file", str(tmp_path / "ppl.json"))
    monkeypatch.setattr("jaxlm.evaluation.perplexity._SHORTEST", 16)
    original = JournalFile.add
    calls: list[Any] = []

    def add(self: JournalFile, *lines: Any, stop_at: int = 0) -> None:
        calls.append(lines)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        original(self, *lines)

    monkeypatch.setattr(JournalFile, "add", add)
    whole = measured(tiny_model, texts, tmp_path / "a", *small)
    saved, batches = (tmp_path / "ppl.json").read_bytes(), len(calls) - 1
    calls.clear()  # then the settings and one batch are kept
    monkeypatch.setattr(JournalFile, "add", functools.partialmethod(add, stop_at=3))
    part = measured(tiny_model, texts, tmp_path / "b", *small, status=130)
    assert (part / JOURNAL).read_bytes().count(b"\n") == 2 and not (part / "scores.json").is_file()
    monkeypatch.setattr(JournalFile, "add", add)
    # Batches of another size are other ones.
    assert main(words(tiny_model, texts, tmp_path / "b", *small[:4], "--mesh.data", "1", "--mesh.fsdp", "1")) == 2
    calls.clear()
    measured(tiny_model, texts, tmp_path / "b", *small)
    assert len(calls) == batches - 1 > 1
    assert contents(part) == contents(whole) and (tmp_path / "ppl.json").read_bytes() == saved


@pytest.mark.slow
def test_a_killed_run_leaves_the_same_files(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(TEXTS * 200))
    whole = measured(tiny_model, data, tmp_path / "a", *SHORT)
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm.evaluate", *words(tiny_model, data, tmp_path / "b", *SHORT)], env=dict(os.environ)
    )
    journal = tmp_path / "b" / "perplexity" / JOURNAL
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.is_file()
    assert contents(measured(tiny_model, data, tmp_path / "b", *SHORT)) == contents(whole)


@pytest.mark.slow
def test_several_sources_beside_another_task(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    """Plain texts and instructions, the first two of each; the report has each source."""
    asked = write(
        tmp_path / "asked.json", [{"instruction": "rock", "output": f"{word} gas"} for word in ("zinc", "iron", "salt")]
    )
    choices, out = write(tmp_path / "choices.json", QUESTIONS), tmp_path / "out"
    given = ["--task", "multiple_choice,perplexity", "--model", str(tiny_model), "--output", str(out)]
    given += ["--data", f"perplexity={texts}", "--data", f"perplexity={asked}", "--data", str(choices), "--limit", "2"]
    assert main([*given, "--compilation_cache", "none"]) == 0
    assert scores_of(out / "multiple_choice")["figures"]["acc"]["n"] == 2
    scores = scores_of(out / "perplexity")
    assert scores["figures"]["loss"]["n"] == 4 and scores["settings"]["limit"] == 2
    assert [line["record"]["source"] for line in lines_of(out / "perplexity")] == [str(texts)] * 2 + [str(asked)] * 2
    assert scores["settings"]["options"]["add_eos"] == [False, True]
    report = (out / "perplexity" / "report.md").read_text()
    assert f"| {texts} |" in report and f"| {asked} |" in report


def test_save_file_alone_writes_nothing_else(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it always did: the same command on other data is not held up by what it wrote before."""
    monkeypatch.chdir(tmp_path)
    given = ["--task", "perplexity", "--model", str(tiny_model), "--data", str(texts), "--compilation_cache", "none"]
    assert main([*given, "--save_file", "ppl.json"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ppl.json", "texts.txt"]
    saved = json.loads((tmp_path / "ppl.json").read_text())
    assert saved["task"] == "perplexity" and saved["records"] == 40 and saved["data"] == str(texts)


@pytest.mark.slow
def test_models_are_compared_text_by_text(
    tiny_model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tiny_model, texts, tmp_path / "a")
    measured(tiny_model, texts, tmp_path / "b", "--model.dtype", "bfloat16")
    measured(tiny_model, texts, tmp_path / "c", "--sequence_length", "64")
    both = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--resamples", "100"]
    assert main([*both, "--save_file", str(tmp_path / "table.json")]) == 0
    task = json.loads((tmp_path / "table.json").read_text())["tasks"]["perplexity"]
    loss = task["differences"]["b"]["loss"]
    assert loss["value"] == pytest.approx(
        task["figures"]["b"]["loss"]["value"] - task["figures"]["a"]["loss"]["value"], abs=1e-12
    )
    assert loss["low"] <= loss["value"] <= loss["high"]
    # The same texts, so the interval is much narrower than that of either figure.
    assert loss["high"] - loss["low"] < 0.2 * task["figures"]["a"]["loss"]["stderr"]
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "only answers to the same questions can be compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "limit: 0 must be at least 1"),
        (["--options.stride", "3"], "options.stride: perplexity has no options"),
        (["--data", "none.txt"], "none.txt"),
    ],
)
def test_bad_words_are_named(
    more: list[str], message: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(Path("nowhere"), texts, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
