"""Adam whose moments take a byte each: `scale_by_adam_8bit`, in place of `optax.scale_by_adam`.

A moment is kept in blocks of at most 256 neighbours (Dettmers et al. 2022, arXiv:2110.02861) as codes and one float32
scale, the largest size in the block. Codes are quadratic: c of 127 stands for scale · (c/127)², so that what is small
beside its neighbours has more of them; of the second moment it is the square root that is coded so, with 255. They are
computed, not looked up in a table as bitsandbytes' dynamic codes are, because accelerators are slow at look-ups.

With a decay of 0.999 the second moment changes by less than a code at a step: rounded to the nearest it would stand
still, for ever, where its neighbours do too. So it is rounded up or down, up as often as the rest demands, by a
sequence that the step and the place of the element give; there is no random state, and a resumed run has the same bits.
It is never rounded to 0, which would be divided by.

A block lies within the last dim of a tensor, or within the last two where the last is short, so that sharding a tensor
shards its codes and scales alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BLOCK = 256  # most elements of a block
LEAST_BLOCK = 32  # a tensor whose dims allow only shorter ones stays float32
LEAST_SIZE = 4096  # so does a smaller tensor, as in bitsandbytes
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: steps of an even sequence


class Moment(NamedTuple):
    """A moment of all parameters.

    Attributes:
        values: codes with the parameter's shape, int8 of the first moment and uint8 of the second; or the moment
            itself, float32, where it is kept whole.
        scales: float32, see `scales_shape`; none (`optax.MaskedNode`) where the moment is kept whole.
    """

    values: Any
    scales: Any


class ScaleByAdam8bitState(NamedTuple):
    """The state of `scale_by_adam_8bit`: steps taken (int32), and the two moments."""

    count: Any
    mu: Moment
    nu: Moment


def block_dims(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a block, which divide the last two dims; None where blocks would be too short."""
    if len(shape) < 2 or 0 in shape:
        return None
    columns = _divisor(shape[-1], BLOCK)
    rows = _divisor(shape[-2], BLOCK // columns) if columns == shape[-1] else 1
    return (rows, columns) if rows * columns >= LEAST_BLOCK else None


def _divisor(size: int, most: int) -> int:
    return next(number for number in range(min(size, most), 0, -1) if size % number == 0)


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor's scales: that of the tensor, the last two dims divided by those of a block."""
    dims = block_dims(shape)
    assert dims is not None
    return (*shape[:-2], shape[-2] // dims[0], shape[-1] // dims[1])


def _blocks(x: jax.Array) -> jax.Array:
    """[..., m, n] as [..., m / rows, rows, n / columns, columns]."""
    dims = block_dims(x.shape)
    assert dims is not None
    (rows, columns), (m, n) = dims, x.shape[-2:]
    return x.reshape(*x.shape[:-2], m // rows, rows, n // columns, columns)


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(_blocks(x)), axis=(-3, -1))


def _scaled(x: jax.Array, scales: jax.Array) -> jax.Array:
    """x times the scale of its block."""
    return (_blocks(x) * scales[..., :, None, :, None]).reshape(x.shape)


def _inverse(scales: jax.Array) -> jax.Array:
    return jnp.where(scales > 0, 1 / scales, 0)


def encode_first(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes int8 and scales of a first moment, rounded to the nearest."""
    scales = _largest(x)
    share = _scaled(x, _inverse(scales))
    codes = jnp.sign(share) * jnp.round(127 * jnp.sqrt(jnp.minimum(jnp.abs(share), 1)))
    return codes.astype(jnp.int8), scales


def decode_first(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """float32, from codes and scales."""
    share = codes.astype(jnp.float32) / 127
    return _scaled(share * jnp.abs(share), scales)


def encode_second(x: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes uint8 and scales of a second moment (at least 0), rounded up or down.

    Args:
        step: int32; together with an element's place it decides which.
    """
    root = jnp.sqrt(x)
    scales = _largest(root)
    exact = 255 * jnp.sqrt(jnp.minimum(_scaled(root, _inverse(scales)), 1))
    codes = jnp.clip(jnp.floor(exact + _thresholds(x.shape, step)), 1, 255)
    return jnp.where(x > 0, codes, 0).astype(jnp.uint8), scales


def decode_second(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """float32, from codes and scales."""
    return jnp.square(_scaled(jnp.square(codes.astype(jnp.float32) / 255), scales))


def _thresholds(shape: tuple[int, ...], step: jax.Array) -> jax.Array:
    """Numbers in [0, 1) for every element: over the steps spread evenly, and begun at a place of its own."""
    place = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        place = place * jnp.uint32(shape[dim]) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    mixed = place * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    mixed = (mixed ^ (mixed >> 13)) + step.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    return (mixed >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def large_matrices(params: Any) -> Any:
    """True for tensors of two dims or more with `LEAST_SIZE` elements."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1 and math.prod(leaf.shape) >= LEAST_SIZE, params)


def scale_by_adam_8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    coded: Callable[[Any], Any] = large_matrices,
) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`, with moments of a byte an element.

    A step computes with float32 moments; rounded is what is kept of them for the next one.

    Args:
        b1, b2: decay of the moments.
        eps: added to the root of the second moment.
        coded: of the parameters a tree of bools: whose moments are coded. Where blocks would be shorter than
            `LEAST_BLOCK` they are float32 too.
    """

    def is_coded(params: Any) -> Any:
        return jax.tree.map(lambda leaf, wanted: wanted and block_dims(leaf.shape) is not None, params, coded(params))

    def empty(params: Any, dtype: Any) -> Moment:
        mask = is_coded(params)

        def scales(leaf: Any, has_codes: bool) -> Any:
            return jnp.zeros(scales_shape(leaf.shape), jnp.float32) if has_codes else optax.MaskedNode()

        values = jax.tree.map(lambda leaf, c: jnp.zeros(leaf.shape, dtype if c else jnp.float32), params, mask)
        return Moment(values, jax.tree.map(scales, params, mask))

    def init(params: Any) -> ScaleByAdam8bitState:
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), empty(params, jnp.int8), empty(params, jnp.uint8))

    def update(updates: Any, state: ScaleByAdam8bitState, params: Any = None) -> tuple[Any, ScaleByAdam8bitState]:
        count = optax.safe_increment(state.count)
        corrections = 1 - b1 ** count.astype(jnp.float32), 1 - b2 ** count.astype(jnp.float32)

        def leaf(gradient: jax.Array, m: Any, m_scales: Any, v: Any, v_scales: Any) -> tuple[Any, ...]:
            g, has_codes = gradient.astype(jnp.float32), m.dtype == jnp.int8
            if has_codes:
                m, v = decode_first(m, m_scales), decode_second(v, v_scales)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * jnp.square(g)
            out = m / corrections[0] / (jnp.sqrt(v / corrections[1]) + eps)
            if has_codes:
                (m, m_scales), (v, v_scales) = encode_first(m), encode_second(v, count)
            return out.astype(gradient.dtype), m, m_scales, v, v_scales

        structure: Any = jax.tree.structure(updates)
        gradients = jax.tree.leaves(updates)
        kept = [structure.flatten_up_to(tree) for tree in (*state.mu, *state.nu)]
        new = zip(*map(leaf, gradients, *kept), strict=True)
        out, m, m_scales, v, v_scales = (structure.unflatten(column) for column in new)
        return out, ScaleByAdam8bitState(count, Moment(m, m_scales), Moment(v, v_scales))

    return optax.GradientTransformation(init, update)
