"""Schedules and update rules against transformers, PyTorch, and the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import OptimizerConfig
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.spec import ExpertsSpec
from jaxlm.training.optimizer import make_optimizer, make_schedule, parameter_axes

STEPS, PEAK = 40, 3e-3


def ours(steps: int = STEPS, **options: Any) -> np.ndarray:
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **options), STEPS)
    return np.array(jax.vmap(schedule)(jnp.arange(steps)))


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("name", "options", "kwargs"),
    [
        ("linear", dict(schedule="linear"), {}),
        ("cosine", dict(schedule="cosine"), {}),
        ("polynomial", dict(schedule="polynomial", power=2.0, end_ratio=1e-4 / PEAK), dict(power=2.0, lr_end=1e-4)),
        ("constant_with_warmup", dict(schedule="constant"), {}),
        ("cosine_with_min_lr", dict(schedule="cosine", end_ratio=0.1), dict(min_lr_rate=0.1)),
    ],
)
def test_schedules_are_those_of_transformers(name: str, options: Any, kwargs: Any, warmup: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, scheduler_specific_kwargs=kwargs
    )
    expected = []
    for _ in range(STEPS + 1):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(ours(STEPS + 1, warmup_steps=warmup, **options), expected, rtol=1e-5, atol=PEAK * 1e-6)


def test_log_warmup_is_deepspeeds() -> None:
    expected = [PEAK * (math.log(t + 1) / math.log(10) if t < 10 else 1.0) for t in range(STEPS)]
    np.testing.assert_allclose(ours(schedule="log_warmup", warmup_steps=10), expected, rtol=1e-5)
    np.testing.assert_allclose(ours(schedule="log_warmup"), PEAK, rtol=1e-6)


def test_warmup_ratio_rounds_up_and_rates_stay_at_their_end() -> None:
    # HF rounds up: 0.11 * 40 = 4.4 -> 5 steps.
    np.testing.assert_array_equal(ours(schedule="linear", warmup_ratio=0.11), ours(schedule="linear", warmup_steps=5))
    for name in ("linear", "cosine", "polynomial"):
        rates = ours(STEPS + 20, schedule=name, end_ratio=0.25, warmup_steps=3)
        np.testing.assert_allclose(rates[STEPS:], 0.25 * PEAK, rtol=1e-6)  # and stays there
    assert np.isfinite(ours(schedule="cosine", warmup_steps=100)).all()  # a run shorter than its warm-up


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(warmup_steps=3, warmup_ratio=0.1), "warmup_steps or warmup_ratio, not both"),
        (dict(warmup_ratio=1.5), r"optimizer.warmup_ratio: 1.5"),
        (dict(warmup_ratio=-0.1), r"optimizer.warmup_ratio: -0.1"),
        (dict(warmup_steps=-3), r"optimizer.warmup_steps: -3"),
    ],
)
def test_a_warmup_that_is_not_possible_is_refused(options: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_schedule(OptimizerConfig(**options), STEPS)


# Every kind of leaf: stacked and not, with and without decay.
SHAPES = {
    "params": {
        "embed_tokens": {"embedding": (5, 4)},
        "layers": {
            "input_layernorm": {"scale": (2, 4)},
            "self_attn": {
                "q_proj": {"kernel": (2, 4, 2, 3), "bias": (2, 2, 3), "lora_A": (2, 4, 2), "magnitude": (2, 6)}
            },
        },
        "norm": {"scale": (4,)},
    }
}
# Logical axes by module and parameter, without 'layers'.
AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens.embedding": ("vocab", "embed"),
    "lm_head.kernel": ("vocab", "embed"),
    "input_layernorm.scale": ("norm",),
    "norm.scale": ("norm",),
    "q_proj.kernel": ("embed", "heads", "head_dim"),
    "q_proj.bias": ("heads", "head_dim"),
    "q_proj.lora_A": ("embed", "lora_rank"),
    "q_proj.lora_B": ("lora_rank", "heads", "head_dim"),
    "q_proj.magnitude": ("heads", "head_dim"),
    "o_proj.kernel": ("heads", "head_dim", "embed"),
    "o_proj.lora_A": ("heads", "head_dim", "lora_rank"),
    "o_proj.lora_B": ("lora_rank", "embed"),
    "o_proj.magnitude": ("embed",),
    "mlp.router": ("embed", "experts"),
    "up_proj.lora_A": ("embed", "lora_rank"),
    "up_proj.lora_B": ("lora_rank", "mlp"),
    "down_proj.kernel": ("mlp", "embed"),
    "down_proj.bias": ("embed",),
}
DECAYED = {"embedding", "kernel", "lora_A", "lora_B", "router"}


def draw(seed: int, std: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(0, std, shape).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def axes_of(tree: Any) -> dict[str, tuple[str, ...]]:
    """The logical axes of the made-up parameters, as `parameter_axes` gives those of a model."""
    axes = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple)):
        names = [key.key for key in path]
        stacked = ("layers",) if "layers" in names else ()
        axes[jax.tree_util.keystr(path)] = (*stacked, *AXES[".".join(names[-2:])])
    return axes


def train(config: OptimizerConfig, params: Any, grads: list[Any], axes: Any = None) -> Any:
    optimizer = make_optimizer(config, make_schedule(config, len(grads)), axes or axes_of(params))
    state = optimizer.init(params)

    @jax.jit
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = update(params, state, g)
    return params


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_adamw_is_that_of_torch(decay: Any) -> None:
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(
        learning_rate=1e-2, schedule="constant", weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-5, decay=decay
    )
    grads = [draw(10 + i, 10.0 ** (i % 3 - 1)) for i in range(20)]
    found = train(config, draw(0), grads)
    leaves, _ = jax.tree_util.tree_flatten_with_path(draw(0))
    tensors = [torch.nn.Parameter(torch.tensor(leaf)) for _, leaf in leaves]
    decayed = [decay == "all" or path[-1].key in DECAYED for path, _ in leaves]
    groups = [
        {"params": [p for p, d in zip(tensors, decayed, strict=True) if d], "weight_decay": 0.3},
        {"params": [p for p, d in zip(tensors, decayed, strict=True) if not d], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2, betas=(0.8, 0.95), eps=1e-5)
    for step in grads:
        for p, g in zip(tensors, jax.tree.leaves(step), strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    for a, b in zip(jax.tree.leaves(found), tensors, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=2e-6)


def test_lion_against_the_paper() -> None:
    """arXiv:2302.06675, algorithm 2: sign of an interpolation, then the momentum is updated."""
    config = OptimizerConfig(
        name="lion", learning_rate=1e-2, schedule="linear", weight_decay=0.3, beta1=0.9, beta2=0.98
    )
    grads = [draw(10 + i) for i in range(20)]
    found = train(config, draw(0), grads)
    for path, leaf in jax.tree_util.tree_leaves_with_path(draw(0)):
        p, m = leaf.astype(np.float64), np.zeros(leaf.shape)
        for t, step in enumerate(grads):
            g = np.asarray(dict(jax.tree_util.tree_leaves_with_path(step))[path], np.float64)
            decay = 0.3 * p if path[-1].key in DECAYED else 0.0
            p = p - 1e-2 * (1 - t / 20) * (np.sign(0.9 * m + 0.1 * g) + decay)
            m = 0.98 * m + 0.02 * g
        other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        np.testing.assert_allclose(other, p, rtol=0, atol=1e-5)


# Every kind of tensor that trains, [L, ...] below `layers`: those of a tiny model, whose dims are all below 128, of one
# whose dims are not, and of an adapter (the second layer of q_proj has rank 3 of 5).
ADAFACTOR = {
    "tiny": {
        "embed_tokens": {"embedding": (7, 6)},
        "layers": {
            "input_layernorm": {"scale": (2, 6)},
            "self_attn": {
                "q_proj": {"kernel": (2, 6, 2, 3), "bias": (2, 2, 3)},
                "o_proj": {"kernel": (2, 2, 3, 6)},
            },
            "mlp": {"router": (2, 6, 4), "down_proj": {"kernel": (2, 9, 6), "bias": (2, 6)}},
        },
        "norm": {"scale": (6,)},
        "lm_head": {"kernel": (7, 6)},
    },
    "large": {
        "layers": {
            "input_layernorm": {"scale": (2, 130)},
            "self_attn": {"q_proj": {"kernel": (2, 130, 4, 40)}, "o_proj": {"kernel": (2, 4, 40, 130)}},
        },
        "lm_head": {"kernel": (150, 130)},
    },
    "lora": {
        "layers": {
            "self_attn": {
                "q_proj": {"lora_A": (2, 12, 5), "lora_B": (2, 5, 2, 6), "magnitude": (2, 2, 6)},
                "o_proj": {"lora_A": (2, 2, 6, 4), "lora_B": (2, 4, 12), "magnitude": (2, 12)},
            },
            "mlp": {"up_proj": {"lora_A": (2, 140, 4), "lora_B": (2, 4, 200)}},
        },
        "modules_to_save": {"embed_tokens": {"embedding": (9, 12)}},
    },
}
RANK = 3


def in_torch(tree: Any) -> dict[str, np.ndarray]:
    """Name -> each layer's own tensor as PyTorch holds it: matrices [out, in], the rest 1-D, factors of their rank."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path]
        leaf = np.asarray(leaf, np.float32)
        layers = list(leaf) if "layers" in names else [leaf]
        for number, one in enumerate(layers):
            if names[-1] in ("kernel", "lora_A", "lora_B", "router"):
                last = names[-2:] in (["o_proj", "kernel"], ["o_proj", "lora_A"])
                one = one.reshape((-1, one.shape[-1]) if last else (one.shape[0], -1)).T
            elif names[-1] != "embedding":
                one = one.reshape(-1)
            if "q_proj" in names and number == 1 and names[-1] in ("lora_A", "lora_B"):
                one = one[:RANK] if names[-1] == "lora_A" else one[:, :RANK]
            found[f"{'.'.join(names)}.{number}"] = np.ascontiguousarray(one)
    return found


