"""Runs that are killed go on to the very same numbers: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests.e2e.conftest import write_config

# One worker runs these: they share the uninterrupted run.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("resume")]
# One device, and programs that are quick to compile.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def start(config: Path, output: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jaxlm.train", "--config", str(config), "--output_dir", str(output)]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=ENVIRONMENT)


def finish(config: Path, output: Path, log: Path) -> None:
    process = start(config, output, log)
    assert process.wait(timeout=300) == 0, log.read_text()


def steps_done(output: Path) -> int:
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum('"loss"' in line for line in lines)


def wait_until(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"the run ended before the moment to kill it came:\n{log.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def losses(output: Path) -> dict[tuple[str, int], float]:
    found = {}
    for text in (output / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for key in ("loss", "grad_norm", "validation_loss"):
            if key in line:
                assert (key, line["step"]) not in found, "a step stands twice in metrics.jsonl"
                found[key, line["step"]] = line[key]
    return found


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    import jax

    tree = ocp.load_checkpointables(checkpoint, {"model": None, "train": None})
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def lora_config(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA with dropout on a base made here, packing and accumulation on, a save every other step."""
    folder = tmp_path_factory.mktemp("base")
    config = write_config(folder, base_config, train={"steps": 1})
    finish(config, folder / "run", folder / "log")
    return write_config(
        folder / "lora",
        base_config,
        model={"shape": None, "path": str(folder / "run")},
        lora={"rank": 4, "targets": ["q_proj", "down_proj"], "dropout": 0.1},
        tokenizer=None,
        train={"steps": 60, "eval_every": 20, "save_every": 2, "keep": 2},
    )


@pytest.fixture(scope="module")
def uninterrupted(lora_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(lora_config, folder / "run", folder / "log")
    return folder / "run"


def assert_same_run(output: Path, reference: Path) -> None:
    assert losses(output) == losses(reference)
    mine, theirs = arrays(output / "checkpoints" / "60"), arrays(reference / "checkpoints" / "60")
    assert mine.keys() == theirs.keys()
    assert len(mine) > 10
    for name, value in mine.items():
        assert value.tobytes() == theirs[name].tobytes(), name


def test_sigkill_at_several_moments_continues_bit_exactly(
    lora_config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    checkpoints = output / "checkpoints"

    def saving() -> list[Path]:
        return [path for path in checkpoints.glob("*tmp*") if path.is_dir()]

    moments = {
        "before the first save is complete": lambda: bool(saving()),
        "in the middle of a save": lambda: bool(saving()) and steps_done(output) > 20,
        "late": lambda: steps_done(output) >= 45,
    }
    in_the_middle = 0
    for moment in moments.values():
        before = set(saving())
        process = start(lora_config, output, log)
        wait_until(lambda before=before, moment=moment: moment() and not before & set(saving()), process, log)
        process.send_signal(signal.SIGKILL)
        process.wait()
        in_the_middle += bool(saving())
    assert in_the_middle >= 1, "no kill hit a save in progress"
    finish(lora_config, output, log)
    assert "resumed" in log.read_text()
    assert not saving(), "what the killed save left behind is removed"
    assert_same_run(output, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_0(
    lora_config: Path, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    process = start(lora_config, output, log)
    wait_until(lambda: steps_done(output) >= 7, process, log)
    process.send_signal(number)
    assert process.wait(timeout=120) == 0, log.read_text()
    text = log.read_text()
    assert f"{number.name}: saved step" in text
    assert "Run the same command again" in text
    assert "Traceback" not in text
    if number == signal.SIGTERM:  # the other saves by the same code
        finish(lora_config, output, log)
        assert_same_run(output, uninterrupted)
