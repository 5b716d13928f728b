"""Tasks of `jaxlm evaluate` while a model is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.evaluate import main as evaluate
from jaxlm.cli.train import main as train
from tests.e2e.conftest import WORDS, write_config

pytestmark = [pytest.mark.e2e]

CHOICES = [
    {"question": f"{WORDS[n]} {WORDS[n + 1]}", "choices": [WORDS[n + 2], WORDS[n + 3]], "answer": n % 2}
    for n in range(6)
]
ASKED = [{"question": WORDS[n], "answer": WORDS[n + 1]} for n in range(3)]


@pytest.mark.slow
def test_figures_are_those_of_evaluate(inputs: Path, base_config: dict[str, Any], tmp_path: Path) -> None:
    """In metrics.jsonl at their steps; the best checkpoint by one of them is kept."""
    choices, asked = tmp_path / "choices.json", tmp_path / "asked.json"
    choices.write_text(json.dumps(CHOICES))
    asked.write_text(json.dumps(ASKED))
    tasks = [
        {"task": "multiple_choice", "data": str(choices), "every": 2},
        {"task": "qa", "data": str(asked), "every": 4, "options": {"max_new_tokens": 4}},
    ]
    settings = {"steps": 4, "save_every": 2, "eval_every": 0, "keep": 1, "tasks": tasks}
    settings["best"] = "multiple_choice/probability"
    out = tmp_path / "out"
    config = write_config(tmp_path / "run", base_config, train=settings)
    assert train(["--config", str(config), "--output_dir", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    choice = {line["step"]: line for line in lines if "multiple_choice/acc" in line}
    assert list(choice) == [0, 2, 4] and "multiple_choice/acc_stderr" in choice[4]
    assert [line["step"] for line in lines if "qa/f1" in line] == [0, 4]
    values = {step: line["multiple_choice/probability"] for step, line in choice.items() if step}
    best = max(values, key=lambda step: (values[step], -step))
    assert sorted({best, 4}) == sorted(int(path.name) for path in (out / "checkpoints").iterdir())
    words = ["--model", str(out), "--task", "multiple_choice,qa", "--data", str(choices), "--data", str(asked)]
    words += ["--options.max_new_tokens", "4", "--output", str(tmp_path / "scores"), "--compilation_cache", "none"]
    assert evaluate(words) == 0
    for task, names in (("multiple_choice", ("acc", "probability")), ("qa", ("exact", "f1"))):
        figures = json.loads((tmp_path / "scores" / task / "scores.json").read_text())["figures"]
        last = [line for line in lines if f"{task}/{names[0]}" in line][-1]
        for name in names:
            assert last[f"{task}/{name}"] == pytest.approx(figures[name]["value"], abs=1e-5)


WHOLE = "all of them"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2, "alpha": 8, "targets": ["q_proj", "down_proj"]}, "optimizer": {"learning_rate": 0.1}},
    "experts": {"moe": {"experts": 4, "top_k": {"text": 3}, "router": "learned"}},
    "sharded": {"mesh": {"data": 4, "fsdp": 2}},
    WHOLE: {
        "lora": {"rank": 2, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "moe": {"experts": 4, "top_k": {"text": 3}, "router": "activation"},
        "mesh": {"data": 4, "fsdp": 2},
    },
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=getattr(pytest.mark, "slow" if kind == WHOLE else "nightly")) for kind in KINDS]
)
def test_any_kind_of_model(kind: str, inputs: Path, base_config: dict[str, Any], tmp_path: Path) -> None:
    """An adapter, experts, several devices: what is said while training is what the run's model says afterwards."""
    choices, asked = tmp_path / "choices.json", tmp_path / "asked.json"
    choices.write_text(json.dumps(CHOICES))
    asked.write_text(json.dumps(ASKED))
    tasks = [
        {"task": "multiple_choice", "data": str(choices), "every": 2, "options": {"answers": "texts"}},
        {"task": "qa", "data": str(asked), "every": 2, "options": {"max_new_tokens": 4}},
    ]
    changes = dict(KINDS[kind])
    if "lora" in changes:
        moe = {} if "moe" not in changes else {"moe": changes.pop("moe")}
        base = write_config(tmp_path / "base", base_config, train={"steps": 2, "eval_every": 0, "save_every": 0}, **moe)
        assert train(["--config", str(base), "--output_dir", str(tmp_path / "base" / "out")]) == 0
        changes |= {"model": {"path": str(tmp_path / "base" / "out"), "shape": None}, "tokenizer": None}
    settings = {"steps": 2, "save_every": 0, "eval_every": 0, "tasks": tasks}
    config = write_config(tmp_path / "run", base_config, train=settings, **changes)
    out = tmp_path / "out"
    assert train(["--config", str(config), "--output_dir", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        if any(name.startswith(("multiple_choice/", "qa/")) for name in line):
            by_step.setdefault(line["step"], {}).update(line)
    assert list(by_step) == [0, 2]
    assert by_step[0]["multiple_choice/probability"] != by_step[2]["multiple_choice/probability"]
    words = ["--model", str(out), "--task", "multiple_choice,qa", "--data", str(choices), "--data", str(asked)]
    words += ["--options.max_new_tokens", "4", "--options.answers", "texts", "--compilation_cache", "none"]
    assert evaluate([*words, "--output", str(tmp_path / "scores")]) == 0
    for task, names in (("multiple_choice", ("acc", "acc_norm", "probability")), ("qa", ("exact", "f1"))):
        figures = json.loads((tmp_path / "scores" / task / "scores.json").read_text())["figures"]
        for name in names:
            assert by_step[2][f"{task}/{name}"] == pytest.approx(figures[name]["value"], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": [{"task": "quiz", "data": "FILE"}]}, "train.tasks: task: 'quiz' is not a task"),
        ({"tasks": [{"task": "qa", "data": "FILE"}]}, "train.tasks: data: "),
        ({"tasks": [{"task": "perplexity", "data": "FILE"}]}, "perplexity is what data.validation gives"),
        ({"tasks": [{"task": "multiple_choice", "data": "none.json"}]}, "none.json"),
        ({"tasks": [{"task": "multiple_choice", "data": "FILE", "options": {"x": 1}}]}, "train.tasks: options"),
        ({"tasks": [{"task": "multiple_choice", "data": "FILE", "every": 0}]}, "every: 0 must be at least 1"),
        ({"best": "qa/f1"}, "train.best: 'qa/f1' is not TASK/FIGURE"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(
    change: dict[str, Any], message: str, base_config: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "q.json"
    file.write_text(json.dumps([{"question": "q", "choices": ["a", "b"], "label": 0}]))
    change = json.loads(json.dumps(change).replace("FILE", str(file)))
    config = write_config(tmp_path / "run", base_config, train=change)
    assert train(["--config", str(config), "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
