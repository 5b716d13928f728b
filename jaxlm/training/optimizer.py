"""Learning-rate schedules and optimizers, built on optax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import OptimizerConfig
from jaxlm.errors import UserError

Schedule = Callable[[Any], jax.Array]
# Parameters that weight decay pulls on by default: matrices, not norms, biases and DoRA magnitudes.
MATRICES = ("kernel", "embedding", "router", "lora_A", "lora_B")


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Steps of warm-up of a run.

    Raises:
        UserError: for a warm-up given twice or out of range.
    """
    if config.warmup_steps and config.warmup_ratio:
        raise UserError("optimizer: give warmup_steps or warmup_ratio, not both")
    if config.warmup_steps < 0:
        raise UserError(f"optimizer.warmup_steps: {config.warmup_steps} is negative")
    if not 0 <= config.warmup_ratio <= 1:
        raise UserError(f"optimizer.warmup_ratio: {config.warmup_ratio} is not between 0 and 1")
    return config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Learning rate of step t = 0, 1, ... (the first update uses t = 0, as in HF's Trainer).

    cosine, linear, polynomial and constant follow a linear warm-up from 0 (transformers
    `optimization.py`); log_warmup is DeepSpeed's WarmupLR: log(t + 1) / log(warmup), then constant.

    Raises:
        UserError: for a warm-up given twice or out of range.
    """
    warmup = warmup_steps(config, total_steps)
    peak, end = config.learning_rate, config.end_ratio
    decay_steps = max(1, total_steps - warmup)

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        if config.schedule == "log_warmup":
            rising = jnp.log(t + 1) / math.log(max(2, warmup))
            return peak * jnp.where(t < warmup, rising, 1.0)
        progress = jnp.clip((t - warmup) / decay_steps, 0.0, 1.0)
        if config.schedule == "cosine":
            shape = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "constant":
            shape = jnp.ones_like(progress)
        else:
            shape = (1 - progress) ** (1.0 if config.schedule == "linear" else config.power)
        if config.schedule != "constant":
            shape = end + (1 - end) * shape
        return peak * jnp.where(t < warmup, t / max(1, warmup), shape)

    return schedule


def _decay_mask(params: Any) -> Any:
    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        return path[-1].key in MATRICES

    return jax.tree_util.tree_map_with_path(decays, params)


def _per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on each layer's own tensors in float32: on matrices as [in, out], on biases and the like as vectors.

    Adafactor factors a matrix and clips by a tensor's RMS, so stacking layers and splitting heads would change what it
    does; and running averages of squares stand still in bfloat16.
    """

    def is_stacked(path: tuple[Any, ...]) -> bool:
        return any(getattr(key, "key", None) == "layers" for key in path)

    def flat(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path[-1].key
        start = 1 if is_stacked(path) else 0
        dims = leaf.shape[start:]
        if name not in MATRICES:
            dims = (math.prod(dims),)
        elif len(dims) > 2:
            # q, k, v: [D, H, h]; lora_B [R, H, h]: first dim in. o: [H, h, D]; lora_A of o [H, h, R]: last dim out.
            split = 2 if path[-2].key == "o_proj" and name in ("kernel", "lora_A") else 1
            dims = math.prod(dims[:split]), math.prod(dims[split:])
        return leaf.reshape(*leaf.shape[:start], *dims).astype(jnp.float32)

    def split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        flat_tree = jax.tree_util.tree_leaves_with_path(jax.tree_util.tree_map_with_path(flat, tree))
        named = [(jax.tree_util.keystr(path), is_stacked(path), leaf) for path, leaf in flat_tree]
        return {n: v for n, s, v in named if s}, {n: v for n, s, v in named if not s}

    def init(params: Any) -> Any:
        stacked, rest = split(params)
        return {"layers": jax.vmap(inner.init)(stacked) if stacked else (), "rest": inner.init(rest)}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        stacked, rest = split(updates)
        stacked_params, rest_params = split(params)
        new_state = dict(state)
        if stacked:
            stacked, new_state["layers"] = jax.vmap(inner.update)(stacked, state["layers"], stacked_params)
        rest, new_state["rest"] = inner.update(rest, state["rest"], rest_params)
        merged = stacked | rest

        def back(path: tuple[Any, ...], leaf: Any) -> Any:
            return merged[jax.tree_util.keystr(path)].reshape(leaf.shape)

        return jax.tree_util.tree_map_with_path(back, updates), new_state

    return optax.GradientTransformation(init, update)


def _clip_by_rms(threshold: float) -> optax.GradientTransformation:
    """Divides each tensor by its RMS over `threshold` where that is above 1; tensors by name, see `_per_layer`.

    Zeros behind a layer's own LoRA rank are not the layer's, and do not count.
    """

    def clip(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        values: int | jax.Array = update.size
        name = path[-1].key
        if name.endswith(("['lora_A']", "['lora_B']")):
            across = 0 if name.endswith("['lora_A']") else 1  # [in, R], [R, out]
            ranks = jnp.any(update != 0, axis=across).sum()
            values = update.shape[across] * jnp.maximum(1, ranks)
        rms = jnp.sqrt(jnp.sum(jnp.square(update)) / values)
        return update / jnp.maximum(1.0, rms / threshold)

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(clip, updates), state

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    """The update rule; gradients come in already clipped.

    adamw: decoupled decay as torch.optim.AdamW. lion: arXiv:2302.06675. adafactor: arXiv:1804.04235 as transformers'
    Trainer runs it with `--optim adafactor`: relative steps, parameter scaling and the first moment off; every matrix
    is factored, however small. Its averages are float32 for parameters of any dtype.
    """
    mask = _decay_mask if config.decay == "matrices" else None
    if config.name == "adamw":
        return optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=mask,
        )
    if config.name == "lion":
        return optax.lion(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=mask)
    return optax.chain(
        _per_layer(
            optax.chain(
                # epsilon and decay exponent of the paper; HF: eps=(1e-30, 1e-3), clip 1.0, decay -0.8.
                optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30, min_dim_size_to_factor=0),
                _clip_by_rms(1.0),
            )
        ),
        optax.add_decayed_weights(config.weight_decay, mask=mask) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
