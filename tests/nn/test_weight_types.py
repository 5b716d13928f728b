"""A weight's type: all that layers and the reader ask of it, with one made up that is packed unlike its array."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh, tree_shardings, use_mesh
from jaxlm.inference.model import load_weights, unstack
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.models.unrolled import prefill
from jaxlm.nn.linear import Linear, LinearParts
from jaxlm.nn.lora import LoraSpec
from jaxlm.nn.nf4 import WEIGHT_TYPES, _choose, _gather
from jaxlm.nn.rounding import KINDS, NF4, Kind, dequantize, dynamic_map
from jaxlm.nn.weight_types import Int8Weight, OutputMajorWeight, StoredWeight, dense, num_inputs, times
from jaxlm.sharding import ROW_AXES, WHOLE_IF_UNEVEN
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


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_an_abstract_kernel_are_those_of_an_array(kind: Kind) -> None:
    """With the layers of a stack before them, and axes that go with the dims."""
    stored, shape = WEIGHT_TYPES[kind], (4, 32, 48)
    box = nn.LogicallyPartitioned(
        jax.ShapeDtypeStruct((3, *shape), jnp.float32), ("layers", "heads", "head_dim", "embed")
    )
    abstract, real = stored.of_abstract(box, 2), stored.of_array(np.ones(shape, np.float32), 2)
    for part in stored.parts:
        boxed, array = getattr(abstract, part), getattr(real, part)
        assert (boxed.value.shape, boxed.value.dtype) == ((3, *array.shape), array.dtype)
        assert len(boxed.names) == boxed.value.ndim and boxed.names[0] == "layers"
    assert real.array_shape == shape
    by_output = abstract.factors if kind == "int8" else abstract.absmax
    assert by_output.names[-1] == "embed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(192, 2, 40), (3, 64, 40)])
def test_a_stored_weight_computes_as_what_it_stands_for(kind: Kind, shape: tuple[int, ...]) -> None:
    """Product and gradient of the input; `dense` has the numbers that numpy has."""
    rng = np.random.default_rng(0)
    in_dims = 1 if shape[0] == 192 else 2
    kernel = rng.normal(size=shape).astype(np.float32)
    stored = WEIGHT_TYPES[kind].of_array(kernel, in_dims)
    parts = {part: getattr(stored, part) for part in stored.parts}
    weight = dequantize(kind, parts, shape, in_dims)
    stored = jax.tree.map(jnp.asarray, stored)
    np.testing.assert_allclose(stored.dense(jnp.float32), weight, rtol=1e-6, atol=1e-7)
    x = jnp.asarray(rng.normal(size=(2, 3, *shape[:in_dims])), jnp.float32)
    grad = jnp.asarray(rng.normal(size=(2, 3, *shape[in_dims:])), jnp.float32)
    y, back = jax.vjp(lambda x: times(stored, x, in_dims, jnp.float32), x)
    expected, plain_back = jax.vjp(lambda x: jnp.tensordot(x, jnp.asarray(weight), in_dims), x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(back(grad)[0], plain_back(grad)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_devices_share_a_stored_weight(kind: Kind) -> None:
    """Split over `embed` and `heads`, gathered as bits: the numbers of one device, forward and backward."""
    rng = np.random.default_rng(0)
    stored, axes = WEIGHT_TYPES[kind].of_array(rng.normal(size=(256, 4, 8)).astype(np.float32), 1), ("embed", "heads")
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((256, 4, 8), jnp.float32), (*axes, "head_dim"))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    tree = {"w": WEIGHT_TYPES[kind].of_abstract(box, 1)}
    placed = jax.device_put({"w": stored}, tree_shardings(tree, mesh, WHOLE_IF_UNEVEN))["w"]
    large = jax.tree.leaves(placed)[0]
    assert math.prod(large.sharding.shard_shape(large.shape)) == large.size // 8
    x = jnp.asarray(rng.normal(size=(8, 3, 256)), jnp.float32)

    def run(weight: Any, x: jax.Array) -> Any:
        y, back = jax.vjp(lambda x: times(weight, x, 1, jnp.float32, (*axes, "head_dim")), x)
        return y, back(jnp.cos(y))[0]

    expected = jax.jit(run)(jax.tree.map(jnp.asarray, stored), x)
    with use_mesh(mesh):
        found = jax.jit(run)(placed, jax.device_put(x, NamedSharding(mesh, P(ROW_AXES))))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_the_few_bits(kind: Kind) -> None:
    """Not the weight that they stand for: what `vjp` keeps of a product is smaller than the array."""
    kernel = np.ones((256, 512), np.float32)
    stored = jax.tree.map(jnp.asarray, WEIGHT_TYPES[kind].of_array(kernel, 1))
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: times(stored, x, 1, jnp.float32), x)[1], jnp.ones((1, 256)))
    sizes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert sizes < (0.26 if kind == "int8" else 0.14) * kernel.nbytes


def test_a_table_is_read_alike_on_every_backend() -> None:
    """Bit by bit, as on a TPU, and number by number."""
    for table in (NF4, dynamic_map()):
        codes = jnp.arange(len(table), dtype=jnp.uint8)[::-1]
        np.testing.assert_array_equal(_choose(codes, table), table[::-1])
        np.testing.assert_array_equal(_gather(codes, table), table[::-1])


@pytest.mark.parametrize("as_int8", [False, True], ids=["array", "int8"])
def test_output_major_products_do_not_depend_on_the_number_of_rows(as_int8: bool) -> None:
    rng = np.random.default_rng(5)
    x, kernel = rng.standard_normal((72, 4, 16), np.float32), rng.standard_normal((4, 16, 160), np.float32)
    plain = Int8Weight.of_array(kernel, 2) if as_int8 else jnp.asarray(kernel)
    weight = OutputMajorWeight.of_weight(plain, 2)
    assert weight.array_shape == kernel.shape
    np.testing.assert_array_equal(dense(weight, jnp.float32), dense(plain, jnp.float32))
    whole = jax.jit(lambda x: weight.times(x, jnp.float32))(x)
    np.testing.assert_allclose(whole, times(plain, jnp.asarray(x), 2, jnp.float32), rtol=1e-4, atol=1e-4)
    for rows in (2, 3, 8, 33):
        np.testing.assert_array_equal(jax.jit(lambda x: weight.times(x, jnp.float32))(x[:rows]), whole[:rows])
