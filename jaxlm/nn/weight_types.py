"""What a linear layer's weight may be: an array, or an array stored in fewer bits.

A stored form is a pytree in the array's place, so it passes through jit, scan and shardings like any other leaf.
`times` and `dense` are all that layers ask of a weight, whatever its type. A rounded weight can lie frozen under an
adapter: the gradient goes through it to what it multiplies, and what the backward pass keeps of it are its few bits.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxlm.nn import rounding
from jaxlm.nn.matmul import as_matrix, matmul, product, product_transposed
from jaxlm.sharding import SHARD_AXES


class StoredWeight(abc.ABC):
    """A weight [*in, *out] in another form than its array; without more, for inference."""

    parts: ClassVar[tuple[str, ...]]  # names of its arrays, the leaves of the pytree
    in_dims: int  # number of leading dims that are contracted

    @property
    @abc.abstractmethod
    def array_shape(self) -> tuple[int, ...]:
        """[*in, *out], as of the array that it stands for."""

    @abc.abstractmethod
    def times(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """x [*rows, *in] -> [*rows, *out] in `dtype`, accumulated in float32."""

    @abc.abstractmethod
    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The array [*in, *out] that it stands for."""

    @classmethod
    @abc.abstractmethod
    def of_array(cls, kernel: np.ndarray, in_dims: int) -> Self:
        """The stored form of an array [*in, *out], in host memory."""

    @classmethod
    @abc.abstractmethod
    def of_abstract(cls, kernel: nn.LogicallyPartitioned, in_dims: int) -> Self:
        """Shapes, dtypes and logical axes of the stored form, from those of the array."""


class RoundedWeight(StoredWeight):
    """A frozen weight [*in, *out] in fewer bits (see `nn.rounding`), with a gradient for what it multiplies.

    Its products take the logical axes of the array too, by which a kernel knows what part of it a device has; None: it
    is on one device, or the partitioner decides.
    """

    @abc.abstractmethod
    def times(self, x: jax.Array, dtype: DTypeLike, axes: tuple[str | None, ...] | None = None) -> jax.Array:
        """x [*rows, *in] -> [*rows, *out] in `dtype`, accumulated in float32."""

    @abc.abstractmethod
    def transposed_times(
        self, grad: jax.Array, dtype: DTypeLike, axes: tuple[str | None, ...] | None = None
    ) -> jax.Array:
        """grad [*rows, *out] -> [*rows, *in] in `dtype`, accumulated in float32: the gradient of x in `times`."""

    @abc.abstractmethod
    def part_axes(self, axes: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of its arrays, from those of the array [*in, *out]."""

    @classmethod
    @abc.abstractmethod
    def of_shape(cls, shape: tuple[int, ...], in_dims: int) -> Self:
        """Shapes and dtypes of the stored form of an array [*in, *out]."""

    @classmethod
    def of_abstract(cls, kernel: nn.LogicallyPartitioned, in_dims: int) -> Self:
        """Shapes, dtypes and logical axes of the stored form, from those of the array; layers may be stacked first."""
        shape, names = kernel.value.shape, kernel.names
        stack = [(size, name) for size, name in zip(shape[:1], names[:1], strict=True) if name == "layers"]
        sizes, first = tuple(size for size, _ in stack), tuple(name for _, name in stack)
        weight = cls.of_shape(shape[len(stack) :], in_dims)
        boxes = {}
        for part, axes in weight.part_axes(names[len(stack) :]).items():
            leaf = getattr(weight, part)
            value = jax.ShapeDtypeStruct((*sizes, *leaf.shape), leaf.dtype)
            boxes[part] = kernel.replace(value=value, names=(*first, *axes))
        return dataclasses.replace(cast(Any, weight), **boxes)

    def gathered(self, axes: tuple[str | None, ...]) -> Self:
        """The same, not split over devices along the model's dim: its few bits are sent, not what they stand for.

        Args:
            axes: logical axes of the array.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or math.prod(mesh.shape.get(name, 1) for name in SHARD_AXES) == 1:
            return self
        parts = {}
        for part, names in self.part_axes(axes).items():
            # Other dims stay as they are: some are split only where that can be done evenly.
            split = P(*(None if name in ("embed", "embed_blocks") else P.UNCONSTRAINED for name in names))
            # A TPU's compiler wants the dim that it gathers along to be the outermost one. Behind the barrier it is the
            # first dim of one layer's codes; without, it is the second of the stack, all of which is then copied first.
            parts[part] = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(getattr(self, part)), split)
        return dataclasses.replace(cast(Any, self), **parts)


