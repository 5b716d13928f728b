"""What a linear layer's weight may be: an array, or an array stored in fewer bits.

A stored form is a pytree in the array's place, so it passes through jit, scan and shardings like any other leaf.
`times` and `dense` are all that layers ask of a weight, whatever its type.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jaxlm.nn.matmul import matmul, product


class StoredWeight(abc.ABC):
    """A weight [*in, *out] in fewer bits; for inference, as no gradient is defined for it."""

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


@flax.struct.dataclass
class Int8Weight(StoredWeight):
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

    def times(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        # int8 is exact in bfloat16, so only the result is rounded.
        return product(x, self.values, self.in_dims, dtype, self.factors)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        return (self.values.astype(dtype) * self.factors).astype(dtype)

    @classmethod
    def of_array(cls, kernel: np.ndarray, in_dims: int) -> Self:
        kernel = kernel.astype(np.float32)
        largest = np.abs(kernel).max(axis=tuple(range(in_dims)))
        factors = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
        return cls(np.rint(kernel / factors).astype(np.int8), factors, in_dims)

    @classmethod
    def of_abstract(cls, kernel: nn.LogicallyPartitioned, in_dims: int) -> Self:
        shape, names = kernel.value.shape, kernel.names
        return cls(
            kernel.replace(value=jax.ShapeDtypeStruct(shape, jnp.int8)),
            kernel.replace(value=jax.ShapeDtypeStruct(shape[in_dims:], jnp.float32), names=names[in_dims:]),
            in_dims,
        )


Weight = jax.Array | StoredWeight


def times(
    weight: Weight, x: jax.Array, in_dims: int, dtype: DTypeLike, axes: tuple[str, ...] | None = None
) -> jax.Array:
    """x [*rows, *in] times a weight [*in, *out]: [*rows, *out] in `dtype`, accumulated in float32.

    Args:
        in_dims: number of dims that are contracted.
        axes: logical axes of the weight, for the gradient of an array (see `matmul`).
    """
    if isinstance(weight, StoredWeight):
        assert weight.in_dims == in_dims
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


def with_stored_weights(layer: dict[str, Any], weight_type: type[StoredWeight]) -> dict[str, Any]:
    """The abstract parameters of one decoder layer with every linear layer's kernel in a stored form.

    Args:
        layer: tree of shapes with logical axes (boxed), as `init` under `jax.eval_shape` gives it.
    """

    def stored(path: tuple[Any, ...], leaf: nn.LogicallyPartitioned) -> Any:
        return weight_type.of_abstract(leaf, num_inputs(leaf.names)) if path[-1] == "kernel" else leaf

    return dict(traverse_util.path_aware_map(stored, layer))
