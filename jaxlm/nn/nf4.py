"""A weight in QLoRA's four bits with doubly quantised magnitudes (see `nn.rounding`), as layers multiply by it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxlm.kernels.nf4_matmul_tpu import nf4_product
from jaxlm.nn import rounding
from jaxlm.nn.matmul import product, product_transposed
from jaxlm.nn.weight_types import Int8Weight, RoundedWeight, abstract_parts
from jaxlm.sharding import ROW_AXES, RULES, SEQUENCE, TENSOR

# Logical axes of heads and neurons, which devices along `tensor` share. Once a weight's bits are gathered, nothing else
# of it is split: rows are, over the other axes.
_OVER_TENSOR = {
    name for name, axes in RULES if axes is not None and TENSOR in (axes if isinstance(axes, tuple) else (axes,))
}

Platform = Literal["tpu", "gpu"]

# A GPU's kernel looks a code up once for every 128 rows; XLA does once, but writes and reads the weight in bfloat16. As
# reckoned in benchmarks/README.md, and measured nowhere, both take as long at some hundreds of rows on GPUs of data
# centres; on others, whose tensor cores are slower beside all the rest, the kernel never takes longer.
MOST_ROWS = 512
ANY_ROWS = ("8.6", "8.9", "12.0")


@flax.struct.dataclass
class Nf4Weight(RoundedWeight):
    """value of a code * magnitude of its block, in blocks of 64 inputs of an output; 4.13 bits a number.

    Attributes:
        codes: [N, 32, O] uint8, two codes each: N blocks of inputs, whose first halves are in the upper bits.
        absmax: [N, O] uint8, the magnitudes in 8 bits.
        nested_absmax: [ceil(N O / 256)] float32, the largest of each 256 of them.
        nested_offset: [1] float32, their mean.
        dims: [*in, *out].
    """

    parts: ClassVar[tuple[str, ...]] = ("codes", "absmax", "nested_absmax", "nested_offset")

    codes: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    in_dims: int = flax.struct.field(pytree_node=False)
    dims: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def array_shape(self) -> tuple[int, ...]:
        return self.dims

    def times(self, x: jax.Array, dtype: DTypeLike, axes: tuple[str | None, ...] | None = None) -> jax.Array:
        def plain(x: jax.Array, weight: Nf4Weight) -> jax.Array:
            return product(x, weight.dense(dtype), self.in_dims, dtype)

        return self._by_backend(x, dtype, axes, plain, transposed=False)

    def transposed_times(
        self, grad: jax.Array, dtype: DTypeLike, axes: tuple[str | None, ...] | None = None
    ) -> jax.Array:
        def plain(grad: jax.Array, weight: Nf4Weight) -> jax.Array:
            return product_transposed(grad, weight.dense(dtype), self.in_dims, dtype)

        return self._by_backend(grad, dtype, axes, plain, transposed=True)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        codes, inputs = self.codes, math.prod(self.dims[: self.in_dims])
        halves = [_look_up(codes >> 4, rounding.NF4), _look_up(codes & 15, rounding.NF4)]
        values = jnp.concatenate(halves, axis=1) * self.magnitudes()[:, None]
        # Cast before the reshape, so that it is part of the same pass over memory.
        return values.astype(dtype).reshape(-1, codes.shape[-1])[:inputs].reshape(self.dims)

    def magnitudes(self) -> jax.Array:
        """The magnitudes of the blocks [N, O], float32."""
        blocks, outputs = self.absmax.shape
        # In the order of bitsandbytes: all blocks of one output, then those of the next.
        largest = jnp.broadcast_to(self.nested_absmax[:, None], (*self.nested_absmax.shape, rounding.NESTED_BLOCK))
        largest = largest.reshape(-1)[: self.absmax.size].reshape(outputs, blocks).T
        return _look_up(self.absmax, rounding.dynamic_map()) * largest + self.nested_offset

    def _by_backend(
        self, x: jax.Array, dtype: DTypeLike, axes: tuple[str | None, ...] | None, plain: Any, transposed: bool
    ) -> jax.Array:
        """The product of rows [*rows, *in] (or [*rows, *out]) by the kernel, where there is one, or its plain twin."""
        ins, mesh = self.dims[: self.in_dims], _sizes()
        rows = x.shape[: x.ndim - (len(self.dims) - self.in_dims if transposed else self.in_dims)]
        axis = None if axes is None else axes[0]
        if why_plain(mesh, dtype, math.prod(ins), axis, rows) is not None:
            return cast(jax.Array, plain(x, self))

        def kernel(platform: Platform, x: jax.Array, weight: Nf4Weight) -> jax.Array:
            return checkpoint_name(weight.by_kernel(x, dtype, axes, transposed, platform), "matmul")

        kernels = {"tpu": partial(kernel, "tpu")}
        if why_plain_on_gpu(math.prod(rows) // _row_parts(mesh), _capability()) is None:
            kernels["cuda"] = partial(kernel, "gpu")
        return cast(jax.Array, jax.lax.platform_dependent(x, self, **kernels, default=plain))

    def by_kernel(
        self,
        x: jax.Array,
        dtype: DTypeLike,
        axes: tuple[str | None, ...] | None = None,
        transposed: bool = False,
        platform: Platform = "tpu",
        interpret: bool = False,
    ) -> jax.Array:
        """A product by this platform's kernel, where `why_plain` has nothing against it.

        On several devices each multiplies its rows with its part of the weight: heads and neurons are split over
        `tensor`, and where they are what is summed over, the parts of the sum are added in float32.

        Args:
            x: [*rows, *in]; transposed: [*rows, *out].
            dtype: of the factors and of the result.
            axes: logical axes of the array; None on one device.
            platform: whose kernel it is.
        """
        ins, outs = self.dims[: self.in_dims], self.dims[self.in_dims :]
        multiply: Any = nf4_product
        if platform == "gpu":
            # On use: a JAX without Triton is to start too.
            from jaxlm.kernels.nf4_matmul_gpu import nf4_product as multiply
        own, other = (outs, ins) if transposed else (ins, outs)
        rows, sizes = x.shape[: x.ndim - len(own)], _sizes()
        tensor = sizes.get(TENSOR, 1)

        def split(axis: str | None, size: int) -> str | None:
            return TENSOR if tensor > 1 and axis in _OVER_TENSOR and size % tensor == 0 else None

        of_ins, of_outs = (None, None) if axes is None else (split(axes[0], ins[0]), split(axes[self.in_dims], outs[0]))
        summed, left = (of_outs, of_ins) if transposed else (of_ins, of_outs)
        local_dims = (other[0] // (tensor if left else 1), *other[1:])

        def local(x: jax.Array, codes: jax.Array, absmax: jax.Array) -> jax.Array:
            x = x.reshape(*x.shape[: len(rows)], -1)
            matrix, accumulated = x.reshape(-1, x.shape[-1]), jnp.float32 if summed else dtype
            y = multiply(matrix, codes, absmax, rounding.NF4, transposed, accumulated, interpret)
            y = y.reshape(*x.shape[:-1], *local_dims)
            return jax.lax.psum(y, summed).astype(dtype) if summed else y

        arguments = x.astype(dtype), self.codes, self.magnitudes()
        if math.prod(sizes.values()) == 1:
            return local(*arguments)
        of_rows = (ROW_AXES, SEQUENCE, *[None] * len(rows))[: len(rows)]
        of_weight = P(of_ins, None, of_outs), P(of_ins, of_outs)
        run = jax.shard_map(
            local, in_specs=(P(*of_rows, summed), *of_weight), out_specs=P(*of_rows, left), check_vma=False
        )
        return run(*arguments)

    def part_axes(self, axes: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        # Heads and their dim are one dim here, as in files: whole heads of it are on a device.
        blocks, out = f"{axes[0]}_blocks", axes[self.in_dims]
        return {
            "codes": (blocks, None, out),
            "absmax": (blocks, out),
            "nested_absmax": (None,),
            "nested_offset": (None,),
        }

    @classmethod
    def of_array(cls, kernel: np.ndarray, in_dims: int) -> Self:
        return cls(**rounding.quantize("nf4", kernel, in_dims), in_dims=in_dims, dims=kernel.shape)

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], in_dims: int) -> Self:
        return cls(**abstract_parts("nf4", shape, in_dims), in_dims=in_dims, dims=shape)


def why_plain(
    mesh: Mapping[str, int],
    dtype: DTypeLike,
    inputs: int,
    axis: str | None = None,
    rows: tuple[int, ...] | None = None,
) -> str | None:
    """Why products with weights in four bits do not go through a kernel; None: on a TPU they do.

    Args:
        mesh: sizes of its axes by name.
        inputs: of the weight.
        axis: logical axis of the inputs; None: it is not known.
        rows: dims before them; None: as many as go over the mesh.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return "the kernel multiplies bfloat16"
    if inputs % rounding.BLOCK:
        return f"{inputs} inputs are not whole blocks of {rounding.BLOCK}"
    parts, tensor = math.prod(mesh.get(name, 1) for name in ROW_AXES), mesh.get(TENSOR, 1)
    if tensor > 1 and axis is None:
        return f"which part of it a device has is not known on mesh {TENSOR} {tensor}"
    if axis in _OVER_TENSOR and (inputs // rounding.BLOCK) % tensor:
        return f"{inputs // rounding.BLOCK} blocks of inputs are not shared evenly on mesh {TENSOR} {tensor}"
    if rows is not None:
        lengths = mesh.get(SEQUENCE, 1)
        if (parts > 1 and (not rows or rows[0] % parts)) or (lengths > 1 and (len(rows) < 2 or rows[1] % lengths)):
            return f"{rows} rows are not shared evenly"
    return None


def why_plain_on_gpu(rows: int, capability: str | None) -> str | None:
    """Why they do not on a GPU, where `why_plain` has nothing against it.

    Args:
        rows: of a device, all dims together.
        capability: compute capability of the GPU; None: it is not known.
    """
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "this JAX has no Triton"
    major = "8" if capability is None else capability.split(".")[0]
    if not major.isdigit() or int(major) < 8:  # AMD's have names
        return f"the kernel needs compute capability 8.0 or later, this GPU has {capability}"
    if rows > MOST_ROWS and capability not in ANY_ROWS:
        return f"for {rows:,} rows, more than {MOST_ROWS}, it is quicker to look codes up once"
    return None


def _capability() -> str | None:
    """The compute capability of this process's GPUs; None without one, as where a program for some is only compiled."""
    device = jax.devices()[0]
    return str(device.compute_capability) if device.platform == "gpu" else None


def _row_parts(mesh: Mapping[str, int]) -> int:
    """Number of parts that rows are shared in."""
    return math.prod(mesh.get(name, 1) for name in (*ROW_AXES, SEQUENCE))


def _sizes() -> dict[str, int]:
    """The sizes of the current mesh's axes by name; {} without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


WEIGHT_TYPES: dict[rounding.Kind, type[RoundedWeight]] = {"int8": Int8Weight, "nf4": Nf4Weight}


def weight_type(kind: rounding.Kind | None) -> type[RoundedWeight] | None:
    """The type of stored weight that `model.quantize` names; None: arrays."""
    return None if kind is None else WEIGHT_TYPES[kind]


def _look_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """table[codes] in float32, for a table of 2^b values."""
    return cast(
        jax.Array,
        jax.lax.platform_dependent(codes, tpu=partial(_choose, table=table), default=partial(_gather, table=table)),
    )


def _gather(codes: jax.Array, table: np.ndarray) -> jax.Array:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def _choose(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """Bit by bit: a TPU reads a table one number at a time."""
    codes, rows = codes.astype(jnp.int32), [jnp.float32(value) for value in table]
    while len(rows) > 1:
        bit = (codes & 1) > 0
        rows = [jnp.where(bit, odd, even) for even, odd in zip(rows[::2], rows[1::2], strict=True)]
        codes = codes >> 1
    return rows[0]
