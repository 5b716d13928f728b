"""A run with a number of rows of each source in every batch: metrics have what it consumed, also when it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.train import main
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("train")]


def lines_of(run: Path) -> list[dict[str, Any]]:
    measured = (
        "tokens_per_second",
        "tokens_per_second_with_pauses",
        "step_seconds",
        "mfu",
        "host_memory",
        "device_memory",
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


@pytest.mark.slow
def test_what_was_consumed_of_each_source_is_kept(
    inputs: Path, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, corpus = str(inputs / "records.json"), str(inputs / "corpus.txt")
    config = write_config(
        tmp_path,
        base_config,
        data={
            "train": [{"path": records, "template": "alpaca_short"}, {"path": corpus}],
            "mixing": {"per_batch": [6, 2]},
            "validation": 0,
        },
        train={"steps": 4, "global_batch_size": 8, "micro_batch_size": 1, "save_every": 2, "eval_every": 0},
        output_dir=str(tmp_path / "run"),
    )
    assert main(["--config", str(config), "--dry_run"]) == 0
    dry = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(["--config", str(config)]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    head = next(at for at, line in enumerate(dry.splitlines()) if line.split()[0] == "source")
    for line in dry.splitlines()[head : head + 3]:
        assert line in told

    run = tmp_path / "run"
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for before, line in zip([None, *lines], lines, strict=False):
        tokens = line["consumed_tokens"]
        assert list(tokens) == [records, corpus] == list(line["passes"])
        assert all(tokens[name] > (0 if before is None else before["consumed_tokens"][name]) for name in tokens)
        whole = {
            line.split()[0]: int(line.split()[1].replace(",", "")) for line in dry.splitlines()[head + 1 : head + 3]
        }
        assert line["passes"] == {name: round(tokens[name] / whole[name], 4) for name in tokens}
    assert (run / "data.png").stat().st_size > 1000
    state = json.loads((run / "checkpoints" / "4" / "jaxlm" / "data.json").read_text())
    assert state == {"step": 4, "packing": 2, "consumed": list(lines[-1]["consumed_tokens"].values())}

    # From the second step on, the very same.
    shutil.rmtree(run / "checkpoints" / "4")
    assert main(["--config", str(config)]) == 0, capsys.readouterr().err
    assert "from step 2" in capsys.readouterr().out
    assert lines_of(run) == lines
    words = ["--config", str(config), "--train.steps", "5", "--data.mixing.per_batch", "4", "4"]
    assert main(words) == 2
    assert "data.mixing.per_batch: was [6, 2], is [4, 4]" in capsys.readouterr().err
