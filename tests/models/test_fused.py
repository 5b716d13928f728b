"""Stored tensors that hold several leaves, on families that are made up: fused as Phi-3, BLOOM and Falcon fuse them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.models.families import FAMILIES
from jaxlm.models.families.base import Fused
from jaxlm.weights.hf import hf_tensors
from jaxlm.weights.names import fused_entries, hf_entries

SIZES: dict[str, Any] = dict(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    attention_bias=True,
)
Q, K, V = (f"self_attn/{name}_proj" for name in "qkv")
QKV = "model.layers.{}.self_attn.qkv"


def paths(leaf: str) -> tuple[str, str, str]:
    return f"{Q}/{leaf}", f"{K}/{leaf}", f"{V}/{leaf}"


GATE_UP = Fused("model.layers.{}.mlp.gate_up_proj.weight", "(F + F) D", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"))


def qkv(rows: str) -> tuple[Fused, ...]:
    return (
        Fused(f"{QKV}.weight", f"({rows}) D", paths("kernel")),
        Fused(f"{QKV}.bias", f"({rows})", paths("bias")),
        GATE_UP,
    )


def below(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """As Phi-3: q, then k, then v."""
    return np.concatenate([q, k, v])


def by_head(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """As BLOOM: q, k and v of the first head, then of the second."""
    parts = [part.reshape(6, 4, *part.shape[1:]) for part in (q, k, v)]
    return np.stack(parts, axis=1).reshape(-1, *q.shape[1:])


def by_group(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """As Falcon: the query heads of the first kv head, that, its values; then those of the second."""
    parts = [part.reshape(2, -1, 4, *part.shape[1:]) for part in (q, k, v)]
    return np.concatenate(parts, axis=1).reshape(-1, *q.shape[1:])


CASES = {
    "below": (qkv("H h + K h + K h"), below, {}),
    "by head": (qkv("H (1 + 1 + 1) h"), by_head, {"num_key_value_heads": 6}),
    "by group": (qkv("K (G + 1 + 1) h"), by_group, {}),
}


@pytest.fixture(params=CASES)
def made(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Path, dict[str, Any]]:
    """A model in files that fuse, of a family that fuses so, and its tensors by themselves."""
    fused, join, more = CASES[request.param]
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(FAMILIES["llama"], fused=fused))
    config = {"architectures": ["LlamaForCausalLM"], **SIZES, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from jaxlm.models.families import read_config

    dice = np.random.default_rng(0)
    alone = {
        entry.name: dice.standard_normal(entry.layout.stored).astype(np.float32)
        for entry in hf_entries(read_config(config))
    }
    stored = dict(alone)
    for layer in range(2):
        for suffix in ("weight", "bias"):
            parts = [stored.pop(f"model.layers.{layer}.self_attn.{name}_proj.{suffix}") for name in "qkv"]
            stored[f"{QKV.format(layer)}.{suffix}"] = join(*parts)
        stem = f"model.layers.{layer}.mlp"
        gate_up = [stored.pop(f"{stem}.{name}_proj.weight") for name in ("gate", "up")]
        stored[f"{stem}.gate_up_proj.weight"] = np.concatenate(gate_up)
    save_file({name: np.ascontiguousarray(value) for name, value in stored.items()}, tmp_path / "model.safetensors")
    return tmp_path, alone


def test_a_fused_tensor_is_read_as_its_leaves(made: tuple[Path, dict[str, Any]]) -> None:
    directory, alone = made
    source = open_model(directory)
    for entry in hf_entries(source.config):
        expected = alone[entry.name].reshape(entry.layout.view).transpose(entry.layout.perm)
        index = () if entry.layer is None else (slice(entry.layer, entry.layer + 1),)
        found = source.read(entry.path, index)
        np.testing.assert_array_equal(found if entry.layer is None else found[0], expected, entry.name)


def test_leaves_are_written_as_the_fused_tensor(made: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = made
    source = open_model(directory)
    stored = load_file(directory / "model.safetensors")
    tensors = hf_tensors(source)
    assert {tensor.name: tensor.shape for tensor in tensors} == {name: value.shape for name, value in stored.items()}
    for tensor in tensors:
        found = np.concatenate([np.atleast_1d(block) for block in tensor.blocks])
        np.testing.assert_array_equal(found, stored[tensor.name], tensor.name)
    assert [tensor.name for tensor in tensors].index(f"{QKV.format(0)}.weight") == 2
    assert len(fused_entries(source.config)) == 6


def test_a_fused_tensor_that_is_missing_or_cut_short_is_refused_by_name(made: tuple[Path, dict[str, Any]]) -> None:
    directory, alone = made
    stored = load_file(directory / "model.safetensors")
    name = f"{QKV.format(1)}.weight"
    save_file(stored | {name: stored[name][:-4]}, directory / "model.safetensors")
    with pytest.raises(UserError, match=rf"tensor '{name}' has shape .*expected \[{len(stored[name])}, 16\]"):
        open_model(directory)
    save_file({key: value for key, value in stored.items() if key != name}, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor '{name}' is missing"):
        open_model(directory)
    part = "model.layers.1.self_attn.k_proj.weight"
    save_file(stored | {part: alone[part]}, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor '{part}' has no place in this model"):
        open_model(directory)
