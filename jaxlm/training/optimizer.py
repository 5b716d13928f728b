"""Learning-rate schedules and optimizers, built on optax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.tree_util import keystr

from jaxlm.config import OptimizerConfig
from jaxlm.errors import UserError
from jaxlm.sharding import flat_dims
from jaxlm.training.adam8bit import LEAST_SIZE, scale_by_adam_8bit

Schedule = Callable[[Any], jax.Array]
Axes = Mapping[str, tuple[str | None, ...]]  # path of a parameter (`keystr`) -> its logical axes
MakeOptimizer = Callable[[Axes], optax.GradientTransformation]
MUON_RMS = 0.2  # of a matrix's update: AdamW's, so that one learning rate serves both (arXiv:2502.16982, section 2.2)


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


def parameter_axes(boxed: Any) -> Axes:
    """The logical axes of every parameter.

    Args:
        boxed: parameters as their modules declare them (`nn.with_logical_partitioning`).
    """
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    return {keystr(path): tuple(leaf.names) for path, leaf in leaves}


def _is_matrix(axes: tuple[str | None, ...]) -> bool:
    # What is added to scores, a number for each bucket of distances, is a bias.
    return len(flat_dims(axes)) > 1 and "buckets" not in axes


def _matrices(params: Any, axes: Axes) -> Any:
    """True for what weight decay pulls on by default: matrices, not norms, biases and DoRA magnitudes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(axes[keystr(path)]), params)


def _per_layer(inner: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
    """Runs `inner` on each layer's own tensors in float32: on matrices as [in, out], on biases and the like as vectors.

    Adafactor factors a matrix and clips by a tensor's RMS, so stacking layers and splitting heads would change what it
    does; and running averages of squares stand still in bfloat16.
    """

    def is_stacked(name: str) -> bool:
        return "layers" in axes[name]

    def flatten(name: str, leaf: Any) -> Any:
        start = 1 if is_stacked(name) else 0
        ends = np.cumsum([start, *map(len, flat_dims(axes[name]))])
        dims = [math.prod(leaf.shape[begin:end]) for begin, end in itertools.pairwise(ends)]
        return leaf.reshape(*leaf.shape[:start], *dims).astype(jnp.float32)

    def split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors by name: those of layers, and the others."""
        flat = {keystr(path): flatten(keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        stacked = {name: leaf for name, leaf in flat.items() if is_stacked(name)}
        return stacked, {name: leaf for name, leaf in flat.items() if name not in stacked}

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

        def restore(path: tuple[Any, ...], leaf: Any) -> Any:
            return merged[keystr(path)].reshape(leaf.shape)

        return jax.tree_util.tree_map_with_path(restore, updates), new_state

    return optax.GradientTransformation(init, update)


def _clip_by_rms(threshold: float, axes: Axes) -> optax.GradientTransformation:
    """Divides each tensor by its RMS over `threshold` where that is above 1; tensors by name, see `_per_layer`.

    Zeros behind a layer's own LoRA rank are not the layer's, and do not count.
    """

    def clip(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        size: int | jax.Array = update.size
        dims = flat_dims(axes[path[-1].key])
        if ("lora_rank",) in dims:
            other = 1 - dims.index(("lora_rank",))
            ranks = jnp.any(update != 0, axis=other).sum()
            size = update.shape[other] * jnp.maximum(1, ranks)
        rms = jnp.sqrt(jnp.sum(jnp.square(update)) / size)
        return update / jnp.maximum(1.0, rms / threshold)

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(clip, updates), state

    return optax.GradientTransformation(init, update)


def _muon_dims(params: Any, axes: Axes) -> Any:
    """How Muon sees each parameter: a matrix [in, out] for each layer; None for what AdamW updates.

    That is what has one dim, and the tables [V, D], of which a step touches few rows.
    """

    def dims(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        own = axes[keystr(path)]
        groups = flat_dims(own)
        if len(groups) != 2 or not _is_matrix(own) or "vocab" in own:
            return None
        start = leaf.ndim - sum(map(len, groups))
        middle = start + len(groups[0])
        return optax.contrib.MuonDimensionNumbers(tuple(range(start, middle)), tuple(range(middle, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(dims, params)


def _coded(params: Any, axes: Axes) -> Any:
    """True for matrices of enough elements in each layer, whose moments `adamw_8bit` keeps in a byte each."""

    def is_coded(path: tuple[Any, ...], leaf: Any) -> bool:
        own = axes[keystr(path)]
        size = math.prod(size for size, axis in zip(leaf.shape, own, strict=True) if axis != "layers")
        return _is_matrix(own) and size >= LEAST_SIZE

    return jax.tree_util.tree_map_with_path(is_coded, params)


def make_optimizer(config: OptimizerConfig, schedule: Schedule, axes: Axes) -> optax.GradientTransformation:
    """The update rule; gradients come in already clipped.

    adamw: decoupled decay as torch.optim.AdamW; adamw_8bit: the same with moments as of `scale_by_adam_8bit`. lion:
    arXiv:2302.06675. adafactor: arXiv:1804.04235 as transformers' Trainer runs it with `--optim adafactor`: relative
    steps, parameter scaling and the first moment off; every matrix is factored, however small. Its averages are float32
    for parameters of any dtype. muon: `optax.contrib.muon`, updates as large as AdamW's (arXiv:2502.16982).
    schedule_free: `optax.contrib.schedule_free` around AdamW without a first moment (arXiv:2405.15682).

    Args:
        axes: of the parameters that train, see `parameter_axes`.
    """
    mask = partial(_matrices, axes=axes) if config.decay == "matrices" else None
    decay = optax.add_decayed_weights(config.weight_decay, mask=mask) if config.weight_decay else optax.identity()
    if config.name == "adamw":
        return optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=mask,
        )
    if config.name == "adamw_8bit":
        scale = scale_by_adam_8bit(config.beta1, config.beta2, config.eps, partial(_coded, axes=axes))
        return optax.chain(scale, decay, optax.scale_by_learning_rate(schedule))
    if config.name == "lion":
        return optax.lion(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=mask)
    if config.name == "muon":
        muon = optax.contrib.muon(
            1.0,
            beta=config.momentum,
            eps=config.eps,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=partial(_muon_dims, axes=axes),
            consistent_rms=MUON_RMS,
        )
        # optax decays Muon's part and AdamW's by different rules; here it is the one of the other optimizers.
        return optax.chain(muon, optax.scale(-1.0), decay, optax.scale_by_learning_rate(schedule))
    if config.name == "schedule_free":
        # `optax.contrib.schedule_free_adamw`, whose weight decay has no mask.
        rms = optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True)
        return optax.contrib.schedule_free(
            optax.chain(rms, decay, optax.scale_by_learning_rate(schedule)), schedule, b1=config.beta1
        )
    return optax.chain(
        _per_layer(
            optax.chain(
                # epsilon and decay exponent of the paper; HF: eps=(1e-30, 1e-3), clip 1.0, decay -0.8.
                optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30, min_dim_size_to_factor=0),
                _clip_by_rms(1.0, axes),
            ),
            axes,
        ),
        decay,
        optax.scale_by_learning_rate(schedule),
    )
