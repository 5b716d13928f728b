"""The feed-forward layer in experts: routers, the sparse form against the masked one, and against the dense model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlm.config import LoraConfig, MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.errors import UserError
from jaxlm.models.adapters import as_one_adapter, resolve_lora
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.nn.dispatch import make_dispatch
from jaxlm.nn.experts import ExpertsFeedForward, keep_used, sums_by_expert, sums_by_product
from jaxlm.nn.routers import (
    PADDING,
    choose_compute,
    experts_of_modalities,
    modality_ids,
    released_mask,
    route_by_scores,
    route_learned,
)
from jaxlm.spec import DecoderSpec, ExpertsSpec, uniform_decoder
from tests.kernels.test_expert_loop import shapes_of_products
from tests.models.compare import assert_trees_close, random_tree

DENSE = uniform_decoder(
    "llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
)
NAMES, RANGES = ("text", "smiles", "protein"), ((40, 50), (50, 60))


def moe_config(
    router: str = "learned", top_k: tuple[int, ...] = (5, 2, 3), experts: int = 8, **more: Any
) -> DecoderSpec:
    moe = ExpertsSpec(experts, router, NAMES, RANGES, top_k, **more)
    return DENSE.with_experts(moe)


def variables_of(model: Decoder, seed: int = 0) -> Any:
    boxed = abstract_variables(model)
    return {name: random_tree(nn.unbox(boxed[name]), seed, 0.3) for name in ("params", "lora") if name in boxed}


IDS = np.random.default_rng(0).integers(0, 64, (3, 17)).astype(np.int32)
SEGMENTS = np.where(np.arange(17)[None] < np.array([17, 12, 6])[:, None], 1, 0).astype(np.int32)


def loss_and_grads(model: Decoder, variables: Any, segments: Any = None) -> Any:
    def loss(variables: Any) -> Any:
        logits = model.apply(variables, IDS, segment_ids=segments)
        # A sum of squares: one whose terms cancel would be compared with itself by its rounding errors.
        weights = 1.5 + np.cos(np.arange(np.prod(logits.shape))).reshape(logits.shape)
        keep = 1.0 if segments is None else (segments > 0)[..., None]
        return jnp.sum(jnp.square(logits) * weights * keep)

    return jax.jit(jax.value_and_grad(loss))(variables)


# --- routers ----------------------------------------------------------------------------------------------------------


def test_modalities_of_tokens() -> None:
    moe = moe_config().experts
    assert moe is not None
    ids = np.array([[0, 39, 40, 49, 50, 59, 60]])
    np.testing.assert_array_equal(modality_ids(moe, ids), [[0, 0, 1, 1, 2, 2, 0]])
    found = modality_ids(moe, ids, np.array([[1, 1, 1, 0, 0, 2, 0]]))
    np.testing.assert_array_equal(found, [[0, 0, 1, PADDING, PADDING, 2, PADDING]])


def test_each_token_uses_its_modalitys_number_of_experts() -> None:
    """Intended routing: exactly k, the best ones, and the lowest index among equals."""
    moe = moe_config("activation").experts
    assert moe is not None
    scores = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    scores[0] = 1.0
    modality = jnp.array([0, 1, 2, PADDING])
    mask = np.asarray(route_by_scores(moe, jnp.asarray(scores), modality).mask(8))
    np.testing.assert_array_equal(mask.sum(1), [5, 2, 3, 0])
    np.testing.assert_array_equal(np.flatnonzero(mask[0]), range(5))
    np.testing.assert_array_equal(np.flatnonzero(mask[1]), np.sort(np.argsort(-scores[1])[:2]))


def scimind() -> ExpertsSpec:
    return ExpertsSpec(16, "activation_released", ("text", "smiles"), ((40, 50),), (14, 2))


def test_released_routing_is_what_the_published_code_does() -> None:
    """COMPAT: molecule -> its top 2 and experts 0..13; text -> its top 14 and experts 0, 1. The trap is -0.0."""
    scores = np.random.default_rng(2).normal(size=(40, 16)).astype(np.float32)
    modality = np.arange(40) % 2
    mask = np.asarray(released_mask(scimind(), jnp.asarray(scores), jnp.asarray(modality)))
    intended = np.asarray(route_by_scores(scimind(), jnp.asarray(scores), jnp.asarray(modality)).mask(16))
    for row in range(40):
        best = np.argsort(-scores[row])[: (14, 2)[modality[row]]]
        expected = set(best) | set(range((2, 14)[modality[row]]))
        assert set(np.flatnonzero(mask[row])) == expected
        assert (mask[row] >= intended[row]).all()
    assert mask.sum(1).min() >= 14
    # A naive port multiplies by the mask: negative scores become -0.0, and other experts are taken.
    naive = jax.lax.top_k(jnp.array([-1.0, 1.0, -1.0]) * 0.0, 1)[1]
    assert int(naive[0]) == 1


def test_the_hard_map() -> None:
    moe = ExpertsSpec(8, "modality", NAMES, RANGES, (4, 2, 3), shared=1)
    np.testing.assert_array_equal(experts_of_modalities(moe), [[0, 1, 2, 3], [0, 4, 0, 0], [0, 5, 6, 0]])


def test_a_learned_router_that_does_not_discriminate_is_the_plain_sum() -> None:
    moe = moe_config().experts
    assert moe is not None
    modality = jnp.array([0, 1, 2, PADDING])
    weights = np.asarray(route_learned(moe, jnp.zeros((4, 8)), None, modality).mask(8))
    np.testing.assert_allclose(weights[0], [1] * 5 + [0] * 3)
    np.testing.assert_allclose(weights.sum(1), [5, 2, 3, 0])
    gradient = jax.grad(lambda x: route_learned(moe, x, None, modality).mask(8).sum())(jnp.zeros((4, 8)))
    assert np.isfinite(gradient).all()


def test_one_expert_is_weighted_as_in_the_switch_transformer() -> None:
    """transformers' own top-1 router: the same expert, weight, and gradient of a task for the router's matrix."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    rng = np.random.default_rng(3)
    x, router, task = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 40, 16), (16, 8), (1, 40, 8)))
    settings = transformers.SwitchTransformersConfig(hidden_size=16, num_experts=8, expert_capacity=40)
    theirs = SwitchTransformersTop1Router(settings).eval()
    theirs.classifier.weight.data = torch.tensor(router.T.copy())
    chosen, share, _ = theirs(torch.tensor(x))
    (chosen * share * torch.tensor(task)).sum().backward()

    moe = moe_config(top_k=(1, 1, 1)).experts
    assert moe is not None

    def mask(router: Any) -> Any:
        return route_learned(moe, x @ router, None, jnp.zeros((1, 40), jnp.int32)).mask(8)

    np.testing.assert_allclose(mask(router), (chosen * share).detach().numpy(), atol=1e-6)
    gradient = jax.grad(lambda router: (mask(router) * task).sum())(router)
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_allclose(gradient, theirs.classifier.weight.grad.numpy().T, atol=1e-5)


