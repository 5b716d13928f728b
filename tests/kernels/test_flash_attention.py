"""The TPU kernels of flash attention, interpreted on a CPU, against the plain form; and compiled where libtpu is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxlm.errors import UserError
from jaxlm.kernels import flash_attention as package
from jaxlm.kernels.flash_attention import flash_attention, tpu_backward
from jaxlm.kernels.flash_attention.schedule import COMPUTE, MASKED, Spec, make_schedule
from jaxlm.nn.attention import MaskSpec, attention, reference_attention
from jaxlm.nn.positions import alibi_slopes
from tests.kernels.ahead_of_time import compile_for_tpus

BLOCK = 8


@pytest.fixture(scope="module", autouse=True)
def short_registers() -> Iterator[None]:
    """Lengths are padded to 4 and not to 128, so that short rows end within a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "LANES", 4)
        yield


def tensors(length: int, heads: tuple[int, int], dim: int = 4, batch: int = 2, seed: int = 0) -> list[np.ndarray]:
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, n, dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def compiled(
    fast: bool,
    window: int | None = None,
    causal: bool = True,
    blocks: tuple[int, int] = (BLOCK, BLOCK),
    alibi: bool = False,
) -> Any:
    """(q, k, v, cotangent, segments) -> output and gradients, 0 where a query is padding."""

    def run(q: Any, k: Any, v: Any, cotangent: Any, segments: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            if fast:
                options = dict(causal=causal, window=window, block_q=blocks[0], block_k=blocks[1], interpret=True)
                slopes = jnp.asarray(alibi_slopes(q.shape[2])) if alibi else None
                out = flash_attention(q, k, v, segments, slopes=slopes, **options)[0]
            else:
                out = reference_attention(q, k, v, MaskSpec(segments, causal, window, alibi=alibi))
            if segments is not None and not fast:
                out = jnp.where((segments == 0)[:, :, None, None], 0.0, out)
            return jnp.sum(out * cotangent), out

        (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return jax.jit(run)


def agree(found: Any, expected: Any) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)


@st.composite
def segment_rows(draw: st.DrawFn, length: int) -> np.ndarray:
    """Documents of any length from 1 on, and padding (0) behind them."""
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=6)))
    row = np.zeros(length, np.int32)
    for number, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False), 1):
        row[start:stop] = number
    return row


# Lengths: one; a block; ragged ends of one and of three rows. Every ratio of heads; windows of 1, below and above a
# block; blocks of different sizes.
STATIC: list[Any] = [
    (1, (2, 1), None, (8, 8)),
    (8, (2, 2), 64, (8, 8)),
    (19, (4, 1), 3, (8, 16)),
    (33, (4, 2), None, (16, 8)),
    (33, (1, 1), 11, (8, 8)),
    (27, (2, 1), 1, (8, 8)),
]


@pytest.mark.parametrize(("length", "heads", "window", "blocks"), STATIC)
@settings(max_examples=3)
@given(data=st.data())
def test_packed_rows(length: int, heads: Any, window: int | None, blocks: Any, data: st.DataObject) -> None:
    segments = np.stack([data.draw(segment_rows(length)), data.draw(segment_rows(length))])
    arguments = (*tensors(length, heads), segments)
    agree(compiled(True, window, True, blocks)(*arguments), compiled(False, window)(*arguments))


@pytest.mark.parametrize(
    ("length", "window", "causal"), [(19, None, True), (35, 5, True), (19, None, False), (19, 6, False)]
)
def test_one_segment(length: int, window: int | None, causal: bool) -> None:
    arguments = (*tensors(length, (2, 1)), None)
    agree(compiled(True, window, causal)(*arguments), compiled(False, window, causal)(*arguments))


def test_segments_in_any_order() -> None:
    """Ids need not be sorted, nor a segment be in one piece."""
    segments = np.array([[2] * 6 + [1] * 6 + [2] * 3 + [0] * 2 + [1] * 2, [3] * 19], np.int32)
    arguments = (*tensors(19, (2, 1)), segments)
    agree(compiled(True)(*arguments), compiled(False)(*arguments))


