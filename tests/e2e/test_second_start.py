"""A second start of what is running already is refused by name, before it touches anything."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.commands.main import main as convert
from jaxlm.cli.generate import main as generate
from jaxlm.cli.train import main as train
from jaxlm.lock import Lock
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("second start")]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
# The commands with one function that stops and says so: the moment when the second start comes.
STOP_AT = """
import sys, time
import {module} as module
def stop(*args, **kwargs):
    print("here", flush=True)
    time.sleep(600)
module.{function} = stop
from {command} import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def held() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command and returns when it has come to a function; it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(command: str, function: str, words: list[str]) -> subprocess.Popen[str]:
        module, _, name = function.rpartition(":")
        script = STOP_AT.format(module=module, function=name, command=command)
        process = subprocess.Popen(
            [sys.executable, "-c", script, *words], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line == "here\n":
                return process
        raise AssertionError(f"ended with {process.wait()}")

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def model(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = write_config(folder, base_config, train={"steps": 1}, data={"validation": 0})
    assert train(["--config", str(config), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_training(
    held: Callable[..., subprocess.Popen[str]],
    base_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, base_config, train={"steps": 4, "eval_every": 0, "save_every": 2})
    run = ["--config", str(config), "--output_dir", str(tmp_path / "run")]
    assert train([*run, "--train.steps", "2"]) == 0
    first = held("jaxlm.train", "jaxlm.training.loop:compile_steps", run)
    before = content(tmp_path)
    capsys.readouterr()
    # The same command, and other settings into the same directory, by another name.
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    for words in (run, [*run[:3], str(tmp_path / "alias"), "--optimizer.learning_rate", "1"]):
        assert train(words) == 2
        message = capsys.readouterr().err
        assert re.match(rf"error: output_dir: .* is in use: by pid {first.pid} on this host, since ", message), message
        assert message.count("\n") == 1 and "choose another output_dir" in message
    assert content(tmp_path) == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert train(run) == 0, "what the killed one left is no obstacle"
    assert "sign of life" not in "".join(capsys.readouterr())
    assert not (tmp_path / "run" / "run.lock").exists()


def test_stages_are_held_from_the_start(
    held: Callable[..., subprocess.Popen[str]],
    base_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = [{"name": "one"}, {"name": "two"}]
    config = write_config(tmp_path, base_config, stages=stages, train={"steps": 2})
    run = ["--config", str(config), "--output_dir", str(tmp_path / "run")]
    first = held("jaxlm.train", "jaxlm.training.loop:compile_steps", run)
    for words in (run, [*run, "--stage", "two"]):
        assert train(words) == 2
        assert f"is in use: by pid {first.pid} on this host" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "run" / "two").iterdir() if path.suffix != ".lock"]


def test_a_copied_run_and_its_local_checkpoints(
    held: Callable[..., subprocess.Popen[str]],
    base_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A copy of output_dir has the name under which each host keeps its own copies."""
    local = {"local_checkpoints": str(tmp_path / "local"), "steps": 2}
    config = write_config(tmp_path, base_config, train=local)
    run = ["--config", str(config), "--output_dir"]
    first = held("jaxlm.train", "jaxlm.training.loop:compile_steps", [*run, str(tmp_path / "run")])
    (tmp_path / "copy").mkdir()
    name = (tmp_path / "run" / "local_checkpoints.txt").read_text()
    (tmp_path / "copy" / "local_checkpoints.txt").write_text(name)
    assert train([*run, str(tmp_path / "copy")]) == 2
    message = capsys.readouterr().err
    assert f"train.local_checkpoints: {tmp_path / 'local'}" in message and f"by pid {first.pid} on this host" in message
    assert f"delete {tmp_path / 'copy' / 'local_checkpoints.txt'}" in message


def test_answers_into_one_file(
    held: Callable[..., subprocess.Popen[str]], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "rock"}\n')
    words = ["--model", str(model), "--predict_data", str(tmp_path / "prompts.jsonl")]
    words += ["--save_file", str(tmp_path / "answers.json"), "--max_new_tokens", "2", "--compilation_cache", "none"]
    first = held("jaxlm.generate", "jaxlm.inference.loading:load_weights", words)  # reading the model takes its time
    assert generate(words) == 2
    message = capsys.readouterr().err
    assert f"save_file: {tmp_path / 'answers.json'} is in use: by pid {first.pid} on this host" in message
    assert "answers.json.partial" not in names(tmp_path)
    first.kill()
    first.wait()
    assert generate(words) == 0 and (tmp_path / "answers.json").exists()
    assert "sign of life" not in "".join(capsys.readouterr())
    assert names(tmp_path) == ["answers.json", "prompts.jsonl"]


def test_a_place_for_answers_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where access is granted and writing fails: the key is named."""

    def refuse(lock: Lock) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(lock.path.parent))

    monkeypatch.setattr(Lock, "acquire", refuse)
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "rock"}\n')
    words = ["--model", "none", "--predict_data", str(tmp_path / "prompts.jsonl"), "--compilation_cache", "none"]
    save = tmp_path / "answers.json"
    assert generate([*words, "--save_file", str(save)]) == 2
    message = f"error: save_file: {save}: {tmp_path}: cannot write there (Read-only file system)"
    assert message in capsys.readouterr().err


def test_conversions_to_one_place(
    held: Callable[..., subprocess.Popen[str]], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["jax-to-hf", str(model), str(tmp_path / "hf")]
    first = held("convert.commands.main", "convert.formats.hf_experts:write_hf", words)
    before = names(tmp_path)
    assert convert(words) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'hf'}: the destination is in use: by pid {first.pid} on this host" in message
    assert names(tmp_path) == before
    first.kill()
    first.wait()
    assert convert(words) in (0, None)
    assert "sign of life" not in "".join(capsys.readouterr())
    assert names(tmp_path) == ["hf"]