@pytest.mark.parametrize("kind", ADAFACTOR)
def test_adafactor_is_that_of_transformers(kind: str) -> None:
    """Update by update what transformers' Trainer runs: gradients grow and shrink, so that clipping is at work."""
    torch = pytest.importorskip("torch")
    adafactor = pytest.importorskip("transformers").Adafactor
    rng = np.random.default_rng(0)

    def draw(std: float, spread: float = 1.0) -> Any:
        def one(shape: tuple[int, ...]) -> np.ndarray:
            # Columns and layers of different size: what is averaged over the wrong dims shows.
            first = np.exp(rng.normal(0, spread, shape[:1])).reshape(-1, *(1,) * (len(shape) - 1))
            sizes = first * np.exp(rng.normal(0, spread, shape[-1:]))
            return (rng.normal(0, std, shape) * sizes).astype(np.float32)

        tree = jax.tree.map(one, ADAFACTOR[kind], is_leaf=lambda x: isinstance(x, tuple))
        if kind == "lora":
            q_proj = tree["layers"]["self_attn"]["q_proj"]
            q_proj["lora_A"][1][:, RANK:] = 0
            q_proj["lora_B"][1][RANK:] = 0
        return tree

    params = draw(0.3, spread=0.0)
    config = OptimizerConfig(name="adafactor", learning_rate=1e-2, schedule="linear", weight_decay=0.1)
    optimizer = make_optimizer(config, make_schedule(config, 100), axes_of(params))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    tensors = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in in_torch(params).items()}
    groups = [
        {"params": [p for name, p in tensors.items() if name.split(".")[-2] in DECAYED], "weight_decay": 0.1},
        {"params": [p for name, p in tensors.items() if name.split(".")[-2] not in DECAYED], "weight_decay": 0.0},
    ]
    theirs = adafactor([g for g in groups if g["params"]], lr=1e-2, scale_parameter=False, relative_step=False)
    scheduler = pytest.importorskip("transformers").get_scheduler("linear", theirs, 0, 100)
    clipped = 0
    for step in range(30):
        grads = draw(10.0 ** (step % 4 - 3) * (0 if step == 5 else 1))
        before = {name: p.detach().numpy().copy() for name, p in tensors.items()}
        for name, g in in_torch(grads).items():
            tensors[name].grad = torch.tensor(g)
        theirs.step()
        scheduler.step()
        updates, state = update(grads, state, params)
        old, params = in_torch(params), jax.tree.map(np.asarray, optax.apply_updates(params, updates))
        for name, new in in_torch(params).items():
            moved = tensors[name].detach().numpy() - before[name]
            error = np.abs((new - old[name]) - moved).max()
            assert error <= 2e-3 * np.abs(moved).max() + 1e-6, (step, name, error, np.abs(moved).max())
            clipped += bool(np.sqrt(np.mean((moved / 1e-2) ** 2)) > 0.9)
    assert clipped > 10
    for name, leaf in in_torch(params).items():
        np.testing.assert_allclose(leaf, tensors[name].detach().numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_adafactor_of_bfloat16_parameters() -> None:
    """transformers keeps averages in float32: those of bfloat16 would stand still after some hundred steps."""
    torch = pytest.importorskip("torch")
    adafactor = pytest.importorskip("transformers").Adafactor
    rng = np.random.default_rng(1)
    start = rng.normal(0, 1e-2, (16, 12)).astype(np.float32)
    params = {"lm_head": {"kernel": jnp.asarray(start, jnp.bfloat16)}}
    p = torch.nn.Parameter(torch.tensor(start).bfloat16())
    config = OptimizerConfig(name="adafactor", learning_rate=1e-3, schedule="constant")
    optimizer = make_optimizer(config, make_schedule(config, 1), axes_of(params))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    theirs = adafactor([p], lr=1e-3, scale_parameter=False, relative_step=False)
    for step in range(300):
        grad = rng.normal(0, 1.0 if step < 100 else 0.1, (16, 12)).astype(np.float32)
        p.grad = torch.tensor(grad).bfloat16()
        theirs.step()
        updates, state = update({"lm_head": {"kernel": jnp.asarray(grad, jnp.bfloat16)}}, state, params)
        params = optax.apply_updates(params, updates)
    found, expected = np.asarray(params["lm_head"]["kernel"], np.float32), p.detach().float().numpy()
    assert params["lm_head"]["kernel"].dtype == jnp.bfloat16
    # Some numbers round the other way on some steps.
    assert np.abs(found - expected).mean() < 0.02 * np.abs(expected - start).mean()


def test_adafactor_state_is_factored() -> None:
    config = OptimizerConfig(name="adafactor")
    params = {"layers": {"self_attn": {"q_proj": {"kernel": jax.ShapeDtypeStruct((2, 256, 8, 32), jnp.float32)}}}}
    optimizer = make_optimizer(config, make_schedule(config, 1), axes_of(params))
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params))]
    assert sum(sizes) < 2 * (256 + 256) + 20


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_zero_gradient_of_zero_parameter_stays_zero(name: Any) -> None:
    """What lies behind a layer's own LoRA rank must not move."""
    config = OptimizerConfig(name=name, learning_rate=0.1, schedule="constant", weight_decay=0.1)
    zero = jax.tree.map(np.zeros_like, draw(0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(train(config, zero, [zero] * 3)))


def test_what_decays_is_what_the_trainer_decays() -> None:
    """Every tensor of a model with all its biases; a router is Mixtral's `gate.weight`, which decays too."""
    hf = pytest.importorskip("tests.models.hf")
    model, shape = hf.build(attention_bias=True, mlp_bias=True)
    decayed = set(hf.transformers.Trainer.get_decay_parameter_names(None, model))
    assert decayed and len(decayed) < len(list(model.parameters()))
    named = {name: hf.torch.full_like(p, float(name in decayed)) for name, p in model.named_parameters()}
    expected = hf.params(named, shape)
    expected["layers"]["mlp"]["router"] = np.ones((2, 32, 4), np.float32)
    ones = jax.tree.map(np.ones_like, expected)
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.5)
    routed = shape.with_experts(ExpertsSpec(4, "learned", ("text",), (), (2,)))
    axes = parameter_axes(abstract_variables(Decoder(routed))["params"])
    after = train(config, ones, [jax.tree.map(np.zeros_like, ones)], axes)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a < 1, b > 0), after, expected)
