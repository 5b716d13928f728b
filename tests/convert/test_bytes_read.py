"""A model is read into eight shards once: no byte of its files more than a twentieth time again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import jaxlm.weights.native.layout
from convert.conversion import convert
from convert.source import open_model
from jaxlm.config import LoraConfig, MeshConfig, OptimizerConfig
from jaxlm.devices import mesh as meshes
from jaxlm.devices.mesh import make_mesh
from jaxlm.inference.model import load_weights
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.nn.rounding import Kind
from jaxlm.nn.weight_types import Int8Weight
from jaxlm.spec import is_stacked
from jaxlm.training.checkpoint import _context
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer
from jaxlm.weights.leaves import full_index
from jaxlm.weights.native.write import write_model
from jaxlm.weights.output import output_directory
from tests.convert.test_experts import params as tree_of
from tests.convert.tiny import make_hf_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
MESHES = [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(tensor=8)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bytes") / "hf"
    make_hf_model(**SIZES).save_pretrained(path)
    return path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes asked of the operating system for tensors."""
    found: list[int] = []
    plain = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        found.append(plain(fd, buffers, offset))
        return found[-1]

    monkeypatch.setattr("jaxlm.weights.tensors.os.preadv", preadv)
    yield found


def weight_bytes(source: Any) -> int:
    return sum(leaf.nbytes for leaf in source.leaves.values())


def initializer(config: Any, mesh: MeshConfig, kind: Kind | None = None) -> Initializer:
    optimizer = partial(make_optimizer, OptimizerConfig(), make_schedule(OptimizerConfig(), 10))
    lora = None if kind is None else LoraConfig(rank=2, targets=("q_proj",))
    adapters = {} if lora is None else resolve_lora(config, lora)
    return Initializer(Decoder(config, adapters), lora, make_mesh(mesh), optimizer, kind)


class Largest:
    """A source, and the bytes of the largest array that was asked of it."""

    def __init__(self, source: Any) -> None:
        self.source, self.leaves, self.nbytes = source, source.leaves, 0

    def read(self, path: str, index: Any) -> np.ndarray:
        found = self.source.read(path, index)
        self.nbytes = max(self.nbytes, found.nbytes)
        return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("piece", [1, 20_000, 1 << 28])
def test_training(mesh: MeshConfig, piece: int, hf: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meshes, "PIECE_BYTES", piece)
    source = open_model(hf)
    watched = Largest(source)
    counted.clear()
    loaded = initializer(source.config, mesh).load_params(watched)
    assert weight_bytes(source) <= sum(counted) <= 1.05 * weight_bytes(source)
    layer = max(leaf.nbytes // (leaf.shape[0] if is_stacked(path) else 1) for path, leaf in source.leaves.items())
    assert watched.nbytes <= max(piece, layer)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree_of(source))


@pytest.mark.parametrize("form", ["meta", "mindspore"])
def test_other_formats(form: Literal["meta", "mindspore"], hf: Path, tmp_path: Path, counted: list[int]) -> None:
    convert(hf, tmp_path / form, form)
    source = open_model(tmp_path / form)
    counted.clear()
    loaded = initializer(source.config, MeshConfig(fsdp=2, tensor=4)).load_params(source)
    assert weight_bytes(source) <= sum(counted) <= 1.05 * weight_bytes(source)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree_of(source))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_base_that_is_rounded_on_the_way(kind: Kind, hf: Path, counted: list[int]) -> None:
    """All arrays of a kernel's form are made of one reading of it."""
    source = open_model(hf)
    counted.clear()
    initializer(source.config, MeshConfig(fsdp=8), kind).load_params(source)
    assert weight_bytes(source) <= sum(counted) <= 1.05 * weight_bytes(source)


@pytest.mark.parametrize("int8", [False, True])
def test_decoding(int8: bool, hf: Path, counted: list[int]) -> None:
    source = open_model(hf)
    counted.clear()
    decoder = Decoder(source.config)
    load_weights(decoder, make_mesh(MeshConfig(tensor=8)), source, None, Int8Weight if int8 else None)
    assert sum(counted) <= 1.05 * weight_bytes(source)


class Counted:
    """The chunks that a native source reads, by what it asks of TensorStore."""

    def __init__(self, source: Any) -> None:
        self.source, self.leaves, self.bytes = source, source.leaves, 0

    def read(self, path: str, index: Any) -> np.ndarray:
        leaf = self.leaves[path]
        full = full_index(leaf.shape, index)
        size = leaf.dtype.itemsize
        for part, chunk, end in zip(full, leaf.chunk, leaf.shape, strict=True):
            size *= min(-(-part.stop // chunk) * chunk, end) - part.start // chunk * chunk
        self.bytes += size
        return self.source.read(path, index)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("form", ["converted", "saved"])
def test_jaxlms_own(form: str, mesh: MeshConfig, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted model, and what a training run saves from its shards: in whole chunks."""
    source = open_model(hf)
    monkeypatch.setattr(jaxlm.weights.native.layout, "CHUNK_BYTES", 4 * 64 * 20)  # several chunks a layer
    with output_directory(tmp_path / "jax", 0) as directory:
        write_model(source, directory, lambda nbytes: None)
    if form == "saved":
        state = initializer(source.config, mesh).load_params(source)
        with _context():
            ocp.save_checkpointables(tmp_path / "saved", {"model": {"params": state}})
        (tmp_path / "saved" / "jaxlm").mkdir()
        content = (tmp_path / "jax" / "jaxlm" / "model.json").read_bytes()
        (tmp_path / "saved" / "jaxlm" / "model.json").write_bytes(content)
        (tmp_path / "saved" / "commit_success.txt").touch()
    found = Counted(open_model(tmp_path / ("jax" if form == "converted" else "saved")))
    for path, leaf in found.leaves.items():
        assert not path.startswith("layers/") or leaf.chunk[0] == 1, (path, leaf.chunk)
    loaded = initializer(source.config, mesh).load_params(found)
    assert found.bytes <= 1.05 * weight_bytes(source)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree_of(source))