@flax.struct.dataclass
class Int8Weight(RoundedWeight):
    """values * factors, each factor that of one output; rounded to nearest.

    Attributes:
        values: [*in, *out] int8.
        factors: [*out] float32.
    """

    parts: ClassVar[tuple[str, ...]] = ("values", "factors")

    values: Any
    factors: Any
    in_dims: int = flax.struct.field(pytree_node=False)

    @property
    def array_shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def times(self, x: jax.Array, dtype: DTypeLike, axes: tuple[str | None, ...] | None = None) -> jax.Array:
        # int8 is exact in bfloat16, so only the result is rounded.
        return product(x, self.values, self.in_dims, dtype, self.factors)

    def transposed_times(
        self, grad: jax.Array, dtype: DTypeLike, axes: tuple[str | None, ...] | None = None
    ) -> jax.Array:
        # The factors are those of what is summed here, so they come first.
        scaled = (grad.astype(jnp.float32) * self.factors).astype(dtype)
        return product_transposed(scaled, self.values, self.in_dims, dtype)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        return (self.values.astype(dtype) * self.factors).astype(dtype)

    def part_axes(self, axes: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        return {"values": axes, "factors": axes[self.in_dims :]}

    @classmethod
    def of_array(cls, kernel: np.ndarray, in_dims: int) -> Self:
        return cls(**rounding.quantize("int8", kernel, in_dims), in_dims=in_dims)

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], in_dims: int) -> Self:
        return cls(**abstract_parts("int8", shape, in_dims), in_dims=in_dims)


