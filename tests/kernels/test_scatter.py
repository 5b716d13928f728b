"""Gradients that devices sum in parts, against the same on one device; 8 fake devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.devices.mesh import use_mesh
from jaxlm.kernels.scatter import split_axes, sum_scattered, sum_scattered_columns
from jaxlm.nn.embedding import look_up
from jaxlm.nn.linear import matmul
from jaxlm.sharding import MESH_AXES


def mesh_of(**sizes: int) -> Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=jax.devices()[: int(np.prod(shape))])


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


MESHES: list[dict[str, int]] = [
    dict(fsdp=8),
    dict(fsdp=4, fsdp_y=2),
    dict(fsdp=2, fsdp_y=2, fsdp_z=2),
    dict(data=2, fsdp=2, fsdp_y=2),
    dict(fsdp=2, fsdp_y=2, tensor=2),
    dict(fsdp=2, fsdp_y=2, sequence=2),
    dict(data=2, sequence=2, tensor=2),
    dict(data=4, tensor=2),
]


@pytest.mark.parametrize(
    ("scattered", "shape", "spec"),
    [(sum_scattered, (16, 3), P(("fsdp", "fsdp_y", "tensor"))), (sum_scattered_columns, (5, 16), P(None, MESH_AXES))],
)
def test_each_device_keeps_its_part(scattered: Callable[..., jax.Array], shape: tuple[int, ...], spec: P) -> None:
    axes = ["fsdp", "fsdp_y", "tensor"]
    mesh = mesh_of(fsdp=2, fsdp_y=2, tensor=2)
    each = draw(0, 8, *shape)

    def local(one: jax.Array) -> jax.Array:
        return scattered(one[0], axes)

    with use_mesh(mesh):
        out = jax.jit(jax.shard_map(local, in_specs=P(tuple(axes)), out_specs=spec, check_vma=False))(each)
    np.testing.assert_allclose(out, each.sum(0), rtol=1e-5, atol=1e-5)


def placed(mesh: Mesh, spec: P, value: jax.Array) -> jax.Array:
    return jax.device_put(value, NamedSharding(mesh, spec))


TOKENS = P(("data", "fsdp", "fsdp_y", "fsdp_z", "expert"), "sequence")
SHARDS = ("fsdp", "fsdp_y", "fsdp_z", "sequence")


def both(mesh: Mesh, loss: Callable[..., jax.Array], arguments: tuple[Any, ...], specs: tuple[P, ...]) -> str:
    """Compares the gradients of all float arguments on a mesh with those on one device; the compiled text."""
    floats = tuple(at for at, one in enumerate(arguments) if jnp.issubdtype(one.dtype, jnp.floating))
    gradient = jax.grad(loss, argnums=floats)
    wanted = jax.jit(gradient)(*arguments)
    with use_mesh(mesh):
        shardings = tuple(NamedSharding(mesh, specs[at]) for at in floats)
        there = [placed(mesh, spec, one) for spec, one in zip(specs, arguments, strict=True)]
        compiled = jax.jit(gradient, out_shardings=shardings).lower(*there).compile()
        for ours, theirs in zip(compiled(*there), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    return str(compiled.as_text())


def summed(text: str, size: int) -> list[str]:
    """The all-reduces of so many numbers."""
    shapes = re.findall(r"= \(?f32\[([\d,]+)\]\S* (?:[^=]*\) )?all-reduce\(", text)
    return [shape for shape in shapes if int(np.prod([int(n) for n in shape.split(",")])) == size]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["q_proj", "o_proj", "up_proj", "down_proj"])
def test_gradient_of_a_kernel(name: str, sizes: dict[str, int]) -> None:
    mesh = mesh_of(**sizes)
    heads, mlp = (("tensor",), (2, 3)), (("tensor",), (12,))
    (axes, ins, outs) = {
        "q_proj": (("embed", "heads", "head_dim"), (16,), heads[1]),
        "o_proj": (("heads", "head_dim", "embed"), heads[1], (16,)),
        "up_proj": (("embed", "mlp"), (16,), mlp[1]),
        "down_proj": (("mlp", "embed"), mlp[1], (16,)),
    }[name]
    spec = P(*(SHARDS if axis == "embed" else "tensor" if axis in ("heads", "mlp") else None for axis in axes))
    x, kernel, weight = draw(1, 8, 4, *ins), draw(2, *ins, *outs), draw(3, 8, 4, *outs)

    def loss(x: jax.Array, kernel: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(matmul(x, kernel, len(ins), jnp.float32, axes) * weight)

    text = both(mesh, loss, (x, kernel, weight), (TOKENS, spec, TOKENS))
    if sizes.get("fsdp", 1) * sizes.get("sequence", 1) > 1:
        assert "reduce-scatter(" in text
        assert not summed(text, kernel.size // sizes.get("tensor", 1))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("vocab", [40, 37])
def test_gradient_of_embeddings(vocab: int, sizes: dict[str, int]) -> None:
    mesh = mesh_of(**sizes)
    table, weight = draw(1, vocab, 16), draw(2, 8, 4, 16)
    ids = jax.random.randint(jax.random.key(3), (8, 4), 0, vocab)
    spec = P("tensor" if vocab % sizes.get("tensor", 1) == 0 else None, SHARDS)

    def loss(table: jax.Array, ids: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(look_up(table, ids, jnp.float32) * weight)

    def plain(table: jax.Array, ids: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(table[ids] * weight)

    text = both(mesh, loss, (table, ids, weight), (spec, TOKENS, TOKENS))
    np.testing.assert_allclose(
        jax.grad(loss)(table, ids, weight), jax.grad(plain)(table, ids, weight), rtol=1e-5, atol=1e-5
    )
    if sizes.get("fsdp", 1) * sizes.get("sequence", 1) > 1:
        whole = table.size // (sizes.get("tensor", 1) if spec[0] else 1)
        assert "reduce-scatter(" in text and not summed(text, whole)


def test_axes_that_do_not_divide_are_left_out() -> None:
    assert split_axes((8, 4), ("batch", "length")) == [(), ()]  # no mesh
    with use_mesh(mesh_of(data=2, fsdp=2, fsdp_y=2)):
        assert split_axes((8, 16), ("batch", "embed")) == [("data", "fsdp", "fsdp_y"), ()]  # an axis serves one dim
        assert split_axes((6, 3), ("length", "embed")) == [(), ()]
        assert split_axes((5, 4), ("vocab", "embed")) == [(), ("fsdp", "fsdp_y")]
