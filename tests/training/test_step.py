"""The train step: accumulation, normalisation, clipping, bad numbers, donation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import LoraConfig, MeshConfig, MoeRunConfig, OptimizerConfig
from jaxlm.devices.mesh import make_mesh, put_batch
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.nn.routers import modality_ids
from jaxlm.spec import ExpertsSpec, uniform_decoder
from jaxlm.training.objectives.cross_entropy import CrossEntropy, target_weights
from jaxlm.training.optimizer import make_optimizer, make_schedule, parameter_axes
from jaxlm.training.state import Initializer, TrainState
from jaxlm.training.step import make_eval_step, make_train_step
from jaxlm.training.update import update_by_branch, update_by_select
from tests.models.compare import assert_trees_close, random_tree

CONFIG = uniform_decoder(
    "llama", vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
MODEL = Decoder(CONFIG, remat="none")
AXES = parameter_axes({"params": abstract_variables(MODEL)["params"]})
ROWS, T = 8, 12
SGD = optax.sgd(1.0)  # new parameters = old - gradient: shows the gradient itself


@functools.cache
def params() -> Any:
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return random_tree(nn.unbox(shapes)["params"], 1)


def batch(micro_steps: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """ROWS rows with very different numbers of targets, as [A, ROWS / A, T]."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T)[None] >= np.array([0, 11, 3, 12, 12, 6, 9, 1])[:, None]  # rows 3 and 4 have no target
    rows = dict(
        input_ids=rng.integers(0, 48, (ROWS, T)).astype(np.int32),
        loss_mask=mask,
        segment_ids=np.repeat([1, 2], [7, 5])[None].repeat(ROWS, 0).astype(np.int32),
        positions=np.r_[0:7, 0:5][None].repeat(ROWS, 0).astype(np.int32),
    )
    return {key: value.reshape(micro_steps, -1, T) for key, value in rows.items()}


def state(trainable: Any = None, optimizer: optax.GradientTransformation = SGD) -> TrainState:
    trainable = {"params": jax.tree.map(jnp.array, params())} if trainable is None else trainable
    return TrainState(
        step=jnp.int32(0),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        dropout_key=jax.random.key_data(jax.random.key(0)),
        skipped=jnp.int32(0),
    )


@functools.cache
def sgd_step(normalisation: Any = "tokens", clip: float = 0.0, group_rows: int = 1) -> Any:
    objective = CrossEntropy(MODEL, normalisation=normalisation, group_rows=group_rows)
    return jax.jit(make_train_step(objective, SGD, optax.constant_schedule(1.0), clip))


def gradient(new: TrainState) -> Any:
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params(), new.trainable["params"])


@functools.cache
def row_losses() -> Any:
    """Sum of target losses and its gradient for given token weights, one plain pass."""

    def total(p: Any, b: Any, weights: Any) -> Any:
        logits = MODEL.apply({"params": p}, b["input_ids"][0], b["positions"][0], b["segment_ids"][0])
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_probs, b["input_ids"][0][:, 1:, None], -1)[..., 0]
        return -jnp.sum(picked * weights[:, 1:])

    return jax.jit(jax.value_and_grad(total))


def test_accumulation_is_one_large_batch() -> None:
    """A=4 against A=1: the same float32 sums in another order; targets are counted over all rows at once."""
    one, one_metrics = sgd_step()(state(), {}, batch(1))
    four, four_metrics = sgd_step()(state(), {}, batch(4))
    np.testing.assert_allclose(four_metrics["loss"], one_metrics["loss"], rtol=1e-6)
    assert_trees_close(gradient(four), gradient(one), 2e-5)
    assert four_metrics["target_tokens"] == one_metrics["target_tokens"]

    mask = batch()["loss_mask"][0].astype(np.float32)
    mask[:, 0] = 0
    loss, grads = row_losses()(params(), batch(), mask / mask.sum())
    np.testing.assert_allclose(one_metrics["loss"], loss, rtol=1e-5)
    assert_trees_close(gradient(one), grads, 2e-5)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(one_metrics["grad_norm"], norm, rtol=1e-5)
    assert one_metrics["target_tokens"] == mask.sum()
    assert one_metrics["tokens"] == ROWS * T


