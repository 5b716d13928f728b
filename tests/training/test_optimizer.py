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
from jaxlm.training.optimizer import make_optimizer, make_schedule

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
def test_schedules_against_transformers(name: str, options: Any, kwargs: Any, warmup: int) -> None:
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


def test_deepspeed_log_warmup() -> None:
    expected = [PEAK * (math.log(t + 1) / math.log(10) if t < 10 else 1.0) for t in range(STEPS)]
    np.testing.assert_allclose(ours(schedule="log_warmup", warmup_steps=10), expected, rtol=1e-5)
    np.testing.assert_allclose(ours(schedule="log_warmup"), PEAK, rtol=1e-6)


def test_warmup_ratio_and_end() -> None:
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
def test_warmup_errors(options: Any, words: str) -> None:
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
DECAYED = {"embedding", "kernel", "lora_A"}


def draw(seed: int, std: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(0, std, shape).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def train(config: OptimizerConfig, params: Any, grads: list[Any]) -> Any:
    optimizer = make_optimizer(config, make_schedule(config, len(grads)))
    state = optimizer.init(params)

    @jax.jit
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = update(params, state, g)
    return params


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_adamw_against_torch(decay: Any) -> None:
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


def test_adafactor_against_transformers() -> None:
    """Ours holds [L, D, H, h]; transformers is given each layer's own [out, in] matrix."""
    torch = pytest.importorskip("torch")
    adafactor = pytest.importorskip("transformers").Adafactor
    rng = np.random.default_rng(0)
    shapes = {
        "q_proj": (2, 130, 4, 40),  # [L, D, H, h]
        "o_proj": (2, 4, 40, 130),  # [L, H, h, D]
    }

    def make(scale: float) -> Any:
        kernels = {name: {"kernel": rng.normal(0, scale, s).astype(np.float32)} for name, s in shapes.items()}
        norm = {"scale": rng.normal(0, scale, (2, 130)).astype(np.float32)}
        head = {"kernel": rng.normal(0, scale, (150, 130)).astype(np.float32)}
        return {"layers": {"self_attn": kernels, "input_layernorm": norm}, "lm_head": head}

    def matrices(tree: Any) -> list[np.ndarray]:
        out = [tree["lm_head"]["kernel"]]
        for i in range(2):
            attention = tree["layers"]["self_attn"]
            out.append(np.asarray(attention["q_proj"]["kernel"])[i].reshape(130, 160).T)
            out.append(np.asarray(attention["o_proj"]["kernel"])[i].reshape(160, 130).T)
            out.append(np.asarray(tree["layers"]["input_layernorm"]["scale"])[i])
        return [np.ascontiguousarray(a) for a in out]

    start, grads = make(1.0), [make(10.0 ** (i % 4 - 3)) for i in range(6)]
    config = OptimizerConfig(name="adafactor", learning_rate=1e-2, schedule="constant", weight_decay=0.1, decay="all")
    found = matrices(train(config, start, grads))
    tensors = [torch.nn.Parameter(torch.tensor(a)) for a in matrices(start)]
    optimizer = adafactor(
        tensors,
        lr=1e-2,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=None,
        weight_decay=0.1,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
    for step in grads:
        for p, g in zip(tensors, matrices(step), strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    for a, b in zip(found, tensors, strict=True):
        moved = np.abs(a - b.detach().numpy()).max()
        assert moved < 2e-5, (a.shape, moved)


def test_adafactor_state_is_factored() -> None:
    config = OptimizerConfig(name="adafactor")
    optimizer = make_optimizer(config, make_schedule(config, 1))
    params = {"layers": {"self_attn": {"q_proj": {"kernel": jax.ShapeDtypeStruct((2, 256, 8, 32), jnp.float32)}}}}
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params))]
    assert sum(sizes) < 2 * (256 + 256) + 20


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_zero_gradient_of_zero_parameter_stays_zero(name: Any) -> None:
    """What lies behind a layer's own LoRA rank must not move."""
    config = OptimizerConfig(name=name, learning_rate=0.1, schedule="constant", weight_decay=0.1)
    zero = jax.tree.map(np.zeros_like, draw(0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(train(config, zero, [zero] * 3)))
