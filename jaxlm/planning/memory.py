"""Bytes of one device, by kind, without a compiler: what lies there all the time, and what the step needs beside it.

What lies there follows exactly from shapes and shardings. What the forward pass keeps for the backward pass is asked of
JAX itself (`jax.vjp` of the loss under `jax.eval_shape`), so any model, adapter or remat policy is right by itself.
What else is alive at the worst moment follows by rules, one a phase; see `Memory`.
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
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.nn.lora import LoraSpec, resolve_lora
from jaxlm.sharding import SHARD_AXES
from jaxlm.spec import DecoderSpec
from jaxlm.training.build import Build
from jaxlm.training.state import Initializer, bytes_per_device, count

# Rules fitted to what libtpu 0.0.42 says of 21 small steps and LLaMA-2-7B's (tests/planning/test_memory.py has some):
# of all that a layer would keep without recomputing, so much is alive at once while it is differentiated;
LAYER_SHARE = 0.5
# so many layers' weights are gathered at once, and where they train so many more are a gradient on its way back;
GATHERED_LAYERS, GATHERED_GRADIENTS = 2, 1
# hidden states [B, T, D] alive beside a chunk's logits: the last layer's, their norm, gradients.
LOSS_STATES = 7


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters: all of the model, trained or not, and adapters.
        optimizer: its state.
        gradients: of what trains; float32 sums of micro-steps beside one micro-step's.
        activations: kept from the forward pass for the backward pass.
        layer: of one layer while it is computed again and differentiated.
        loss: the output matrix as gathered, its gradient, logits of a chunk, hidden states.
        gathered: weights of other devices while layers use them, and a layer's gradient before it is sent back.
        embedding: the table's gradient before it is sent back, and on its way.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    layer: int
    loss: int
    gathered: int
    embedding: int

    @property
    def resident(self) -> int:
        """What lies there all the time."""
        return self.parameters + self.optimizer

    def phases(self) -> dict[str, dict[str, int]]:
        """What is alive at once at each of the moments that can be the worst, by kind."""
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
        """The phase with most."""
        phases = self.phases()
        return max(phases, key=lambda phase: sum(phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes in the worst phase."""
        return sum(self.phases()[self.worst].values())


