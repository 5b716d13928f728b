"""What a user may get wrong: each mistake ends with status 2, one line that names it, and nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.commands.main import main as convert
from convert.source import open_model
from jaxlm.cli.generate import main as generate
from jaxlm.cli.train import main
from tests.e2e.conftest import SHAPE, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("bad input")]


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1, "one line"
    return message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.pth", "x"], "unknown key 'model.pth'; did you mean 'model.path'?"),
        (["--learning_rate", "1e-4"], "did you mean 'optimizer.learning_rate'?"),
        (["--model.dtype", "fp16"], "model.dtype: expected one of bfloat16, float32, found 'fp16'"),
        (["--data.sequence_length", "long"], "data.sequence_length: expected a whole number, found 'long'"),
        (["--lora.rank", "x"], "lora.rank: expected a whole number, found 'x'"),
        (["--optimizer.learning_rate", "1e30"], "optimizer.learning_rate: 1e+30 must be between 0 and 1000"),
        (["--optimizer.eps", "0"], "optimizer.eps: 0.0 must be more than 0"),
        (["--optimizer.beta2", "1.0"], "optimizer.beta2: 1.0 must be at least 0 and below 1"),
        (["--model.shape", "a", "--data.train", "[{path: b}]", "--preview", "0"], "--preview: 0 must be at least 1"),
        (["--lora.dropout", "1.5"], "lora.dropout: 1.5 must be at least 0 and below 1"),
        (["--train.keep", "0"], "train.keep: 0 must be at least 1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--lora", "3"], "lora: expected keys and values, found 3"),
        (["--model", "a", "--model.shape", "b"], "give either path"),
        (["file.yaml"], "'file.yaml': expected --config FILE"),
        (["--preview"], "give either path"),
        (["--preview", "two"], "--preview: 'two' is not a whole number"),
        (["--model.shape", "llama-2-7b"], "data.train: no source"),
        (["--model.path", "a", "--model.shape", "b"], "give either path"),
        (["--model.shape", "llama-2-7b", "--lora.rank", "2"], "lora: an adapter needs a trained base"),
    ],
)
def test_configuration(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in error_of(capsys, *words)


def test_configuration_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {learnin_rate: 1.0}\n")
    assert "did you mean 'optimizer.learning_rate'?" in error_of(capsys, "--config", str(file))
    file.write_text("a: [1\n")
    assert "run.yaml: not valid YAML" in error_of(capsys, "--config", str(file))
    file.write_text("stages: [{model: {}}]\n")
    assert "stages: each needs a name" in error_of(capsys, "--config", str(file))
    file.write_text("stages: 5\n")
    assert "stages: expected a list" in error_of(capsys, "--config", str(file))
    assert "stages are given in the configuration file" in error_of(capsys, "--stages", "[{name: a}]")
    file.write_text("stages: [{name: one}]\n")
    assert "--stage: 'two' is none of one" in error_of(capsys, "--config", str(file), "--stage", "two")


def run_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any], *words: str, **changes: Any
) -> str:
    file = write_config(tmp_path / "config", config, **changes)
    return error_of(capsys, "--config", str(file), "--output_dir", str(tmp_path / "out"), *words)


def records(tmp_path: Path, content: Any) -> dict[str, Any]:
    file = tmp_path / "records.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return {"train": [{"path": str(file), "template": "alpaca"}], "validation": 0}


def test_data(capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any]) -> None:
    def message(**data: Any) -> str:
        return run_error(capsys, tmp_path, base_config, data=data)

    assert "missing.json" in message(train=[{"path": str(tmp_path / "missing.json")}])
    assert "records.json" in message(**records(tmp_path, []))
    wrong = message(**records(tmp_path, [{"instruction": "a", "output": "b"}, {"question": "a", "output": "b"}]))
    assert "records.json:2" in wrong and "instruction" in wrong and "columns" in wrong
    assert "data.sequence_length" in message(sequence_length=4096)
    cut = message(**records(tmp_path, [{"instruction": "rock " * 200, "output": "sand"}]))
    assert "sequence_length" in cut
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_vocabulary_smaller_than_a_token_id(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any]
) -> None:
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(SHAPE | {"vocab_size": 300}))
    message = run_error(capsys, tmp_path, base_config, model={"shape": str(shape)})
    assert "300" in message and "vocab" in message


@pytest.fixture(scope="module")
def hf_model(inputs: Path, base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory, written by `convert` from a one-step run."""
    folder = tmp_path_factory.mktemp("hf")
    config = write_config(folder, base_config, train={"steps": 1}, data={"validation": 0})
    assert main(["--config", str(config), "--output_dir", str(folder / "run")]) == 0
    assert convert(["jax-to-hf", str(folder / "run"), str(folder / "model")]) in (0, None)
    return folder / "model"


