"""`jaxlm evaluate` on a tiny model, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jaxlm.cli.evaluate import main
from jaxlm.errors import UserError
from jaxlm.evaluation import asking
from jaxlm.evaluation.journal import Answered, Journal, JournalFile
from jaxlm.evaluation.outputs import JOURNAL, read_predictions, write_predictions
from jaxlm.evaluation.task import Answer
from tests.e2e.conftest import WORDS

QUESTIONS: list[dict[str, Any]] = [
    {"id": 1, "question": "rock sand", "choices": ["clay", "lava iron", "zinc"], "answer": 0, "subject": "earth"},
    {"id": 2, "question": "salt acid base", "choices": ["atom ion", "gas"], "answer": "B", "subject": "matter"},
    {"id": 3, "question": "heat", "choices": ["deep", "soft hard", "form", "flow"], "answer": 3, "subject": "earth"},
]
FILES = ["figures.png", "predictions.jsonl", "report.md", "scores.json"]


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def many(count: int) -> list[dict[str, Any]]:
    """Questions of different lengths."""
    return [
        {
            "id": n,
            "question": " ".join(WORDS[: 1 + n % 17]),
            "choices": [WORDS[n % 20], *WORDS[n % 7 : n % 7 + 3]],
            "answer": 1,
        }
        for n in range(count)
    ]


def words(model: Path, data: Path, output: Path, task: str, *more: str) -> list[str]:
    given = ["--task", task, "--model", str(model), "--data", str(data), "--output", str(output)]
    return [*given, "--compilation_cache", "none", *more]


def evaluate(model: Path, data: Path, output: Path, task: str = "multiple_choice", *more: str, status: int = 0) -> Path:
    assert main(words(model, data, output, task, *more)) == status
    return output / task


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def scores_of(directory: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((directory / "scores.json").read_text())
    return scores


def test_a_run_leaves_its_files(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "q.json", QUESTIONS)
    out = evaluate(tiny_model, data, tmp_path / "out", "multiple_choice", "--options.answers", "texts")
    assert sorted(contents(out)) == FILES
    scores = scores_of(out)
    first = scores["first_request"]
    assert first["ids"][0] == 1 and first["text"] == "<s> Question: rock sand\nAnswer:"
    assert [each["text"] for each in first["continuations"]] == ["clay", "lava iron", "zinc"]
    assert "bos <s> first" in scores["bos"] and scores["versions"]["jax"]
    assert set(scores["figures"]) == {"acc", "acc_norm", "probability", "chance"}
    assert scores["figures"]["chance"] == {"value": pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3), "stderr": None, "n": 3}
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == QUESTIONS
    assert [len(line["answers"]["answer"]["log_probs"]) for line in lines] == [3, 2, 4]
    report = (out / "report.md").read_text()
    assert "| acc |" in report and "| earth |" in report and str(data) in report
    capsys.readouterr()

    def fail(*_: Any) -> None:
        raise AssertionError("asked again")

    with pytest.MonkeyPatch.context() as patch:  # it ended: its figures come from its answers
        patch.setattr(asking, "make_plan", fail)
        before = contents(out)
        evaluate(tiny_model, data, tmp_path / "out", "multiple_choice", "--options.answers", "texts")
    assert contents(out) == before
    assert evaluate(tiny_model, data, tmp_path / "out", "multiple_choice", status=2)
    assert "--overwrite" in capsys.readouterr().err
    # Scored again as a file of answers, without a model.
    predictions = ["--task", "multiple_choice", "--predictions", str(out / "predictions.jsonl")]
    assert main([*predictions, "--options.answers", "texts", "--output", str(tmp_path / "again")]) == 0
    assert scores_of(tmp_path / "again" / "multiple_choice")["figures"] == scores["figures"]


def test_an_interrupted_run_goes_on(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are computed in the same shape, so the same bytes are left as by a run that was not interrupted."""
    data = write(tmp_path / "q.json", many(20))
    whole = evaluate(tiny_model, data, tmp_path / "a", "multiple_choice", "--batch_size", "4")
    original, calls = Journal.add, []

    def stop_later(self: Journal, answers: Any) -> None:
        calls.append(len(answers))
        if len(calls) == 3:  # one answer of the third batch has been kept
            original(self, dict(list(answers.items())[:1]))
            raise KeyboardInterrupt
        original(self, answers)

    monkeypatch.setattr(Journal, "add", stop_later)
    part = evaluate(tiny_model, data, tmp_path / "b", "multiple_choice", "--batch_size", "4", status=130)
    assert (part / JOURNAL).is_file() and not (part / "scores.json").is_file()
    with (part / JOURNAL).open("ab") as file:
        file.write(b'{"request": 3, "ans')  # a line that was being written
    monkeypatch.setattr(Journal, "add", original)
    asked: list[int] = []
    batch = asking._answer_batch
    monkeypatch.setattr(asking, "_answer_batch", lambda *args: asked.extend(args[1]) or batch(*args))
    evaluate(tiny_model, data, tmp_path / "b", "multiple_choice", "--batch_size", "4")
    assert len(asked) == 12  # three batches
    assert contents(part) == contents(whole)