def test_tokens_of_each_modality_are_weighted_by_their_own_k() -> None:
    """Three experts, one, and padding beside each other; logits for which a softmax of its own would overflow."""
    moe = moe_config(top_k=(3, 1, 2)).experts
    assert moe is not None
    logits = np.random.default_rng(4).normal(0, 40, (4, 8)).astype(np.float32)
    found = np.asarray(route_learned(moe, jnp.asarray(logits), None, jnp.array([0, 1, 2, PADDING])).mask(8))
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    for row, k in enumerate((3, 1, 2)):
        best = np.argsort(-logits[row])[:k]
        expected = np.zeros(8)
        expected[best] = k * powers[row, best] / (powers[row].sum() if k == 1 else powers[row, best].sum())
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    assert not found[3].any()


# --- the layer --------------------------------------------------------------------------------------------------------


ROUTERS = ["activation", "activation_released", "learned", "modality"]
FAST = {("learned", "loop"), ("modality", "ragged"), *((router, "dense") for router in ROUTERS)}


@pytest.mark.parametrize(
    ("router", "compute"),
    [
        pytest.param(router, compute, marks=() if (router, compute) in FAST else pytest.mark.slow)
        for router in ROUTERS
        for compute in ("dense", "loop", "ragged")
    ],
)
def test_all_experts_on_is_the_dense_model(router: str, compute: str) -> None:
    config = moe_config(router, (8, 8, 8))
    model = Decoder(config, experts=compute, remat="none")
    variables = variables_of(model)
    if router == "learned":
        variables["params"]["layers"]["mlp"]["router"][:] = 0
    dense = {"params": jax.tree.map(lambda x: x, variables["params"])}
    dense["params"]["layers"]["mlp"] = {k: v for k, v in variables["params"]["layers"]["mlp"].items() if k != "router"}
    found, expected = model.apply(variables, IDS), Decoder(DENSE, remat="none").apply(dense, IDS)
    if compute == "dense":
        np.testing.assert_array_equal(found, expected)  # bit by bit: the mask is all ones
    else:
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpus_sums_of_neurons_are_the_sums(dtype: Any) -> None:
    h = jnp.asarray(np.random.default_rng(4).normal(size=(2, 5, 48)), dtype)
    expected = np.asarray(h, np.float64).reshape(2, 5, 8, 6).sum(-1)
    for sums in (sums_by_expert, sums_by_product):
        found = sums(h, 8)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("experts", [8, 32, 96])