def test_hugging_face_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any], hf_model: Path
) -> None:
    def message(tensors: dict[str, np.ndarray] | None = None, cut: int = 0, **config_changes: Any) -> str:
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(hf_model, broken)
        if tensors is not None:
            save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        if cut:
            content = (broken / "model.safetensors").read_bytes()
            (broken / "model.safetensors").write_bytes(content[:-cut])
        settings = json.loads((broken / "config.json").read_text()) | config_changes
        (broken / "config.json").write_text(json.dumps(settings))
        return run_error(capsys, tmp_path, base_config, model={"path": str(broken), "shape": None}, tokenizer=None)

    whole = load_file(hf_model / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    assert lost in message({name: value for name, value in whole.items() if name != lost})
    assert "model.extra.weight" in message(whole | {"model.extra.weight": np.zeros(3, np.float32)})
    misshapen = message(whole | {lost: np.zeros((3, 3), np.float32)})
    assert lost in misshapen and "3" in misshapen
    assert "model.safetensors" in message(cut=100)
    assert "GPTJForCausalLM" in message(architectures=["GPTJForCausalLM"])


def test_paths(capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any]) -> None:
    model = {"path": str(tmp_path / "no-model"), "shape": None}
    assert "no-model: no such directory" in run_error(capsys, tmp_path, base_config, model=model)
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path / "config", base_config)
    message = error_of(capsys, "--config", str(config), "--output_dir", str(tmp_path / "file" / "out"))
    assert f"output_dir: {tmp_path / 'file'}: cannot write there (it is a file)" in message
    message = error_of(capsys, "--config", str(config), "--output_dir", str(tmp_path / "file"))
    assert f"output_dir: {tmp_path / 'file'}: cannot write there (it is a file)" in message


def test_mesh(capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any]) -> None:
    message = run_error(capsys, tmp_path, base_config, mesh={"data": 1, "fsdp": 3})
    assert "asks for 3 devices, this machine has 8" in message
    message = run_error(capsys, tmp_path, base_config, mesh={"data": 1, "tensor": 8})
    assert "mesh.tensor: 8 does not divide" in message
    message = run_error(capsys, tmp_path, base_config, train={"global_batch_size": 12})
    assert "train.global_batch_size: 12 rows cannot be shared by 8 groups" in message
    means = {"global_batch_size": 24, "loss_normalisation": "mean_of_means"}
    assert "Try 1" in run_error(capsys, tmp_path, base_config, train=means)


def test_resume_with_changes_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any], inputs: Path
) -> None:
    copy = tmp_path / "records.json"
    shutil.copy(inputs / "records.json", copy)
    source = {"path": str(copy), "template": "alpaca_short"}
    config = write_config(tmp_path / "config", base_config, data={"train": [source]})
    run = ["--config", str(config), "--output_dir", str(tmp_path / "out")]
    assert main([*run, "--train.steps", "2"]) == 0
    checkpoint = tmp_path / "out" / "checkpoints" / "2"
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}

    assert "data.sequence_length: was 64, is 56" in error_of(capsys, *run, "--data.sequence_length", "56")
    assert "optimizer.learning_rate: was 0.01, is 0.5" in error_of(capsys, *run, "--optimizer.learning_rate", "0.5")
    assert "train.resume is false" in error_of(capsys, *run, "--train.resume", "false")
    content = json.loads(copy.read_text())
    content[0]["output"] = "other words"
    copy.write_text(json.dumps(content))
    assert "the training data are not what this run began with" in error_of(capsys, *run)
    assert before == {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}


def test_resume_on_another_base_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any], hf_model: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(hf_model, base)
    changes = {"model": {"path": str(base), "shape": None}, "tokenizer": None, "lora": {"rank": 2}}
    config = write_config(tmp_path / "config", base_config, **changes, train={"steps": 1})
    run = ["--config", str(config), "--output_dir", str(tmp_path / "out")]
    assert main(run) == 0
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 2}, base / "model.safetensors")
    assert "the base model at model.path is not what this run began with" in error_of(capsys, *run)


