"""The prompt template of a trained model goes where the model goes, or is named where it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.convert.tiny import make_adapter, make_hf_model


def record(directory: Path, template: str, content: str | None = None) -> None:
    """As `jaxlm.train` does."""
    (directory / "jaxlm" / "prompt.json").write_text(json.dumps({"template": template}))
    if content is not None:
        (directory / "jaxlm" / "template.json").write_text(content)


def recorded(directory: Path) -> list[str]:
    files = [directory / "jaxlm" / name for name in ("prompt.json", "template.json")]
    return [file.read_text() for file in files if file.is_file()]


@pytest.fixture
def base(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> Path:
    run("hf-to-jax", hf_dir, tmp_path / "base")
    return tmp_path / "base"


def test_models(base: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    assert recorded(base) == []
    record(base, "template.json", "{}")
    want = recorded(base)
    run("make-delta", base, base, tmp_path / "delta", "--format", "jax")
    run("apply-delta", base, tmp_path / "delta", tmp_path / "again", "--format", "jax")
    for name in ("delta", "again"):
        assert recorded(tmp_path / name) == want
    for form in ("hf", "meta", "mindspore"):
        printed = run(f"jax-to-{form}", base, tmp_path / f"to-{form}")
        assert f"needs --template {base / 'jaxlm' / 'template.json'} there" in printed
        assert not list((tmp_path / f"to-{form}").rglob("prompt.json"))
    assert "template" not in run("hf-to-meta", tmp_path / "hf", tmp_path / "other")


def test_adapters(base: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    make_adapter(make_hf_model(), tmp_path / "peft")
    adapter = tmp_path / "adapter"
    run("peft-to-jax", tmp_path / "peft", adapter, "--base", base)
    record(base, "vicuna")
    run("merge", base, adapter, tmp_path / "of-base")
    assert recorded(tmp_path / "of-base") == recorded(base)
    record(adapter, "template.json", '{"own": 1}')
    assert "template" not in run("merge", base, adapter, tmp_path / "of-adapter")
    assert recorded(tmp_path / "of-adapter") == recorded(adapter)
    record(adapter, "alpaca")
    (adapter / "jaxlm" / "template.json").unlink()
    assert "needs --template alpaca there" in run("merge", base, adapter, tmp_path / "hf2", "--format", "hf")
    assert "needs --template alpaca there" in run("jax-to-peft", adapter, tmp_path / "peft2")


def test_shard_size_is_for_hugging_face(base: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    make_adapter(make_hf_model(), tmp_path / "peft")
    for arguments in (
        ["merge", base, tmp_path / "peft", tmp_path / "out"],
        ["make-delta", base, base, tmp_path / "out", "--format", "jax"],
    ):
        message = refused(*arguments, "--shard-size", "10")
        assert "--shard-size 10: is for --format hf; the result is --format jax" in message