def test_mean_of_means_is_alpaca_loras_rule() -> None:
    """HF's old Trainer: each device's micro-batch takes its mean, gradients of devices and micro-steps are averaged."""
    new, metrics = sgd_step("mean_of_means", group_rows=2)(state(), {}, batch(2))
    mask = batch()["loss_mask"][0].astype(np.float32)
    mask[:, 0] = 0
    means, counted = [], 0
    for start in range(0, ROWS, 2):  # micro-batches of two rows; one of them has no target and is no mean
        group = np.zeros_like(mask)
        group[start : start + 2] = mask[start : start + 2]
        if group.sum():
            means.append(row_losses()(params(), batch(), group / group.sum()))
            counted += 1
    assert counted == 4
    np.testing.assert_allclose(metrics["loss"], np.mean([loss for loss, _ in means]), rtol=1e-5)
    expected = jax.tree.map(lambda *g: np.mean(g, axis=0), *[grads for _, grads in means])
    assert_trees_close(gradient(new), expected, 2e-5)


def test_target_weights_sum_to_one_over_groups_with_targets() -> None:
    mask = jnp.asarray(batch(2)["loss_mask"])
    tokens = target_weights(mask, "tokens", 1)
    np.testing.assert_allclose(tokens.sum(), 1.0, rtol=1e-6)
    assert not np.any(tokens[..., 0]) and len(np.unique(tokens)) == 2
    rows = np.asarray(target_weights(mask, "mean_of_means", 1)).sum(-1).reshape(-1)
    # Rows with a target weigh 1/6 each; the two without are no means of anything.
    np.testing.assert_allclose(rows, np.array([1, 1, 1, 0, 0, 1, 1, 1]) / 6, rtol=1e-5)
    empty = target_weights(jnp.zeros_like(mask), "mean_of_means", 2)
    assert not np.any(empty) and not np.any(target_weights(jnp.zeros_like(mask), "tokens", 2))


def test_a_batch_without_targets_changes_nothing() -> None:
    empty = batch()
    empty["loss_mask"] = np.zeros_like(empty["loss_mask"])
    new, metrics = sgd_step()(state(), {}, empty)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, new.trainable["params"], params())


def test_gradients_are_clipped_as_torch_clips_them() -> None:
    """One limit between the norms of two batches: the one is clipped, the other left alone."""
    torch = pytest.importorskip("torch")
    runs = [sgd_step()(state(), {}, batch(seed=seed)) for seed in (0, 1)]
    norms = [float(metrics["grad_norm"]) for _, metrics in runs]
    assert abs(norms[0] - norms[1]) > 0.01 * norms[0]
    clip = sum(norms) / 2
    for seed, (whole, _) in enumerate(runs):
        grads = [torch.tensor(g) for g in jax.tree.leaves(gradient(whole))]
        tensors = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for p, g in zip(tensors, grads, strict=True):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(tensors, clip)
        clipped, metrics = sgd_step(clip=clip)(state(), {}, batch(seed=seed))
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-5)  # the norm before clipping
        for a, p in zip(jax.tree.leaves(gradient(clipped)), tensors, strict=True):
            np.testing.assert_allclose(a, p.grad.numpy(), rtol=0, atol=2e-6)


@functools.cache
def adamw_step(learning_rate: float = 1e-2) -> Any:
    config = OptimizerConfig(
        learning_rate=learning_rate, schedule="linear", warmup_steps=2, weight_decay=0.1, beta2=0.95
    )
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, AXES)
    step = make_train_step(CrossEntropy(MODEL), optimizer, schedule, 1.0)
    return optimizer, schedule, jax.jit(step, donate_argnums=0)


