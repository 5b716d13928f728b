"""What conversions hold in memory does not grow with the model: here a small part of its largest tensor."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.formats.hf_experts import write_hf
from convert.formats.meta import write_meta
from convert.formats.mindspore import write_mindspore
from convert.source import open_model
from jaxlm.spec import ExpertsSpec, uniform_decoder
from jaxlm.weights.ahead import BYTES_AHEAD
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.leaves import CastSource, LeafInfo, full_index, index_shape, row_blocks
from jaxlm.weights.names import Entry, leaf_shapes

# Embedding and head have 48 MB each, a matrix of the layer 12 MB.
CONFIG = uniform_decoder(
    "llama",
    vocab_size=24000,
    hidden_size=1024,
    intermediate_size=6144,
    num_layers=1,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
)
LIMIT = 10 << 20


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """In place of the one in conftest: the sizes as users have them."""
    yield


class Counting:
    """A bfloat16 model whose elements count up as bits, made block by block."""

    def __init__(self) -> None:
        self.path = self.tokenizer_dir = Path("counting")
        self.config, self.hf_config = CONFIG, None
        self.tokenizer_files: list[Path] = []
        self.prompt_files: list[Path] = []
        self.leaves = {path: LeafInfo(shape, BFLOAT16) for path, shape in leaf_shapes(CONFIG).items()}

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        width, first = int(np.prod(entry.layout.stored[1:])), len(entry.path)  # the head is not the embedding
        for start, stop in row_blocks(entry.layout):
            bits = ((first + np.arange(start * width, stop * width, dtype=np.uint32)) % 0x7000).astype(np.uint16)
            yield bits.view(BFLOAT16).reshape(stop - start, *entry.layout.stored[1:])

    def read(self, path: str, index: Any) -> np.ndarray:
        raise AssertionError("a whole leaf was asked for")


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def nothing(nbytes: int) -> None:
    pass


def test_peak_is_a_few_blocks(tmp_path: Path) -> None:
    names = "hf", "meta", "ms", "hf2", "ms2", "cast"
    hf, meta, ms, hf2, ms2, cast = (tmp_path / name for name in names)
    for name in names:
        (tmp_path / name).mkdir()
    source: Any = Counting()
    assert peak(lambda: write_hf(source, hf, 10**9, nothing)) < LIMIT
    # What is opened is part of it.
    assert peak(lambda: write_meta(open_model(hf), meta, 4, nothing)) < LIMIT
    assert peak(lambda: write_mindspore(open_model(meta), ms, nothing, joined=True, crc=True)) < LIMIT
    assert peak(lambda: write_hf(open_model(ms), hf2, 10**8, nothing)) < LIMIT
    assert peak(lambda: write_mindspore(open_model(hf2), ms2, nothing)) < LIMIT
    assert peak(lambda: write_hf(CastSource(open_model(ms2), "float32"), cast, 10**9, nothing)) < LIMIT
    # All the way round: nothing was lost.
    first, last = open_model(hf), open_model(ms2)
    rows = (slice(23990, None),)
    assert first.read("lm_head/kernel", rows).tobytes() == last.read("lm_head/kernel", rows).tobytes()
    part = (slice(0, 1), slice(500, 510))
    for leaf in ("layers/self_attn/q_proj/kernel", "layers/mlp/down_proj/kernel"):
        assert first.read(leaf, part).tobytes() == last.read(leaf, part).tobytes()


class Experts:
    """Five layers of experts with matrices of 8 MB, all zero, neurons in another order."""

    def __init__(self) -> None:
        self.path = self.tokenizer_dir = Path("experts")
        self.config, self.hf_config = (
            uniform_decoder(
                "llama",
                vocab_size=64,
                hidden_size=512,
                intermediate_size=8192,
                num_layers=5,
                num_heads=8,
                num_kv_heads=8,
                head_dim=64,
                experts=ExpertsSpec(8, "learned", top_k=(2,)),
            ),
            None,
        )
        self.tokenizer_files: list[Path] = []
        self.prompt_files: list[Path] = []
        self.leaves = {path: LeafInfo(shape, BFLOAT16) for path, shape in leaf_shapes(self.config).items()}
        self.partition = np.tile(np.arange(8191, -1, -1, dtype=np.int32), (5, 1))

    def read(self, path: str, index: Any) -> np.ndarray:
        return np.zeros(index_shape(full_index(self.leaves[path].shape, index)), BFLOAT16)


def test_experts_are_a_matrix_at_a_time(tmp_path: Path) -> None:
    source: Any = Experts()
    for layout in ("dense", "mixtral"):
        (tmp_path / layout).mkdir()
        found = peak(lambda layout=layout: write_hf(source, tmp_path / layout, 10**9, nothing, layout))
        assert found < ((8 + 6) << 20) + BYTES_AHEAD
    # And the way back: a slice of one layer in the order of the experts.
    for layout in ("dense", "mixtral"):
        for leaf in ("layers/mlp/down_proj/kernel", "layers/mlp/up_proj/kernel"):
            assert peak(lambda leaf=leaf, layout=layout: open_model(tmp_path / layout).read(leaf, (slice(3, 4),))) < (
                (8 + 6) << 20
            )
