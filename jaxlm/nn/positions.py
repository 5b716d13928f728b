"""Rotary position embeddings: default, linear, dynamic NTK, llama3 and yarn; the slopes of ALiBi; relative biases.

Rotate-half convention (HF): dims i and i + h/2 form a pair. Frequencies are computed in
float32 in the order of operations of transformers' `modeling_rope_utils.py`, so that they
agree with it to the last bit or two.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.spec import PrefixSpec, RelativeBiasSpec, RopeSpec


def _powers(theta: float | jax.Array, head_dim: int) -> jax.Array:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return jnp.asarray(theta, jnp.float32) ** exponents


def _llama3(inv_freq: jax.Array, rope: RopeSpec) -> jax.Array:
    # Long wavelengths are slowed down by `factor`, short ones kept, the band between interpolated.
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and rope.original_max_position_embeddings
    length = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    low, high = length / rope.low_freq_factor, length / rope.high_freq_factor
    smooth = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = jnp.where(wavelength > low, inv_freq / rope.factor, inv_freq)
    return jnp.where((wavelength >= high) & (wavelength <= low), between, scaled)


def _yarn(rope: RopeSpec, head_dim: int, max_position_embeddings: int) -> tuple[jax.Array, float]:
    assert rope.factor
    length = rope.original_max_position_embeddings or max_position_embeddings
    factor = rope.factor

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_factor = rope.attention_factor
    if attention_factor is None:
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = mscale(factor, rope.mscale) / mscale(factor, rope.mscale_all_dim)
        else:
            attention_factor = mscale(factor)

    def dim_of(rotations: float) -> float:
        # The pair that turns `rotations` times over the original context.
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dim_of(rope.beta_fast or 32.0), dim_of(rope.beta_slow or 1.0)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    powers = _powers(rope.rope_theta, head_dim)
    extrapolation = 1 - ramp
    return (1.0 / (factor * powers)) * (1 - extrapolation) + (1.0 / powers) * extrapolation, attention_factor


def _longrope(
    rope: RopeSpec, head_dim: int, max_position_embeddings: int, length: int | jax.Array
) -> tuple[jax.Array, float]:
    original = rope.original_max_position_embeddings
    assert original and rope.short_factor and rope.long_factor
    stretch = rope.factor or max_position_embeddings / original
    factor = rope.attention_factor
    if factor is None:
        factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    long, short = (jnp.asarray(factors, jnp.float32) for factors in (rope.long_factor, rope.short_factor))
    return 1.0 / (jnp.where(jnp.asarray(length) > original, long, short) * _powers(rope.rope_theta, head_dim)), factor


def rope_frequencies(
    rope: RopeSpec, head_dim: int, max_position_embeddings: int, length: int | jax.Array
) -> tuple[jax.Array, float]:
    """Inverse frequencies [h/2] in float32, and the factor on cos and sin.

    Args:
        head_dim: h.
        max_position_embeddings: number of positions that the model was trained for, before any scaling.
        length: number of tokens seen (largest position + 1), a scalar or [..., 1]; only dynamic NTK and longrope depend
            on it, and then the frequencies are [..., h/2].
    """
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, max_position_embeddings)
    if rope.rope_type == "longrope":
        return _longrope(rope, head_dim, max_position_embeddings, length)
    theta: float | jax.Array = rope.rope_theta
    if rope.rope_type == "dynamic":
        assert rope.factor
        longest = jnp.maximum(jnp.asarray(length, jnp.float32), max_position_embeddings)
        stretch = rope.factor * longest / max_position_embeddings - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    inv_freq = 1.0 / _powers(theta, head_dim)
    if rope.rope_type == "linear":
        assert rope.factor
        inv_freq = inv_freq / rope.factor
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    if rope.frequency_dtype is not None:
        inv_freq = inv_freq.astype(rope.frequency_dtype).astype(jnp.float32)
    return inv_freq, 1.0


def rope_cos_sin(
    rope: RopeSpec,
    head_dim: int,
    max_position_embeddings: int,
    positions: jax.Array,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cos and sin, each [B, T, h/2] float32, for positions [B, T].

    Args:
        head_dim, max_position_embeddings: see `rope_frequencies`.
        lengths: [B] number of tokens seen in each row; None: for longrope those of each document, as if it stood alone,
            otherwise the largest position of all rows + 1, as transformers has it.
    """
    if lengths is not None:
        length = lengths[:, None, None]
    elif rope.rope_type == "longrope":
        length = document_lengths(positions)[..., None]
    else:
        length = jnp.max(positions) + 1
    inv_freq, factor = rope_frequencies(rope, head_dim, max_position_embeddings, length)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def document_lengths(positions: jax.Array) -> jax.Array:
    """The largest position + 1 of the document that each token is in, [B, T] like `positions`.

    A document ends where the next token's position is not the next one.
    """
    after = jnp.pad(positions[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    ends = jnp.where(after == positions + 1, positions.shape[1], jnp.arange(positions.shape[1]))
    end = jax.lax.cummin(ends, axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, axis=1) + 1


def prefix_positions(
    prefix: PrefixSpec, ids: jax.Array, positions: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions, the numbers of tokens since the answer began, and segment ids, each [B, T] int32.

    Segment ids are -n for the tokens of segment n which the whole segment sees.

    Args:
        ids, positions: [B, T].
        segment_ids: [B, T], 0 for padding; the tokens of a segment lie side by side. None: one segment.
    """
    segments = jnp.ones_like(positions) if segment_ids is None else segment_ids
    places = jnp.arange(ids.shape[1])
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)

    def counted(values: jax.Array) -> jax.Array:
        """The sum of a segment's values up to each token."""
        values = values.astype(jnp.int32)
        total = jnp.cumsum(values, axis=1)
        return total - jnp.take_along_axis(total - values, first, axis=1)

    is_answer = counted(ids == prefix.start_id) > 0
    standing, is_told = positions, jnp.zeros(ids.shape, bool)
    for mask_id in prefix.mask_ids:
        number = counted(ids == mask_id)
        place = counted(jnp.where((ids == mask_id) & (number == 1), positions, 0))
        standing, is_told = jnp.where((number > 0) & ~is_told, place, standing), is_told | (number > 0)
    return (
        jnp.where(is_answer, standing, positions),
        counted(is_answer),
        jnp.where(is_answer, segments, -segments),
    )


def alibi_slopes(num_heads: int) -> np.ndarray:
    """How far a score sinks for each token between query and key, [H] float32 (arXiv:2108.12409).

    Of 2**n heads the slopes are a geometric series from 2**(-8 / 2**n) to 2**-8. For other numbers of heads, BLOOM's
    rule: those of the next smaller 2**n, then every other one of twice as many heads.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-8.0 * (2 * i + 1) / (2 * power)) for i in range(num_heads - power)]
    return np.asarray(slopes, np.float32)


def relative_buckets(distances: np.ndarray, num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """The class of each distance, place of the key - place of the query, int64 of their shape (T5, arXiv:1910.10683).

    Half of the classes hold one distance each, from 0 on; the others grow as its logarithm, up to `max_distance`. If
    `bidirectional`, keys before and behind the query have half of all classes each; else keys behind it count as 0.
    """
    first = np.zeros(np.shape(distances), np.int64)
    if bidirectional:
        num_buckets //= 2
        first += (distances > 0) * num_buckets
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    single = num_buckets // 2
    logarithms = np.log(np.maximum(distances, 1) / single) / math.log(max_distance / single)
    # Rounded to float32, as transformers computes in it: where float64 is just below a whole number, so is its floor.
    far = single + (logarithms * (num_buckets - single)).astype(np.float32).astype(np.int64)
    return first + np.where(distances < single, distances, np.minimum(far, num_buckets - 1))


def relative_bias(
    table: jax.Array, spec: RelativeBiasSpec, length: int, kv_length: int, bidirectional: bool
) -> jax.Array:
    """What scores get by distance, [H, T + S - 1] float32: `MaskSpec.bias`.

    For a cache of S slots, where a query may stand in any, T is S and S is 1: no key lies behind it.

    Args:
        table: [buckets, H], trained.
        length, kv_length: T and S.
        bidirectional: see `relative_buckets`.
    """
    distances = np.arange(-(length - 1), kv_length)
    buckets = relative_buckets(distances, spec.num_buckets, spec.max_distance, bidirectional)
    return table.astype(jnp.float32)[buckets].T


def apply_rope_by_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """As `apply_rope` of each half of a head by itself, by its half of cos and sin."""
    parts = (jnp.split(part, 2, axis=-1) for part in (x, cos, sin))
    return jnp.concatenate([apply_rope(*half) for half in zip(*parts, strict=True)], axis=-1)


def apply_partial_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """As `apply_rope`, for cos and sin [B, T, r/2]: only the first r dims of each head are turned.

    Args:
        interleaved: whether dims 2 i and 2 i + 1 form a pair, not i and i + r/2.
    """
    rotary = 2 * cos.shape[-1]
    if rotary == x.shape[-1] and not interleaved:
        return apply_rope(x, cos, sin)
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        turned = jnp.concatenate([turned[..., 0::2], turned[..., 1::2]], axis=-1)
    turned = apply_rope(turned, cos, sin)
    if interleaved:
        turned = jnp.stack(jnp.split(turned, 2, axis=-1), axis=-1).reshape(turned.shape)
    return jnp.concatenate([turned, rest], axis=-1)


@jax.custom_vjp
def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, H, h] by cos and sin [B, T, h/2]; computed in float32, returned in x's dtype.

    The gradient turns the other way and keeps nothing of x; none flows into cos and sin.
    """
    return jax.lax.platform_dependent(x, cos, sin, tpu=rotate_by_product, default=rotate_by_halves)


def _apply_rope_fwd(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return apply_rope(x, cos, sin), (cos, sin)


def _apply_rope_bwd(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = residuals
    return apply_rope(grad, cos, -sin), None, None


apply_rope.defvjp(_apply_rope_fwd, _apply_rope_bwd)


def rotate_by_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The rotation as it is written in papers, half against half."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The same with the halves swapped by a product with a matrix of 0, 1 and -1, which is exact.

    On a TPU, halves of the 128 lanes cost a pass over memory in float32; the matrix unit swaps them on the way
    (docs/kernels.md, "Shapes of products").
    """
    half = x.shape[-1] // 2
    swap = np.zeros((2 * half, 2 * half), np.float32)
    index = np.arange(half)
    swap[index + half, index], swap[index, index + half] = -1, 1
    swapped = jnp.einsum(
        "bthd,de->bthe",
        x,
        jnp.asarray(swap, x.dtype),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,  # float32 in one bfloat16 pass would lose digits
    )
    cos, sin = (jnp.concatenate([part, part], axis=-1)[:, :, None, :] for part in (cos, sin))
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
