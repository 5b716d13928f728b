"""`Linear`: the one place that knows an adapter and the type of a weight.

Adapter maths is PEFT's (arXiv:2106.09685; rsLoRA arXiv:2312.03732; DoRA arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.nn.lora import LoraSpec
from jaxlm.nn.matmul import as_matrix, matmul, product
from jaxlm.nn.weight_types import RoundedWeight, StoredWeight, Weight, dense, times


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


@dataclasses.dataclass
class Entered:
    """What an adapter that several linear layers share makes of their input.

    Attributes:
        spec: the adapter.
        a: its first factor [*in, R], times its scale.
        dropped: the input that it sees.
        product: dropped a, [..., R].
    """

    spec: LoraSpec
    a: jax.Array
    dropped: jax.Array
    product: jax.Array


@flax.struct.dataclass
class AdapterBank:
    """Adapters of one linear layer side by side, of which each token uses its own; for generation.

    It stands in the `lora` collection in place of one adapter's factors, under the name BANK. With A places of rank R
    the products are A times as wide and masked, which reads each factor once, whatever the number of tokens
    (docs/kernels.md, "Several adapters").

    Attributes:
        a: [*in, A, R] in the compute dtype, times its scale; zeros behind an adapter's own rank.
        b: [A, R, *out] in the compute dtype.
        ratio: [A, *out] float32, DoRA's magnitude over norm, 1 for others; None: no place is for DoRA.
        chosen: [*rows] int32 of the tokens, 0: the base alone, n: the adapter at place n - 1; None until a step knows.
    """

    a: jax.Array
    b: jax.Array
    ratio: jax.Array | None = None
    chosen: jax.Array | None = None


BANK = "bank"


def is_bank(tree: Any) -> bool:
    return isinstance(tree, AdapterBank)


def with_chosen(lora: Any, chosen: jax.Array) -> Any:
    """The `lora` collection whose banks, if it has any, are told which adapter each token uses.

    Args:
        chosen: [*rows] int32 (see `AdapterBank`).
    """
    return jax.tree.map(lambda leaf: leaf.replace(chosen=chosen) if is_bank(leaf) else leaf, lora, is_leaf=is_bank)


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

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array, deterministic: bool = True, entered: Entered | None = None
    ) -> jax.Array:
        """x [..., *in] -> [..., *out].

        Args:
            layer: this layer's index, which ranks and scales may depend on.
            deterministic: whether nothing is dropped.
            entered: x in an adapter that this layer shares with others; None: it has one of its own, or none.
        """
        kernel = self._kernel()
        spec = self.adapter if entered is None else entered.spec
        if self.has_variable("lora", BANK):
            assert spec is None
            y = self._chosen(x, kernel, self.get_variable("lora", BANK))
        elif spec is None:
            y = times(kernel, x, len(self.in_dims), self.dtype, self.in_axes + self.out_axes)
        else:
            y = self._adapted(x, kernel, spec, layer, deterministic, entered)
        if self.use_bias:
            y = y + self._bias().astype(self.dtype)
        return y

    def _kernel(self) -> Weight:
        """The kernel [*in, *out] as it is stored."""
        shape = self.in_dims + self.out_dims
        if self.has_variable("params", "kernel"):
            given: Any = self.get_variable("params", "kernel")
            if isinstance(given, StoredWeight):  # not through `param`, which compares leaf by leaf with a fresh array
                assert given.array_shape == shape, f"{self.name}: {given.array_shape}, expected {shape}"
                return fetched(given)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), self.in_axes + self.out_axes)
        return fetched(cast(jax.Array, self.param("kernel", init, shape, self.param_dtype)))

    def _bias(self) -> jax.Array:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.out_axes)
        return cast(jax.Array, self.param("bias", zeros, self.out_dims, self.param_dtype))

    def _fresh_a(self, key: Any, spec: LoraSpec, layer: jax.Array, fan_in: int) -> jax.Array:
        """PEFT's kaiming_uniform(a=sqrt(5)) on [R, in]: A [in, R], zero in columns behind this layer's own rank."""
        bound = 1.0 / math.sqrt(fan_in)
        a = jax.random.uniform(key, (math.prod(self.in_dims), spec.rank), jnp.float32, -bound, bound)
        return jnp.where(jnp.arange(spec.rank) < jnp.asarray(spec.ranks)[layer], a, 0.0)

    def _init_a(self, key: Any, spec: LoraSpec, layer: jax.Array) -> jax.Array:
        return self._fresh_a(key, spec, layer, math.prod(self.in_dims)).reshape(*self.in_dims, spec.rank)

    def _first_factor(self, spec: LoraSpec, layer: jax.Array) -> jax.Array:
        """The adapter's A [*in, R]."""
        key = self.make_rng("params") if self.is_mutable_collection("lora") else None
        return self._adapter_variable("lora_A", (*self.in_axes, "lora_rank"), lambda: self._init_a(key, spec, layer))

    def _second_factor(self, spec: LoraSpec) -> jax.Array:
        """The adapter's B [R, *out]."""
        return self._adapter_variable(
            "lora_B", ("lora_rank", *self.out_axes), lambda: jnp.zeros((spec.rank, *self.out_dims), jnp.float32)
        )

    def _own_factor(self, spec: LoraSpec, layer: jax.Array) -> jax.Array:
        """B of an adapter whose A is shared."""
        return self._second_factor(spec)

    def _factors(self, spec: LoraSpec, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The adapter's A [*in, R], times its scale, and B [R, *out]."""
        a, b = self._first_factor(spec, layer), self._second_factor(spec)
        return a * _scale(spec, layer), b

    def _adapted(
        self,
        x: jax.Array,
        kernel: Weight,
        spec: LoraSpec,
        layer: jax.Array,
        deterministic: bool,
        entered: Entered | None,
    ) -> jax.Array:
        in_dims = len(self.in_dims)
        if entered is None:
            a, b = self._factors(spec, layer)
            dropped = nn.Dropout(spec.dropout)(x, deterministic=deterministic)
        else:
            a, b, dropped = entered.a, self._own_factor(spec, layer), entered.dropped
        axes = self.in_axes + self.out_axes if isinstance(kernel, RoundedWeight) else None
        plain = times(kernel, x, in_dims, self.dtype, axes)
        product = matmul(dropped, a, in_dims, self.dtype) if entered is None else entered.product
        update = matmul(product, b, 1, self.dtype)
        if not spec.dora:
            return plain + update
        magnitude = self._adapter_variable(
            "magnitude",
            self.out_axes,
            lambda: _norms(dense(kernel, jnp.float32), in_dims),
        )
        # The norm is treated as a constant (paper, section 4.3).
        change = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)  # a TPU's default is bfloat16
        ratio = magnitude / jax.lax.stop_gradient(_norms(dense(kernel, jnp.float32) + change, in_dims))
        if len(set(spec.ranks)) > 1:
            # A layer that carries no adapter (rank 0) has no magnitude either.
            ratio = jnp.where(jnp.asarray(spec.ranks)[layer] > 0, ratio, jnp.ones_like(ratio))
        # As PEFT: what the adapter adds to the base sees the dropped input, the base itself never does.
        seen = plain
        if spec.dropout > 0 and not deterministic:
            seen = times(kernel, dropped, in_dims, self.dtype, axes)
        return _rescaled(plain, seen, update, ratio)

    def _chosen(self, x: jax.Array, kernel: Weight, bank: AdapterBank) -> jax.Array:
        """The product in which each token has the adapter that it chose."""
        in_dims, chosen = len(self.in_dims), bank.chosen
        assert chosen is not None and chosen.shape == x.shape[: x.ndim - in_dims], "an adapter for each token"
        plain = times(kernel, x, in_dims, self.dtype)
        is_own = chosen[..., None] == 1 + jnp.arange(len(bank.b))  # [*rows, A]
        entered = jnp.where(is_own[..., None], product(x, bank.a, in_dims, self.dtype), 0)
        update = product(entered, bank.b, 2, self.dtype)
        if bank.ratio is None:
            adapted = plain + update
        else:
            adapted = _rescaled(plain, plain, update, bank.ratio[jnp.maximum(chosen - 1, 0)])
        return jnp.where(jnp.expand_dims(chosen > 0, range(chosen.ndim, plain.ndim)), adapted, plain)

    def _adapter_variable(self, name: str, axes: tuple[str, ...], init) -> jax.Array:  # type: ignore[no-untyped-def]
        return cast(jax.Array, self.variable("lora", name, nn.with_logical_partitioning(init, axes)).value)


