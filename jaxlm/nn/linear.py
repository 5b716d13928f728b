"""`Linear`: the one place that knows plain weights, LoRA and int8 weights.

Adapter maths is PEFT's (arXiv:2106.09685; rsLoRA arXiv:2312.03732; DoRA arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxlm.kernels.scatter import split_axes, sum_scattered
from jaxlm.nn.lora import LoraSpec


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(
    x: jax.Array, kernel: jax.Array, in_dims: int, dtype: DTypeLike, axes: tuple[str, ...] | None = None
) -> jax.Array:
    """x [*rows, *in] times kernel [*in, *out] in `dtype`, accumulated in float32.

    Own gradient for three reasons: each backend gets all three products in the shape it is fast at, the kernel's
    gradient keeps the float32 accumulator instead of going through bfloat16, and devices sum it in parts.

    Args:
        in_dims: how many dims are contracted.
        axes: logical axes of the kernel; None: how its gradient is summed is left to the partitioner.
    """
    return _product(x, kernel, in_dims, dtype)


def _product(
    x: jax.Array, kernel: jax.Array, in_dims: int, dtype: DTypeLike, factor: jax.Array | None = None
) -> jax.Array:
    rows = x.ndim - in_dims
    out = jax.ShapeDtypeStruct(x.shape[:rows] + kernel.shape[in_dims:], dtype)
    y = _by_backend(_times, x.astype(dtype), kernel.astype(dtype), rows, in_dims, out, factor=factor)
    # Named, so that a remat policy can keep it: in `dtype`, not as the float32 accumulator.
    return checkpoint_name(y, "matmul")


def _by_backend(
    product: Callable[[jax.Array, jax.Array, int, int], jax.Array],
    a: jax.Array,
    b: jax.Array,
    a_split: int,
    b_split: int,
    out: jax.ShapeDtypeStruct | jax.Array,
    flat_on_tpu: bool = False,
    factor: jax.Array | None = None,
) -> jax.Array:
    """A product of arrays in the shapes they have, or of two matrices; with the shape and dtype of `out`.

    XLA's CPU backend is slow on more than two dims. On a TPU a product can write the layout that attention reads; with
    two dims, copies take a sixth of an attention layer (LLaMA-2-7B, v5e: 24.4 against 20.4 Mcycles). Rows that are
    split over two mesh axes cannot become one dim.

    Args:
        a_split, b_split: dims in front of it become the rows of the matrix, the others its columns.
        flat_on_tpu: two dims are the better shape there too.
        factor: float32, the product's trailing dims; it multiplies the accumulator, before the one rounding.
    """
    factors = () if factor is None else (factor,)

    def flat(a: jax.Array, b: jax.Array, *factors: jax.Array) -> jax.Array:
        y = product(_as_matrix(a, a_split), _as_matrix(b, b_split), 1, 1)
        for each in factors:
            y = y * each.reshape(-1)
        # Cast first: behind a reshape the cast would not become part of the product.
        return y.astype(out.dtype).reshape(out.shape)

    def whole(a: jax.Array, b: jax.Array, *factors: jax.Array) -> jax.Array:
        y = product(a, b, a_split, b_split)
        for each in factors:
            y = y * each
        return y.astype(out.dtype)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape.get("sequence", 1) > 1:
        return whole(a, b, *factors)
    if flat_on_tpu:
        return flat(a, b, *factors)
    return cast(jax.Array, jax.lax.platform_dependent(a, b, *factors, tpu=whole, default=flat))


def _as_matrix(x: jax.Array, split: int) -> jax.Array:
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))


def _dot(a: jax.Array, b: jax.Array, a_dims: range, b_dims: range) -> jax.Array:
    dims = ((tuple(a_dims), tuple(b_dims)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _times(x: jax.Array, kernel: jax.Array, rows: int, in_dims: int) -> jax.Array:
    return _dot(x, kernel, range(rows, x.ndim), range(in_dims))


def _times_transposed(grad: jax.Array, kernel: jax.Array, rows: int, in_dims: int) -> jax.Array:
    return _dot(grad, kernel, range(rows, grad.ndim), range(in_dims, kernel.ndim))


def _transposed_times(x: jax.Array, grad: jax.Array, rows: int, _: int) -> jax.Array:
    return _dot(x, grad, range(rows), range(rows))


def _matmul_fwd(
    x: jax.Array, kernel: jax.Array, in_dims: int, dtype: DTypeLike, axes: tuple[str, ...] | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not through `matmul`: a remat policy does not see into a function with a gradient of its own.
    return _product(x, kernel, in_dims, dtype), (x, kernel)


def _matmul_bwd(
    in_dims: int,
    dtype: DTypeLike,
    axes: tuple[str, ...] | None,
    residuals: tuple[jax.Array, jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    grad, rows = grad.astype(dtype), x.ndim - in_dims
    # Of the feed-forward layer a TPU computes the gradients faster as matrices, but not the forward product, into
    # which the activation is fused: LLaMA-2-7B, 2 x 2048 tokens per v5e chip, 0.45 against 0.55 Gcycles per step.
    flat = kernel.ndim == 2
    return (
        _by_backend(_times_transposed, grad, kernel.astype(dtype), rows, in_dims, x, flat),
        _kernel_gradient(x.astype(dtype), grad, kernel, rows, axes, flat),
    )


def _kernel_gradient(
    x: jax.Array, grad: jax.Array, kernel: jax.Array, rows: int, axes: tuple[str, ...] | None, flat: bool
) -> jax.Array:
    """[*in, *out] of x [*rows, *in] and grad [*rows, *out]; where the kernel is split over `embed`, a part of it each.

    Of the LLaMA-2-7B step on 16 v5e chips devices send each other 60 GB, in place of 80, and it peaks at 9.0, not 9.6
    GiB.
    """
    split = [()] * kernel.ndim if axes is None else split_axes(kernel.shape, axes)
    tokens = split_axes(x.shape[:rows], ("batch", "length")) if rows == 2 else []
    token_axes = [name for one in tokens for name in one]
    at = axes.index("embed") if axes is not None and "embed" in axes else 0
    shards, inner = split[at], [() if dim == at else one for dim, one in enumerate(split)]
    if not shards or not set(shards) <= set(token_axes) or {name for one in inner for name in one} & set(token_axes):
        return _by_backend(_transposed_times, x, grad, rows, rows, kernel, flat)

    def local(x: jax.Array, grad: jax.Array) -> jax.Array:
        # The dim that is cut up comes first, so that parts are contiguous.
        a, b = (x, grad) if at == 0 else (grad, x)
        out = jax.ShapeDtypeStruct(a.shape[rows:] + b.shape[rows:], jnp.float32)
        found = sum_scattered(_by_backend(_transposed_times, a, b, rows, rows, out, flat), shards)
        others = tuple(name for name in token_axes if name not in shards)
        found = jax.lax.psum(found, others) if others else found
        return found if at == 0 else jnp.moveaxis(found, 0, -1)

    in_dims = x.ndim - rows
    specs = P(*tokens, *inner[:in_dims]), P(*tokens, *inner[in_dims:])
    return jax.shard_map(local, in_specs=specs, out_specs=P(*split), check_vma=False)(x, grad).astype(kernel.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _matmul_scaled(
    x: jax.Array,
    kernel: jax.Array,
    factor: jax.Array | None,
    in_dims: int,
    dtype: DTypeLike,
    axes: tuple[str, ...] | None = None,
) -> jax.Array:
    """`matmul`; or x times an int8 kernel and its factors: int8 is exact in bfloat16, so only the result is rounded."""
    if factor is None:
        return matmul(x, kernel, in_dims, dtype, axes)
    return _product(x, kernel, in_dims, dtype, factor)


@partial(jax.checkpoint, prevent_cse=False)
def _rescaled(plain: jax.Array, dropped: jax.Array, update: jax.Array, ratio: jax.Array) -> jax.Array:
    """DoRA's output: plain + (ratio - 1) dropped + ratio update, [*rows, *out], in float32 and rounded once.

    In bfloat16 a ratio of 1.0025 would be 1. What the backward pass keeps are the arguments, not their float32 copies.

    Args:
        plain: x W.
        dropped: the same of the input that the adapter sees; `plain` itself where nothing is dropped.
        update: x A B, scaled.
        ratio: [*out] float32, magnitude over norm.
    """
    base, seen = plain.astype(jnp.float32), dropped.astype(jnp.float32)
    return (base + (ratio - 1) * seen + ratio * update.astype(jnp.float32)).astype(plain.dtype)


def quantize(kernel: np.ndarray, in_dims: int) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [*in, *out] as int8 and its float32 factors [*out]: kernel ~ int8 * factor, rounded to nearest.

    Args:
        in_dims: how many leading dims are contracted.
    """
    kernel = kernel.astype(np.float32)
    axes = tuple(range(in_dims))
    largest = np.abs(kernel).max(axis=axes)
    factor = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
    return np.rint(kernel / factor).astype(np.int8), factor


