"""Memory of one device, by kind, without a compiler: what is always there, and what a step needs besides.

Parameters and optimizer state follow exactly from shapes and shardings. The size of what the forward pass keeps for the
backward pass comes from JAX itself (`jax.vjp` of the loss under `jax.eval_shape`), so that any model, adapter or remat
policy is covered. The rest of the peak follows from rules, one for each phase; see `Memory`.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import LoraConfig
from jaxlm.devices.mesh import shard_axes_size
from jaxlm.kernels.cross_entropy import chunk_count
from jaxlm.models.adapters import resolve_lora, saved_modules
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.nn.lora import LoraSpec
from jaxlm.sharding import SEQUENCE, SHARD_AXES, TENSOR
from jaxlm.spec import DecoderSpec, LayerSpec
from jaxlm.training.setup import TrainSetup
from jaxlm.training.state import Initializer, bytes_per_device, count

# Rules fitted to what libtpu 0.0.42 reports for 21 small steps and LLaMA-2-7B's (see tests/planning/test_memory.py):
# share of what a layer would keep without recomputation that is alive at once while the layer is differentiated;
LAYER_SHARE = 0.5
# number of layers whose weights are gathered at once, and, where they train, whose gradient is on its way back;
GATHERED_LAYERS, GATHERED_GRADIENTS = 2, 1
# number of hidden states [B, T, D] alive beside a chunk's logits: the last layer's, their norm, gradients.
LOSS_STATES = 7


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters: of the whole model, trained or not, and its adapters.
        optimizer: the optimizer's state.
        gradients: of what trains; the float32 sums over micro-steps beside one micro-step's.
        activations: kept from the forward pass for the backward pass.
        layer: what one layer needs while it is recomputed and differentiated.
        loss: the output matrix as gathered, its gradient, logits of a chunk, hidden states.
        gathered: weights of other devices, or of the hosts, while layers use them, and a layer's gradient before it is
            sent back.
        embedding: the table's gradient before it is sent back, and on its way.
        host: in the host's memory for this device (model.offload); not in its own.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    layer: int
    loss: int
    gathered: int
    embedding: int
    host: int

    @property
    def resident(self) -> int:
        """Bytes that are in use all the time."""
        return self.parameters + self.optimizer

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes in use at once, by kind, in each phase that can be the peak."""
        kinds = {
            "loss": ("activations", "loss"),
            "backward": ("gradients", "activations", "layer", "gathered"),
            "update": ("gradients", "embedding"),
        }
        return {
            phase: {name: getattr(self, name) for name in ("parameters", "optimizer", *names)}
            for phase, names in kinds.items()
        }

    @property
    def worst(self) -> str:
        """The phase with the largest sum."""
        phases = self.phases()
        return max(phases, key=lambda phase: sum(phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes in the worst phase."""
        return sum(self.phases()[self.worst].values())


def estimate_memory(setup: TrainSetup, initializer: Initializer) -> Memory:
    """Estimates the memory of a run's train step.

    Args:
        setup: of the run; made for a topology, it needs no devices.
        initializer: of the run.
    """
    model, mesh, rows = setup.model, setup.mesh, setup.micro_batch
    length, lora = setup.config.data.sequence_length // mesh.shape[SEQUENCE], initializer.lora
    lengths = length, setup.config.data.row_length("encoder_ids")
    shape = local_shape(model.spec, mesh.shape[TENSOR])
    frozen = _frozen_bytes(setup, initializer)
    trained = bytes_per_device(initializer.trainable, initializer.trainable_shardings)
    # A micro-step's gradients have the parameters' dtype, their sum over micro-steps is float32.
    summed = 4 * _shard_count(initializer.trainable, initializer.trainable_shardings) if setup.accumulation > 1 else 0

    itemsize = jnp.dtype(model.dtype).itemsize
    table = shape.vocab_size * shape.embedding_dims
    shards = shard_axes_size(mesh)
    split = shards > 1
    saved = {} if lora is None else saved_modules(model.spec, lora)
    head_trains, table_trains = (lora is None or name in saved for name in ("lm_head", "embed_tokens"))
    chunks = chunk_count(rows, length, shape.vocab_size, head_trains)
    logits = 4 * rows * -(-length // chunks) * shape.vocab_size
    states = LOSS_STATES * rows * length * shape.hidden_size * itemsize
    layer_weights = itemsize * layer_params(initializer.dense) // shape.total_layers // mesh.shape[TENSOR]
    # A sum that is scattered along one mesh axis after the other leaves a part behind each.
    stages = sum(4 * table // parts for parts in _parts_by_stage(mesh))
    host = bytes_per_device(initializer.params, initializer.params_shardings, in_host=True)
    # One layer's matrices are used while those of the next one come.
    fetched = GATHERED_LAYERS * host // shape.total_layers
    return Memory(
        parameters=frozen + trained,
        optimizer=optimizer_bytes(initializer),
        gradients=trained + summed,
        activations=rows * kept_bytes(shape, lora, model, lengths, model.remat),
        layer=int(LAYER_SHARE * rows * kept_bytes(shape, lora, model, lengths, "none") / shape.total_layers),
        loss=itemsize * table + (4 * table + stages) * head_trains + logits + states,
        gathered=fetched
        + (
            layer_weights * (GATHERED_LAYERS + GATHERED_GRADIENTS * (lora is None) if split else 1)
            if initializer.quantize is None
            else _gathered_bits(setup, initializer, split)
        ),
        embedding=(4 * table * (2 if summed else 1) + stages) * (split and table_trains),
        host=host,
    )


def optimizer_bytes(initializer: Initializer) -> int:
    """Bytes of the optimizer's state in a device's memory."""
    return bytes_per_device(initializer.opt_state, initializer.opt_shardings)


def _gathered_bits(setup: TrainSetup, initializer: Initializer, split: bool) -> int:
    """Bytes of a quantised base in use beside its own: gathered layers, and the largest kernel as an array.

    The array is there where no kernel multiplies with the bits themselves (see `TrainSetup.why_plain_nf4`).
    """
    tensor, spec = setup.mesh.shape[TENSOR], setup.model.spec
    parts = (initializer.params, initializer.params.get("encoder", {}))
    leaves = [leaf for part in parts for stack in ("layers", "tail") for leaf in jax.tree.leaves(part.get(stack, {}))]
    gathered = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // spec.total_layers // tensor
    widest = max(layer.feed_forward.size for layer in spec.period)
    if initializer.quantize == "nf4" and setup.why_plain_nf4() is None:
        dense = 0
    else:
        dense = jnp.dtype(setup.model.dtype).itemsize * spec.hidden_size * widest // tensor
    return dense + GATHERED_LAYERS * gathered * split


def _parts_by_stage(mesh: Any) -> list[int]:
    """Number of parts that a sum is cut into after each mesh axis of `SHARD_AXES` (see `kernels.scatter`)."""
    sizes = [mesh.shape[axis] for axis in SHARD_AXES if mesh.shape[axis] > 1]
    return [math.prod(sizes[: at + 1]) for at in range(len(sizes))]


def _frozen_bytes(setup: TrainSetup, initializer: Initializer) -> int:
    """Bytes of the trees that the objective reads and nothing trains."""
    return len(setup.objective.frozen) * bytes_per_device(initializer.params, initializer.params_shardings)


def resident_bytes(setup: TrainSetup, initializer: Initializer) -> int:
    """Bytes of a device that are in use all the time: parameters and the optimizer's state."""
    trained = bytes_per_device(initializer.trainable, initializer.trainable_shardings)
    return _frozen_bytes(setup, initializer) + trained + optimizer_bytes(initializer)


def _shard_count(tree: Any, shardings: Any) -> int:
    sizes = jax.tree.map(lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), tree, shardings)
    return sum(jax.tree.leaves(sizes))


def layer_params(params: Any) -> int:
    """Number of parameters of all layers."""
    parts = (params, params.get("encoder", {}))
    return sum(count(part.get(stack, {})) for part in parts for stack in ("layers", "tail"))


def local_shape(shape: DecoderSpec, tensor: int) -> DecoderSpec:
    """The model that one device of a tensor axis computes: its heads, neurons and rows of the vocabulary."""
    if tensor == 1:
        return shape
    moe = shape.experts
    if moe is not None:
        share = max(1, moe.num_experts // tensor)
        moe = dataclasses.replace(moe, num_experts=share, top_k=tuple(min(k, share) for k in moe.top_k), shared=0)

    def part(layer: LayerSpec) -> LayerSpec:
        attention, feed_forward = layer.attention, layer.feed_forward
        kv_heads = attention.num_kv_heads // math.gcd(attention.num_kv_heads, tensor)  # with copies where uneven
        heads = max(1, attention.num_heads // tensor), kv_heads
        return dataclasses.replace(
            layer,
            attention=dataclasses.replace(attention, num_heads=heads[0], num_kv_heads=heads[1]),
            cross_attention=None
            if layer.cross_attention is None
            else dataclasses.replace(layer.cross_attention, num_heads=heads[0], num_kv_heads=heads[1]),
            feed_forward=dataclasses.replace(
                feed_forward, size=feed_forward.size // tensor, experts=None if feed_forward.experts is None else moe
            ),
        )

    encoder = shape.encoder
    if encoder is not None:
        encoder = dataclasses.replace(encoder, period=tuple(map(part, encoder.period)))
    shape = dataclasses.replace(shape, period=tuple(map(part, shape.period)), encoder=encoder)
    return dataclasses.replace(shape, vocab_size=-(-shape.vocab_size // tensor))


def kept_bytes(
    shape: DecoderSpec, lora: LoraConfig | None, model: Decoder, lengths: tuple[int, int], remat: str
) -> int:
    """Bytes per row that the layers' forward passes keep for their backward passes.

    They are the arrays that `jax.vjp` of the loss keeps and that are stacked over layers, for two batch sizes; what
    does not grow with the batch are weights.

    Args:
        shape: the model on one device.
        model: the model that names dtypes, attention and the experts' computation.
        lengths: of a row of the decoder, and of one of the encoder.
    """
    adapters = tuple(resolve_lora(shape, lora).items()) if lora else ()
    settings = model.dtype, model.param_dtype, model.attention, remat, model.experts, model.router_noise
    return _kept_bytes(shape, adapters, settings, lengths)


@cache
def _kept_bytes(
    shape: DecoderSpec, adapters: tuple[tuple[str, LoraSpec], ...], settings: tuple[Any, ...], lengths: tuple[int, int]
) -> int:
    # Whole periods only, whose arrays are stacked over the repetitions; the layers of the tail keep as much as others.
    size = len(shape.period)
    whole = max(size, shape.num_layers - shape.num_layers % size)
    # An encoder's layers are all of one description.
    repeats = {whole // size} | (set() if shape.encoder is None else {shape.encoder.num_layers})
    # Two batches whose number of rows is not the number of repetitions, which marks stacked arrays.
    few, many = [rows for rows in (1, 2, 3, 4) if rows not in repeats][:2]
    local = Decoder(dataclasses.replace(shape, num_layers=whole), dict(adapters), *settings)

    def kept(rows: int) -> int:
        leaves = jax.tree.leaves(_kept(local, rows, lengths))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim > 1 and leaf.shape[0] in repeats)

    return (kept(many) - kept(few)) // (many - few) * shape.num_layers // whole


@cache
def _variables(shape: DecoderSpec, adapters: tuple[tuple[str, LoraSpec], ...], dtypes: tuple[Any, Any]) -> Any:
    return nn.unbox(abstract_variables(Decoder(shape, dict(adapters), *dtypes)))


def _kept(model: Decoder, rows: int, lengths: tuple[int, int]) -> Any:
    variables = _variables(model.spec, tuple(model.adapters.items()), (model.dtype, model.param_dtype))
    part = "lora" if "lora" in variables else "params"
    ids, source = (jax.ShapeDtypeStruct((rows, length), jnp.int32) for length in lengths)
    weights = jax.ShapeDtypeStruct((rows, lengths[0]), jnp.float32)

    def backward(variables: Any, ids: jax.Array, weights: jax.Array, source: jax.Array) -> Any:
        more: dict[str, Any] = (
            {} if model.spec.encoder is None else {"encoder_ids": source, "encoder_segment_ids": source}
        )

        def loss(trained: Any) -> jax.Array:
            out, _ = model.apply(
                {**variables, part: trained},
                ids,
                weights,
                positions=ids,
                segment_ids=ids,
                deterministic=False,
                rngs={"dropout": jax.random.key(0)},
                method="loss",
                mutable=["moe"],
                **more,
            )
            return out.loss

        return jax.vjp(loss, variables[part])[1]

    return jax.eval_shape(backward, variables, ids, weights, source)