def test_skip_leaves_the_state_and_survives_donation() -> None:
    optimizer, schedule, step = adamw_step()
    first, _ = step(state(optimizer=optimizer), {}, batch())
    kept = jax.tree.map(np.array, (first.trainable, first.opt_state))
    poisoned = jax.tree.map(np.array, first.trainable)
    poisoned["params"]["norm"]["scale"][3] = np.nan
    bad = first.replace(trainable=jax.tree.map(jnp.asarray, poisoned))
    moments = jax.tree.map(np.array, bad.opt_state)
    second, metrics = step(bad, {}, batch())
    assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1
    assert (second.step, second.skipped) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, (second.trainable, second.opt_state), (poisoned, moments))
    # Healed, it goes on, with the learning rate of an optimizer that has done one update, and says so.
    healed = second.replace(trainable=jax.tree.map(jnp.array, kept[0]))
    third, metrics = step(healed, {}, batch())
    assert np.isfinite(metrics["loss"]) and (third.step, third.skipped) == (3, 1)
    np.testing.assert_allclose(metrics["learning_rate"], schedule(1), rtol=1e-6)
    straight, metrics = step(state(optimizer=optimizer), {}, batch())
    straight, metrics = step(straight, {}, batch())
    jax.tree.map(np.testing.assert_array_equal, third.trainable, straight.trainable)


def test_padded_rows_need_no_segments() -> None:
    """One document a row, padding behind it: without segment ids the same loss and gradients."""
    rows = batch()
    lengths = np.array([12, 3, 7, 9, 1, 12, 5, 4])[None, :, None]
    inside = np.arange(T)[None, None] < lengths
    rows |= {
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, np.arange(T), 0).astype(np.int32),
        "loss_mask": inside & (np.arange(T) > 0),
    }
    step = jax.jit(make_train_step(CrossEntropy(MODEL, packed=False), SGD, optax.constant_schedule(1.0), 0.0))
    plain, plain_metrics = step(state(), {}, rows)
    packed, metrics = sgd_step()(state(), {}, rows)
    np.testing.assert_allclose(plain_metrics["loss"], metrics["loss"], rtol=1e-6)
    assert_trees_close(plain.trainable, packed.trainable, 1e-5)
    # The test sees what it looks for: two documents in a row do need them.
    _, other = step(state(), {}, batch())
    _, right = sgd_step()(state(), {}, batch())
    assert abs(other["loss"] - right["loss"]) > 1e-3


def test_the_step_takes_the_memory_of_the_old_state() -> None:
    optimizer, _, step = adamw_step()
    old = state(optimizer=optimizer)
    new, _ = step(old, {}, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.trainable, old.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_state_keeps_its_dtypes(name: Any) -> None:
    """bfloat16 parameters, float32 accumulation: a state of other dtypes could be neither donated nor restored."""
    config = OptimizerConfig(name=name, weight_decay=0.1)
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, AXES)
    model = Decoder(CONFIG, param_dtype=jnp.bfloat16)
    step = make_train_step(CrossEntropy(model), optimizer, schedule, 1.0)
    old = state({"params": jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params())}, optimizer)
    for steps in (1, 4):
        new, _ = jax.eval_shape(step, old, {}, batch(steps))
        jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), old, new)


def test_dropout_differs_between_steps_and_micro_steps() -> None:
    settings = LoraConfig(rank=2, dropout=0.5)
    model = Decoder(CONFIG, resolve_lora(CONFIG, settings))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    lora = random_tree(nn.unbox(shapes)["lora"], 2)
    # Rows all alike: without dropout every micro-step has the same loss.
    same = {key: value[:, :1].repeat(2, 0) for key, value in batch().items()}
    losses: list[float] = []

    class Spy(Decoder):
        def loss(self, *args: Any, **kwargs: Any) -> Any:
            out = super().loss(*args, **kwargs)
            jax.debug.callback(lambda loss: losses.append(float(loss)), out.loss, ordered=True)
            return out

    spy = Spy(CONFIG, model.adapters)
    step = jax.jit(make_train_step(CrossEntropy(spy), optax.sgd(0.0), optax.constant_schedule(0.0), 0.0))
    current = state({"lora": lora}, optax.sgd(0.0))
    first, metrics = step(current, {"params": params()}, same)
    _, second = step(first, {"params": params()}, same)
    _, again = step(current, {"params": params()}, same)
    assert metrics["loss"] == again["loss"] != second["loss"]
    jax.effects_barrier()
    assert len({losses[0], losses[1], losses[2], losses[3]}) == 4


