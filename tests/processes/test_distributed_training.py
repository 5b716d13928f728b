"""Whole runs of two and four processes, started as a user starts them, killed, and started again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from convert.source import open_model
from jaxlm.devices.trace import read_trace
from tests.e2e.conftest import base_config, inputs, write_config
from tests.e2e.test_resume import losses, steps_done
from tests.processes.test_distributed import free_port

__all__ = ["base_config", "inputs"]  # fixtures

# One worker runs these: they share the uninterrupted run, and two cores.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("distributed")]
ROOT = Path(__file__).parents[2]
# Compiled programs are kept from start to start: these are tests of starts.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_ENABLE_COMPILATION_CACHE": "true",
}
STEPS = 20


def start(
    config: Path, output: Path, log: Path, *words: str, processes: int = 2, devices: int = 2
) -> subprocess.Popen[bytes]:
    return start_words(
        log, "--config", str(config), "--output_dir", str(output), *words, processes=processes, devices=devices
    )


def start_words(
    log: Path,
    *words: str,
    processes: int = 2,
    devices: int = 2,
    module: str = "jaxlm.train",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "launch/local.py"), f"--processes={processes}", f"--devices={devices}"]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*command, "--module", module, "--", *words],
            stdout=stream,
            stderr=stream,
            env={**ENVIRONMENT, **environment},
        )


def end(process: subprocess.Popen[bytes], log: Path, status: int = 0) -> str:
    try:
        found = process.wait(timeout=240)
    finally:
        process.kill()
    text = log.read_text()
    assert found == status, text
    return text


# How lines begin that process 0 alone is to print. What libraries print, on whichever process, is nobody's business.
OURS = ("train ", "validation ", "model ", "devices ", "template ", "attention ", "step ", "going on", "saved ")


def ours(text: str, process: int) -> list[str]:
    """What jaxlm itself tells the user on a process."""
    lines = [line.removeprefix(f"[{process}] ") for line in text.splitlines() if line.startswith(f"[{process}] ")]
    return [line for line in lines if line.startswith(OURS) or " answered" in line]


def pid(output: Path, process: int) -> int:
    """Of the newest start."""
    return int(re.findall(r"^pid (\d+)", (output / f"logs/process-{process:02}.log").read_text(), re.MULTILINE)[-1])


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, f"the run ended before the moment came:\n{log.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def config(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows over both processes, parameters over both devices of each; validation, and a save every fourth step."""
    folder = tmp_path_factory.mktemp("config")
    cache = str(folder / "xla")
    return write_config(
        folder,
        base_config,
        train={
            "steps": STEPS,
            "eval_every": 10,
            "save_every": 4,
            "keep": 9,
            "global_batch_size": 8,
            "compilation_cache": cache,
        },
        mesh={"data": 2, "fsdp": -1},
        distributed={"heartbeat": 10, "timeout": 120},
    )


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    profile = ("--train.profile", "{start: 6, steps: 2}")
    text = end(start(config, folder / "run", folder / "log", *profile), folder / "log")
    assert "devices            4 cpu, data 2 x fsdp 2" in text
    assert sum(line.startswith(f"step {STEPS}: validation loss") for line in ours(text, 0)) == 1
    assert ours(text, 0) and not ours(text, 1), text
    for process in (0, 1):  # and each keeps its own log
        log = (folder / f"run/logs/process-{process:02}.log").read_text()
        assert "all 2 processes have the same configuration" in log and f"step {STEPS}/{STEPS}" in log
        assert read_trace(folder / f"run/profile/process-{process:02}").steps == 2
    assert (folder / "run/loss.png").exists()
    return folder / "run"


