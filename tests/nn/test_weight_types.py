"""A weight's type: all that layers and the reader ask of it, with one made up that is packed unlike its array."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.inference.model import load_weights, unstack
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.models.unrolled import prefill
from jaxlm.nn.linear import Linear, LinearParts
from jaxlm.nn.lora import LoraSpec
from jaxlm.nn.weight_types import Int8Weight, StoredWeight, num_inputs
from jaxlm.spec import uniform_decoder


@flax.struct.dataclass
class Packed(StoredWeight):
    """Halves of the values, in one dim: neither shape nor values are those of the array."""

    parts: ClassVar[tuple[str, ...]] = ("halves",)

    halves: Any
    in_dims: int = flax.struct.field(pytree_node=False)
    dims: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def array_shape(self) -> tuple[int, ...]:
        return self.dims

    def times(self, x: jax.Array, dtype: Any) -> jax.Array:
        return jnp.tensordot(x.astype(dtype), self.dense(dtype), self.in_dims)

    def dense(self, dtype: Any) -> jax.Array:
        return (2 * self.halves).reshape(self.dims).astype(dtype)

    @classmethod
    def of_array(cls, kernel: np.ndarray, in_dims: int) -> Self:
        return cls(kernel.reshape(-1).astype(np.float32) / 2, in_dims, kernel.shape)

    @classmethod
    def of_abstract(cls, kernel: nn.LogicallyPartitioned, in_dims: int) -> Self:
        flat = jax.ShapeDtypeStruct((int(np.prod(kernel.value.shape)),), jnp.float32)
        return cls(kernel.replace(value=flat, names=(None,)), in_dims, kernel.value.shape)


SPEC = uniform_decoder(
    "llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


class Source:
    def __init__(self, tree: Any) -> None:
        self.leaves = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.leaves[path][index]


@pytest.mark.parametrize("adapter", [None, LoraSpec((2,), (1.5,), 0.0, False), LoraSpec((2,), (1.5,), 0.0, True)])
def test_a_layer_computes_with_a_weight_of_another_type(adapter: LoraSpec | None) -> None:
    layer = Linear((4, 8), (32,), ("heads", "head_dim"), ("embed",), adapter=adapter)
    x = np.random.default_rng(0).normal(size=(3, 5, 4, 8)).astype(np.float32)
    variables = nn.unbox(layer.init(jax.random.key(0), x, jnp.int32(0)))
    kernel = np.asarray(variables["params"]["kernel"])
    stored = {**variables, "params": {"kernel": Packed.of_array(kernel, 2)}}
    expected = layer.apply(variables, x, jnp.int32(0))
    np.testing.assert_allclose(layer.apply(stored, x, jnp.int32(0)), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="expected"):
        layer.apply({**variables, "params": {"kernel": Packed.of_array(kernel[:2], 2)}}, x, jnp.int32(0))


def test_the_parts_of_a_layer_hold_the_dense_weight() -> None:
    parts = LinearParts((32,), (48,), ("embed",), ("mlp",))
    kernel = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)
    found = parts.apply({"params": {"kernel": Packed.of_array(kernel, 1)}}, jnp.int32(0))
    np.testing.assert_array_equal(found.kernel, kernel)


def test_a_model_is_read_into_weights_of_another_type_and_computes_with_them() -> None:
    model = Decoder(SPEC)
    rng = np.random.default_rng(0)
    shapes = nn.unbox(abstract_variables(model))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    weights = load_weights(model, mesh, Source(params), weight_type=Packed)
    kernel = weights["params"]["layers"][1]["self_attn"]["o_proj"]["kernel"]
    assert isinstance(kernel, Packed) and (kernel.halves.ndim, kernel.in_dims, kernel.dims) == (1, 2, (4, 8, 32))
    tokens, lengths = jnp.asarray(rng.integers(0, 64, (1, 8)), jnp.int32), jnp.array([8], jnp.int32)
    found, _ = prefill(model, weights, tokens, lengths, 8)
    expected, _ = prefill(model, unstack({"params": params}, SPEC), tokens, lengths, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_number_of_inputs_is_that_of_every_linear_layer() -> None:
    boxed = abstract_variables(Decoder(SPEC))["params"]["layers"]
    for parent, layers in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in layers:
            axes = boxed[parent][f"{name}_proj"]["kernel"].names[1:]  # without the stack
            assert num_inputs(axes) == (2 if name == "o" else 1), name


def test_int8_of_an_abstract_kernel_is_what_int8_of_an_array_is() -> None:
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 8, 32), jnp.float32), ("heads", "head_dim", "embed"))
    abstract, real = Int8Weight.of_abstract(box, 2), Int8Weight.of_array(np.ones((4, 8, 32)), 2)
    for part in Int8Weight.parts:
        shape = getattr(abstract, part).value
        assert (shape.shape, shape.dtype) == (getattr(real, part).shape, getattr(real, part).dtype)
    assert abstract.factors.names == ("embed",) and real.array_shape == (4, 8, 32)