def fetched(weight: Weight) -> Weight:
    """A layer's weight in the device's memory, where it is not yet: see `model.offload`."""

    def fetch(leaf: Any) -> Any:
        in_host = jax.typeof(leaf).memory_space == jax.memory.Space.Host
        return jax.device_put(leaf, jax.memory.Space.Device) if in_host else leaf

    return cast(Weight, jax.tree.map(fetch, weight))


def _scale(spec: LoraSpec, layer: jax.Array) -> float | jax.Array:
    """What A B is multiplied with in a layer."""
    if len(set(spec.scales)) > 1:
        return jnp.asarray(spec.scales, jnp.float32)[layer]
    return spec.scales[0]


def dora_ratio(kernel: Weight, a: jax.Array, b: jax.Array, magnitude: jax.Array) -> jax.Array:
    """DoRA's factor [*out] float32 of a layer's output, for a kernel [*in, *out] and scaled a [*in, R], b [R, *out]."""
    change = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return magnitude / _norms(dense(kernel, jnp.float32) + change, a.ndim - 1)


def _norms(weight: jax.Array, in_dims: int) -> jax.Array:
    """Euclidean norms [*out] of the columns of a weight [*in, *out]."""
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=tuple(range(in_dims))))


class SharedInput(Linear):
    """The first factor of an adapter that several linear layers share (see `nn.lora.FUSED`); it has no kernel."""

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, deterministic: bool) -> Entered:  # type: ignore[override]
        assert self.adapter is not None
        a = self._first_factor(self.adapter, layer) * _scale(self.adapter, layer)
        dropped = nn.Dropout(self.adapter.dropout)(x, deterministic=deterministic)
        return Entered(self.adapter, a, dropped, matmul(dropped, a, len(self.in_dims), self.dtype))