@pytest.mark.parametrize(
    ("length", "heads", "window", "blocks"),
    [(33, (6, 2), None, (16, 8)), (19, (3, 3), 7, (8, 16))],
)
def test_alibi(length: int, heads: Any, window: int | None, blocks: Any) -> None:
    """Numbers of heads that are no powers of two; several segments and padding."""
    arguments = (*tensors(length, heads), np.stack([np.repeat([1, 2, 0], [9, length - 11, 2]), np.ones(length, int)]))
    expected = compiled(False, window, alibi=True)(*arguments)
    agree(compiled(True, window, True, blocks, alibi=True)(*arguments), expected)
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(expected, compiled(False, window)(*arguments), strict=True))


def test_alibi_far_from_the_first_token() -> None:
    """Places are counted within a block: counted from the start of a row, thousands would cost near keys digits.

    What 512 of them cost, 2**-15 of a weight, is below the rounding of weights to bfloat16.
    """
    q, k, v, _ = tensors(4096, (1, 1), batch=1)
    slope = float(np.float32(0.84))
    run = jax.jit(functools.partial(flash_attention, slopes=np.float32([slope]), window=512, interpret=True))
    out, lse = (np.asarray(x)[0, -1, 0] for x in run(q, k, v))
    scores = k[0, -512:, 0].astype(float) @ q[0, -1, 0] / 2 - slope * np.arange(511, -1, -1)
    weights = np.exp(scores)
    np.testing.assert_allclose(out, weights @ v[0, -512:, 0] / weights.sum(), rtol=0, atol=3e-5)
    np.testing.assert_allclose(lse, np.log(weights.sum()), rtol=0, atol=3e-5)


@pytest.mark.parametrize("slopes", [None, np.float32([0.25, 0.7])])
def test_soft_cap_scale_and_lse(slopes: np.ndarray | None) -> None:
    """Values, log-sum-exp and the gradients of both, against the formula."""
    q, k, v, cotangent = tensors(19, (2, 1), batch=1)
    of_lse = np.random.default_rng(1).normal(size=(1, 19, 2)).astype(np.float32)

    def plain(q: Any, k: Any, v: Any) -> Any:
        scores = 2.0 * jnp.tanh(0.7 * jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / 2.0)
        if slopes is not None:
            scores = scores - slopes[:, None, None] * (np.arange(19)[:, None] - np.arange(19))
        scores = jnp.where(np.tri(19, dtype=bool), scores, -jnp.inf)
        out = jnp.einsum("bhts,bsd->bthd", jax.nn.softmax(scores), v[:, :, 0])
        return out, jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2)

    def fast(q: Any, k: Any, v: Any) -> Any:
        return flash_attention(q, k, v, soft_cap=2.0, scale=0.7, slopes=slopes, block_q=8, block_k=8, interpret=True)

    found, back = jax.vjp(jax.jit(fast), q, k, v)
    expected, plain_back = jax.vjp(plain, q, k, v)
    for a, b in zip((*found, *back((cotangent, of_lse))), (*expected, *plain_back((cotangent, of_lse))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_attention_hands_on_what_becomes_of_scores() -> None:
    q, k, v, _ = tensors(19, (3, 1), batch=1)
    mask = MaskSpec(scale=0.7, soft_cap=2.0, alibi=True, window=9)
    with pltpu.force_tpu_interpret_mode():
        found = attention(q, k, v, mask, "pallas_tpu")
    np.testing.assert_allclose(found, reference_attention(q, k, v, mask), rtol=0, atol=2e-5)


def test_keys_of_other_rows() -> None:
    """Cross-attention: sources of another length, padding on both sides, and a document without a source."""
    q, _, _, cotangent = tensors(19, (2, 1))
    _, k, v, _ = tensors(13, (2, 1), seed=1)
    ids, key_ids = (np.repeat([[1, 2, 3, 0]], sizes, axis=1).repeat(2, 0) for sizes in ([7, 6, 3, 3], [4, 7, 0, 2]))
    mask = MaskSpec(ids.astype(np.int32), False, key_segment_ids=key_ids.astype(np.int32))

    def run(name: str) -> Any:
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, mask, name), q, k, v)
        return out, *back(cotangent)

    with pltpu.force_tpu_interpret_mode():
        agree(jax.jit(run, static_argnums=0)("pallas_tpu"), jax.jit(run, static_argnums=0)("reference"))