def test_evaluation_sums_losses_targets_and_hits() -> None:
    step = jax.jit(make_eval_step(CrossEntropy(MODEL)))
    out = step({"params": params()}, {}, batch())
    mask = batch()["loss_mask"][0].astype(np.float32)
    mask[:, 0] = 0
    expected, _ = row_losses()(params(), batch(), mask)
    np.testing.assert_allclose(out["loss"], expected, rtol=1e-5)
    assert out["target_tokens"] == mask.sum()
    assert 0 <= out["correct"] <= out["target_tokens"]


def test_five_steps_equal_those_of_pytorch() -> None:
    """The whole step: packed rows, clipping, warm-up, AdamW with a decay mask; PyTorch sees each document alone."""
    hf = pytest.importorskip("tests.models.hf")
    torch = hf.torch
    torch_model, config = hf.build(tie_word_embeddings=True, initializer_range=0.1)
    options = OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.2, clip_norm=0.5)
    schedule = make_schedule(options, 5)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    model = Decoder(config)
    initializer = Initializer(model, None, mesh, functools.partial(make_optimizer, options, schedule))
    current = initializer.new_state({"params": jax.tree.map(jnp.array, hf.weights(torch_model, config))}, 0)
    step = jax.jit(make_train_step(CrossEntropy(model), initializer.optimizer, schedule, 0.5), donate_argnums=0)

    decayed = [p for n, p in torch_model.named_parameters() if "norm" not in n]
    rest = [p for n, p in torch_model.named_parameters() if "norm" in n]
    torch_optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )
    scheduler = hf.transformers.get_scheduler("cosine", torch_optimizer, 2, 5)
    rng = np.random.default_rng(0)
    for _ in range(5):
        # Two micro-steps of two rows; each row two documents, of which a random part is learned.
        ids = rng.integers(0, config.vocab_size, (2, 2, 20)).astype(np.int32)
        mask = rng.random((2, 2, 20)) < rng.random((2, 2, 1))
        mask[..., [0, 8]] = False  # nothing predicts the first token of a document
        segments = np.broadcast_to(np.repeat([1, 2], [8, 12]), ids.shape).astype(np.int32)
        positions = np.broadcast_to(np.r_[0:8, 0:12], ids.shape).astype(np.int32)
        total = torch.zeros(())
        for row, row_mask in zip(ids.reshape(-1, 20), mask.reshape(-1, 20), strict=True):
            for part in (slice(0, 8), slice(8, 20)):
                tokens = torch.tensor(row[part]).long()[None]
                logits = torch_model(tokens).logits[0, :-1]
                each = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
                total = total + (each * torch.tensor(row_mask[part][1:])).sum()
        total = total / int(mask.sum())
        torch_optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 0.5)
        rate = scheduler.get_last_lr()[0]
        torch_optimizer.step()
        scheduler.step()

        rows = put_batch(dict(input_ids=ids, loss_mask=mask, segment_ids=segments, positions=positions), mesh)
        current, metrics = step(current, {}, rows)
        np.testing.assert_allclose(metrics["loss"], total.item(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-3)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-5, atol=1e-8)
    assert dataclasses.asdict(options)["clip_norm"] < metrics["grad_norm"]  # clipping was at work
    assert_trees_close(current.trainable["params"], hf.weights(torch_model, config), 1e-3)


@pytest.mark.parametrize("keep", [update_by_branch, update_by_select])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_state_is_updated_or_kept(keep: Any, wanted: bool) -> None:
    """CPUs take the one form, GPUs and TPUs the other."""
    old = {"a": jnp.arange(3.0), "count": jnp.int32(5)}

    def update(old: Any) -> Any:
        return {"a": old["a"] / 0.0, "count": old["count"] + 1}  # NaN and infinities

    new = jax.jit(functools.partial(keep, update))(jnp.bool_(wanted), old)
    expected = [np.nan, np.inf, np.inf] if wanted else [0.0, 1.0, 2.0]
    np.testing.assert_array_equal(new["a"], expected)
    assert new["count"] == 5 + wanted