def estimate_memory(built: Build, setup: Initializer) -> Memory:
    """Of the train step of a run.

    Args:
        built: the run's programs; built for a topology, it needs no devices.
        setup: its initializer.
    """
    model, mesh, rows = built.model, built.mesh, built.micro_batch
    length, lora = built.config.data.sequence_length // mesh.shape["sequence"], setup.lora
    shape = local_shape(model.config, mesh.shape["tensor"])
    frozen = 0 if lora is None else bytes_per_device(setup.params, setup.params_shardings)
    trained = bytes_per_device(setup.trainable, setup.trainable_shardings)
    # A micro-step's gradients have the parameters' dtype, their sum over micro-steps is float32.
    summed = 4 * _shard_count(setup.trainable, setup.trainable_shardings) if built.accumulation > 1 else 0

    itemsize = jnp.dtype(model.dtype).itemsize
    table = shape.vocab_size * shape.hidden_size
    shards = shard_axes_size(mesh)
    split = shards > 1
    head_trains, table_trains = (lora is None or name in lora.modules_to_save for name in ("lm_head", "embed_tokens"))
    chunks = chunk_count(rows, length, shape.vocab_size, head_trains)
    logits = 4 * rows * -(-length // chunks) * shape.vocab_size
    states = LOSS_STATES * rows * length * shape.hidden_size * itemsize
    layer_weights = itemsize * count(setup.params["layers"]) // shape.num_layers // mesh.shape["tensor"]
    # A sum that is scattered along one mesh axis after the other leaves a part behind each.
    stages = sum(4 * table // parts for parts in _parts_by_stage(mesh))
    return Memory(
        parameters=frozen + trained,
        optimizer=bytes_per_device(setup.opt_state, setup.opt_shardings),
        gradients=trained + summed,
        activations=rows * kept_bytes(shape, lora, model, length, model.remat),
        layer=int(LAYER_SHARE * rows * kept_bytes(shape, lora, model, length, "none") / shape.num_layers),
        loss=itemsize * table + (4 * table + stages) * head_trains + logits + states,
        gathered=layer_weights * (GATHERED_LAYERS + GATHERED_GRADIENTS * (lora is None) if split else 1),
        embedding=(4 * table * (2 if summed else 1) + stages) * (split and table_trains),
    )


def _parts_by_stage(mesh: Any) -> list[int]:
    """Into how many parts a sum is cut after each mesh axis of `SHARD_AXES` (see `kernels.scatter`)."""
    sizes = [mesh.shape[axis] for axis in SHARD_AXES if mesh.shape[axis] > 1]
    return [math.prod(sizes[: at + 1]) for at in range(len(sizes))]


def resident_bytes(setup: Initializer) -> int:
    """What lies on a device all the time: parameters and the optimizer's state."""
    frozen = 0 if setup.lora is None else bytes_per_device(setup.params, setup.params_shardings)
    trained = bytes_per_device(setup.trainable, setup.trainable_shardings)
    return frozen + trained + bytes_per_device(setup.opt_state, setup.opt_shardings)


def _shard_count(tree: Any, shardings: Any) -> int:
    sizes = jax.tree.map(lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), tree, shardings)
    return sum(jax.tree.leaves(sizes))


def local_shape(shape: DecoderSpec, tensor: int) -> DecoderSpec:
    """The model that one device of a tensor axis computes: its heads, neurons and rows of the vocabulary."""
    if tensor == 1:
        return shape
    moe = shape.experts
    if moe is not None:
        share = max(1, moe.num_experts // tensor)
        moe = dataclasses.replace(moe, num_experts=share, top_k=tuple(min(k, share) for k in moe.top_k), shared=0)
    attention = shape.attention
    local = shape.with_attention(
        num_heads=max(1, attention.num_heads // tensor), num_kv_heads=max(1, attention.num_kv_heads // tensor)
    )
    local = local.with_feed_forward(size=shape.feed_forward.size // tensor, experts=moe)
    return dataclasses.replace(local, vocab_size=-(-shape.vocab_size // tensor))


def kept_bytes(shape: DecoderSpec, lora: LoraConfig | None, model: Decoder, length: int, remat: str) -> int:
    """Bytes a row that the layers' forward passes keep for their backward passes.

    Found by asking JAX for the arrays that `jax.vjp` of the loss keeps: those stacked over layers, of two sizes of
    batch; what does not grow with it are weights.

    Args:
        shape: of the model on one device.
        model: where dtypes, attention and experts' computation stand.
    """
    adapters = tuple(resolve_lora(shape, lora).items()) if lora else ()
    settings = model.dtype, model.param_dtype, model.attention, remat, model.experts, model.router_noise
    return _kept_bytes(shape, adapters, settings, length)


@cache
def _kept_bytes(
    shape: DecoderSpec, adapters: tuple[tuple[str, LoraSpec], ...], settings: tuple[Any, ...], length: int
) -> int:
    # Two batches whose number of rows is not the number of layers, by which stacked arrays are known.
    few, many = [rows for rows in (1, 2, 3, 4) if rows != shape.num_layers][:2]
    local = Decoder(shape, dict(adapters), *settings)

    def kept(rows: int) -> int:
        leaves = jax.tree.leaves(_kept(local, rows, length))
        return sum(
            leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim > 1 and leaf.shape[0] == shape.num_layers
        )

    return (kept(many) - kept(few)) // (many - few)


@cache
def _variables(shape: DecoderSpec, adapters: tuple[tuple[str, LoraSpec], ...], dtypes: tuple[Any, Any]) -> Any:
    return nn.unbox(abstract_variables(Decoder(shape, dict(adapters), *dtypes)))


def _kept(model: Decoder, rows: int, length: int) -> Any:
    variables = _variables(model.config, tuple(model.adapters.items()), (model.dtype, model.param_dtype))
    part = "lora" if "lora" in variables else "params"
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)

    def backward(variables: Any, ids: jax.Array, weights: jax.Array) -> Any:
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
            )
            return out.loss

        return jax.vjp(loss, variables[part])[1]

    return jax.eval_shape(backward, variables, ids, weights)
