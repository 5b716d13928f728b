"""What a run keeps of its data's circumstances: bos, ends and the day that a chat template is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.train import main
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("train")]

DATED = (
    "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def dated(inputs: Path, base_config: dict[str, Any], tmp_path: Path) -> Path:
    """A configuration whose chat template writes the time."""
    shutil.copytree(inputs / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(DATED)
    train = [{"path": str(inputs / "records.json"), "template": "chat"}]
    data = {"train": train, "validation": 0.1}
    length = {"steps": 1, "save_every": 1, "eval_every": 0}
    tokenizer = {"path": str(tmp_path / "tokenizer")}
    out = {"output_dir": str(tmp_path / "run")}
    return write_config(tmp_path, base_config, data=data, train=length, tokenizer=tokenizer, **out)


def test_the_date_of_the_first_start_stays(dated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(dated)]) == 0
    first = capsys.readouterr().out
    assert "(data.date), to the run's end" in first.replace("\n", " ")
    assert main(["--config", str(dated), "--preview", "1"]) == 0
    shown = capsys.readouterr().out
    assert main(["--config", str(dated), "--train.steps", "2"]) == 0, capsys.readouterr().err
    date = next(line for line in first.splitlines() if line.startswith("date: "))
    again = capsys.readouterr().out
    assert date in again and date in shown and "resumed" in again
    assert main(["--config", str(dated), "--train.steps", "3", "--data.date", "2026-01-01"]) == 2
    assert "data.date: was " in capsys.readouterr().err


def test_what_prompts_need_is_noted(dated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(dated), "--data.date", "2026-11-27 12:00"]
    assert main(words) == 0
    assert "told 2026-11-27 12:00:00" in capsys.readouterr().out
    noted = json.loads((tmp_path / "run" / "checkpoints" / "1" / "jaxlm" / "prompt.json").read_text())
    assert noted == {"template": "chat", "add_bos": True, "add_eos": True, "stop_ids": [2], "version": 1}
    assert main([*words[:2], "--data.date", "today"]) == 2
    assert "data.date: 'today' is not a date" in capsys.readouterr().err


def test_runs_from_before_go_on(dated: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint whose run.yaml has neither date nor allow_no_end, and a prompt.json without ends."""
    source = [{"path": str(inputs / "records.json"), "template": "alpaca_short"}]
    words = ["--config", str(dated), "--data.train", json.dumps(source)]
    assert main(words) == 0
    small = tmp_path / "run" / "checkpoints" / "1" / "jaxlm"
    lines = (small / "run.yaml").read_text().splitlines(keepends=True)
    older = [line for line in lines if line.split(":")[0].strip() not in ("date", "allow_no_end")]
    assert len(older) == len(lines) - 2
    (small / "run.yaml").write_text("".join(older))
    (small / "prompt.json").write_text('{"template": "alpaca_short", "add_bos": true}')
    capsys.readouterr()
    assert main([*words, "--train.steps", "2"]) == 0, capsys.readouterr().err
    from jaxlm.cli.generate import main as generate

    path = str(small.parent)
    asked = ["--model", path, "--prompt", "rock", "--max_new_tokens", "2", "--compilation_cache", "none"]
    assert generate(asked) == 0
    assert "alpaca_short: the one it was trained with; bos <s> first" in capsys.readouterr().err
