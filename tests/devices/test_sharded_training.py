"""Whole train steps on eight fake devices: the numbers of one device, every array where it belongs, and no more talk
between devices than that takes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import LoraConfig, MeshConfig, MoeRunConfig, OptimizerConfig
from jaxlm.devices.mesh import make_mesh, put_batch, use_mesh
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.spec import DecoderSpec, ExpertsSpec, uniform_decoder
from jaxlm.training.objectives.cross_entropy import CrossEntropy
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer, TrainState
from jaxlm.training.step import make_train_step
from tests.devices.collectives import collectives
from tests.models.compare import random_tree

pytestmark = pytest.mark.slow

# Every dim has a size of its own, so that a shape in the compiled program tells what it is.
L, D, F, V, E, A, B, T = 3, 32, 48, 88, 8, 2, 8, 20
CONFIG = uniform_decoder(
    "llama",
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_layers=L,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qkv_bias=True,
)
EXPERTS = CONFIG.with_experts(ExpertsSpec(E, "learned", ("text", "smiles"), ((40, V),), (3, 2)))
MODELS: dict[str, tuple[DecoderSpec, LoraConfig | None]] = {
    "full": (CONFIG, None),
    "uneven": (dataclasses.replace(CONFIG, vocab_size=V + 1), None),
    "lora": (
        CONFIG,
        LoraConfig(
            rank=5, targets=("q_proj", "o_proj", "down_proj"), dora=True, modules_to_save=("lm_head",), dropout=0.1
        ),
    ),
    "experts": (EXPERTS, None),
    "experts, lora": (EXPERTS, LoraConfig(rank=5, targets=("q_proj", "up_proj", "down_proj"))),
}
STEPS = 2
# What makes faster programs for a CPU takes most of the time to compile them; JAX 0.12 has no such choice.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None


@dataclasses.dataclass
class Run:
    metrics: list[dict[str, Any]]
    state: TrainState
    mesh: Mesh
    text: str
    messages: str


def batches(i: int) -> dict[str, np.ndarray]:
    """Rows of two documents and padding, which no cut along the length falls between."""
    rng = np.random.default_rng(i)
    ids = rng.integers(0, V, (A, B, T)).astype(np.int32)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [9, 8, 3]), ids.shape).astype(np.int32)
    return dict(
        input_ids=ids,
        loss_mask=(rng.random(ids.shape) < rng.random((A, B, 1))) & (segments > 0),
        segment_ids=segments,
        positions=np.broadcast_to(np.r_[0:9, 0:8, 0:3], ids.shape).astype(np.int32),
        modality_ids=np.where(segments > 0, ids >= 40, -1).astype(np.int8),
    )


def train(sizes: dict[str, int], kind: str, attention: str = "reference", capture: Any = None) -> Run:
    config, lora = MODELS[kind]
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), devices, E if config.experts else None)
    adapters = resolve_lora(config, lora) if lora else {}
    model = Decoder(config, adapters, attention=attention, experts="loop")
    options = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1)
    schedule = make_schedule(options, 10)
    initializer = Initializer(model, lora, mesh, functools.partial(make_optimizer, options, schedule))
    params = jax.device_put(random_tree(initializer.params, 1, 0.1), initializer.params_shardings)
    frozen: Any = {"params": params} if lora else {}
    trainable: Any = {"params": params}
    if lora:
        trainable = jax.device_put(random_tree(initializer.trainable, 2, 0.1), initializer.trainable_shardings)
    state = initializer.new_state(trainable, 0)
    routers = MoeRunConfig(balance_loss=0.3, z_loss=0.2)
    step = make_train_step(CrossEntropy(model, moe=routers), initializer.optimizer, schedule, 1.0)
    with use_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(initializer.state_shardings, None))
        compiled = jitted.lower(state, frozen, put_batch(batches(0), mesh)).compile(compiler_options=QUICK)
        messages = "" if capture is None else capture.readouterr().err
        metrics = []
        for i in range(STEPS):
            state, found = compiled(state, frozen, put_batch(batches(i), mesh))
            metrics.append(jax.device_get(found))
    return Run(metrics, state, mesh, compiled.as_text(), messages)


@functools.cache
def one_device(kind: str) -> Run:
    return train({}, kind)


def assert_same(run: Run, kind: str) -> None:
    """Losses, norms, counts of what experts were used, and parameters after the steps."""
    expected = one_device(kind)
    assert len({float(found["loss"]) for found in run.metrics}) == STEPS
    for mine, theirs in zip(run.metrics, expected.metrics, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            # float32 sums in another order
            np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=2e-5, err_msg=name)
    for name in ("expert_use", "modality_tokens"):
        assert (name in run.metrics[0]) == (MODELS[kind][0].experts is not None)
    params, wanted = run.state.trainable, expected.state.trainable
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), params, wanted)


# Where each leaf lies, written out by hand: what the rules say is under test too.
SHARDED, NEURONS = ("fsdp", "sequence"), ("expert", "tensor")
KERNELS = {
    "embed_tokens/embedding": P("tensor", SHARDED),
    "lm_head/kernel": P("tensor", SHARDED),
    "norm/scale": P(None),
    "input_layernorm/scale": P(None, None),
    "post_attention_layernorm/scale": P(None, None),
    "q_proj/kernel": P(None, SHARDED, "tensor", None),
    "k_proj/kernel": P(None, SHARDED, "tensor", None),
    "v_proj/kernel": P(None, SHARDED, "tensor", None),
    "q_proj/bias": P(None, "tensor", None),
    "k_proj/bias": P(None, "tensor", None),
    "v_proj/bias": P(None, "tensor", None),
    "o_proj/kernel": P(None, "tensor", None, SHARDED),
    "mlp/router": P(None, SHARDED, None),
    "gate_proj/kernel": P(None, SHARDED, NEURONS),
    "up_proj/kernel": P(None, SHARDED, NEURONS),
    "down_proj/kernel": P(None, NEURONS, SHARDED),
    "q_proj/lora_A": P(None, SHARDED, None),
    "q_proj/lora_B": P(None, None, "tensor", None),
    "q_proj/magnitude": P(None, "tensor", None),
    "o_proj/lora_A": P(None, "tensor", None, None),
    "o_proj/lora_B": P(None, None, SHARDED),
    "o_proj/magnitude": P(None, SHARDED),
    "up_proj/lora_A": P(None, SHARDED, None),
    "up_proj/lora_B": P(None, None, NEURONS),
    "down_proj/lora_A": P(None, NEURONS, None),
    "down_proj/lora_B": P(None, None, SHARDED),
    "down_proj/magnitude": P(None, SHARDED),
}


def assert_placed(run: Run) -> None:
    """The arrays themselves, after steps: parameters, both moments, counters."""
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.state):
        names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
        name = "/".join(names[-2:])
        spec = KERNELS.get(name, P())
        if leaf.ndim > 1 and "dropout_key" not in names:
            assert name in KERNELS, names
            seen.add(names[0])
        wanted = NamedSharding(run.mesh, spec)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (names, leaf.sharding.spec, spec)
        shards = {shard.data.shape for shard in leaf.addressable_shards}
        assert shards == {wanted.shard_shape(leaf.shape)}, names
    assert seen == {"trainable", "opt_state"}


def products(text: str) -> list[tuple[int, ...]]:
    """Shapes that products result in."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", text)
    return [tuple(int(n) for n in dims.split(",") if n) for dims in found]


