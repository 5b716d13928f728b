"""Adapters on a base in few bits: the numbers of the weights that it stands for, whatever the devices."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxlm.config import LoraConfig, MeshConfig, OptimizerConfig
from jaxlm.devices.finite import check_finite
from jaxlm.devices.mesh import make_mesh, put_batch, use_mesh
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import FAMILIES
from jaxlm.nn.rounding import Kind, dequantize, quantize
from jaxlm.nn.weight_types import StoredWeight
from jaxlm.spec import DecoderSpec, ExpertsSpec, uniform_decoder
from jaxlm.training.objectives.cross_entropy import CrossEntropy
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer
from jaxlm.training.step import make_train_step
from jaxlm.weights.leaves import LeafInfo
from jaxlm.weights.names import leaf_shapes
from jaxlm.weights.quantized import kernels_of
from tests.models.compare import random_tree
from tests.models.small import small_spec

QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None
SPEC = uniform_decoder(
    "llama",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=("q_proj", "o_proj", "down_proj"))
EVERY = LoraConfig(rank=2, alpha=8.0, targets=("all-linear",), rslora=True)
STEPS = 2


class Source:
    """Random weights of a model as leaves; counts what is read of each kernel."""

    def __init__(self, spec: DecoderSpec) -> None:
        rng = np.random.default_rng(0)
        self.arrays = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in leaf_shapes(spec).items()}
        self.leaves = {path: LeafInfo(array.shape, array.dtype) for path, array in self.arrays.items()}
        self.read_elements = dict.fromkeys(self.arrays, 0)

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self.arrays[path][index].copy()
        self.read_elements[path] += part.size
        return part


class Rounded(Source):
    """The same with what the kernels stand for once they are rounded."""

    def __init__(self, spec: DecoderSpec, kind: Kind) -> None:
        super().__init__(spec)
        for path, dims in kernels_of(spec).items():
            array = self.arrays[path]
            layers = [dequantize(kind, quantize(kind, layer, dims), layer.shape, dims) for layer in array]
            self.arrays[path] = np.stack(layers)


def train(
    spec: DecoderSpec, lora: LoraConfig, kind: Kind | None, source: Source, sizes: dict[str, int], offload: bool = False
) -> tuple[list[float], Any, Any]:
    """Losses, the adapter behind the steps, and the base."""
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[: math.prod(sizes.values())], spec.experts and 4)
    model = Decoder(spec, resolve_lora(spec, lora), attention="reference", experts="loop")
    options = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    schedule = make_schedule(options, 10)
    initializer = Initializer(model, lora, mesh, functools.partial(make_optimizer, options, schedule), kind, offload)
    base = initializer.load_params(source)
    start = random_tree(initializer.trainable, 2, 0.1)
    if lora.dora:
        start = {"lora": initializer.init_lora(base, 0)}
    state = initializer.new_state(jax.device_put(start, initializer.trainable_shardings), 0)
    step = make_train_step(CrossEntropy(model), initializer.optimizer, schedule, 1.0)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, spec.vocab_size, (1, 8, 16)).astype(np.int32)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [7, 7, 2]), ids.shape).astype(np.int32)
    positions = np.broadcast_to(np.r_[0:7, 0:7, 0:2], ids.shape).astype(np.int32)
    batch = dict(input_ids=ids, loss_mask=segments > 0, segment_ids=segments, positions=positions)
    batch["modality_ids"] = np.where(segments > 0, ids % 2, -1).astype(np.int8)
    if spec.encoder is not None:
        batch |= {"encoder_ids": ids[:, :, ::-1].copy(), "encoder_segment_ids": segments}
    losses = []
    with use_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(initializer.state_shardings, None))
        frozen = {"params": base}
        compiled = jitted.lower(state, frozen, put_batch(batch, mesh)).compile(compiler_options=QUICK)
        for _ in range(STEPS):
            state, found = compiled(state, frozen, put_batch(batch, mesh))
            losses.append(float(found["loss"]))
    return losses, jax.device_get(state.trainable), base


def assert_alike(found: Any, expected: Any) -> None:
    assert len(set(expected[0])) == STEPS
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    # Adam's steps are as large for gradients that are rounding errors: some of the 1e-2 of two steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found[1], expected[1])


@functools.cache
def alone(kind: Kind) -> tuple[Any, Source]:
    """What one device computes, and what it read from."""
    source = Source(SPEC)
    return train(SPEC, LORA, kind, source, {}), source


@pytest.mark.slow
def test_an_adapter_learns_on_nf4_what_it_learns_on_the_same_numbers() -> None:
    """With dropout, scanned layers; every kernel is read once."""
    found, source = alone("nf4")
    assert_alike(found, train(SPEC, LORA, None, Rounded(SPEC, "nf4"), {}))
    stored = [leaf for leaf in jax.tree.leaves(found[2], is_leaf=_is_stored) if _is_stored(leaf)]
    assert len(stored) == 7
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) / sum(s.layers for s in map(_Size, stored))
    assert 4.12 < bits < 4.14
    assert {n // source.arrays[path].size for path, n in source.read_elements.items()} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), [("nf4", {}), (None, {"fsdp": 2, "tensor": 2})])
def test_a_base_in_the_hosts_memory_gives_the_same_bits(kind: Kind | None, sizes: dict[str, int]) -> None:
    here, there = (train(SPEC, LORA, kind, Source(SPEC), sizes, offload) for offload in (False, True))
    assert here[0] == there[0]
    for parts in zip(here[1:], there[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, *parts)
    kinds = {
        leaf.sharding.memory_kind for leaf in jax.tree.leaves(there[2]["layers"]["mlp"]["up_proj"]) if leaf.ndim > 2
    }
    assert kinds == {"pinned_host"}
    check_finite(
        there[2], make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[: math.prod(sizes.values())]), "", ""
    )


class _Size:
    def __init__(self, leaf: StoredWeight) -> None:
        self.layers = 2 * math.prod(leaf.array_shape)  # of two layers


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, StoredWeight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("nf4", {"fsdp": 2, "tensor": 2, "data": 2}), ("nf4", {"fsdp": 2, "sequence": 2, "tensor": 2})],
)
def test_devices_that_share_it_compute_the_same(kind: Kind, sizes: dict[str, int]) -> None:
    found = train(SPEC, LORA, kind, Source(SPEC), sizes)
    expected, _ = alone(kind)
    assert_alike(found, expected)
    for here, there in zip(jax.tree.leaves(found[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_array_equal(here, there)  # bit by bit, though each device read what it keeps
    kernel = found[2]["layers"]["mlp"]["down_proj"]["kernel"]
    large = kernel.values if kind == "int8" else kernel.codes
    assert large.sharding.shard_shape(large.shape) != large.shape


EXPERTS = ExpertsSpec(
    num_experts=4,
    router="modality",
    modalities=("text", "smiles"),
    top_k=(2, 2),
    ranges=((32, 64),),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("sizes", [{}, {"expert": 2, "fsdp": 2, "tensor": 2}])
def test_experts_on_it(kind: Kind, sizes: dict[str, int]) -> None:
    spec = SPEC.with_experts(EXPERTS)
    lora = LoraConfig(rank=2, targets=("q_proj", "up_proj", "down_proj"))
    found = train(spec, lora, kind, Source(spec), sizes)
    assert_alike(found, train(spec, lora, None, Rounded(spec, kind), {}))


@pytest.mark.slow
def test_dora_on_it() -> None:
    lora = LoraConfig(rank=2, dropout=0.2, dora=True, targets=("q_proj", "down_proj"))
    found = train(SPEC, lora, "nf4", Source(SPEC), {"fsdp": 2, "tensor": 2})
    assert_alike(found, train(SPEC, lora, None, Rounded(SPEC, "nf4"), {}))


# These stand for the kinds of layers that there are; the others have little that differs here.
TELLING = {"falcon", "qwen3_moe"}


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=pytest.mark.slow if each in TELLING else pytest.mark.nightly) for each in FAMILIES],
)
def test_every_family_has_a_step_on_it(family: str) -> None:
    """Shapes alone, with adapters on all linear layers, all of which are in few bits."""
    spec = small_spec(family)
    model = Decoder(spec, resolve_lora(spec, EVERY), attention="reference", experts="dense")
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    initializer = Initializer(model, EVERY, mesh, lambda axes: optax.identity(), "nf4")
    stored = [leaf for leaf in jax.tree.leaves(initializer.params, is_leaf=_is_stored) if _is_stored(leaf)]
    assert len(stored) == len(kernels_of(spec))
    ids = np.ones((1, 6), np.int32)
    more = {} if spec.encoder is None else {"encoder_ids": ids}

    def loss(lora: Any, params: Any) -> Any:
        variables = {"params": params, "lora": lora}
        return model.apply(variables, ids, np.ones((1, 6), np.float32), method="loss", mutable=["moe"], **more)[0].loss

    lora = initializer.trainable["lora"]
    grads = jax.eval_shape(jax.grad(loss), lora, initializer.params)
    assert jax.tree.map(lambda leaf: leaf.shape, grads) == jax.tree.map(lambda leaf: leaf.shape, lora)


@pytest.mark.parametrize(
    "family", [pytest.param("t5", marks=pytest.mark.nightly), pytest.param("falcon", marks=pytest.mark.slow)]
)
def test_families_train_on_it(family: str) -> None:
    """With rsLoRA on all linear layers; blocks of these small models are cut short."""
    spec = small_spec(family)
    found = train(spec, EVERY, "nf4", Source(spec), {})
    assert_alike(found, train(spec, EVERY, None, Rounded(spec, "nf4"), {}))