def test_neurons_of_experts_that_are_not_used_are_zero(experts: int) -> None:
    """Values and gradients, for any number of experts; what is not used is no part of them, were it infinite."""
    rng = np.random.default_rng(experts)
    h, used = rng.normal(size=(2, 5, 192)).astype(np.float32), rng.random((2, 5, experts)) < 0.5
    is_used = np.repeat(used, 192 // experts, axis=-1)
    h[~is_used] = np.inf
    found, back = jax.vjp(lambda h: keep_used(h, jnp.asarray(used)), jnp.asarray(h))
    np.testing.assert_array_equal(found, np.where(is_used, h, 0))
    np.testing.assert_array_equal(back(jnp.full(h.shape, 2.0))[0], 2.0 * is_used)


LORAS = {
    "none": None,
    "lora": LoraConfig(rank=3, alpha=6, targets=("q_proj", "gate_proj", "up_proj", "down_proj")),
    "each": LoraConfig(rank=2, per_expert=True, targets=("v_proj", "gate_proj", "up_proj", "down_proj")),
    "gate": LoraConfig(rank=2, targets=("gate_proj",)),
    "down": LoraConfig(rank=2, targets=("down_proj", "up_proj"), rank_pattern={"layers.0.mlp.down_proj": 1}),
    "fused": LoraConfig(rank=2, targets=("gate_up_proj", "down_proj")),
    "fused each": LoraConfig(rank=2, per_expert=True, targets=("gate_up_proj",)),
}


# Not every combination: a program is compiled for each.
@pytest.mark.parametrize(
    ("router", "lora", "compute"),
    [
        ("learned", "each", "loop"),
        ("modality", "lora", "ragged"),
        ("learned", "fused", "loop"),
        ("activation", "lora", "loop"),
        ("activation_released", "gate", "loop"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *(("learned", lora, "loop") for lora in LORAS if lora not in ("each", "fused")),
                *(("modality", lora, "ragged") for lora in LORAS if lora != "lora"),
                ("learned", "lora", "ragged"),
                ("modality", "lora", "loop"),
                ("activation", "none", "ragged"),
                ("activation", "each", "loop"),
            ]
        ),
    ],
)
def test_sparse_is_masked(router: str, lora: str, compute: str) -> None:
    """Values and gradients, with padding, remat, biases and adapters."""
    config = moe_config(router, shared=1 if router == "modality" else 0)
    config = config.with_feed_forward(bias=lora in ("none", "lora", "fused"))
    if "fused" in lora:
        config = dataclasses.replace(config, family="phi3")
    specs = {} if LORAS[lora] is None else resolve_lora(config, LORAS[lora])  # type: ignore[arg-type]
    masked, sparse = (Decoder(config, specs, experts=kind, remat="full") for kind in ("dense", compute))
    variables = variables_of(masked, 3)
    expected = loss_and_grads(masked, variables, SEGMENTS)
    found = loss_and_grads(sparse, variables, SEGMENTS)
    assert_trees_close(found, expected, 1e-4)


