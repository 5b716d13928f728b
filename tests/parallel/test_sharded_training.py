"""Whole train steps on eight fake devices: the numbers of one device, and every array where it belongs."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import LoraConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.models.llama import Llama
from jaxlm.models.lora import resolve_lora
from jaxlm.models.shapes import LlamaConfig
from jaxlm.parallel.mesh import make_mesh, put_batch, use_mesh
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer, TrainState
from jaxlm.training.step import make_train_step
from tests.models.compare import random_tree

# Every dim has a size of its own, so that a shape in the compiled program tells what it is.
L, D, F, V, A, B, T = 3, 32, 48, 80, 2, 8, 14
CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_layers=L,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qkv_bias=True,
)
LORA = LoraConfig(
    rank=5, targets=("q_proj", "o_proj", "down_proj"), dora=True, modules_to_save=("lm_head",), dropout=0.1
)
STEPS = 3


@dataclasses.dataclass
class Run:
    losses: list[float]
    norms: list[float]
    state: TrainState
    expected: Any
    text: str
    messages: str


def batches(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    ids = rng.integers(0, V, (A, B, T)).astype(np.int32)
    return dict(
        input_ids=ids,
        loss_mask=rng.random(ids.shape) < rng.random((A, B, 1)),
        segment_ids=np.broadcast_to(np.repeat([1, 2], [9, T - 9]), ids.shape).astype(np.int32),
        positions=np.broadcast_to(np.r_[0:9, 0 : T - 9], ids.shape).astype(np.int32),
    )


def train(
    sizes: tuple[int, int, int],
    lora: bool,
    capture: Any = None,
    config: LlamaConfig = CONFIG,
    sequence: int = 1,
    attention: str = "reference",
) -> Run:
    devices = jax.devices()[: int(np.prod(sizes)) * sequence]
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], sequence=sequence, tensor=sizes[2]), devices)
    model = Llama(config, resolve_lora(config, LORA) if lora else {}, attention=attention)
    options = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1)
    schedule = make_schedule(options, 10)
    optimizer = make_optimizer(options, schedule)
    initializer = Initializer(model, LORA if lora else None, mesh, optimizer)
    params = jax.device_put(random_tree(initializer.params, 1, 0.1), initializer.params_shardings)
    frozen: Any = {"params": params} if lora else {}
    trainable: Any = {"params": params}
    if lora:
        trainable = jax.device_put(random_tree(initializer.trainable, 2, 0.1), initializer.trainable_shardings)
    state = initializer.new_state(trainable, 0)
    step = make_train_step(model, optimizer, schedule, TrainConfig(), 1.0, 1)
    with use_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(initializer.state_shardings, None))
        compiled = jitted.lower(state, frozen, put_batch(batches(0), mesh)).compile()
        messages = "" if capture is None else capture.readouterr().err
        losses, norms = [], []
        for i in range(STEPS):
            state, metrics = compiled(state, frozen, put_batch(batches(i), mesh))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    return Run(losses, norms, state, initializer.state_shardings, compiled.as_text(), messages)


@functools.cache
def one_device(lora: bool) -> Run:
    return train((1, 1, 1), lora)


# Where each leaf lies, written out by hand: what the rules say is under test too.
SHARDED = ("fsdp", "sequence")
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
    "gate_proj/kernel": P(None, SHARDED, "tensor"),
    "up_proj/kernel": P(None, SHARDED, "tensor"),
    "down_proj/kernel": P(None, "tensor", SHARDED),
    "q_proj/lora_A": P(None, SHARDED, None),
    "q_proj/lora_B": P(None, None, "tensor", None),
    "q_proj/magnitude": P(None, "tensor", None),
    "o_proj/lora_A": P(None, "tensor", None, None),
    "o_proj/lora_B": P(None, None, SHARDED),
    "o_proj/magnitude": P(None, SHARDED),
    "down_proj/lora_A": P(None, "tensor", None),
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
            seen.add(names[0] + "/" + name)
        wanted = NamedSharding(leaf.sharding.mesh, spec)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (names, leaf.sharding.spec, spec)
        shards = {shard.data.shape for shard in leaf.addressable_shards}
        assert shards == {wanted.shard_shape(leaf.shape)}, names
    assert {s.split("/")[0] for s in seen} == {"trainable", "opt_state"}


def result_shapes(text: str, operation: str) -> list[tuple[int, ...]]:
    """Shapes an HLO operation results in, also inside tuples of combined ones."""
    shapes = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) {operation}(?:-start)?\(", line)
        if match:
            shapes += [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])]
    return shapes


def assert_frugal(run: Run, sizes: tuple[int, int, int]) -> None:
    assert "nvoluntary full rematerialization" not in run.messages, run.messages[:2000]
    gathered = result_shapes(run.text, "all-gather")
    if sizes[1] > 1:
        assert gathered  # fsdp does gather something; the pattern sees it
    for shape in gathered:
        # A stack [L, ...] gathered as a whole would undo fsdp; small vectors (DoRA magnitudes) may be.
        assert not (len(shape) > 2 and shape[0] == L and np.prod(shape) >= L * D * 12), shape
        if sizes[2] > 1:
            assert V not in shape, shape  # neither logits nor the table over the vocabulary


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_full(sizes: tuple[int, int, int], capfd: pytest.CaptureFixture[str]) -> None:
    run = train(sizes, False, capture=capfd)
    # float32 sums in another order, three AdamW steps long.
    np.testing.assert_allclose(run.losses, one_device(False).losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(run.norms, one_device(False).norms, rtol=1e-4)
    assert len(set(run.losses)) == STEPS
    assert_placed(run)
    assert_frugal(run, sizes)
    if sizes == (1, 1, 2):
        assert (D, F // 2) in result_shapes(run.text, "dot")  # what test_lora looks for is there when weights train


def test_a_vocabulary_that_does_not_divide() -> None:
    """The table and the head are whole along it, everything else is split; the loss splits it all the same."""
    uneven = dataclasses.replace(CONFIG, vocab_size=V + 1)
    run, alone = (train(sizes, False, config=uneven) for sizes in ((1, 2, 2), (1, 1, 1)))
    np.testing.assert_allclose(run.losses, alone.losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(run.norms, alone.norms, rtol=1e-4)
    params = run.state.trainable["params"]
    assert params["lm_head"]["kernel"].sharding.shard_shape((V + 1, D)) == (V + 1, D // 2)
    products = [shape for shape in result_shapes(run.text, "dot") if {V + 1, V // 2 + 1} & set(shape)]
    assert products and not [shape for shape in products if V + 1 in shape]


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_lora(sizes: tuple[int, int, int], capfd: pytest.CaptureFixture[str]) -> None:
    run = train(sizes, True, capture=capfd)
    np.testing.assert_allclose(run.losses, one_device(True).losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(run.norms, one_device(True).norms, rtol=1e-4)
    assert_placed(run)
    assert_frugal(run, sizes)
    # Frozen weights get no gradient: no product results in gate's or up's [D, F], whole or of one shard.
    gate = {(d, f) for d in (D, D // sizes[1]) for f in (F, F // sizes[2])}
    assert not gate & set(result_shapes(run.text, "dot"))


@pytest.mark.parametrize("attention", ["reference", "xla"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1), (1, 2, 2)], ids=str)
def test_sequence(sizes: tuple[int, int, int], lora: bool, attention: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows of two documents, each cut in half; with tensor 2 there are half as many kv heads as devices."""
    run = train(sizes, lora, capture=capfd, sequence=2, attention=attention)
    np.testing.assert_allclose(run.losses, one_device(lora).losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(run.norms, one_device(lora).norms, rtol=1e-4)
    assert_placed(run)
    assert_frugal(run, sizes)
    rows = B // (sizes[0] * sizes[1])
    products = result_shapes(run.text, "dot")
    # Half of a row is what the feed-forward layer sees, and whole rows of some heads what attention does.
    assert (rows * T // 2, F // sizes[2]) in products and (rows * T, F // sizes[2]) not in products
    assert result_shapes(run.text, "all-to-all")


def test_the_warning_looked_for_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    """XLA says so when it cannot go from one sharding to another but through full replication."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    x = jax.ShapeDtypeStruct((4, 4, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, None, ("data", "fsdp"))))
    other = NamedSharding(mesh, P(("fsdp", "data"), None))
    move = jax.jit(lambda x: jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x).reshape(16, 8), other)))
    move.lower(x).compile()
    assert "nvoluntary full rematerialization" in capfd.readouterr().err