class Linear(nn.Module):
    """y = x W (+ b), with an optional adapter.

    Attributes:
        in_dims: trailing dims of the input that are contracted, e.g. (D,) or (H, h).
        out_dims: dims of the output, e.g. (F,) or (H, h).
        in_axes, out_axes: their logical axis names.
        use_bias: whether there is a bias [*out].
        adapter: LoRA of this layer (lives in the `lora` collection), or None.
        dtype: compute dtype.
        param_dtype: dtype of kernel and bias; adapters are float32.
        init_std: standard deviation of a fresh kernel.
        quantized: the kernel is int8 with a float32 factor per output (see `quantize`); inference only.
    """

    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    use_bias: bool = False
    adapter: LoraSpec | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    init_std: float = 0.02
    quantized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, deterministic: bool = True) -> jax.Array:
        """x [..., *in] -> [..., *out]; `layer` is this layer's index, which ranks and scales may depend on."""
        kernel, factor = self._kernel()
        if self.adapter is None:
            y = _matmul_scaled(x, kernel, factor, len(self.in_dims), self.dtype, self.in_axes + self.out_axes)
        else:
            y = self._adapted(x, kernel, factor, self.adapter, layer, deterministic)
        if self.use_bias:
            y = y + self._bias().astype(self.dtype)
        return y

    def _kernel(self) -> tuple[jax.Array, jax.Array | None]:
        """The kernel [*in, *out] as it is stored, and the factors [*out] of an int8 one."""
        init = nn.initializers.zeros if self.quantized else nn.initializers.normal(self.init_std)
        kernel: Any = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.in_axes + self.out_axes),
            self.in_dims + self.out_dims,
            jnp.int8 if self.quantized else self.param_dtype,
        )
        factor: Any = None
        if self.quantized:
            ones = nn.with_logical_partitioning(nn.initializers.ones, self.out_axes)
            factor = self.param("kernel_scale", ones, self.out_dims, jnp.float32)
        return kernel, factor

    def _bias(self) -> jax.Array:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.out_axes)
        return cast(jax.Array, self.param("bias", zeros, self.out_dims, self.param_dtype))

    def _factors(self, spec: LoraSpec, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The adapter's A [*in, R], times its scale, and B [R, *out]."""
        fan_in, rank = math.prod(self.in_dims), spec.rank

        def init_a(key: Any) -> jax.Array:
            # PEFT: kaiming_uniform(a=sqrt(5)) on [R, in]. Columns behind this layer's own rank stay zero.
            bound = 1.0 / math.sqrt(fan_in // (spec.blocks if by_input else 1))
            a = jax.random.uniform(key, (fan_in, rank), jnp.float32, -bound, bound)
            live = jnp.arange(rank) < jnp.asarray(spec.ranks)[layer]
            a = jnp.where(live, a, 0.0)
            return (own(a, 0) if by_input else a).reshape(*self.in_dims, rank)

        by_input = self.in_axes == ("mlp",)  # the side of the neurons, which are in blocks by expert

        def own(factor: jax.Array, neurons: int) -> jax.Array:
            """Zero where a neuron and a rank are not of one expert; the gradient is too."""
            if spec.blocks == 1:
                return factor
            per_expert = jnp.asarray(spec.ranks)[layer] // spec.blocks
            expert = jax.lax.broadcasted_iota(jnp.int32, factor.shape, neurons) * spec.blocks // factor.shape[neurons]
            owner = jax.lax.broadcasted_iota(jnp.int32, factor.shape, 1 - neurons) // jnp.maximum(per_expert, 1)
            return jnp.where(expert == owner, factor, 0.0)

        key = self.make_rng("params") if self.is_mutable_collection("lora") else None
        lora_a = self._adapter_variable("lora_A", (*self.in_axes, "lora_rank"), lambda: init_a(key))
        lora_b = self._adapter_variable(
            "lora_B", ("lora_rank", *self.out_axes), lambda: jnp.zeros((rank, *self.out_dims), jnp.float32)
        )
        scale: float | jax.Array = spec.scales[0]
        if len(set(spec.scales)) > 1:
            scale = jnp.asarray(spec.scales, jnp.float32)[layer]
        a, b = lora_a * scale, lora_b
        return (own(a, 0), b) if by_input else (a, own(b, 1))

    def _adapted(
        self,
        x: jax.Array,
        kernel: jax.Array,
        factor: jax.Array | None,
        spec: LoraSpec,
        layer: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        a, b = self._factors(spec, layer)
        dropped = nn.Dropout(spec.dropout)(x, deterministic=deterministic)
        in_dims = len(self.in_dims)
        plain = _matmul_scaled(x, kernel, factor, in_dims, self.dtype)
        update = matmul(matmul(dropped, a, in_dims, self.dtype), b, 1, self.dtype)
        if not spec.dora:
            return plain + update
        magnitude = self._adapter_variable(
            "magnitude",
            self.out_axes,
            lambda: _norms(kernel.astype(jnp.float32), in_dims),
        )
        # The norm is treated as a constant (paper, section 4.3).
        change = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)  # a TPU's default is bfloat16
        weight = kernel.astype(jnp.float32) * (1.0 if factor is None else factor) + change
        ratio = magnitude / jax.lax.stop_gradient(_norms(weight, in_dims))
        if len(set(spec.ranks)) > 1:
            # A layer that carries no adapter (rank 0) has no magnitude either.
            ratio = jnp.where(jnp.asarray(spec.ranks)[layer] > 0, ratio, jnp.ones_like(ratio))
        # As PEFT: what the adapter adds to the base sees the dropped input, the base itself never does.
        seen = plain
        if spec.dropout > 0 and not deterministic:
            seen = _matmul_scaled(dropped, kernel, factor, in_dims, self.dtype)
        return _rescaled(plain, seen, update, ratio)

    def _adapter_variable(self, name: str, axes: tuple[str, ...], init) -> jax.Array:  # type: ignore[no-untyped-def]
        return cast(jax.Array, self.variable("lora", name, nn.with_logical_partitioning(init, axes)).value)


def _norms(weight: jax.Array, in_dims: int) -> jax.Array:
    """Euclidean norms [*out] of the columns of a weight [*in, *out]."""
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=tuple(range(in_dims))))


@dataclasses.dataclass
class Parts:
    """What a linear layer is made of, for code that multiplies in a way of its own.

    Attributes:
        kernel: [I, O] in the compute dtype.
        a, b: [I, R] (scaled) and [R, O] of a LoRA adapter, or None.
        bias: [O], or None.
        dropout: on the adapter's input.
    """

    kernel: jax.Array
    a: jax.Array | None
    b: jax.Array | None
    bias: jax.Array | None
    dropout: float


class LinearParts(Linear):
    """The same parameters as `Linear`, handed out instead of applied."""

    @nn.compact
    def __call__(self, layer: jax.Array) -> Parts:  # type: ignore[override]
        kernel, factor = self._kernel()
        a = b = None
        if self.adapter is not None:
            assert not self.adapter.dora
            a, b = self._factors(self.adapter, layer)
            a, b = _as_matrix(a, len(self.in_dims)), _as_matrix(b, 1)
        kernel = kernel.astype(self.dtype)
        if factor is not None:
            kernel = (kernel * factor).astype(self.dtype)
        bias = self._bias() if self.use_bias else None
        return Parts(
            _as_matrix(kernel, len(self.in_dims)), a, b, bias, 0.0 if self.adapter is None else self.adapter.dropout
        )