def assert_frugal(run: Run, kind: str) -> None:
    """The collectives that the mesh asks for, over these axes and of these sizes, and no others."""
    assert "nvoluntary full rematerialization" not in run.messages, run.messages[:2000]
    size = run.mesh.shape
    tokens = B * T // (run.mesh.size // size["tensor"])
    rows = B // (size["data"] * size["fsdp"] * size["expert"])
    found = collectives(run.text, run.mesh)
    talk = {(one.kind, name) for one in found for name in one.axes}
    expected = {("all-reduce", name) for name, devices in size.items() if devices > 1}
    expected |= {("all-gather", name) for name in SHARDED if size[name] > 1}
    expected |= {("all-to-all", name) for name in ("sequence", "expert") if size[name] > 1}
    assert expected <= talk, expected - talk
    for one in found:
        if one.kind == "reduce-scatter":
            assert one.axes <= set(SHARDED), one
        elif one.kind == "all-to-all":
            assert one.axes == {"expert"} or one.axes <= set(SHARDED), one
        for shape in one.shapes:
            numbers = math.prod(shape)
            if numbers <= max(D * E, 2 * tokens):
                continue  # a router; a few numbers of each token, among them those of the loss over the vocabulary
            # The output layer or table as a whole, and never logits.
            assert not {V, V // size["tensor"]} & set(shape) or shape[0] == V // size["tensor"], one
            if one.kind == "all-gather":
                # Matrices of one layer (experts have gate and up in one), or keys and values of whole rows; a stack of
                # layers would undo FSDP.
                assert one.axes <= set(SHARDED), one
                limit = (D * V if shape[0] == V // size["tensor"] else 2 * D * F) // size["tensor"]
                whole_rows = (
                    shape[:2] == (rows, T) and size["sequence"] * size["tensor"] > CONFIG.attention.num_kv_heads
                )
                assert len(shape) < 4 or whole_rows, one
                assert numbers <= limit, one
            elif one.kind == "all-reduce" and "tensor" in one.axes:
                assert one.axes == {"tensor"} and numbers <= tokens * (D + 5), one  # hidden states, with LoRA's rank
            elif one.kind == "all-reduce":  # gradients
                assert numbers <= max(D * V, 2 * D * F) // size["tensor"], one
            elif one.kind == "collective-permute":
                raise AssertionError(one)
    if MODELS[kind][0].experts is None:
        # A part of a row is what the feed-forward layer sees: whole rows are for attention, which has some heads.
        gated, found_products = (tokens, F // size["tensor"]), products(run.text)
        assert gated in found_products
        if size["sequence"] > 1:
            assert (tokens * size["sequence"], F // size["tensor"]) not in found_products


# Each axis alone, and each three of them that make sense together.
TABLE: list[tuple[str, str]] = [
    ("full", "data 8"),
    ("full", "fsdp 8"),
    ("full", "tensor 2"),
    ("full", "sequence 4"),  # more devices than kv heads
    ("full", "data 2, fsdp 2, tensor 2"),
    ("full", "data 2, fsdp 2, sequence 2"),
    ("full", "data 2, sequence 2, tensor 2, xla"),
    ("full", "fsdp 2, sequence 2, tensor 2"),
    ("lora", "fsdp 8"),
    ("lora", "data 2, fsdp 2, tensor 2"),
    ("lora", "fsdp 2, sequence 2, tensor 2, xla"),
    ("experts", "expert 8"),
    ("experts", "data 2, fsdp 2, expert 2"),
    ("experts", "data 2, expert 2, sequence 2"),
    ("experts", "data 2, expert 2, tensor 2"),
    ("experts", "fsdp 2, expert 2, sequence 2"),
    ("experts", "expert 2, sequence 2, tensor 2"),
    ("experts", "fsdp 2, sequence 2, tensor 2"),
    ("experts, lora", "fsdp 2, expert 2, tensor 2"),
]


@pytest.mark.parametrize(("kind", "devices"), TABLE, ids=str)
def test_as_one_device(kind: str, devices: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = devices.split(", ")
    sizes = {name: int(size) for name, _, size in (word.partition(" ") for word in words if " " in word)}
    run = train(sizes, kind, "xla" if "xla" in words else "reference", capfd)
    assert_same(run, kind)
    assert_placed(run)
    assert_frugal(run, kind)
    parts, tensor = sizes.get("fsdp", 1) * sizes.get("sequence", 1), sizes.get("tensor", 1)
    gate = {(d, f) for d in (D, D // parts) for f in (F, F // tensor)}
    if kind == "full" and devices == "tensor 2":
        assert gate & set(products(run.text))  # what is looked for below is there when weights train
    if kind == "lora":  # frozen weights get no gradient: no product results in gate's or up's
        assert not gate & set(products(run.text))


def test_one_device_talks_to_nobody() -> None:
    for kind in ("full", "experts"):
        run = one_device(kind)
        assert not re.search(r"all-(gather|reduce|to-all)|reduce-scatter|collective-permute", run.text)


def test_a_vocabulary_that_does_not_divide() -> None:
    """The table and the head are whole along it, everything else is split; the loss splits it all the same."""
    run = train({"fsdp": 2, "tensor": 2}, "uneven")
    assert_same(run, "uneven")
    params = run.state.trainable["params"]
    assert params["lm_head"]["kernel"].sharding.shard_shape((V + 1, D)) == (V + 1, D // 2)
    with_vocabulary = [shape for shape in products(run.text) if {V + 1, V // 2 + 1} & set(shape)]
    assert with_vocabulary and not [shape for shape in with_vocabulary if V + 1 in shape]


def test_the_warning_looked_for_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    """XLA says so when it cannot go from one sharding to another but through full replication."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    x = jax.ShapeDtypeStruct((4, 4, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, None, ("data", "fsdp"))))
    other = NamedSharding(mesh, P(("fsdp", "data"), None))
    move = jax.jit(lambda x: jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x).reshape(16, 8), other)))
    move.lower(x).compile()
    assert "nvoluntary full rematerialization" in capfd.readouterr().err