@pytest.mark.slow
def test_a_killed_run_leaves_the_same_files(tiny_model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "q.json", many(60))
    whole = evaluate(tiny_model, data, tmp_path / "a", "multiple_choice", "--batch_size", "4")
    command = words(tiny_model, data, tmp_path / "b", "multiple_choice", "--batch_size", "4")
    process = subprocess.Popen([sys.executable, "-m", "jaxlm.evaluate", *command], env=dict(os.environ))
    journal = tmp_path / "b" / "multiple_choice" / JOURNAL
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_bytes().count(b"\n") > 8) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.is_file()
    out = evaluate(tiny_model, data, tmp_path / "b", "multiple_choice", "--batch_size", "4")
    assert contents(out) == contents(whole)


def test_answers_made_elsewhere_are_scored(tmp_path: Path) -> None:
    """By their ids where both have some, and in their order else."""
    data = write(tmp_path / "q.json", QUESTIONS)
    texts = ["The answer is (B).", "gas", "A"]
    common = ["--task", "multiple_choice", "--data", str(data)]
    rows = [{"id": row["id"], "prediction": text} for row, text in zip(QUESTIONS, texts, strict=True)]
    for name, content in (("ids.json", rows[::-1]), ("order.json", texts)):
        file = write(tmp_path / name, content)
        assert main([*common, "--predictions", str(file), "--output", str(tmp_path / name[:3])]) == 0
        acc = scores_of(tmp_path / name[:3] / "multiple_choice")["figures"]["acc"]
        assert acc["value"] == pytest.approx(1 / 3) and acc["n"] == 3


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([{"question": "rock"}], [], "q.json:1: has no choices in"),
        ([{"instruction": "rock", "output": "sand"}], [], "expects a question, choices"),
        ([QUESTIONS[0] | {"answer": "E"}], [], "the answer 'E', which is none of its choices"),
        ([QUESTIONS[0] | {"answer": 3}], [], "the answer 3, which is none"),
        ([*QUESTIONS, QUESTIONS[0]], [], "id 1 stands at"),
        (QUESTIONS, ["--options.shot", "5"], "did you mean 'shots'"),
        (QUESTIONS, ["--options.shots", "many"], "options.shots: expected a whole number"),
        (QUESTIONS, ["--options.shots", "2"], "options.examples: name the file"),
        (QUESTIONS, ["--limit", "0"], "limit"),
        (QUESTIONS, ["--batch_size", "0"], "batch_size: 0"),
        (QUESTIONS, ["--task", "multiple_choise"], "did you mean 'multiple_choice'"),
        (QUESTIONS, ["--task", "multiple_choice,smiles2text"], "smiles2text is run by itself"),
        (QUESTIONS, ["--task", "multiple_choice,perplexity"], "data: name a file of texts"),
        (QUESTIONS, ["--data", "other.json"], "name one for each task"),
    ],
)
def test_bad_input_is_named(
    records: Any, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "q.json", records)
    given = ["--task", "multiple_choice", "--model", "nowhere", "--data", str(data), "--output", str(tmp_path / "out")]
    assert main([*given, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no answer"),
        (["B"], "has 1 answers"),
        ([{"id": 1, "prediction": "A"}, {"id": 1, "prediction": "B"}, {"id": 2, "prediction": "B"}], "have the id '1'"),
        (
            [{"id": 1, "prediction": "A"}, {"id": 2, "prediction": "B"}, {"id": 4, "prediction": "B"}],
            "no answer with the id '3'",
        ),
        ([{"guess": "A"}] * 3, "has no text in"),
        ([{"number": 0, "answers": {"answer": {"log_probs": [float("inf")]}}}] * 3, "not a finite number"),
        ([{"number": 0, "answers": {"answer": {"logs": [0.1]}}}] * 3, "not those of a predictions.jsonl"),
    ],
)
def test_bad_predictions_are_named(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = write(tmp_path / "q.json", QUESTIONS), write(tmp_path / "p.json", content)
    given = ["--task", "multiple_choice", "--data", str(data), "--predictions", str(file)]
    assert main([*given, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_record_with_its_right_answer_alone_is_no_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "p.json", QUESTIONS)
    assert main(["--task", "multiple_choice", "--predictions", str(file), "--output", str(tmp_path / "out")]) == 2
    assert "has no text in prediction" in capsys.readouterr().err


def test_a_question_that_does_not_fit_counts_as_wrong_and_is_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "q.json", [QUESTIONS[0] | {"question": "rock " * 300}, *QUESTIONS[1:]])
    out = evaluate(tiny_model, data, tmp_path / "out", status=1)
    scores = scores_of(out)
    assert scores["errors"] == 1 and scores["figures"]["acc"]["n"] == 3
    assert "the model reads at most 256" in capsys.readouterr().err
    assert "count as wrong" in (out / "report.md").read_text()


def test_other_settings_are_named_with_both_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hashes say nothing to a reader: what was read from where does."""
    data = write(tmp_path / "q.json", QUESTIONS)
    first, other = write(tmp_path / "first.json", ["A", "A", "A"]), write(tmp_path / "other.json", ["A", "A", "B"])
    command = ["--task", "multiple_choice", "--data", str(data), "--output", str(tmp_path / "out"), "--predictions"]
    assert main([*command, str(first)]) == 0
    capsys.readouterr()
    assert main([*command, str(other), "--options.answers", "texts"]) == 2
    error = capsys.readouterr().err
    assert f"predictions of {first}, now {other}" in error and "options.answers 'letters', now 'texts'" in error
    write(first, ["B", "B", "B"])
    assert main([*command, str(first)]) == 2
    error = capsys.readouterr().err
    assert f"other predictions (of {first}, which has changed); go on with" in error


def test_settings_of_a_journal_are_named_with_both_values(tmp_path: Path) -> None:
    key, path = "weights (hash of samples)", tmp_path / "journal"
    before = {key: "1f", "adapter (hash of samples)": None, "dtype": "float32", "batch_size": 8}
    JournalFile(path, before, origins={key: "out/a"}).close()
    after = {key: "2e", "adapter (hash of samples)": "3d", "dtype": "bfloat16", "batch_size": 8}
    wanted = "weights of out/a, now out/b; no adapter, now there is one; dtype 'float32', now 'bfloat16'; go on"
    with pytest.raises(UserError, match=wanted) as caught:
        JournalFile(path, after, origins={key: "out/b"})
    assert "batch_size" not in str(caught.value)
    JournalFile(path, after, overwrite=True).close()
    with pytest.raises(UserError, match="other weights; "):
        JournalFile(path, after | {key: "1f"})


def test_answers_kept_in_memory_need_no_file() -> None:
    answered = Answered()
    answered.add({})
    assert answered.answers == {}


def test_several_tasks_are_asked_in_one_command(tiny_model: Path, tmp_path: Path) -> None:
    """Generated answers beside scored ones; each task has its file and its directory."""
    asked = [{"question": "rock sand", "answer": "clay"}, {"question": "iron", "answer": ["zinc", "salt"]}]
    texts, sums = write(tmp_path / "qa.json", asked), write(tmp_path / "n.json", [{"problem": "1 + 1", "answer": 2}])
    given = ["--task", "qa,numbers", "--model", str(tiny_model), "--output", str(tmp_path / "out")]
    given += ["--data", f"numbers={sums}", "--data", str(texts), "--options.max_new_tokens", "4", "--limit", "1"]
    assert main([*given, "--compilation_cache", "none"]) == 0
    for task, figures in (("qa", {"exact", "f1"}), ("numbers", {"acc", "answered"})):
        scores = scores_of(tmp_path / "out" / task)
        assert set(scores["figures"]) == figures and scores["figures"][min(figures)]["n"] == 1
        (line,) = [
            json.loads(line) for line in (tmp_path / "out" / task / "predictions.jsonl").read_text().splitlines()
        ]
        assert len(line["answers"]["answer"]["texts"]) == 1
    assert scores_of(tmp_path / "out" / "qa")["first_request"]["text"] == "<s> Question: rock sand\nAnswer:"


def test_answers_with_any_character_are_read_back(tmp_path: Path) -> None:
    """Some end a line elsewhere (U+2028, U+0085), one is half of a pair."""
    text = "one\u2028two\x85three\x0bfour \ud83d"
    job = SimpleNamespace(records=[{"question": text}, {"question": "b"}])
    write_predictions(tmp_path, cast(Any, job), [{"": Answer(texts=(text,))}, {"": Answer()}])
    (first, answers), second = read_predictions(tmp_path)
    assert first == {"question": text} and answers[""].texts == (text,)
    assert second == ({"question": "b"}, {"": Answer()})