def test_padding_gives_zero() -> None:
    segments = np.zeros((2, 19), np.int32)
    segments[0, :4] = 1
    for result in compiled(True)(*tensors(19, (2, 1)), segments):
        assert np.any(result[0, :4]) and not np.any(result[0, 4:]) and not np.any(result[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "cotangent"])
def test_what_is_broken_stays_in_its_segment(which: str, bad: float) -> None:
    """Values and gradients of other segments and of earlier queries are the same to the bit; what sees it is NaN."""
    arguments = tensors(19, (2, 1))
    segments = np.repeat([[1, 2, 0]], [7, 9, 3], axis=1).repeat(2, 0).astype(np.int32)
    clean = [np.asarray(a) for a in compiled(True)(*arguments, segments)]
    at = ["q", "k", "v", "cotangent"].index(which)
    arguments[at] = arguments[at].copy()
    arguments[at][0, 10, 0, 1] = bad
    broken = [np.asarray(a) for a in compiled(True)(*arguments, segments)]
    arguments[at][0, 17] = bad  # in the padding
    for a, b in zip(broken, compiled(True)(*arguments, segments), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, a, b in zip(("out", "dq", "dk", "dv"), broken, clean, strict=True):
        elsewhere = np.ones(a.shape, bool)
        elsewhere[0, 7:16] = False
        np.testing.assert_array_equal(a[elsewhere], b[elsewhere], err_msg=name)
        if name in ("out", "dq"):
            np.testing.assert_array_equal(a[0, 7:10], b[0, 7:10], err_msg=name)
    if np.isinf(bad):
        return  # a score of minus infinity is a weight of 0, rightly
    seen = broken[0][0, 10:16] if which in ("k", "v") else broken[0][0, 10, 0] if which == "q" else broken[3][0, 7:11]
    assert np.isnan(seen).any(axis=-1).all()


def test_races() -> None:
    """The interpreter that plays out every copy, with its check for races."""
    q, k, v, cotangent = tensors(19, (2, 1), batch=1)
    segments = np.repeat([[1, 2, 0]], [7, 9, 3], axis=1).astype(np.int32)

    def total(q: Any, k: Any, v: Any) -> Any:
        mode = pltpu.InterpretParams(detect_races=True)
        return jnp.sum(flash_attention(q, k, v, segments, block_q=8, block_k=8, interpret=mode)[0] * cotangent)

    cotangent = np.where(segments[..., None, None] == 0, 0, cotangent)
    found = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    for a, b in zip(found, compiled(False)(q, k, v, cotangent, segments)[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_bfloat16() -> None:
    """In and out in bfloat16; sums and softmax are float32, so errors are roundings of inputs to the products."""
    q, k, v, cotangent = (jnp.asarray(a, jnp.bfloat16) for a in tensors(19, (2, 1), dim=16))
    segments = np.ones((2, 19), np.int32)
    found = compiled(True)(q, k, v, cotangent, segments)
    exact = compiled(False)(*(jnp.asarray(a, jnp.float32) for a in (q, k, v, cotangent)), segments)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=4 * 2**-9 * np.abs(b).max())


def test_query_heads_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the dq of a whole group of heads does not fit on the chip, kv gradients are summed over parts of it."""
    arguments = (*tensors(19, (4, 1)), np.ones((2, 19), np.int32))
    one = 4 * 24 * 128
    monkeypatch.setattr(tpu_backward, "DQ_BYTES", 2 * one)
    assert tpu_backward._head_parts(4, 24, 4) == 2
    compiled.cache_clear()
    agree(compiled(True, alibi=True)(*arguments), compiled(False, alibi=True)(*arguments))
    compiled.cache_clear()
    monkeypatch.setattr(tpu_backward, "DQ_BYTES", one - 1)
    with pytest.raises(UserError, match=r"rows of 24 with head dim 4 need 12288 bytes .* shorter rows"):
        compiled(True)(*arguments)


def steps(
    length: int, block: int, segments: np.ndarray | None, window: int | None = None, by_keys: bool = False
) -> Any:
    spec = Spec(True, window, None, 1.0, length, length, block, block)
    return make_schedule(spec, 1 if segments is None else len(segments), segments, segments, by_keys)


@pytest.mark.parametrize("by_keys", [False, True])
def test_what_the_mask_empties_is_not_visited(by_keys: bool) -> None:
    assert steps(4096, 512, None, by_keys=by_keys).steps == 8 * 9 // 2
    assert steps(4096, 512, None, window=512, by_keys=by_keys).steps == 8 + 7
    eight = np.repeat(np.arange(1, 9, dtype=np.int32), 1024)[None]
    packed = steps(8192, 512, eight, by_keys=by_keys)
    assert packed.steps == 8 * 3  # of 136 without segments
    flags = np.asarray(packed.flags)[:24]
    assert np.all(flags & COMPUTE) and np.sum((flags & MASKED) != 0) == 16
    padded = steps(8192, 512, np.where(eight < 3, eight, 0), by_keys=by_keys)
    # Two documents; blocks of padding are visited once, to write zeros.
    assert padded.steps == 2 * 3 + 12
    assert np.sum((np.asarray(padded.flags)[:18] & COMPUTE) != 0) == 6


def kernels(run: Any, *arguments: Any) -> list[str]:
    """Names of the kernels whose results a program uses."""
    found: list[str] = []

    def walk(jaxpr: Any) -> None:
        read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                if any(id(v) in read for v in equation.outvars):
                    found.append(equation.params["name"].rsplit("_", 1)[1])
            else:
                for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                        walk(getattr(value, "jaxpr", value))

    walk(jax.make_jaxpr(run)(*arguments).jaxpr)
    return found


@pytest.mark.parametrize(("policy", "expected"), [("full", 2), ("qkv", 2), ("qkv_out", 1)])
def test_remat_finds_the_output(policy: str, expected: int) -> None:
    from jaxlm.models.decoder import REMAT_POLICIES

    q, k, v, _ = tensors(8, (2, 1))

    def block(q: Any) -> Any:
        return jnp.sum(flash_attention(jnp.sin(q), k, v)[0])

    names = kernels(jax.value_and_grad(jax.checkpoint(block, policy=REMAT_POLICIES[policy])), q)
    assert names.count("forward") == expected and names.count("backward") == 1


def test_sharded() -> None:
    """Rows over one mesh axis and heads over the other: the same numbers."""
    mesh = jax.make_mesh(
        (2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    q, k, v, cotangent = tensors(19, (4, 2))
    segments = np.repeat([[1, 2, 0]], [7, 9, 3], axis=1).repeat(2, 0).astype(np.int32)
    segments[1] = 1

    def run(q: Any, k: Any, v: Any, **axes: Any) -> Any:
        def total(*qkv: Any) -> Any:
            options = dict(slopes=jnp.asarray(alibi_slopes(4)), block_q=8, block_k=8, interpret=True)
            out, lse = flash_attention(*qkv, segments, **options, **axes)
            return jnp.sum(out * cotangent), (out, lse)

        (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return *out, *grads

    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(run, rows_axes=("fsdp",), heads_axes="tensor"))(q, k, v)
    for a, b in zip(found, jax.jit(run)(q, k, v), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.isneginf(found[1][0, 16:])) and np.all(np.isfinite(found[1][0, :16]))


def test_heads_moved_along_the_sequence_axis_keep_their_slopes() -> None:
    """Heads are over two mesh axes in there: every device takes its own."""
    from jaxlm.config import MeshConfig
    from jaxlm.devices.mesh import make_mesh, use_mesh

    q, k, v, _ = tensors(16, (8, 2))
    mask = MaskSpec(alibi=True)
    config = MeshConfig(data=1, fsdp=1, sequence=2, tensor=2)
    with use_mesh(make_mesh(config, jax.devices()[:4])), pltpu.force_tpu_interpret_mode():
        found = jax.jit(lambda *args: attention(*args, mask, "pallas_tpu"))(q, k, v)
    np.testing.assert_allclose(found, reference_attention(q, k, v, mask), rtol=0, atol=2e-5)


def test_errors() -> None:
    q, k, v, _ = tensors(8, (4, 2))
    ids = np.ones((2, 8), np.int32)
    for arguments, options, message in [
        ((q, k[:, :, :1], v), {}, r"do not go together; give q \[B, T, H, h\]"),
        ((q[:, :, :3], k, v), {}, r"do not go together"),
        ((q, k.astype(np.float16), v), {}, r"float32, float16 and float32; cast them"),
        ((q, k, v), {"window": 0}, r"window 0 lets a query see nothing"),
        ((q, k, v, ids[:, :7]), {}, r"segment_ids \(2, 7\) should be \(2, 8\)"),
        ((q, k, v, None, ids), {}, r"kv_segment_ids without segment_ids"),
        ((q, k, v), {"slopes": alibi_slopes(2)}, r"slopes \(2,\) of 4 heads, causal is True; give one for each head"),
        ((q, k, v), {"slopes": alibi_slopes(4), "causal": False}, r"causal is False; .* use attention 'xla'"),
    ]:
        with pytest.raises(UserError, match=message):
            flash_attention(*(jnp.asarray(a) if a is not None else None for a in arguments), **options)
    with pytest.raises(UserError, match=r"too many for a TPU's scalar memory"):
        steps(2**18, 128, None)


AHEAD_OF_TIME = """
from jaxlm.kernels.flash_attention import flash_attention

def both(topology, length, heads, kv_heads, dim, **options):
    alibi = options.pop("alibi", False)
    def run(q, k, v, ids, slopes):
        slopes = slopes if alibi else None
        out, back = jax.vjp(lambda *a: flash_attention(*a, ids, slopes=slopes, **options)[0], q, k, v)
        return out, back(out)
    x, y = ((jnp.bfloat16, 1, length, n, dim) for n in (heads, kv_heads))
    compile("flash_attention", topology, run, x, y, y, (jnp.int32, 1, length), (jnp.float32, heads), kernels=2)

for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    both(topology, 2048, 32, 32, 128)  # LLaMA-2-7B
    both(topology, 2048, 64, 8, 128)  # LLaMA-2-70B
    both(topology, 2048, 32, 32, 128, alibi=True)  # BLOOM-7b1
both("v6e:2x2", 640, 2, 1, 80, window=100, soft_cap=30.0)
both("v5e:2x2", 640, 71, 1, 64, window=100, soft_cap=30.0, alibi=True)
both("v5p:2x2x1", 2048, 16, 8, 256, window=1024, soft_cap=50.0)  # Gemma 2 9B
"""


@pytest.mark.slow
def test_compiles_for_tpus() -> None:
    assert len(compile_for_tpus(AHEAD_OF_TIME)) == 12


def test_in_the_model() -> None:
    """`attention: pallas_tpu` gives the loss and the gradients of the plain form, on a mesh, under remat."""
    import flax.linen as nn

    from jaxlm.config import MeshConfig
    from jaxlm.devices.mesh import make_mesh, use_mesh
    from jaxlm.models.decoder import Decoder
    from jaxlm.spec import uniform_decoder

    config = uniform_decoder(
        "llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32, (4, 19)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], [7, 9, 3], axis=1).repeat(4, 0).astype(np.int32)
    weights = (segments > 0).astype(np.float32)
    params = nn.unbox(Decoder(config).init(jax.random.key(0), ids)["params"])

    def loss(params: Any, name: str) -> Any:
        model = Decoder(config, attention=name, remat="qkv_out")
        return model.apply({"params": params}, ids, weights, segment_ids=segments, method="loss").loss

    expected = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, "reference")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with use_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        from jaxlm.nn import attention

        patch.setattr(attention, "flash_attention", functools.partial(flash_attention, interpret=True))
        found = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, "pallas_tpu")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