@dataclasses.dataclass
class Parts:
    """What a linear layer is made of, for code that multiplies in a way of its own.

    Attributes:
        kernel: [I, O] in the compute dtype.
        a, b: [I, R] (scaled) and [R, O] of a LoRA adapter, or None; a is None where it is shared.
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
    def __call__(self, layer: jax.Array, entered: Entered | None = None) -> Parts:  # type: ignore[override]
        assert not self.has_variable("lora", BANK), "parts have one adapter"
        kernel = self._kernel()
        a = b = None
        if entered is not None:
            assert not entered.spec.dora
            b = as_matrix(self._own_factor(entered.spec, layer), 1)
        elif self.adapter is not None:
            assert not self.adapter.dora
            a, b = self._factors(self.adapter, layer)
            a, b = as_matrix(a, len(self.in_dims)), as_matrix(b, 1)
        bias = self._bias() if self.use_bias else None
        return Parts(
            as_matrix(dense(kernel, self.dtype), len(self.in_dims)),
            a,
            b,
            bias,
            0.0 if self.adapter is None else self.adapter.dropout,
        )


class WithLinears(nn.Module):
    """What the layers that are made of linear layers have in common.

    Attributes:
        hidden_size: D.
        init_std: standard deviation of fresh kernels.
        adapters: LoRA by the linear layer's name.
        dtype: compute dtype.
        param_dtype: dtype of the base parameters.
    """

    hidden_size: int
    init_std: float
    adapters: Mapping[str, LoraSpec]
    dtype: DTypeLike
    param_dtype: DTypeLike

    def _linear(
        self,
        name: str,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        use_bias: bool,
        linear_type: type[Linear] = Linear,
    ) -> Any:
        """A linear layer of this one.

        Args:
            inputs, outputs: size of each dim by its logical axis.
            linear_type: `Linear`, or one with the same parameters.
        """
        return linear_type(
            tuple(inputs.values()),
            tuple(outputs.values()),
            tuple(inputs),
            tuple(outputs),
            use_bias=use_bias,
            adapter=self.adapters.get(name),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            init_std=self.init_std,
            name=name,
        )

    def _entered(
        self, name: str, inputs: Mapping[str, int], x: jax.Array, layer: jax.Array, deterministic: bool
    ) -> Entered | None:
        """x in the adapter that the linear layers of `nn.lora.FUSED[name]` share; None where they share none."""
        if name not in self.adapters:
            return None
        entered: Entered = self._linear(name, inputs, {}, False, SharedInput)(x, layer, deterministic)
        return entered
