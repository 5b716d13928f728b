"""Whole commands with names of the Hugging Face hub where paths are taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import jaxlm
from convert.commands.main import main as convert
from convert.source import open_with_adapter
from jaxlm.cli.plan import main as plan
from jaxlm.cli.prepare import main as prepare
from jaxlm.cli.train import main as train
from jaxlm.config.reading import build
from jaxlm.data.store.stored import StoredTokens
from jaxlm.errors import UserError
from tests.convert.tiny import make_hf_model
from tests.e2e.conftest import SHAPE
from tests.hub_server import Hub, forget, running_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with running_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def push(hub: Hub, inputs: Path, tmp_path: Path) -> Callable[[int], str]:
    """Pushes a small model with its tokenizer to org/tiny; the weights differ by the seed."""

    def push(seed: int) -> str:
        folder = tmp_path / f"made-{seed}"
        sizes = {key: value for key, value in SHAPE.items() if key not in ("architectures", "model_type")}
        make_hf_model(seed=seed, **sizes).save_pretrained(folder)
        shutil.copytree(inputs / "tokenizer", folder, dirs_exist_ok=True)
        return hub.push_folder("org/tiny", folder, {"README.md": b"about"})

    return push


def refused(capsys: pytest.CaptureFixture[str], main: Callable[..., int], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_run_keeps_the_commit_that_it_began_with(
    hub: Hub, push: Callable[[int], str], base_config: dict[str, Any], inputs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first = push(0)
    hub.push("datasets/org/records", {"records.json": (inputs / "records.json").read_bytes(), "README.md": b"about"})
    values = {
        **base_config, "model": {"path": "org/tiny", "dtype": "float32"}, "tokenizer": {}, "lora": {"rank": 2},
        "data": {"train": [{"path": "hf://datasets/org/records", "template": "alpaca_short"}], "sequence_length": 64},
        "output_dir": "run",
    }  # fmt: skip

    def run(steps: int, **changes: Any) -> list[str]:
        settings = {**values, **changes, "train": {**values["train"], "steps": steps, "eval_every": 0}}
        Path("run.yaml").write_text(yaml.safe_dump(settings))
        forget()
        return ["--config", "run.yaml"]

    assert train(run(1)) == 0
    assert f"hub model.path: hf://org/tiny@{first}" in " ".join(capsys.readouterr().out.split())
    recorded = yaml.safe_load(Path("run/checkpoints/1/jaxlm/run.yaml").read_text())
    assert recorded["model"]["path"] == f"hf://org/tiny@{first}"
    assert recorded["data"]["train"][0]["path"].startswith("hf://datasets/org/records@")
    content = json.loads(Path("run/checkpoints/1/jaxlm/model.json").read_text())
    assert content["base"] == f"hf://org/tiny@{first}"

    second = push(1)
    assert train(run(2)) == 0, "main has moved; the run goes on with what it began with"
    recorded = yaml.safe_load(Path("run/checkpoints/2/jaxlm/run.yaml").read_text())
    assert recorded["model"]["path"] == f"hf://org/tiny@{first}"
    message = refused(capsys, train, *run(3, model={**values["model"], "path": "hf://org/tiny@main"}))
    assert f"model.path: was 'hf://org/tiny@{first}', is 'hf://org/tiny@{second}'" in message

    # The adapter brings its base along, and is of use elsewhere.
    forget()
    hub.requests.clear()
    assert str(open_with_adapter("run", None).path).endswith(first)
    assert hub.requests == [], "all of the commit is here"
    assert convert(["merge", "hf://org/tiny", "run", "merged"]) == 0 and Path("merged/model.safetensors").is_file()


def test_what_is_prepared_keeps_the_commit_that_it_began_with(
    hub: Hub, push: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    push(0)
    first = hub.push("datasets/org/texts", {"all.txt": b"rock sand clay\nlava iron zinc\n"})
    words = ["build", "--steps", "[build]", "--sources", "hf://datasets/org/texts", "--tokenizer", "org/tiny"]
    words += ["--output_dir", "out", "--engine.workers", "1"]
    assert prepare(words) == 0
    stored = StoredTokens(Path("out/build/store"))
    assert len(stored) == 2 and f"sources[0].path: hf://datasets/org/texts@{first}" in capsys.readouterr().err
    hub.push("datasets/org/texts", {"all.txt": b"salt\n"})
    forget()
    assert prepare(words) == 0
    assert f"hf://datasets/org/texts@{first}" in capsys.readouterr().err


def test_other_commands_take_names_too(
    hub: Hub, push: Callable[[int], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = push(0)
    assert plan(
        ["--model", "hf://org/tiny", "--data.train", "x", "--topology", "cpu:1", "--data.sequence_length", "64"]
    ) in (0, 1)
    assert "model.safetensors" not in hub.downloaded(), "a plan needs the shape"
    assert convert(["hf-to-jax", "org/tiny", "jax"]) == 0
    assert convert(["verify", f"hf://org/tiny@{commit}", "jax"]) == 0
    assert convert(["inspect", "hf://org/tiny"]) == 0
    assert "equal" in capsys.readouterr().out
    assert "nothing is written to hf://" in refused(capsys, convert, "hf-to-jax", "org/tiny", "hf://org/jax")
    assert "has no such repository" in refused(capsys, convert, "hf-to-jax", "hf://org/none", "out")
    config = build({"model": {"path": "hf://org/none"}, "data": {"train": [{"path": "x"}]}}, jaxlm.RunConfig)
    with pytest.raises(UserError, match=r"model\.path: hf://org/none: the hub has no such repository"):
        jaxlm.train(config)
    assert not any(path.name.startswith("hf:") for path in tmp_path.iterdir())
