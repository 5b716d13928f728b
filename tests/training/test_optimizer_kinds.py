"""Muon, schedule-free and 8-bit AdamW against optax's own on plain trees, and over several devices."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig, OptimizerConfig, RunConfig
from jaxlm.config.ranges import check_ranges
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.spec import uniform_decoder
from jaxlm.training import adam8bit
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer
from tests.training.test_optimizer import ADAFACTOR, train

RATE = 1e-2
SHAPES = {"model": ADAFACTOR["tiny"], "adapter": ADAFACTOR["lora"]}


def draw(seed: int, std: float = 1.0, shapes: Any = SHAPES) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(0, std, shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def plain(optimizer: Any, params: Any, grads: list[Any]) -> Any:
    """Parameters and state after steps of an optimizer of optax."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in grads:
        updates, state = update(step, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def matrices(tree: Any) -> dict[str, np.ndarray]:
    """Every layer's own tensors: matrices as [in, out], the others as they are."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path]
        for number, own in enumerate(leaf if "layers" in names else [leaf]):
            own = np.asarray(own)
            if names[-1] in ("kernel", "lora_A", "lora_B", "router"):
                wide_in = names[-2:] in (["o_proj", "kernel"], ["o_proj", "lora_A"])
                own = own.reshape((-1, own.shape[-1]) if wide_in else (own.shape[0], -1))
            found["/".join([*names, str(number)])] = own
    return found


def test_muon_is_that_of_optax_on_each_layers_own_matrices() -> None:
    """[D, H, h] is a matrix [D, H h]; tables, norms, biases and magnitudes are AdamW's."""
    config = OptimizerConfig(
        name="muon", learning_rate=RATE, schedule="constant", weight_decay=0.1, decay="all", momentum=0.9
    )
    grads = [draw(10 + step, 10.0 ** (step % 3 - 1)) for step in range(6)]
    found = matrices(train(config, draw(0), grads))
    params = matrices(draw(0))
    numbers = {
        name: None
        if leaf.ndim != 2 or any(word in name for word in ("embedding", "lm_head", "bias", "magnitude"))
        else optax.contrib.MuonDimensionNumbers()
        for name, leaf in params.items()
    }
    assert sum(number is not None for number in numbers.values()) == 20 and None in numbers.values()
    theirs = optax.contrib.muon(
        RATE,
        beta=0.9,
        weight_decay=0.1,
        adam_weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=numbers,
    )
    expected, _ = plain(theirs, params, [matrices(step) for step in grads])
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["muon", "schedule_free", "adamw_8bit"])
def test_zero_gradient_of_zero_parameter_stays_zero(name: Any) -> None:
    """What lies behind a layer's own LoRA rank must not move."""
    config = OptimizerConfig(name=name, learning_rate=0.1, schedule="constant", weight_decay=0.1)
    zero = {"layers": {"mlp": {"down_proj": {"kernel": np.zeros((2, 64, 128), np.float32)}}}}
    assert not np.any(train(config, zero, [zero] * 3)["layers"]["mlp"]["down_proj"]["kernel"])


def test_schedule_free_is_that_of_optax() -> None:
    config = OptimizerConfig(
        name="schedule_free", learning_rate=RATE, schedule="constant", warmup_steps=3, weight_decay=0.1, decay="all"
    )
    grads = [draw(10 + step) for step in range(8)]
    theirs = optax.contrib.schedule_free_adamw(make_schedule(config, 8), weight_decay=0.1)
    expected, state = plain(theirs, draw(0), grads)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), train(config, draw(0), grads), expected)
    average = optax.contrib.schedule_free_eval_params(state, expected)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (average, expected)), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"schedule": "cosine"}, "optimizer.schedule: cosine lowers the learning rate"),
        ({"schedule": "constant", "beta1": 0.0}, "optimizer.beta1: 0 leaves no average"),
        ({"name": "muon", "momentum": 1.0}, "optimizer.momentum: 1.0 must be at least 0"),
    ],
)
def test_what_an_optimizer_cannot_be_run_with(optimizer: dict[str, Any], message: str) -> None:
    settings = OptimizerConfig(**{"name": "schedule_free", **optimizer})
    with pytest.raises(UserError, match=message):
        check_ranges(dataclasses.replace(RunConfig(), optimizer=settings))


# --- eight bits -------------------------------------------------------------------------------------------------------


def test_blocks_lie_within_the_last_dims() -> None:
    for shape, dims in (
        ((3, 4096, 11008), (1, 256)),
        ((3, 4096, 32, 128), (2, 128)),
        ((64, 896), (1, 224)),
        ((4096, 8), (32, 8)),
        ((5, 7), (5, 7)),
        ((4099, 4099), None),
        ((4096,), None),
    ):
        assert adam8bit.block_dims(shape) == dims, shape
    assert adam8bit.scales_shape((3, 4096, 32, 128)) == (3, 4096, 16, 1)


def test_codes_are_near_and_none_is_zero() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(8, 6, 512)) * np.exp(rng.normal(0, 3, (8, 6, 512)))).astype(np.float32)
    x[0, 0, :256] = 0
    first = np.asarray(adam8bit.decode_first(*adam8bit.encode_first(jnp.asarray(x))))
    largest = np.abs(x.reshape(8, 6, 2, 256)).max(-1).repeat(256, -1).reshape(x.shape)
    # Half a code away at most: the width of a code at this size.
    width = largest * (2 * np.sqrt(np.abs(x) / np.where(largest > 0, largest, 1)) * 127 + 1) / 127**2
    assert np.all(np.abs(first - x) <= width / 2 * 1.01)
    codes, scales = adam8bit.encode_second(jnp.asarray(x**2), jnp.int32(3))
    assert np.all((np.asarray(codes) == 0) == (x == 0)) and scales.shape == (8, 6, 2)
    second = np.sqrt(np.asarray(adam8bit.decode_second(codes, scales)))
    wider = largest * (2 * np.sqrt(np.abs(x) / np.where(largest > 0, largest, 1)) * 255 + 1) / 255**2
    assert np.all(np.abs(second - np.abs(x)) <= wider * 1.01)