def test_preempted_then_killed_then_bit_for_bit_as_never_interrupted(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    process = start(config, output, log)
    wait_until(lambda: steps_done(output) >= 5, process, log)
    os.kill(pid(output, 1), signal.SIGTERM)
    text = end(process, log)
    saved = int(re.findall(r"\[0\] SIGTERM on process 1 \(.*\): saved step (\d+) of 20", text)[0])
    assert 5 <= saved < STEPS
    assert f"saved step {saved} of" in (output / "logs/process-01.log").read_text()
    assert max(int(path.name) for path in (output / "checkpoints").iterdir()) == saved

    process = start(config, output, log)
    wait_until(lambda: steps_done(output) >= saved + 5, process, log)
    os.kill(pid(output, 1), signal.SIGKILL)
    assert process.wait(timeout=60) in (1, 128 + signal.SIGKILL)  # whichever of the two is seen first
    text = log.read_text()
    assert re.search(r"\[0\] error: process 1 \(.*\) died; process 0 ends too", text), text

    text = end(start(config, output, log), log)
    resumed = int(re.findall(r"resumed +from step (\d+)", text)[0])
    assert resumed >= saved
    assert losses(output) == losses(uninterrupted)
    mine, theirs = (open_model(folder / f"checkpoints/{STEPS}") for folder in (output, uninterrupted))
    for leaf in mine.leaves:
        assert mine.read(leaf, ()).tobytes() == theirs.read(leaf, ()).tobytes(), leaf


def test_killed_before_any_save_goes_on_from_each_host_s_own_copies(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output, log, local = tmp_path / "run", tmp_path / "log", tmp_path / "local"
    words = ["--train.save_every", "0", "--train.local_checkpoints", str(local), "--train.local_every", "3"]
    process = start(config, output, log, *words)
    wait_until(lambda: steps_done(output) >= 7, process, log)
    os.kill(pid(output, 1), signal.SIGKILL)
    assert process.wait(timeout=60) in (1, 128 + signal.SIGKILL)
    assert not [path for path in (output / "checkpoints").iterdir() if path.name.isdigit()]
    text = end(start(config, output, log, *words), log)
    assert int(re.findall(r"resumed +from step (\d+), kept by each host", text)[0]) in (3, 6, 9, 12)
    assert losses(output) == losses(uninterrupted)
    assert not list(local.rglob("shards.bin")), "the run is complete: its copies are gone"


def test_half_the_processes_on_another_mesh_go_on_with_the_same_data(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """From rows over both processes to heads over some devices: every array of the checkpoint is cut anew."""
    output, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(uninterrupted, output)
    for checkpoint in (output / "checkpoints").iterdir():
        if int(checkpoint.name) > 16:
            shutil.rmtree(checkpoint)
    mesh = ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    text = end(start(config, output, log, *mesh, processes=1, devices=4), log)
    assert "from step 16" in text and "4 cpu, fsdp 2 x tensor 2" in text
    mine, theirs = losses(output), losses(uninterrupted)
    assert mine.keys() == theirs.keys() and ("validation_loss", STEPS) in mine
    # Sums are taken in another order; another batch would change the loss in its first or second digit.
    assert all(value == pytest.approx(theirs[key], rel=2e-4) for key, value in mine.items())


def test_two_processes_write_what_one_does(uninterrupted: Path, config: Path, tmp_path: Path) -> None:
    """Weights lie over both; process 0 alone writes."""
    from jaxlm.cli.generate import main

    prompts, log = tmp_path / "prompts.jsonl", tmp_path / "log"
    prompts.write_text("".join(f'{{"instruction": "rock {word}"}}\n' for word in ("sand", "clay", "lava and iron")))
    words = [
        "--model",
        str(uninterrupted),
        "--predict_data",
        str(prompts),
        "--max_new_tokens",
        "8",
        "--batch_size",
        "2",
    ]
    assert main([*words, "--save_file", str(tmp_path / "one.json"), "--compilation_cache", "none"]) == 0

    cache = yaml.safe_load(config.read_text())["train"]["compilation_cache"]
    words += ["--save_file", str(tmp_path / "two.json"), "--compilation_cache", cache, "--mesh.fsdp", "2"]
    two = partial(start_words, log, module="jaxlm.generate")
    text = end(two(*words, "--mesh.tensor", "2"), log)
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert sum("3 answered; wrote" in line for line in ours(text, 0)) == 1 and "fsdp 2, tensor 2" in text
    assert ours(text, 0) and not ours(text, 1), text
    text = end(two("--model", str(uninterrupted), "--interactive"), log, status=2)
    assert len(re.findall(r"error: interactive: a conversation is with one process, here are 2", text)) == 2


def test_two_processes_evaluate_as_one_does(uninterrupted: Path, config: Path, tmp_path: Path) -> None:
    """Scored and written answers; process 0 alone writes."""
    from jaxlm.cli.evaluate import main

    data, log = tmp_path / "q.json", tmp_path / "log"
    rows = [{"question": f"rock {word}", "answer": "gas", "choices": ["gas", "iron ion"]} for word in ("sand", "clay")]
    data.write_text(json.dumps(rows))
    words = ["--task", "multiple_choice,qa", "--model", str(uninterrupted), "--data", str(data), "--data", f"qa={data}"]
    words += ["--options.answers", "texts", "--options.max_new_tokens", "6"]
    assert main([*words, "--output", str(tmp_path / "one"), "--compilation_cache", "none"]) == 0
    cache = yaml.safe_load(config.read_text())["train"]["compilation_cache"]
    words += ["--output", str(tmp_path / "two"), "--compilation_cache", cache, "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    text = end(start_words(log, *words, module="jaxlm.evaluate"), log)
    assert text.count("[0] 2 records; wrote") == 2 and "[1] 2 records" not in text and not ours(text, 1), text
    one, two = (
        [
            json.loads(line)["answers"]["answer"]
            for task in ("multiple_choice", "qa")
            for line in (tmp_path / name / task / "predictions.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    )
    for mine, theirs in zip(one, two, strict=True):
        assert mine.pop("log_probs", []) == pytest.approx(theirs.pop("log_probs", []), abs=1e-4)
        assert mine == theirs


def test_two_processes_measure_perplexity_as_one_does(
    uninterrupted: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one process scored a part before; process 0 alone writes."""
    from jaxlm.cli.evaluate import main
    from jaxlm.evaluation.journal import JournalFile
    from jaxlm.evaluation.outputs import JOURNAL

    data, log, add = tmp_path / "texts.jsonl", tmp_path / "log", JournalFile.add
    texts = [f"rock {word} " * count for word, count in (("sand", 40), ("clay", 3), ("iron", 90), ("gas", 11))] * 8
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--task", "perplexity", "--model", str(uninterrupted), "--data", str(data), "--batch_size", "1"]
    words += ["--mesh.data", "2", "--mesh.fsdp", "2", "--sequence_length", "48"]

    def measure(name: str, status: int = 0) -> None:
        files = ["--output", str(tmp_path / name), "--save_file", str(tmp_path / f"{name}.json")]
        assert main([*words, *files, "--mesh.tensor", "2", "--compilation_cache", "none"]) == status

    def killed_at_the_third_batch(journal: JournalFile, *lines: Any) -> None:
        add(journal, *lines)
        if (tmp_path / "two/perplexity" / JOURNAL).read_bytes().count(b"\n") == 3:
            raise KeyboardInterrupt

    measure("one")
    monkeypatch.setattr(JournalFile, "add", killed_at_the_third_batch)
    measure("two", 130)
    cache = yaml.safe_load(config.read_text())["train"]["compilation_cache"]
    words += ["--compilation_cache", cache]
    saved = [{"--save_file": "two.json", "--output": "two"}, {"--save_file": "three.json"}]
    for files, goes_on in zip(saved, (True, False), strict=True):
        named = [word for key, name in files.items() for word in (key, str(tmp_path / name))]
        text = end(start_words(log, *words, *named, module="jaxlm.evaluate"), log)
        assert "[0] perplexity of" in text and ("going on: 2 batches" in text) == goes_on, text
        assert text.count("32 records; wrote") == goes_on, text
        assert "[1] perplexity of" not in text and not ours(text, 1), text
        figures, theirs = (json.loads((tmp_path / name).read_text()) for name in ("one.json", files["--save_file"]))
        assert theirs == {
            key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for key, value in figures.items()
        }
    lines = [(tmp_path / each / "perplexity/predictions.jsonl").read_text().splitlines() for each in ("one", "two")]
    for mine, other in zip(*lines, strict=True):
        mine, other = json.loads(mine)["answers"]["text"], json.loads(other)["answers"]["text"]
        assert mine.pop("log_probs") == pytest.approx(other.pop("log_probs"), rel=1e-5) and mine == other


def test_disagreeing_config_and_data_are_named(config: Path, inputs: Path, tmp_path: Path) -> None:
    def both(log: Path, *words: str) -> str:
        place = ["--coordinator", f"localhost:{free_port()}", "--num_processes", "2", "--process_id"]
        command = [sys.executable, "-m", "jaxlm.train", "--output_dir", str(tmp_path / "run"), "--config"]
        command.append(str(tmp_path / "relative.yaml"))
        environment = ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "1"}
        with log.open("wb") as stream:
            runs = [
                subprocess.Popen([*command, *place, str(n), *w], stdout=stream, stderr=stream, env=environment, cwd=cwd)
                for n, w, cwd in ((0, (), tmp_path / "0"), (1, words, tmp_path / "1"))
            ]
            assert [process.wait(timeout=100) for process in runs] == [2, 2], log.read_text()
        return log.read_text()

    content = yaml.safe_load(config.read_text())
    content["data"]["train"][0]["path"] = "records.json"  # each process reads what lies in its working directory
    (tmp_path / "relative.yaml").write_text(yaml.safe_dump(content))
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        shutil.copy(inputs / "records.json", tmp_path / f"{number}/records.json")
    text = both(tmp_path / "log", "--optimizer.learning_rate", "0.5", "--data.train", "[{path: other.json}]")
    words = r"error: the processes differ from process 0 \(.*\) in their configuration: on process 1 \(.*\) "
    different = r"data.train.0.path is \"other.json\", not \"records.json\"; .*optimizer.learning_rate is 0.5, not 0.01"
    assert len(re.findall(words + different, text)) == 2, text

    records = json.loads((tmp_path / "1/records.json").read_text())
    records[7]["output"] += " acid"
    (tmp_path / "1/records.json").write_text(json.dumps(records))
    text = both(tmp_path / "log")
    words = r"error: the processes differ from process 0 \(.*\) in their data: on process 1 \(.*\) "
    assert len(re.findall(words + r".*hash of all tokens is ", text)) == 2, text


@pytest.mark.skipif(os.environ.get("JAXLM_SLOW_TESTS") != "1", reason="two minutes; set JAXLM_SLOW_TESTS=1")
def test_four_processes_lose_their_first_and_two_go_on(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    process = start(config, output, log, processes=4, devices=1)
    wait_until(lambda: steps_done(output) >= 6, process, log)
    os.kill(pid(output, 0), signal.SIGKILL)
    process.wait(timeout=60)
    for survivor in (1, 2, 3):
        # JAX's own message may be the quicker one when the coordinator dies.
        assert re.search(rf"\[{survivor}\] .*(process 0 \(.*\) died|leader task was preempted/died)", log.read_text())
    end(start(config, output, log, processes=2, devices=2), log)
    mine, theirs = losses(output), losses(uninterrupted)
    assert mine.keys() == theirs.keys()
    assert all(value == pytest.approx(theirs[key], rel=2e-4) for key, value in mine.items())
