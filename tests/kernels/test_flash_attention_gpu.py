"""The GPU kernels of flash attention: played out on a CPU, and compiled for an H200 where CUDA's tools are."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from jaxlm.errors import UserError
from jaxlm.kernels.flash_attention import flash_attention, gpu, gpu_backward, unsupported
from jaxlm.kernels.flash_attention.schedule import Spec, make_ranges
from jaxlm.nn.attention import MaskSpec, reference_attention
from jaxlm.nn.positions import alibi_slopes
from tests.kernels.ahead_of_time import NO_CUDA_COMPILER, run_for_h200

pytestmark = pytest.mark.slow

LENGTH, HEADS, KV_HEADS, DIM = 23, 2, 1, 16
SEGMENTS = np.repeat([[1, 2, 3, 0]], [3, 15, 1, 4], axis=1).astype(np.int32)


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of keys, and one of queries, at once on the chip: short rows too use a place again."""
    monkeypatch.setattr(gpu, "stages", lambda dim: 2)
    monkeypatch.setattr(gpu_backward, "_stages", lambda dim: 1)


def tensors(length: int = LENGTH) -> list[np.ndarray]:
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(1, length, n, DIM)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


@functools.cache
def compiled(alibi: bool = False, **options: Any) -> Any:
    """(q, k, v, cotangent, segments) -> output and gradients."""

    def run(q: Any, k: Any, v: Any, cotangent: Any, segments: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            mode = InterpretGPUParams(detect_races=True)
            blocks = dict(block_q=16, block_k=8, backend="gpu", interpret=mode)
            slopes = jnp.asarray(alibi_slopes(q.shape[2])) if alibi else None
            return flash_attention(q, k, v, segments, slopes=slopes, **blocks, **options)[0]

        out, back = jax.vjp(attend, q, k, v)
        return out, *back(cotangent)

    return jax.jit(run)


def expected(q: Any, k: Any, v: Any, cotangent: Any, segments: Any, mask: MaskSpec) -> Any:
    def attend(q: Any, k: Any, v: Any) -> Any:
        out = reference_attention(q, k, v, mask)
        return out if segments is None else jnp.where((segments == 0)[:, :, None, None], 0.0, out)

    out, back = jax.vjp(attend, q, k, v)
    return out, *back(cotangent)


def agree(found: Any, wanted: Any) -> None:
    assert not gpu_callbacks.get_races().races_found
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)


def test_packed_rows() -> None:
    """Documents that end within blocks, one of length 1, padding; two query heads share keys; no race."""
    arguments = (*tensors(), SEGMENTS)
    agree(compiled()(*arguments), expected(*arguments, MaskSpec(SEGMENTS)))


@pytest.mark.parametrize("first", ["q", "k"])
def test_what_is_broken_stays_in_its_segment(first: str) -> None:
    """Of q and the cotangent, or of k and v, one is broken in the second document, one in the third, all in padding."""
    clean = [np.asarray(a) for a in expected(*tensors(), SEGMENTS, MaskSpec(SEGMENTS))]
    names = ["q", "k", "v", "cotangent"]
    arguments = dict(zip(names, tensors(), strict=True))
    arguments[first][0, 9, 0, 1] = np.nan
    arguments["v" if first == "k" else "cotangent"][0, 18, 0, 2] = np.nan
    for array in arguments.values():
        array[0, 20] = np.inf
    out, grad_q, grad_k, grad_v = (np.asarray(a) for a in compiled()(*arguments.values(), SEGMENTS))
    for name, a, b in zip(names, (out, grad_q, grad_k, grad_v), clean, strict=True):
        np.testing.assert_allclose(a[0, :3], b[0, :3], rtol=0, atol=2e-5, err_msg=name)
        assert not np.any(a[0, 19:]), name
    np.testing.assert_allclose(out[0, 3:9], clean[0][0, 3:9], rtol=0, atol=2e-5)  # earlier in the same document
    blind = {"q": (out[0, 9, 0], grad_k[0, 3:10], grad_v[0, 18]), "k": (out[0, 9:18], out[0, 18], grad_q[0, 9:18])}[
        first
    ]
    for seen in blind:
        assert np.isnan(seen).any(axis=-1).all()


def test_window_without_segments() -> None:
    arguments = (*tensors(), None)
    agree(compiled(window=5)(*arguments), expected(*arguments, MaskSpec(None, True, 5)))


def test_alibi() -> None:
    """Packed rows, and one document with a soft cap; more blocks of keys than places on the chip."""
    arguments = (*tensors(), SEGMENTS)
    agree(compiled(True)(*arguments), expected(*arguments, MaskSpec(SEGMENTS, alibi=True)))
    arguments = (*tensors(), None)
    mask = MaskSpec(None, alibi=True, soft_cap=1.5, window=11)
    agree(compiled(True, soft_cap=1.5, window=11)(*arguments), expected(*arguments, mask))


