"""What SIGTERM and Ctrl-C do before there is anything to save, in a compiler, and while a run saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.train import main
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("signals")]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
# A command, in which one function is another. `block` is what a compiler is to Python: a C function that does
# not come back, during which no signal handler of Python runs.
SCRIPT = """
import ctypes, os, signal, sys, time
def block():
    print("here", flush=True)
    while True:  # a signal ends one sleep
        ctypes.CDLL(None).sleep(600)
{patch}
from {command} import main
sys.exit(main(sys.argv[1:]))
"""
COMPILING = """
import jaxlm.training.loop as loop
loop.compile_steps = lambda *args: block()
"""
EVALUATING = """
import jaxlm.training.loop as loop
def validate(job, setup, compiled, state, frozen, hosts):
    print("here", flush=True)
    while not hosts.due():
        time.sleep(0.01)
loop.validate = validate
"""
READING = """
import jaxlm.data.loader as loader
loader.build_data = lambda *args, **more: block()
"""
# The first signal comes before the second step; while that is saved, another.
SAVING = """
import jaxlm.training.setup as setup
steps = [0]
put = setup.put_batch
def put_batch(*args):
    steps[0] += 1
    if steps[0] == 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    return put(*args)
setup.put_batch = put_batch
from jaxlm.training.checkpoint import Checkpoints
Checkpoints.save = lambda *args: block()
"""


def run(
    config: Path, output: Path, patch: str, *signals: signal.Signals, words: tuple[str, ...] = ()
) -> tuple[int, str]:
    """(exit status, output) of a command that gets signals when it says 'here'."""
    return run_words(patch, ["--config", str(config), "--output_dir", str(output), *words], *signals)


def run_words(patch: str, words: list[str], *signals: signal.Signals, command: str = "jaxlm.train") -> tuple[int, str]:
    script = SCRIPT.format(patch=patch, command=command)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        text = ""
        for line in process.stdout:
            text += line
            if line == "here\n":
                break
        for number in signals:
            process.send_signal(number)
        text += process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert "here\n" in text and "Traceback" not in text, text
    return process.returncode, text


@pytest.fixture(scope="module")
def config(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = {"steps": 8, "eval_every": 4, "save_every": 0, "global_batch_size": 8}
    return write_config(tmp_path_factory.mktemp("config"), base_config, train=train)


@pytest.mark.parametrize("patch", [READING, COMPILING, EVALUATING], ids=["reading", "compiling", "before step 1"])
def test_nothing_is_saved_yet_and_nobody_takes_it_for_done(config: Path, tmp_path: Path, patch: str) -> None:
    status, text = run(config, tmp_path / "run", patch, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, text
    assert "SIGTERM before a step was done: nothing is saved yet. Run the same command again to begin" in text
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*")), text
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_resumed_run_says_which_step_is_kept(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(["--config", str(config), "--output_dir", str(output), "--train.steps", "2"]) == 0
    kept = f"step 2 in {output}/checkpoints/2 is kept. Run the same command again to go on from there"
    # In a compiler; a cluster that takes 0 for done has another status for what is not.
    words = ("--distributed.interrupted_status", "75")
    status, text = run(config, output, COMPILING, signal.SIGINT, words=words)
    assert status == 75 and f"SIGINT before a step was done: {kept}" in text, text
    # A second Ctrl-C while it saves.
    status, text = run(config, output, SAVING, signal.SIGINT)
    assert status == 130 and f"SIGINT again, without waiting for the save: {kept}" in text, text
    assert [path.name for path in (output / "checkpoints").glob("[0-9]*")] == ["2"]


def test_a_signal_when_all_is_done(config: Path, tmp_path: Path) -> None:
    patch = """
import jaxlm.training.loop as loop
loop.plot_losses = lambda *args: block()
"""
    status, text = run(config, tmp_path / "run", patch, signal.SIGTERM)
    assert status == 0 and f"SIGTERM: the run is complete; step 8 in {tmp_path}/run/checkpoints/8 is its last" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_answering_a_file(config: Path, tmp_path: Path, number: signal.Signals) -> None:
    patch = """
import jaxlm.inference.loading as loading
loading.load_weights = lambda *args: block()
"""
    assert main(["--config", str(config), "--output_dir", str(tmp_path / "run"), "--train.steps", "1"]) == 0
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "rock"}\n')
    words = ["--model", str(tmp_path / "run"), "--predict_data", str(tmp_path / "prompts.jsonl")]
    words += ["--save_file", str(tmp_path / "answers.json"), "--compilation_cache", "none"]
    status, text = run_words(patch, words, number, command="jaxlm.generate")
    assert status == 128 + number and "interrupted; with --predict_data the same command goes on" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "run"]
