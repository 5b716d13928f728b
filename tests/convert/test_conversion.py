"""`convert.convert`, the public function: the same files as the command, from Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import convert
from convert.commands import command
from convert.commands.main import main
from convert.conversion import SHARD_SIZE, Converted
from jaxlm.errors import UserError
from jaxlm.weights.files import read_tensors
from jaxlm.weights.tensors import same_bytes
from tests.convert.tiny import make_adapter, make_hf_model


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the times that Orbax keeps, and the manifest's hash of them."""
    times = {"_CHECKPOINT_METADATA", "manifest.json"}
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in times)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("verb", "options", "arguments"),
    [
        ("jax-to-hf", ["--dtype", "bfloat16", "--shard-size", "9KB"], {"dtype": "bfloat16", "shard_size": 9000}),
        ("jax-to-meta", ["--dtype", "float16"], {"to": "meta", "dtype": "float16"}),
        ("jax-to-mindspore", ["--qkv-concat", "--crc"], {"to": "mindspore", "joined": True, "crc": True}),
    ],
)
def test_writes_what_the_command_writes(
    verb: str, options: list[str], arguments: dict[str, Any], hf_dir: Path, tmp_path: Path
) -> None:
    native = tmp_path / "native"
    assert convert.convert(hf_dir, native).format == "jax"  # the default for what is not jaxlm's own
    assert main([verb, str(native), str(tmp_path / "command"), *options]) == 0
    counted: list[int] = []
    written = convert.convert(native, tmp_path / "function", progress=counted.append, **arguments)
    assert contents(tmp_path / "function") == contents(tmp_path / "command")
    assert written.path == tmp_path / "function" and written.format == verb.split("-to-")[1]
    assert written.files == {name: len(data) for name, data in contents(tmp_path / "function").items()}
    assert sum(counted) > 0
    if verb == "jax-to-hf":
        return
    # And back: what the format does not say is told.
    back = convert.convert(tmp_path / "function", tmp_path / "back", "jax")
    assert [text.split()[0] for text in back.assumed] == [
        {"jax-to-mindspore": "wq,", "jax-to-meta": "max_position_embeddings"}[verb]
    ]


def test_adapters_by_what_they_are(hf_dir: Path, tmp_path: Path) -> None:
    make_adapter(make_hf_model(), tmp_path / "peft")
    written = convert.convert(tmp_path / "peft", tmp_path / "native", base=hf_dir)
    assert written.format == "jax"
    back = convert.convert(tmp_path / "native", tmp_path / "back")
    assert back.format == "peft"
    before, after = (read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "hf"}, ["is a Hugging Face model already"]),
        ({"to": "peft"}, ["is a full model", "write it as hf"]),
        ({"to": "meta", "shards": 0}, ["--shards 0"]),
        ({"source_format": "meta"}, ["is a Hugging Face model, not a checkpoint in Meta's format"]),
        ({"base": "x"}, ["--base", "adapter"]),
        ({"shard_size": "much"}, ["--shard-size 'much'"]),
        ({"groups": 0}, ["--groups 0"]),
        ({"to": "onnx"}, ["to: 'onnx' is not a format", "mindspore"]),
        ({"source_format": "onnx"}, ["source_format: 'onnx' is not a format"]),
        ({"dtype": "fp16"}, ["dtype: expected one of keep, float32", "'fp16'"]),
        ({"to": "meta", "shards": 1.5}, ["shards: expected a whole number", "1.5"]),
        ({"shard_size": -5}, ["shard_size: -5 is for conversions to hf, this one is to jax"]),
        ({"to": "meta", "shard_size": 9000}, ["shard_size: 9000 is for conversions to hf"]),
        ({"layout": "round"}, ["layout: expected one of dense, mixtral", "'round'"]),
        ({"config": "x"}, ["config: 'x' is for conversions from mindspore, this one is from hf"]),
        ({"max_positions": 64}, ["max_positions: 64 is for conversions from meta"]),
        ({"crc": True}, ["crc: True is for conversions to mindspore"]),
        ({"adapter": True}, ["is not an adapter"]),
    ],
)
def test_refuses_what_makes_no_sense(arguments: dict[str, Any], words: list[str], hf_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        convert.convert(hf_dir, tmp_path / "out", **arguments)
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_adapter_has_no_form_in_a_models_format(hf_dir: Path, tmp_path: Path) -> None:
    make_adapter(make_hf_model(), tmp_path / "peft")
    with pytest.raises(UserError, match="merge it into its base first"):
        convert.convert(tmp_path / "peft", tmp_path / "out", "meta", base=hf_dir)
    with pytest.raises(UserError, match="give the base model too"):
        convert.convert(tmp_path / "peft", tmp_path / "out")
    with pytest.raises(UserError, match="are not for adapters"):
        convert.convert(tmp_path / "peft", tmp_path / "out", base=hf_dir, dtype="float16")


def test_public_names_are_imported_late() -> None:
    code = (
        "import sys, convert\n"
        "print(sorted(m for m in ('numpy', 'jax', 'tensorstore') if m in sys.modules), dir(convert))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[] ['Converted', 'convert']"
    assert convert.Converted is Converted
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = convert.nothing


def test_the_commands_default_is_the_functions() -> None:
    assert command.SHARD_SIZE == SHARD_SIZE