@pytest.mark.parametrize("micro_steps", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_router_penalties_count_once_however_a_step_is_cut(micro_steps: int) -> None:
    """Micro-steps that are all alike: the same penalties, and gradients, as of all rows at once; with padding."""
    moe = ExpertsSpec(4, "learned", ("text", "salt"), ((40, 48),), (2, 1))
    model = Decoder(CONFIG.with_experts(moe), experts="loop", remat="none")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    start = random_tree(nn.unbox(shapes)["params"], 1)
    rows = {key: np.tile(value[0, :2], (4, 1)) for key, value in batch().items()}
    rows["segment_ids"][1::2, 9:] = 0
    rows["loss_mask"] &= rows["segment_ids"] > 0
    rows["modality_ids"] = np.asarray(modality_ids(moe, rows["input_ids"], rows["segment_ids"]))

    def run(steps: int, **weights: float) -> Any:
        objective = CrossEntropy(model, moe=MoeRunConfig(**weights))
        step = make_train_step(objective, SGD, optax.constant_schedule(1.0), 0.0)
        cut = {key: value.reshape(steps, -1, T) for key, value in rows.items()}
        new, metrics = jax.jit(step)(state({"params": jax.tree.map(jnp.array, start)}), {}, cut)
        change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start, new.trainable["params"])
        return change, metrics

    penalised = {"balance_loss": 3.0, "z_loss": 0.5}
    whole, once = run(1, **penalised)
    parts, many = run(micro_steps, **penalised)
    assert_trees_close(parts, whole, 1e-4)
    for name in ("loss", "grad_norm", "router_balance", "router_z", "expert_use", "modality_tokens"):
        np.testing.assert_allclose(many[name], once[name], rtol=1e-4, err_msg=name)
    # Against the model's own notes, as means over layers; the loss that is reported is the task's alone.
    inputs = [rows[name] for name in ("input_ids", "positions", "segment_ids", "modality_ids")]

    def noted(start: Any, name: str) -> Any:
        _, notes = model.apply({"params": start}, *inputs, mutable=["moe"])
        return notes["moe"]["layers"]["mlp"][name].mean()

    for name, figure in (("balance_loss", "router_balance"), ("z_loss", "router_z")):
        value, gradient = jax.jit(jax.value_and_grad(noted), static_argnums=1)(start, name)
        np.testing.assert_allclose(once[figure], value, rtol=1e-5)
        less, figures = run(1, **(penalised | {name: 0.0}))
        found = jax.tree.map(np.subtract, whole, less)["layers"]["mlp"]["router"]
        expected = penalised[name] * np.asarray(gradient["layers"]["mlp"]["router"])
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max() + 1e-5)
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(figures["loss"], once["loss"], rtol=1e-6)


@pytest.mark.slow
def test_routers_of_a_period_are_reported_by_layer() -> None:
    """Dense and expert layers in turn, and one left over: as many penalties and counts as layers of experts."""
    moe = ExpertsSpec(4, "learned", ("text",), (), (2,))
    dense, routed = CONFIG.uniform_layer, CONFIG.with_experts(moe).uniform_layer
    spec = dataclasses.replace(CONFIG, num_layers=7, period=(routed, dense, routed))
    model = Decoder(spec, experts="loop", remat="none")
    params = random_tree(nn.unbox(abstract_variables(model))["params"], 1)
    rows = {key: value[0] for key, value in batch().items()}
    rows["weights"] = target_weights(jnp.asarray(rows["loss_mask"])[None], "tokens", 1)[0]
    rows["modality_ids"] = np.zeros_like(rows["input_ids"])
    objective = CrossEntropy(model, moe=MoeRunConfig(balance_loss=1.0, z_loss=0.0))
    share = objective.loss({"params": params}, {}, rows, jax.random.key(0), 1)
    inputs = [rows[name] for name in ("input_ids", "positions", "segment_ids")]
    _, notes = model.apply({"params": params}, *inputs, mutable=["moe"])
    first, third, last = (notes["moe"][part][p]["mlp"] for part, p in (("layers", "0"), ("layers", "2"), ("tail", "0")))
    use = [first["used"][0], third["used"][0], first["used"][1], third["used"][1], last["used"][0]]
    np.testing.assert_allclose(share.figures["expert_use"], np.stack(use), rtol=1e-5)
    assert len(np.unique(np.stack(use), axis=0)) > 1
    balance = np.mean(np.concatenate([each["balance_loss"] for each in (first, third, last)]))
    np.testing.assert_allclose(share.figures["router_balance"], balance, rtol=1e-5)
    np.testing.assert_allclose(share.total - share.loss, balance, rtol=1e-4)