def test_a_layer_on_a_tpu_is_masked() -> None:
    """Values and gradients, interpreted: what no kernel writes is NaN, and what is read of it would show."""
    config = moe_config()
    common = (config.hidden_size, 0.3, {}, jnp.float32, jnp.float32, config.feed_forward)
    rng = np.random.default_rng(6)
    x, task = (jnp.asarray(rng.normal(size=(2, 9, 16)), jnp.float32) for _ in range(2))
    modality = jnp.asarray(np.where(np.arange(9) < 6, rng.integers(0, 3, (2, 9)), PADDING))
    shapes = jax.eval_shape(ExpertsFeedForward(*common).init, jax.random.key(0), x, jnp.int32(0), True, modality)
    params = random_tree(nn.unbox(shapes)["params"], 6, 0.3)

    def run(compute: str) -> Any:
        layer = ExpertsFeedForward(*common, compute=compute)

        def loss(params: Any, x: Any) -> Any:
            y = layer.apply({"params": params}, x, jnp.int32(0), True, modality)
            return jnp.sum(y * task), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    with pltpu.force_tpu_interpret_mode():
        found = run("pallas_tpu")
    assert_trees_close(found, run("dense"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("router", "lora"), [("learned", "lora"), ("activation", "none"), ("modality", "fused each")])
def test_the_form_for_tpus_is_masked(router: str, lora: str) -> None:
    """A model of one layer, with biases and adapters."""
    config = dataclasses.replace(moe_config(router), num_layers=1).with_feed_forward(bias=lora == "lora")
    if "fused" in lora:
        config = dataclasses.replace(config, family="phi3")
    specs = {} if LORAS[lora] is None else resolve_lora(config, LORAS[lora])  # type: ignore[arg-type]
    masked, sparse = (Decoder(config, specs, experts=kind, remat="none") for kind in ("dense", "pallas_tpu"))
    variables = variables_of(masked, 3)
    expected = loss_and_grads(masked, variables, SEGMENTS)
    with pltpu.force_tpu_interpret_mode():
        found = loss_and_grads(sparse, variables, SEGMENTS)
    assert_trees_close(found, expected, 1e-4)


@pytest.mark.parametrize("lora", ["lora", "none"])
@pytest.mark.parametrize("router", ["learned", "activation"])
def test_frozen_experts_have_no_gradient_formed(router: str, lora: str) -> None:
    """Under LoRA no product of the whole program, scan and remat included, has the shape of a kernel's gradient."""
    config = dataclasses.replace(moe_config(router), hidden_size=20)  # no block has as many rows
    specs = resolve_lora(config, LORAS[lora]) if lora != "none" else {}  # type: ignore[arg-type]
    model = Decoder(config, specs, experts="loop", remat="full")
    variables = variables_of(model)
    trained = "lora" if lora != "none" else "params"

    def loss(some: Any) -> Any:
        return jnp.sum(model.apply(variables | {trained: some}, IDS))

    products = shapes_of_products(jax.make_jaxpr(jax.grad(loss))(variables[trained]).jaxpr)
    down = {(6, 20), (6, 20 + 3)}  # neurons of an expert; D, and the adapter's rank
    gate_up = {(20, 12), (20 + 3, 12), (20 + 6, 12)} if router == "learned" else set()
    if lora == "none":
        assert products & down and (products & gate_up or router == "activation")
    else:
        assert not products & (down | gate_up) and (6, 3) in products


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("compute", ["dense", "loop", "ragged"])
def test_the_task_trains_the_router(k: int, compute: str) -> None:
    """Without any penalty; both forms alike."""
    config = moe_config("learned", (k, k, k))
    model = Decoder(config, experts=compute, remat="none")
    variables = variables_of(model, 7)
    found = loss_and_grads(model, variables, SEGMENTS)
    router = found[1]["params"]["layers"]["mlp"]["router"]
    assert (np.abs(router).max(axis=(1, 2)) > 1e-3).all()
    if compute != "dense":
        assert_trees_close(found, loss_and_grads(Decoder(config, remat="none"), variables, SEGMENTS), 1e-4)


@pytest.mark.parametrize(
    "gate_up",
    [
        pytest.param(("gate_proj", "up_proj"), id="apart"),
        pytest.param(("gate_up_proj",), id="fused", marks=pytest.mark.slow),
    ],
)
def test_adapters_of_experts_are_apart(gate_up: tuple[str, ...]) -> None:
    """One for each expert: as if every expert were a layer with an adapter of its own."""
    config = dataclasses.replace(moe_config("modality", (8, 8, 8)), num_layers=1, family="phi3")
    lora = LoraConfig(rank=2, alpha=6, per_expert=True, targets=(*gate_up, "down_proj"))
    specs = resolve_lora(config, lora)
    assert {spec.rank for spec in specs.values()} == {16} and {spec.scales for spec in specs.values()} == {(3.0,)}
    model = Decoder(config, specs, remat="none")
    start = nn.unbox(jax.jit(model.init)({"params": jax.random.key(0)}, IDS))["lora"]["layers"]["mlp"]
    blocks = np.asarray(start["down_proj"]["lora_A"][0]).reshape(8, 6, 8, 2)  # expert, neuron, owner, rank
    assert all((np.abs(blocks[e, :, o]) > 0).all() == (e == o) for e in range(8) for o in range(8))
    assert np.abs(blocks).max() <= 6**-0.5  # PEFT's bound for a layer of an expert's 6 neurons

    variables = variables_of(model, 6)
    grads = jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, IDS))))(variables)["lora"]["layers"]["mlp"]
    own = np.kron(np.eye(8), np.ones((6, 2))) > 0  # [F, E R]
    for name, factor in (("gate_proj", "lora_B"), ("up_proj", "lora_B"), ("down_proj", "lora_A")):
        grad = np.asarray(grads[name][factor][0])
        grad = grad.T if factor == "lora_B" else grad
        assert (grad[~own] == 0).all() and (grad[own] != 0).all(), name

    # Ranks of other experts mean nothing to an expert: what the structure forbids may hold anything.
    clean = jax.tree.map(lambda x: x, variables)
    mlp = clean["lora"]["layers"]["mlp"]
    for name in ("gate_proj", "up_proj"):
        mlp[name]["lora_B"] = mlp[name]["lora_B"] * own.T
    mlp["down_proj"]["lora_A"] = mlp["down_proj"]["lora_A"] * own
    np.testing.assert_array_equal(model.apply(clean, IDS), model.apply(variables, IDS))
    # And what is left is an ordinary adapter of eight times the rank.
    plain = Decoder(config, resolve_lora(config, as_one_adapter(config, lora)), remat="none")
    np.testing.assert_allclose(plain.apply(clean, IDS), model.apply(clean, IDS), atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_experts_have_the_scale_of_their_own_rank(rslora: bool) -> None:
    """Eight of rank 2 are kept as one of rank 16; each is scaled by alpha / 2, or alpha / sqrt(2)."""
    lora = LoraConfig(rank=2, alpha=6, rslora=rslora, per_expert=True, targets=("q_proj", "up_proj"))
    specs = resolve_lora(moe_config(), lora)
    expected = 6 / np.sqrt(2) if rslora else 3.0
    np.testing.assert_allclose([specs["up_proj"].scales, specs["q_proj"].scales], expected)
    assert (specs["up_proj"].ranks, specs["q_proj"].ranks) == ((16, 16), (2, 2))


def test_adapters_of_experts_need_experts() -> None:
    each = LoraConfig(per_expert=True, targets=("up_proj",))
    for model, lora, wanted in (
        (DENSE, each, "not divided into experts"),
        (moe_config(), dataclasses.replace(each, targets=("q_proj",)), "none of gate_proj"),
        (moe_config(), dataclasses.replace(each, rank_pattern={"up_proj": 2}), "together with rank_pattern"),
    ):
        with pytest.raises(UserError, match=wanted):
            resolve_lora(model, lora)


def test_gradients_reach_only_the_neurons_that_were_used() -> None:
    """And none goes through the activation scores: neurons of unused experts get exactly zero."""
    config = moe_config("activation", (1, 1, 1))
    config = dataclasses.replace(config, num_layers=1)
    model = Decoder(config, remat="none")
    variables = variables_of(model, 4)
    ids = IDS[:1, :1]

    def loss(variables: Any) -> Any:
        return jnp.sum(jnp.sin(model.apply(variables, ids)))

    grads = jax.grad(loss)(variables)["params"]["layers"]["mlp"]
    _, notes = model.apply(variables, ids, mutable=["moe"])
    used = np.asarray(notes["moe"]["layers"]["mlp"]["used"])[0].sum(0) > 0
    assert used.sum() == 1
    for name in ("gate_proj", "up_proj"):
        per_expert = np.abs(np.asarray(grads[name]["kernel"][0])).reshape(16, 8, 6).sum((0, 2))
        assert ((per_expert > 0) == used).all(), name
    down = np.abs(np.asarray(grads["down_proj"]["kernel"][0])).reshape(8, 6, 16).sum((1, 2))
    assert ((down > 0) == used).all()


def test_padding_uses_no_expert() -> None:
    model = Decoder(moe_config("learned"), experts="loop")
    _, notes = model.apply(variables_of(model), IDS, segment_ids=SEGMENTS, mutable=["moe"])
    notes = notes["moe"]["layers"]["mlp"]
    assert notes["tokens"].sum() == 2 * SEGMENTS.sum()
    per_modality = notes["tokens"] * np.array([5, 2, 3])
    np.testing.assert_array_equal(notes["used"].sum(-1), per_modality)
    assert notes["balance_loss"].shape == (2,) and (notes["balance_loss"] > 0).all()


def test_the_balance_loss_is_one_when_use_is_even() -> None:
    from jaxlm.nn.routers import router_losses

    moe = ExpertsSpec(4, "learned", top_k=(1,))
    logits = jnp.eye(4) * 50.0
    modality = jnp.zeros(4, jnp.int32)
    even, z = router_losses(moe, logits, route_learned(moe, logits, None, modality), modality)
    np.testing.assert_allclose([even, z], [1.0, 2500.0], rtol=1e-5)
    one = jnp.tile(jnp.eye(4)[:1] * 50.0, (4, 1))
    np.testing.assert_allclose(router_losses(moe, one, route_learned(moe, one, None, modality), modality)[0], 4.0)


@pytest.mark.parametrize("k", [1, 3])
def test_router_losses_leave_padding_out(k: int) -> None:
    """The balance loss is Mixtral's in transformers, over k (even use: 1 here, k there); the z loss by its formula."""
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from jaxlm.nn.routers import router_losses

    moe = ExpertsSpec(8, "learned", top_k=(k,))
    logits = np.random.default_rng(5).normal(0, 2, (3, 17, 8)).astype(np.float32)
    modality = jnp.where(SEGMENTS > 0, 0, PADDING)
    balance, z = router_losses(moe, logits, route_learned(moe, jnp.asarray(logits), None, modality), modality)
    flat = torch.tensor(logits.reshape(-1, 8))
    theirs = mixtral.load_balancing_loss_func((flat,), 8, k, torch.tensor(SEGMENTS))
    np.testing.assert_allclose(balance, float(theirs) / k, rtol=1e-5)
    sums = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(z, (sums**2)[SEGMENTS > 0].mean(), rtol=1e-5)


@pytest.mark.slow
def test_noise_chooses_experts_while_training_and_never_weighs_them() -> None:
    moe = moe_config(top_k=(2, 1, 2)).experts
    assert moe is not None
    logits = jnp.asarray(np.random.default_rng(6).normal(size=(2, 8)), jnp.float32)
    noise = jnp.zeros((2, 8)).at[:, 5].set(100.0)
    found = np.asarray(route_learned(moe, logits, noise, jnp.array([0, 1])).mask(8))
    other = int(np.argmax(np.where(np.arange(8) == 5, -np.inf, logits[0])))
    pair = jax.nn.softmax(logits[0, jnp.array([5, other])])
    np.testing.assert_allclose(found[0, [5, other]], 2 * pair, rtol=1e-5)
    np.testing.assert_allclose(found[1, 5], jax.nn.softmax(logits[1])[5], rtol=1e-5)
    assert (found > 0).sum() == 3

    config = moe_config()
    variables = variables_of(Decoder(config, remat="none"), 2)
    noisy = Decoder(config, remat="none", router_noise=5.0)

    def used(model: Decoder, key: int | None) -> np.ndarray:
        rngs = {} if key is None else {"dropout": jax.random.key(key)}
        _, notes = model.apply(variables, IDS, deterministic=key is None, rngs=rngs, mutable=["moe"])
        return np.asarray(notes["moe"]["layers"]["mlp"]["used"])

    plain = used(Decoder(config, remat="none"), None)
    np.testing.assert_array_equal(used(noisy, None), plain)
    assert (used(noisy, 1) != plain).any() and (used(noisy, 1) != used(noisy, 2)).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "mesh"),
    [
        ("learned", {"data": 2, "expert": 4}),
        ("learned", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("modality", {"data": 2, "expert": 2, "tensor": 2}),
        ("modality", {"data": 4, "tensor": 2}),
        ("activation", {"data": 2, "expert": 2, "tensor": 2}),
        ("activation, loop", {"data": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_experts_on_several_devices_give_the_same_numbers(router: str, mesh: dict[str, int]) -> None:
    compute = "dense" if router == "activation" else "loop"
    config = moe_config(router.split(",")[0])
    model = Decoder(config, experts=compute, remat="none")
    variables = variables_of(model, 5)
    ids = np.tile(IDS, (3, 1))[:8]

    def loss(variables: Any, ids: Any) -> Any:
        logits, notes = model.apply(variables, ids, mutable=["moe"])
        notes = notes["moe"]["layers"]["mlp"]
        # The router's penalties are of all tokens, wherever they are.
        penalties = sum((jnp.sum(notes[name]) for name in ("balance_loss", "z_loss") if name in notes), jnp.float32(0))
        return jnp.sum(logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)) + penalties

    expected = jax.jit(jax.value_and_grad(loss))(variables, ids)
    from jaxlm.devices.mesh import tree_shardings

    devices = make_mesh(MeshConfig(**({"fsdp": 1} | mesh)), experts=8)
    shardings = tree_shardings(abstract_variables(model)["params"], devices)
    with use_mesh(devices):
        placed = {"params": jax.tree.map(jax.device_put, variables["params"], shardings)}
        kernel = placed["params"]["layers"]["mlp"]["up_proj"]["kernel"]
        owners = mesh.get("expert", 1) * mesh.get("tensor", 1)
        assert kernel.sharding.shard_shape(kernel.shape)[2] == 48 // owners
        found = jax.jit(jax.value_and_grad(loss))(placed, ids)
    assert_trees_close(found, expected, 1e-4)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_dispatch_loses_and_doubles_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, k, count = 37, 3, 5
    experts = np.stack([rng.permutation(count)[:k] for _ in range(tokens)]).astype(np.int32)
    live = rng.random((tokens, k)) < (0.0 if seed == 3 else 0.7)
    moves, groups = make_dispatch(jnp.asarray(experts), jnp.asarray(live), count, tokens * k)
    slot, token = np.asarray(moves.slot), np.asarray(moves.token)
    block = len(token) // len(groups.owner)
    assert len(set(slot[live])) == live.sum() and (slot[~live] == len(token)).all()
    for n, j in zip(*np.nonzero(live), strict=True):
        assert token[slot[n, j]] == n
        assert groups.owner[slot[n, j] // block] == experts[n, j]
        assert slot[n, j] // block < groups.live
    assert (np.sort(token)[: live.sum()] < tokens).all() and (np.sort(token)[live.sum() :] == tokens).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": (9, 2, 3)}, "moe.top_k: text: 9; there are 8 experts"),
        ({"top_k": (5, 0, 3)}, "moe.top_k: smiles: 0"),
        ({"top_k": (5, 2)}, "2 numbers for the modalities text, smiles, protein"),
        ({"num_experts": 7}, "7 does not divide the 48 neurons"),
        ({"router": "softmax"}, "'softmax' is not one of"),
        ({"ranges": ((40, 50), (45, 60))}, "share tokens"),
        ({"ranges": ((50, 40), (50, 60))}, "are not a range"),
        ({"ranges": ((40, 50),)}, "1 ranges of tokens for 2 modalities"),
        ({"modalities": ("smiles", "text", "protein")}, "the first is 'text'"),
        ({"shared": 3}, "moe.shared: 3"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(values: dict[str, Any], message: str) -> None:
    good = {"num_experts": 8, "router": "modality", "modalities": NAMES, "ranges": RANGES, "top_k": (5, 2, 3)}
    with pytest.raises(UserError, match=message):
        DENSE.with_experts(ExpertsSpec(**(good | values)))


def test_the_configuration_survives_json() -> None:
    import json

    config = moe_config("modality", shared=2)
    assert DecoderSpec.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_computes_and_why() -> None:
    def chosen(
        router: str,
        k: int,
        requested: str = "auto",
        platform: str = "cpu",
        capability: str = "9.0",
        dtype: str = "bfloat16",
        **lora: Any,
    ) -> str:
        config = moe_config(router, (k, 1, 1))
        specs = resolve_lora(config, LoraConfig(**lora)) if lora else {}
        assert config.experts is not None
        device = SimpleNamespace(platform=platform, compute_capability=capability)
        return choose_compute(requested, device, config.experts, specs, dtype)[0]

    assert chosen("learned", 8) == "loop" and chosen("learned", 8, platform="gpu") == "pallas_gpu"
    for lack in ({"capability": "8.0"}, {"dtype": "float32"}):
        assert chosen("learned", 8, platform="gpu", **lack) == "dense"
        with pytest.raises(UserError, match=r"'pallas_gpu' needs a (Hopper GPU|16-bit)"):
            chosen("learned", 8, "pallas_gpu", "gpu", **lack)
    assert chosen("learned", 8, platform="tpu") == "pallas_tpu"
    with pytest.raises(UserError, match="'pallas_tpu' needs a TPU, this is gpu"):
        chosen("learned", 8, "pallas_tpu", "gpu")
    assert chosen("activation", 4) == "loop" and chosen("activation", 5) == "dense"
    assert chosen("activation", 5, "ragged") == "ragged"
    assert chosen("learned", 2, dora=True, targets=("q_proj",)) == "loop"
    assert chosen("learned", 2, dora=True, targets=("up_proj",)) == "dense"
    assert chosen("activation", 2, dora=True, targets=("up_proj",)) == "loop"
    assert chosen("learned", 2, dropout=0.1, targets=("down_proj",)) == "dense"
    with pytest.raises(UserError, match="'loop' cannot serve: dropout on the adapter of down_proj"):
        chosen("modality", 2, "loop", dropout=0.1, targets=("down_proj",))
