"""FLOPs of a train step, its bytes over links and through memory, and the time that these bound: a roofline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from jaxlm.devices.chips import Chip
from jaxlm.devices.mesh import shard_axes_size
from jaxlm.planning.memory import Memory, layer_params
from jaxlm.sharding import DATA, EXPERT, SEQUENCE, TENSOR
from jaxlm.spec import DecoderSpec, LayerSpec
from jaxlm.training.report import flops_per_token, idle_params
from jaxlm.training.setup import TrainSetup
from jaxlm.training.state import Initializer, bytes_per_device, count

FORMULA = (
    "compute = hardware FLOPs / bf16 peak; links = bytes a chip gets / its links, all at once, one direction; network "
    "= bytes from other slices / its share of the host's; memory = state, weights and activations / bandwidth. A step "
    "takes at least the longest of them (all overlap) and at most their sum (nothing overlaps), if each ran at its "
    "data sheet's speed; MFU = model FLOPs / (time x peak)"
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a step.

    Attributes:
        tokens: number of tokens, over all devices.
        model_flops: FLOPs over all devices: 6 N a token (4 N where the base is frozen) and causal attention, halved; as
            in `training.report.flops_per_token`.
        hardware_flops: FLOPs that one device computes, recomputation included.
        link_bytes: bytes that one device receives from others of its slice.
        memory_bytes: bytes that go through the memory of one device.
        network_bytes: bytes that one device receives from other slices.
    """

    tokens: int
    model_flops: float
    hardware_flops: float
    link_bytes: float
    memory_bytes: float
    network_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step by what bounds it.

    Attributes:
        compute, links, memory, network: seconds of each alone.
        mfu: (upper bound, lower bound): when all overlap, when nothing does.
        tokens_per_second: likewise, over all devices.
    """

    compute: float
    links: float
    memory: float
    mfu: tuple[float, float]
    tokens_per_second: tuple[float, float]
    network: float = 0.0

    @property
    def shortest(self) -> float:
        return max(self.compute, self.links, self.memory, self.network)

    @property
    def longest(self) -> float:
        return self.compute + self.links + self.memory + self.network


def estimate_cost(setup: TrainSetup, initializer: Initializer, memory: Memory, slices: int = 1) -> Cost:
    """Estimates the cost of a run's train step.

    Args:
        setup, initializer: of the run, as for `memory.estimate_memory`.
        memory: what that estimated.
        slices: number of TPU slices that the devices are in.
    """
    config, c, mesh = setup.config, setup.model.spec, setup.mesh
    length, rows = config.data.sequence_length, setup.micro_batch
    tokens = config.train.global_batch_size * length
    devices = math.prod(mesh.shape.values())
    full = initializer.lora is None
    encoder_length = config.data.row_length("encoder_ids")
    model_flops = flops_per_token(c, length, full, encoder_length) * tokens
    # An encoder's layers count by the tokens that they read for one of the decoder's.
    layers = c.num_layers + (0 if c.encoder is None else c.encoder.num_layers * encoder_length / length)

    recomputed = _recomputed(setup)
    # Experts that compute all neurons and mask compute those, too, that no token uses.
    idle = idle_params(c)
    masked = idle if setup.model.experts == "dense" else 0.0
    per_layer = layer_params(initializer.dense) / c.total_layers - (idle - masked) / c.num_layers
    # Scores and values, halved because causal; backward the scores are formed again, and there are two more products
    # for each of the two.
    attention = 2 * layer_mean(c, lambda layer: layer.attention.num_heads * layer.attention.head_dim) * length
    scores_again = 0.5 * attention * layers
    again = layers * (2 * per_layer * recomputed[0] + attention * recomputed[1])
    hardware = (model_flops + tokens * ((6 if full else 4) * masked + again + scores_again)) / devices

    micro_tokens = rows * length // mesh.shape[SEQUENCE]
    itemsize = jnp.dtype(setup.model.dtype).itemsize
    tensor, fsdp = mesh.shape[TENSOR], shard_axes_size(mesh)
    replicas = mesh.shape[DATA] // slices
    weights = count(initializer.dense) / tensor / mesh.shape[EXPERT]
    trained_shard = bytes_per_device(initializer.trainable, initializer.trainable_shardings)
    passes = 2 * setup.accumulation  # forward, backward
    links = passes * itemsize * weights * (1 - 1 / fsdp)
    # Gradients: each device gets its part of the sum, then (over data) the sum of all parts.
    links += setup.accumulation * trained_shard * ((fsdp - 1) + 2 * (1 - 1 / replicas))
    # ... and then, over slices, the sum of these.
    network = setup.accumulation * trained_shard * 2 * (1 - 1 / slices)
    if tensor > 1:
        # Two sums of hidden states a layer, forward, backward and once more where they are recomputed.
        sums = layers * (4 + 2 * (recomputed[0] > 0))
        links += setup.accumulation * sums * 2 * (1 - 1 / tensor) * micro_tokens * c.hidden_size * itemsize
    sequence = mesh.shape[SEQUENCE]
    if sequence > 1:
        # From parts of rows to parts of heads and back: q, k, v and the output, forward, backward, recomputed.
        width = layer_mean(c, lambda layer: 2 * _qkv_width(layer) - _kv_width(layer)) / tensor
        times = setup.accumulation * layers * (2 + recomputed[1])
        links += times * micro_tokens * width * (1 - 1 / sequence) * itemsize
    # Parameters, moments and gradients are read, the first two written; weights are written once gathered and read.
    state = 2 * (trained_shard + memory.optimizer) + memory.gradients
    through = state + passes * 2 * itemsize * weights
    # Inputs and outputs of the products, forward and twice backward, and what is kept is written and read.
    layer_io = (11 * c.hidden_size + 3 * layer_mean(c, lambda layer: layer.feed_forward.size) / tensor) * itemsize
    through += setup.accumulation * (micro_tokens * layers * layer_io * (3 + recomputed[0]) + 2 * memory.activations)
    return Cost(tokens, model_flops, hardware, links, through, network)


def layer_mean(spec: DecoderSpec, size: Callable[[LayerSpec], int]) -> float:
    """The mean of a size over all layers."""
    return sum(map(size, spec.layers())) / spec.num_layers


def _qkv_width(layer: LayerSpec) -> int:
    """Number of outputs of q, k and v."""
    return layer.attention.num_heads * layer.attention.head_dim + _kv_width(layer)


def _kv_width(layer: LayerSpec) -> int:
    """Number of outputs of k and v."""
    return 2 * layer.attention.num_kv_heads * layer.attention.head_dim


def _recomputed(setup: TrainSetup) -> tuple[float, float]:
    """The shares of a layer's products, and of its attention, that the backward pass computes again."""
    c = setup.model.spec
    d = c.hidden_size
    qkv, out = d * layer_mean(c, _qkv_width), d * layer_mean(c, lambda layer: _qkv_width(layer) - _kv_width(layer))
    mlp = d * layer_mean(c, lambda layer: layer.feed_forward.size)
    everything = qkv + out + 3 * mlp
    # The backward pass does not read the result of the last product, so no compiler forms it again.
    return {
        "full": (1 - mlp / everything, 1.0),
        "qkv": ((out + 2 * mlp) / everything, 1.0),
        "qkv_out": ((out + 2 * mlp) / everything, 0.0),
        "dots": (0.0, 1.0),
        "none": (0.0, 0.0),
    }[setup.model.remat]


def estimate_time(cost: Cost, chip: Chip, devices: int) -> Time | None:
    """By `FORMULA`; None for a chip whose peak is not known."""
    if not chip.flops:
        return None
    compute, memory = cost.hardware_flops / chip.flops, cost.memory_bytes / chip.bandwidth
    links = cost.link_bytes / chip.link if devices > 1 else 0.0
    network = cost.network_bytes / chip.network if cost.network_bytes else 0.0
    bounds = max(compute, links, memory, network), compute + links + memory + network
    ideal = cost.model_flops / devices / chip.flops
    return Time(
        compute,
        links,
        memory,
        (ideal / bounds[0], ideal / bounds[1]),
        (cost.tokens / bounds[0], cost.tokens / bounds[1]),
        network,
    )