def brute_ranges(spec: Spec, ids: np.ndarray, by_keys: bool) -> list[tuple[int, int, set[int]]]:
    """Of each block: the first block it sees, the one behind the last, and which need no mask."""
    place = np.arange(spec.q_length)
    seen = (place[:, None] >= place[None]) & (ids[:, None] == ids[None]) & (ids != 0)[:, None]
    if spec.window is not None:
        seen &= place[:, None] - place[None] < spec.window
    n_q, n_k = spec.blocks
    padded = np.zeros((n_q * spec.block_q, n_k * spec.block_k), bool)
    padded[: spec.q_length, : spec.kv_length] = seen
    tiles = padded.reshape(n_q, spec.block_q, n_k, spec.block_k).transpose(0, 2, 1, 3)
    some, every = tiles.any((2, 3)), tiles.all((2, 3))
    if by_keys:
        some, every = some.T, every.T
    return [
        (int(np.argmax(row)), len(row) - int(np.argmax(row[::-1])) if row.any() else 0, set(np.flatnonzero(whole)))
        for row, whole in zip(some, every, strict=True)
    ]


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("window", [None, 3, 40])
def test_ranges_cover_what_is_visible_and_skip_what_is_not(by_keys: bool, window: int | None) -> None:
    rng = np.random.default_rng(1)
    for length in (1, 8, 23, 23, 23, 64, 64, 64):
        ids = np.sort(rng.integers(0, 5, length)).astype(np.int32)[::-1]
        spec = Spec(True, window, None, 1.0, length, length, 8, 4, "gpu")
        found = np.asarray(make_ranges(spec, 1, jnp.asarray(ids[None]), jnp.asarray(ids[None]), by_keys))[0]
        for (first, whole, behind, end), (low, high, every) in zip(
            found, brute_ranges(spec, ids, by_keys), strict=True
        ):
            assert (first <= low and high <= end) or high == 0
            assert set(range(whole, behind)) <= every  # nothing is left unmasked that needs a mask
            assert first <= whole <= behind <= end or end == 0
            if high and np.all(np.diff(ids) <= 0) and window is None:
                assert (first, end) == (low, high)  # sorted ids: no block is visited in vain


def test_eight_documents_cost_an_eighth() -> None:
    spec = Spec(True, None, None, 1.0, 8192, 8192, 128, 128, "gpu")
    ids = jnp.repeat(jnp.arange(1, 9, dtype=jnp.int32), 1024)[None]
    packed, dense = (np.asarray(make_ranges(spec, 1, i, i, by_keys=False)) for i in (ids, None))
    visits = [int((r[..., 3] - r[..., 0]).sum()) for r in (packed, dense)]
    assert visits == [8 * 36, 64 * 65 // 2]


def test_what_cannot_run_says_so() -> None:
    q = jnp.zeros((1, 8, 2, 24), jnp.bfloat16)
    with pytest.raises(UserError, match="head dim 24 is not a multiple of 16"):
        flash_attention(q, q, q, backend="gpu")
    assert "not float32" in str(unsupported("gpu", dtype="float32", head_dim=64, heads=2, kv_heads=1))
    assert unsupported("gpu", dtype="bfloat16", head_dim=64, heads=2, kv_heads=1) is None


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxlm.kernels.flash_attention import flash_attention

jax.devices("cpu")
h200 = topologies.get_topology_desc(platform="cuda", topology_name="h200", target_config=sys.argv[1], topology="1x1x1")
place = SingleDeviceSharding(h200.devices[0])

def shape(dtype, *dims):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

def run(alibi=False, **options):
    def both(q, k, v, grad, ids, slopes):
        options["slopes"] = slopes if alibi else None
        out, back = jax.vjp(lambda q, k, v: flash_attention(q, k, v, ids, backend="gpu", **options)[0], q, k, v)
        return out, back(grad)
    return both

for heads, kv_heads, dim, options in [
    (32, 32, 128, {}), (64, 8, 128, {"window": 1000}), (8, 1, 256, {}), (8, 4, 80, {}), (8, 2, 64, {"soft_cap": 30.0}),
    (8, 8, 96, {"causal": False}), (32, 32, 128, {"alibi": True}), (71, 1, 64, {"alibi": True}),
]:
    q, k = shape(jnp.bfloat16, 2, 2000, heads, dim), shape(jnp.bfloat16, 2, 2000, kv_heads, dim)
    arguments = q, k, k, q, shape(jnp.int32, 2, 2000), shape(jnp.float32, heads)
    lowered = jax.jit(run(**options)).trace(*arguments).lower(lowering_platforms=("cuda",))
    # Kernels become machine code when the program is written out.
    binary = lowered.compile().runtime_executable().serialize()
    assert binary.count(b"wgmma") or binary.count(b"ELF"), "no machine code"
    print("compiled", heads, kv_heads, dim, flush=True)
"""


@pytest.mark.skipif(
    NO_CUDA_COMPILER,
    reason="needs JAX's CUDA plug-in and ptxas (nvidia-cuda-nvcc), no GPU",
)
def test_compiles_for_an_h200() -> None:
    assert run_for_h200(COMPILE).count("compiled") == 8
