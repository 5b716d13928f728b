"""`Linear`: the one place that knows plain weights, LoRA and int8 weights.

Adapter maths is PEFT's (arXiv:2106.09685; rsLoRA arXiv:2312.03732; DoRA arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxlm.models.lora import LoraSpec


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x [N, I] times kernel [I, O] in `dtype`, accumulated in float32.

    Own gradient for two reasons: both products stay two-dimensional (XLA's CPU backend is slow on
    the others), and the kernel's gradient keeps the float32 accumulator instead of going through bfloat16.
    """
    return _product(x, kernel, dtype)


def _product(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    # Named, so that a remat policy can keep it: in `dtype`, not as the float32 accumulator.
    return checkpoint_name(_dot(x.astype(dtype), kernel.astype(dtype), 1, 0).astype(dtype), "matmul")


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _matmul_fwd(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not through `matmul`: a remat policy does not see into a function with a gradient of its own.
    return _product(x, kernel, dtype), (x, kernel)


def _matmul_bwd(
    dtype: DTypeLike, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    grad = grad.astype(dtype)
    return (
        _dot(grad, kernel.astype(dtype), 1, 1).astype(x.dtype),
        _dot(x.astype(dtype), grad, 0, 0).astype(kernel.dtype),
    )


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _matmul_scaled(x: jax.Array, kernel: jax.Array, factor: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    y = matmul(x, kernel, dtype)
    return y if factor is None else (y.astype(jnp.float32) * factor).astype(dtype)


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
        lead = x.shape[: x.ndim - len(self.in_dims)]
        x = x.reshape(-1, kernel.shape[0])
        if self.adapter is None:
            y = _matmul_scaled(x, kernel, factor, self.dtype)
        else:
            y = self._adapted(x, kernel, factor, self.adapter, layer, deterministic)
        y = y.reshape(*lead, *self.out_dims)
        if self.use_bias:
            y = y + self._bias().astype(self.dtype)
        return y

    def _kernel(self) -> tuple[jax.Array, jax.Array | None]:
        """The kernel [I, O] as it is stored, and the factors [O] of an int8 one."""
        fan_in, fan_out = math.prod(self.in_dims), math.prod(self.out_dims)
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
            factor = factor.reshape(fan_out)
        return kernel.reshape(fan_in, fan_out), factor

    def _bias(self) -> jax.Array:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.out_axes)
        return cast(jax.Array, self.param("bias", zeros, self.out_dims, self.param_dtype))

    def _factors(self, spec: LoraSpec, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The adapter's A [I, R], times its scale, and B [R, O]."""
        fan_in, fan_out, rank = math.prod(self.in_dims), math.prod(self.out_dims), spec.rank

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
        a, b = lora_a.reshape(fan_in, rank) * scale, lora_b.reshape(rank, fan_out)
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
        plain = _matmul_scaled(x, kernel, factor, self.dtype)
        update = matmul(matmul(dropped, a, self.dtype), b, self.dtype)
        if not spec.dora:
            return plain + update
        magnitude = self._adapter_variable(
            "magnitude",
            self.out_axes,
            lambda: jnp.linalg.norm(kernel.astype(jnp.float32), axis=0).reshape(self.out_dims),
        )
        # The norm is treated as a constant (paper, section 4.3).
        weight = kernel.astype(jnp.float32) * (1.0 if factor is None else factor) + a @ b
        norm = jax.lax.stop_gradient(jnp.linalg.norm(weight, axis=0))
        ratio = magnitude.reshape(-1) / norm
        if len(set(spec.ranks)) > 1:
            # A layer that carries no adapter (rank 0) has no magnitude either.
            ratio = jnp.where(jnp.asarray(spec.ranks)[layer] > 0, ratio, jnp.ones_like(ratio))
        if deterministic or spec.dropout == 0:
            return (plain + update) * ratio.astype(self.dtype)
        # As PEFT: what the adapter adds to the base sees the dropped input, the base itself never does.
        change = (ratio - 1).astype(self.dtype) * _matmul_scaled(dropped, kernel, factor, self.dtype)
        return plain + change + update * ratio.astype(self.dtype)

    def _adapter_variable(self, name: str, axes: tuple[str, ...], init) -> jax.Array:  # type: ignore[no-untyped-def]
        return cast(jax.Array, self.variable("lora", name, nn.with_logical_partitioning(init, axes)).value)


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
        kernel = kernel.astype(self.dtype)
        if factor is not None:
            kernel = (kernel * factor).astype(self.dtype)
        bias = self._bias() if self.use_bias else None
        return Parts(kernel, a, b, bias, 0.0 if self.adapter is None else self.adapter.dropout)
