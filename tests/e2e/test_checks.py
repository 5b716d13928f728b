"""Mistakes are found before the work that they would waste; what is hardly ever meant is said."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from convert.commands.main import main as convert
from jaxlm.cli.train import main
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("checks")]
Usage = namedtuple("Usage", "total used free")


def refuse(*args: Any, **more: Any) -> Any:
    raise AssertionError("too late: the work has begun")


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


WITHOUT_MODEL = [
    ({"optimizer": {"warmup_steps": 0, "warmup_ratio": 2}}, "optimizer.warmup_ratio: 2.0 must be between 0 and 1"),
    ({"optimizer": {"end_ratio": 2}}, "optimizer.end_ratio: 2.0 must be between 0 and 1"),
    ({"optimizer": {"warmup_ratio": 0.1}}, "give warmup_steps or warmup_ratio, not both"),
    ({"lora": {"targets": ["q_prj"]}}, "lora.targets: 'q_prj' is not a linear layer of the model"),
    ({"lora": {"targets": ["lm_head"]}}, "to train it in full: lora.modules_to_save: [lm_head]"),
    (
        {"lora": {"modules_to_save": ["embed"]}},
        "lora.modules_to_save: 'embed' is not one of embed_norm, embed_positions, embed_tokens",
    ),
    ({"lora": {"rank_pattern": {"q_proj(": 4}}}, "lora.rank_pattern: 'q_proj(' is not a regular expression"),
    ({"lora": {"init_from": "nowhere/adapter"}}, "lora.init_from: nowhere/adapter: no such directory"),
    ({"model": {"path": "nowhere/base"}}, "model.path: nowhere/base: no such directory"),
    ({"model": {"path": None, "shape": "llama-3b"}}, "model.shape: 'llama-3b' is neither a known shape"),
    ({"tokenizer": {"path": "nowhere/tokenizer"}}, "tokenizer.path: nowhere/tokenizer: no such directory"),
    ({"data": {"train": [{"path": "nowhere.json"}]}}, "nowhere.json does not exist"),
    ({"data": {"validation": [{"path": "nowhere.json"}]}}, "nowhere.json does not exist"),
    ({"mesh": {"data": 1, "fsdp": 3}}, "asks for 3 devices, this machine has 8"),
    ({"mesh": {"data": 2, "tensor": 3}}, "mesh: "),
    ({"train": {"compiler_options": {"xla_no_such_option": 1}}}, "train.compiler_options: "),
    ({"train": {"local_checkpoints": "local", "local_every": 0}}, "train.local_every: 0"),
    ({"train": {"wandb": "project"}}, "train.wandb: needs wandb; pip install 'jaxlm[wandb]'"),
    ({"train": {"tensorboard": True}}, "train.tensorboard: needs tensorboardX; pip install 'jaxlm[tensorboard]'"),
]


@pytest.fixture(scope="module")
def base(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = write_config(folder, base_config, train={"steps": 1}, data={"validation": 0})
    assert main(["--config", str(config), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize(("changes", "message"), WITHOUT_MODEL, ids=[message[:40] for _, message in WITHOUT_MODEL])
def test_before_the_model_is_opened(
    changes: dict[str, Any],
    message: str,
    base: Path,
    base_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    hidden = {"wandb", "tensorboardX"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else found(name))
    monkeypatch.setattr("convert.source.open_model", refuse)
    if "model" not in changes or "path" in changes["model"]:
        changes = {"model": {"path": str(base)} | changes.get("model", {})} | {
            key: value for key, value in changes.items() if key != "model"
        }
    changes["model"].setdefault("shape", None)
    config = write_config(tmp_path / "config", base_config, **changes)
    assert message in error_of(capsys, "--config", str(config), "--output_dir", str(tmp_path / "deep" / "run"))
    assert not (tmp_path / "deep").exists(), "nothing is left behind"


def test_of_a_later_stage_before_the_first(
    base_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jaxlm.training.prepare.open_tokenizer", refuse)
    for stage, message in (
        ({"lora": {"targets": ["no_proj"]}}, "lora.targets: 'no_proj'"),
        ({"data": {"train": [{"path": "gone.json"}]}}, "gone.json does not exist"),
        ({"mesh": {"data": 3, "fsdp": 1}}, "asks for 3 devices"),
    ):
        config = write_config(tmp_path, base_config, stages=[{"name": "one"}, {"name": "two", **stage}])
        assert message in error_of(capsys, "--config", str(config), "--output_dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_before_the_data_are_read(
    base: Path,
    base_config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def message(*words: str, **changes: Any) -> str:
        more = {"model": {"path": str(base), "shape": None}, "tokenizer": None, "train": {"steps": 2}, **changes}
        config = write_config(tmp_path / "config", base_config, **more)
        return error_of(capsys, "--config", str(config), "--output_dir", str(tmp_path / "run"), *words)

    lora = write_config(tmp_path / "lora", base_config, model={"path": str(base), "shape": None}, tokenizer=None)
    words = ["--config", str(lora), "--lora.rank", "2", "--train.steps", "1", "--output_dir"]
    assert main([*words, str(tmp_path / "adapter")]) == 0
    assert main([*words, str(tmp_path / "run")]) == 0
    monkeypatch.setattr("jaxlm.training.prepare.build_data", refuse)
    assert "mesh.tensor: 8 does not divide" in message(mesh={"data": 1, "tensor": 8}, output_dir="x", lora={"rank": 2})
    batch = {"train": {"global_batch_size": 12}}
    assert "global_batch_size: 12 rows cannot" in message("--output_dir", str(tmp_path / "new"), **batch)
    init_from = {"rank": 4, "init_from": str(tmp_path / "adapter")}
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    assert "lora.rank: was 2, is 4" in message(lora=init_from)
    assert "train.resume is false" in message("--train.resume", "false", lora={"rank": 2})
    shutil.rmtree(tmp_path / "run")
    assert "lora.rank: 4, but the adapter" in message(lora=init_from)
    assert "train.sample_prompts" in message("--train.sample_prompts", "rock " * 200)
    # The disk has no room for a single checkpoint.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    assert "a checkpoint of this run takes 1.3 MiB, and the disk has 1000 B free" in message()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_room_for_one_checkpoint_and_not_for_all(
    base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 4 << 20))
    # And paths that a shell would take apart, in the commands that are printed at the end.
    output = tmp_path / "my runs" / "it's new"
    config = write_config(
        tmp_path, base_config, train={"steps": 2, "keep": 3, "eval_every": 0}, optimizer={"warmup_steps": 100}
    )
    assert main(["--config", str(config), "--output_dir", str(output)]) == 0
    text = capsys.readouterr().out
    assert "warning: checkpoints take 1.3 MiB each, 6.6 MiB for train.keep 3" in text and "4.0 MiB free" in text
    following, asked = (shlex.split(line_of(text, name)) for name in ("next", "ask it"))
    assert following[1:] == ["convert", "jax-to-hf", str(output), f"{output}-hf"]
    assert asked[-3:] == ["--model", str(output), "--interactive"]
    # And of a schedule that never left its warm-up.
    assert "warning: warm-up takes 2 of the run's 2 steps, and the learning rate comes to 0.0001 at most" in text
    assert "warning: the learning rate never came above 0.0001, 1% of optimizer.learning_rate 0.01" in text

    assert convert(following[2:]) in (0, None)
    loaded = line_of(capsys.readouterr().out, "next")
    assert loaded.endswith(f'from_pretrained("{output}-hf")')
    assert convert(["hf-to-jax", f"{output}-hf", f"{output}-jax"]) in (0, None)
    assert shlex.split(line_of(capsys.readouterr().out, "next"))[-1] == f"{output}-jax"


def test_gradients_of_zero_and_ranks_too_large(
    base: Path, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(**lora: Any) -> str:
        config = write_config(
            tmp_path,
            base_config,
            model={"path": str(base), "shape": None},
            tokenizer=None,
            lora=lora,
            train={"steps": 3, "eval_every": 0},
        )
        output = tmp_path / "-".join(f"{key}{value}" for key, value in lora.items() if key != "targets")
        assert main(["--config", str(config), "--output_dir", str(output)]) == 0
        return capsys.readouterr().out

    text = said(rank=2, alpha=0.0)
    assert "warning: all gradients were 0: nothing has been trained" in text and "lora.rank" not in text
    text = said(rank=48, targets=["q_proj", "k_proj", "down_proj"])
    # q_proj is 64 x 64, k_proj 64 x 32, down_proj 128 x 64.
    assert "warning: lora.rank: 48 of k_proj exceeds the smaller side of a matrix of 64 x 32: above 32" in text
    assert text.count("exceeds the smaller side") == 1 and "gradients were 0" not in text


@pytest.mark.slow
def test_a_run_made_longer_says_what_becomes_of_its_rates(
    base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(steps: int) -> str:
        train = {"steps": steps, "eval_every": 0}
        config = write_config(tmp_path, base_config, optimizer={"warmup_steps": 0}, train=train)
        assert main(["--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
        return capsys.readouterr().out

    assert "begun for" not in said(3)
    text = said(9)
    # 0.01 x (1 + cos(pi x 2/3)) / 2, then with 9 for 3 steps: 0.01 x (1 + cos(pi x 3/9)) / 2.
    assert (
        "warning: the run was begun for 3 steps and is now one of 9, so that its cosine schedule is another: "
        "step 3 took 2.50e-03, step 4 takes 7.50e-03 instead of 0.00e+00"
    ) in text


def test_another_base_with_the_same_norms(
    base: Path, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter merged into the base: its norms are the same."""
    config = write_config(
        tmp_path, base_config, model={"path": str(base), "shape": None}, tokenizer=None, train={"steps": 2}
    )
    run = ["--config", str(config), "--lora.rank", "2", "--output_dir", str(tmp_path / "run")]
    assert main(run) == 0
    assert convert(["merge", str(base), str(tmp_path / "run"), str(tmp_path / "merged"), "--format", "jax"]) in (
        0,
        None,
    )
    moved = ["--model.path", str(tmp_path / "merged"), "--train.steps", "3"]
    assert "the base model at model.path is not what this run began with" in error_of(capsys, *run, *moved)
    # The same weights elsewhere are the same base.
    assert convert(["jax-to-hf", str(base), str(tmp_path / "hf")]) in (0, None)
    assert main([*run, "--model.path", str(tmp_path / "hf"), "--train.steps", "3"]) == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["model"]["path"] == str(tmp_path / "hf")
