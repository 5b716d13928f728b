"""The Pallas TPU form of grouped products against the plain twin, in interpret mode; and compiled for real TPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm.errors import UserError
from jaxlm.kernels import grouped_matmul_tpu as tpu
from jaxlm.kernels.grouped_matmul import grouped_matmul
from jaxlm.kernels.groups import Groups, make_groups
from tests.kernels.ahead_of_time import compile_for_tpus

I, O = 136, 264


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Kernels are interpreted; memory that nothing was written to is NaN."""
    with pltpu.force_tpu_interpret_mode():
        yield


def problem(counts: list[int], block: int, spare: int = 0) -> tuple[Any, Any, Groups, np.ndarray, Any]:
    """Rows, matrices, groups, which rows are of used blocks, and a cotangent; NaN in what is never to be read."""
    rng = np.random.default_rng(0)
    groups, starts, rows = make_groups(jnp.array(counts), sum(counts) + spare, block)
    live = np.arange(rows) < int(groups.live) * block
    x, grad = np.zeros((rows, I), np.float32), np.zeros((rows, O), np.float32)
    for start, count in zip(np.asarray(starts), counts, strict=True):
        for side in (x, grad):
            side[start : start + count] = rng.normal(size=(count, side.shape[1]))
    x[~live], grad[~live] = np.nan, np.nan
    w = rng.normal(size=(len(counts), I, O)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), groups, live, jnp.asarray(grad)


def both(name: str, x: Any, w: Any, groups: Groups, grad: Any) -> tuple[Any, Any, Any]:
    """The product and the gradients of x and w."""

    @jax.jit
    def run(x: Any, w: Any, groups: Groups, grad: Any) -> tuple[Any, Any, Any]:
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, groups, name), x, w)
        return out, *pull(grad)

    return run(x, w, groups, grad)


# Groups without rows at the start, between and at the end; of one row; of whole blocks; none at all; blocks to spare.
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("counts", "block", "spare"),
    [([0, 1, 16, 0, 9], 8, 0), ([20, 3, 0, 0, 8], 16, 40), ([0, 0, 0, 0, 0], 8, 9)],
)
@pytest.mark.parametrize("tiled", [False, True])
def test_values_and_gradients(
    counts: list[int], block: int, spare: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiled:  # the last tile of each is a part of one
        monkeypatch.setattr(tpu, "column_tiles", lambda block, inner, columns, itemsize: -(-columns // 128))
        monkeypatch.setattr(tpu, "matrix_tiles", lambda block, inner, columns, itemsize: (2, 3))
    x, w, groups, live, grad = problem(counts, block, spare)
    expected = both("reference", jnp.nan_to_num(x), w, groups, jnp.nan_to_num(grad))
    out, grad_x, grad_w = both("pallas_tpu", x, w, groups, grad)
    np.testing.assert_allclose(out[live], expected[0][live], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(grad_x[live], expected[1][live], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(grad_w, expected[2], rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_accumulates_in_float32() -> None:
    counts = [64, 0, 64]
    groups, _, rows = make_groups(jnp.array(counts), 128, 16)
    x = jnp.ones((rows, 512), jnp.bfloat16)
    w = jnp.full((3, 512, 128), 1 + 2**-7, jnp.bfloat16)
    # 64 rows of 1 + 2^-7, added up in bfloat16, would stop growing by the last digits: 64.5 is exact in float32.
    out, grad_x, grad_w = both("pallas_tpu", x, w, groups, jnp.full((rows, 128), 1 + 2**-7, jnp.bfloat16))
    assert {out.dtype, grad_x.dtype, grad_w.dtype} == {jnp.dtype(jnp.bfloat16)}
    used = np.asarray(groups.live) * 16
    np.testing.assert_array_equal(np.asarray(out[:used], np.float32), 516.0)
    np.testing.assert_array_equal(np.asarray(grad_w[0], np.float32), 64.5)
    np.testing.assert_array_equal(np.asarray(grad_w[1], np.float32), 0.0)


@pytest.mark.parametrize("memory", [tpu.VMEM, tpu.OLD_VMEM])
def test_tiles_fit(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experts of LLaMA-2-7B and 70B, of half a layer and a whole one; on old TPUs the first, in bfloat16."""
    monkeypatch.setattr(tpu, "vector_memory", lambda: memory)
    shapes = [(4096, 1376), (688, 4096), (8192, 3584), (1792, 8192), (8192, 57344), (14336, 8192)]
    for inner, columns in shapes if memory == tpu.VMEM else shapes[:2]:
        for itemsize in (2, 4) if memory == tpu.VMEM else (2,):
            for block in (8, 256):
                tile = tpu._tile(columns, tpu.column_tiles(block, inner, columns, itemsize))
                moving = 2 * itemsize * (block * inner + inner * tile + block * tile)
                assert moving + 4 * block * tile < memory, (inner, columns, itemsize, block)
                down, across = tpu.matrix_tiles(block, inner, columns, itemsize)
                tall, wide = tpu._tile(inner, down), tpu._tile(columns, across)
                assert tall * wide * (8 + 2 * itemsize) < memory
    with pytest.raises(UserError, match=r"moe.compute: pallas_tpu: experts of 28672 inputs and outputs in 32 bits"):
        tpu.column_tiles(256, 28672, 8192, 4)
    # A layer of 16 experts: every row and every matrix is read once.
    if memory == tpu.VMEM:
        assert tpu.column_tiles(256, 4096, 1376, 2) == tpu.column_tiles(256, 688, 4096, 2) == 1


AHEAD = """
from jaxlm.kernels.grouped_matmul import grouped_matmul
from jaxlm.kernels.groups import Groups

def both(x, w, grad, sizes, owner, live, transposed):
    groups = Groups(sizes, owner, live)
    return jax.vjp(lambda x, w: grouped_matmul(x, w, groups, "pallas_tpu", transposed), x, w)[1](grad)

def problem(name, topology, block, inner, columns, dtype, experts=16, blocks=32, transposed=False):
    sizes = ("int32", experts), ("int32", blocks), ("int32",)
    matrix = (columns, inner) if transposed else (inner, columns)
    rows = (dtype, blocks * block, inner), (dtype, experts, *matrix), (dtype, blocks * block, columns)
    compile(name, topology, partial(both, transposed=transposed), *rows, *sizes)

problem("gate_up", "v5e:2x2", 256, 4096, 1376, "bfloat16")
problem("down", "v6e:2x2", 256, 688, 4096, "bfloat16", transposed=True)
problem("smallest", "v5p:2x2x1", 8, 688, 4096, "bfloat16")
problem("float32", "v5e:2x2", 64, 4096, 1376, "float32")
"""


@pytest.mark.slow
def test_compiles_for_tpus() -> None:
    """The gradients, in as many FLOPs as two products of the rows (XLA's own: one of E times as many)."""
    done = compile_for_tpus(AHEAD)
    assert [name for name, *_ in done] == ["gate_up", "down", "smallest", "float32"]
    assert float(done[0][2]) < 1.01 * 2 * 2 * (32 * 256) * 4096 * 1376