def abstract_parts(kind: rounding.Kind, shape: tuple[int, ...], in_dims: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of a stored weight [*in, *out]."""
    parts = rounding.parts_of(kind, shape, in_dims)
    return {name: jax.ShapeDtypeStruct(part.shape, part.dtype) for name, part in parts.items()}


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def frozen_times(
    x: jax.Array, weight: RoundedWeight, dtype: DTypeLike, axes: tuple[str | None, ...] | None = None
) -> jax.Array:
    """x [*rows, *in] times a rounded weight [*in, *out], with a gradient for x alone.

    Own gradient because JAX's would keep the dense weight of every layer for the backward pass.

    Args:
        axes: logical axes of the weight; None: it is on one device, or the partitioner decides what is sent.
    """
    return _gathered(weight, axes).times(x, dtype, axes)


def _gathered(weight: RoundedWeight, axes: tuple[str | None, ...] | None) -> RoundedWeight:
    return weight if axes is None else weight.gathered(axes)


def _frozen_fwd(
    x: jax.Array, weight: RoundedWeight, dtype: DTypeLike, axes: tuple[str | None, ...] | None
) -> tuple[jax.Array, Any]:
    # Not through `frozen_times`: a remat policy does not see into a function with a gradient of its own.
    return _gathered(weight, axes).times(x, dtype, axes), (weight, jnp.empty((0,), x.dtype))


def _frozen_bwd(
    dtype: DTypeLike, axes: tuple[str | None, ...] | None, residuals: Any, grad: jax.Array
) -> tuple[jax.Array, None]:
    weight, like = residuals
    return _gathered(weight, axes).transposed_times(grad, dtype, axes).astype(like.dtype), None


frozen_times.defvjp(_frozen_fwd, _frozen_bwd)


@flax.struct.dataclass
class OutputMajorWeight(StoredWeight):
    """An array or its int8 form, an output's numbers side by side.

    XLA's CPU backend sums a product with such a matrix in the same order for any number of rows from two on; with one
    whose outputs lie side by side, the order changes between 16 and 64 rows.

    Attributes:
        values: [*out, *in].
        factors: [*out] float32 of int8 values; None: values are the array's.
    """

    parts: ClassVar[tuple[str, ...]] = ("values", "factors")

    values: Any
    factors: Any
    in_dims: int = flax.struct.field(pytree_node=False)

    @property
    def array_shape(self) -> tuple[int, ...]:
        outputs = self.values.ndim - self.in_dims
        return (*self.values.shape[outputs:], *self.values.shape[:outputs])

    def times(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        outputs = self.values.ndim - self.in_dims
        rows, out_shape = x.shape[: x.ndim - self.in_dims], self.values.shape[:outputs]
        x, matrix = as_matrix(x.astype(dtype), len(rows)), as_matrix(self.values.astype(dtype), outputs)
        y = jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        y = y if self.factors is None else y * self.factors.reshape(-1)
        return y.astype(dtype).reshape(*rows, *out_shape)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        outputs = self.values.ndim - self.in_dims
        values = self.values.transpose([*range(outputs, self.values.ndim), *range(outputs)]).astype(dtype)
        return values if self.factors is None else (values * self.factors).astype(dtype)

    @classmethod
    def of_weight(cls, weight: jax.Array | Int8Weight, in_dims: int) -> Self:
        """The same weight, laid out anew."""
        values, factors = (weight.values, weight.factors) if isinstance(weight, Int8Weight) else (weight, None)
        return cls(values.transpose([*range(in_dims, values.ndim), *range(in_dims)]), factors, in_dims)

    @classmethod
    def of_array(cls, kernel: np.ndarray, in_dims: int) -> Self:
        return cls(kernel.transpose([*range(in_dims, kernel.ndim), *range(in_dims)]), None, in_dims)

    @classmethod
    def of_abstract(cls, kernel: nn.LogicallyPartitioned, in_dims: int) -> Self:
        value, names = kernel.value, kernel.names
        order = [*range(in_dims, len(names)), *range(in_dims)]
        shape = jax.ShapeDtypeStruct(tuple(value.shape[dim] for dim in order), value.dtype)
        return cls(kernel.replace(value=shape, names=tuple(names[dim] for dim in order)), None, in_dims)


Weight = jax.Array | StoredWeight


def times(
    weight: Weight, x: jax.Array, in_dims: int, dtype: DTypeLike, axes: tuple[str, ...] | None = None
) -> jax.Array:
    """x [*rows, *in] times a weight [*in, *out]: [*rows, *out] in `dtype`, accumulated in float32.

    Args:
        in_dims: number of dims that are contracted.
        axes: logical axes of the weight, for the gradient of an array (see `matmul`), and for what is sent of a rounded
            weight.
    """
    if isinstance(weight, StoredWeight):
        assert weight.in_dims == in_dims
        if isinstance(weight, RoundedWeight):
            return frozen_times(x, weight, dtype, axes)
        return weight.times(x, dtype)
    return matmul(x, weight, in_dims, dtype, axes)


def dense(weight: Weight, dtype: DTypeLike) -> jax.Array:
    """A weight as an array in `dtype`."""
    return weight.dense(dtype) if isinstance(weight, StoredWeight) else weight.astype(dtype)


def num_inputs(axes: tuple[str | None, ...]) -> int:
    """The number of dims of a layer's kernel that are contracted, from its logical axes.

    A linear layer of a decoder layer goes from the model's dim (`embed`) to its own dims, or back.
    """
    return 1 if axes[0] == "embed" else len(axes) - 1


def with_stored_weights(tree: dict[str, Any], weight_type: type[StoredWeight]) -> dict[str, Any]:
    """The abstract parameters of decoder layers with every linear layer's kernel in a stored form.

    Args:
        tree: shapes with logical axes (boxed), as `init` under `jax.eval_shape` gives them; of one layer by itself, or
            stacked.
    """

    def stored(path: tuple[Any, ...], leaf: nn.LogicallyPartitioned) -> Any:
        if path[-1] != "kernel":
            return leaf
        axes = leaf.names[1:] if leaf.names[0] == "layers" else leaf.names
        return weight_type.of_abstract(leaf, num_inputs(axes))

    return dict(traverse_util.path_aware_map(stored, tree))


def with_stored_layers(params: dict[str, Any], weight_type: type[RoundedWeight]) -> dict[str, Any]:
    """The abstract parameters of a model, boxed, with the kernels of all its stacked layers in a stored form."""
    changed: dict[str, Any] = {
        name: with_stored_weights(params[name], weight_type) for name in ("layers", "tail") if name in params
    }
    if "encoder" in params:
        changed["encoder"] = with_stored_layers(params["encoder"], weight_type)
    return {**params, **changed}


def split_parts(tree: Any) -> tuple[dict[str, Any], dict[str, StoredWeight]]:
    """A tree of weights with the arrays of stored ones as leaves ('kernel/codes'); and these weights by path.

    Args:
        tree: nested dicts.
    """
    flat: dict[str, Any] = {}
    stored: dict[str, StoredWeight] = {}
    for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        if isinstance(leaf, StoredWeight):
            stored[path] = leaf
            flat |= {f"{path}/{part}": getattr(leaf, part) for part in leaf.parts}
        else:
            flat[path] = leaf
    return traverse_util.unflatten_dict(flat, sep="/"), stored


def join_parts(tree: Any, stored: Mapping[str, StoredWeight]) -> Any:
    """The opposite of `split_parts`: the arrays in `tree` in weights like those of `stored`."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    for path, leaf in stored.items():
        parts = {part: flat.pop(f"{path}/{part}") for part in leaf.parts}
        flat[path] = dataclasses.replace(cast(Any, leaf), **parts)
    return traverse_util.unflatten_dict(flat, sep="/")