def test_the_mean_of_many_roundings_is_the_number() -> None:
    """A second moment that moves by a hundredth of a code at a step follows, where the nearest code would not move."""
    value = jnp.full((2, 256), 0.5).at[:, 0].set(1.0)
    decoded = [adam8bit.decode_second(*adam8bit.encode_second(value, jnp.int32(step))) for step in range(200)]
    np.testing.assert_allclose(np.mean(decoded, axis=0), value, rtol=2e-3)
    assert len({float(each[0, 5]) for each in decoded}) == 2


def test_eight_bits_stay_near_float32() -> None:
    """Updates of 400 steps, whose gradients' sizes drift; measured are 10 to 11 % (benchmarks/README.md)."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(0, 1, (32, 256))).astype(np.float32)
    params = {"x": jnp.zeros((32, 256))}
    ours, theirs = adam8bit.scale_by_adam_8bit(), optax.scale_by_adam()

    @jax.jit
    def step(state: Any, number: Any, key: Any) -> Any:
        waves = jnp.exp(jnp.sin(jnp.linspace(0, 6.28, 256) + number / 300))
        gradient = {"x": jax.random.normal(key, (32, 256)) * sizes * waves}
        coded, first = ours.update(gradient, state[0])
        exact, second = theirs.update(gradient, state[1])
        return (first, second), (coded["x"], exact["x"])

    keys = jax.random.split(jax.random.key(0), 400)
    _, (coded, exact) = jax.lax.scan(
        lambda state, each: step(state, *each), (ours.init(params), theirs.init(params)), (jnp.arange(400.0), keys)
    )
    error = np.asarray(coded - exact)[-50:]
    assert np.sqrt(np.mean(error**2) / np.mean(np.asarray(exact)[-50:] ** 2)) < 0.13
    slope = np.sum(np.asarray(coded * exact)[-50:]) / np.sum(np.asarray(exact)[-50:] ** 2)
    assert slope == pytest.approx(1, abs=0.01)


def test_small_tensors_are_those_of_adamw_to_the_bit() -> None:
    config = OptimizerConfig(name="adamw_8bit", learning_rate=RATE, schedule="constant", weight_decay=0.1)
    grads = [draw(10 + step) for step in range(3)]
    exact = train(dataclasses.replace(config, name="adamw"), draw(0), grads)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), train(config, draw(0), grads), exact)


# --- over several devices ---------------------------------------------------------------------------------------------

SPEC = uniform_decoder(
    "llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


def made(name: str, sizes: dict[str, int]) -> Initializer:
    config = OptimizerConfig(name=name, learning_rate=RATE, schedule="constant", weight_decay=0.1)  # type: ignore[arg-type]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), devices)
    optimizer = partial(make_optimizer, config, make_schedule(config, 10))
    return Initializer(Decoder(SPEC), None, mesh, optimizer)


def stepped(initializer: Initializer, steps: int, state: Any = None, first: int = 0) -> Any:
    """The state after updates with drawn gradients."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, initializer.trainable)
    place = initializer.trainable_shardings
    state = initializer.new_state(jax.device_put(draw(0, 0.1, shapes), place), 0) if state is None else state

    def step(state: Any, gradient: Any) -> Any:
        trainable, opt_state = initializer.update(
            jnp.bool_(True), jnp.float32(1), gradient, state.trainable, state.opt_state
        )
        return state.replace(trainable=trainable, opt_state=opt_state)

    run = jax.jit(step, donate_argnums=0, out_shardings=initializer.state_shardings)
    for number in range(first, first + steps):
        state = run(state, jax.device_put(draw(1 + number, 0.1, shapes), place))
    return state


def test_scales_lie_with_their_parameters() -> None:
    initializer = made("adamw_8bit", {"fsdp": 2, "tensor": 2})
    state, places = initializer.opt_state[0], initializer.opt_shardings[0]
    layers, where = (tree["params"]["layers"]["mlp"] for tree in (state.mu.values, places.mu.values))
    assert layers["up_proj"]["kernel"].dtype == jnp.int8 and state.nu.values["params"]["norm"]["scale"].shape == (64,)
    assert (
        where["up_proj"]["kernel"].spec
        == initializer.trainable_shardings["params"]["layers"]["mlp"]["up_proj"]["kernel"].spec
    )
    down = places.nu.scales["params"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert state.nu.scales["params"]["layers"]["mlp"]["down_proj"]["kernel"].shape == (2, 64, 1)
    assert down.spec == P(None, ("expert", "tensor"), None)
    assert jax.tree.leaves(state.nu.scales["params"]["norm"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "schedule_free", "adamw_8bit"])
def test_sharded_is_as_on_one_device(name: str) -> None:
    results = []
    for sizes in ({}, {"fsdp": 2, "tensor": 2}):
        initializer = made(name, sizes)
        state = stepped(initializer, 3)
        results.append(jax.device_get((initializer.weights(state), state.opt_state)))
    assert_close(*results)


def assert_close(one: Any, other: Any) -> None:
    """Equal up to the rounding of float32, by which a code may be the next one."""
    for mine, theirs in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        if mine.dtype in (np.int8, np.uint8):
            assert np.mean(mine != theirs) < 1e-3
        else:
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5)