def test_full_disk(tmp_path: Path, base_config: dict[str, Any]) -> None:
    """A real one: a small file system of its own. The run ends with a message, its last checkpoint stays good."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    try:
        config = write_config(
            tmp_path / "config", base_config, train={"steps": 40, "eval_every": 0, "save_every": 1, "keep": 40}
        )
        command = [sys.executable, "-m", "jaxlm.train", "--config", str(config), "--output_dir", str(disk / "run")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and "No space left on device" in done.stderr
        assert "choose another output_dir" in done.stderr and "Traceback" not in done.stderr
        complete = [path for path in (disk / "run" / "checkpoints").iterdir() if path.name.isdigit()]
        assert len(complete) >= 2
        newest = max(complete, key=lambda path: int(path.name))
        assert open_model(newest).read("norm/scale", ()).shape == (64,)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_weights_that_are_not_finite_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any], hf_model: Path
) -> None:
    """Of a base in full and under an adapter, of an adapter, and of a checkpoint; whatever train.on_nonfinite says."""
    name = "model.layers.1.mlp.up_proj.weight"

    def broken(number: float) -> Path:
        folder = tmp_path / f"broken-{number}"
        shutil.copytree(hf_model, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[name][3, 3] = number
        save_file(tensors, folder / "model.safetensors")
        return folder

    for number in (np.nan, -np.inf):
        changes = {"model": {"path": str(broken(number)), "shape": None}, "tokenizer": None}
        for more in ({}, {"lora": {"rank": 2}, "train": {"on_nonfinite": "skip"}}):
            message = run_error(capsys, tmp_path, base_config, **changes, **more)
            assert f"{name} (layers/mlp/up_proj/kernel, layer 1) holds 1 value that is not finite" in message
            words = ["--model", changes["model"]["path"], "--prompt", "rock"]
            assert generate(words) == 2 and f"{name} (layers/mlp/up_proj/kernel, layer 1)" in capsys.readouterr().err
            assert "learning_rate" not in message and not list((tmp_path / "out").glob("checkpoints/*"))
    config = write_config(
        tmp_path / "adapter",
        base_config,
        model={"path": str(hf_model), "shape": None},
        tokenizer=None,
        lora={"rank": 2},
        train={"steps": 1},
    )
    run = ["--config", str(config), "--output_dir"]
    assert main([*run, str(tmp_path / "first")]) == 0
    assert convert(["jax-to-peft", str(tmp_path / "first"), str(tmp_path / "peft")]) in (0, None)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    message = error_of(capsys, *run, str(tmp_path / "second"), "--lora.init_from", str(tmp_path / "peft"))
    assert f"lora.init_from: {tmp_path / 'peft'}: " in message and "layer 0 holds 1 value that is not finite" in message


def test_loss_that_is_not_finite_stops_and_is_never_complete(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base_config: dict[str, Any], hf_model: Path
) -> None:
    """Numbers that overflow in the model; the last step is done and saved by the time that this is noticed."""
    large = tmp_path / "large"
    shutil.copytree(hf_model, large)
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"] *= np.float32(3e38)
    save_file(tensors, large / "model.safetensors")
    changes = {"model": {"path": str(large), "shape": None}, "tokenizer": None}
    two = {"train": {"steps": 2, "eval_every": 0}}
    message = run_error(capsys, tmp_path, base_config, **changes, **two)
    assert "step 1: loss nan" in message and "not why" in message and "Lower optimizer.learning_rate" not in message
    assert "train.on_nonfinite: skip" in message
    (saved,) = (tmp_path / "out" / "checkpoints").iterdir()
    for leaf in ("layers/mlp/up_proj/kernel", "norm/scale"):
        before, after = (open_model(path).read(leaf, ()) for path in (large, saved))
        np.testing.assert_array_equal(before, after), "nothing was touched"
    for _ in range(2):  # the same command again
        message = run_error(capsys, tmp_path, base_config, **changes, **two)
        assert f"{saved}: the run was stopped: step 1: loss nan" in message and "train.on_nonfinite: skip" in message
    config = write_config(tmp_path / "config", base_config, **changes, train={**two["train"], "on_nonfinite": "skip"})
    run = ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--train.steps", "3"]
    assert main(run) == 0
    assert "step 3: loss nan" in capsys.readouterr().out
    assert main(run) == 0 and "complete: " in capsys.readouterr().out
