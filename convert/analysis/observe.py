"""A model seen from inside: its feed-forward layers on a sample, one layer's weights in memory at a time.

Everything is float32. Shapes: N tokens of a chunk, D model, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from convert.analysis.probe import layer_params
from convert.analysis.sample import Sample
from jaxlm.models.decoder import Block
from jaxlm.nn.attention import MaskSpec
from jaxlm.nn.positions import rope_cos_sin
from jaxlm.spec import DecoderSpec
from jaxlm.weights.leaves import ParamSource

Found = TypeVar("Found")


@flax.struct.dataclass
class Observed:
    """What a feed-forward layer sees.

    Attributes:
        x: [N, D], its input, which is normed.
        h: [N, F], silu(gate) * up.
        modality: [N] int32, -1 where there is no token.
    """

    x: jax.Array
    h: jax.Array
    modality: jax.Array


def hidden(mlp: Any, x: jax.Array) -> jax.Array:
    """silu(gate) * up, [N, F], of inputs [N, D]."""
    gate, up = (_linear(mlp[name], x) for name in ("gate_proj", "up_proj"))
    return jax.nn.silu(gate) * up


def down(mlp: Any, h: jax.Array) -> jax.Array:
    """The layer's output [N, D] from its neurons [N, F]."""
    return _linear(mlp["down_proj"], h)


def _linear(part: Any, x: jax.Array) -> jax.Array:
    y = x @ part["kernel"]
    return y + part["bias"] if "bias" in part else y


def by_expert(h: jax.Array, experts: int) -> jax.Array:
    """Neurons [N, F] -> [N, E, F / E]."""
    return h.reshape(len(h), experts, -1)


def masked(h: jax.Array, weights: jax.Array) -> jax.Array:
    """Neurons [N, F] times the weight of their expert [N, E]."""
    return (by_expert(h, weights.shape[1]) * weights[..., None]).reshape(h.shape)


def walk(
    source: ParamSource,
    sample: Sample,
    run: Callable[[Any, Observed], tuple[jax.Array, Found]],
    description: str,
) -> Iterator[tuple[int, Any, list[Found]]]:
    """Goes through a model of experts layer by layer.

    Args:
        run: (the layer's `mlp` parameters, what it sees) -> (its output [N, D], anything else); compiled once. The
            output is what goes on to the next layer.
        description: for the progress bar.

    Yields:
        the layer, its `mlp` parameters on the device, and what `run` found in each chunk.
    """
    config = source.config

    @jax.jit
    def step(
        params: Any, x: jax.Array, segments: jax.Array, positions: jax.Array, modality: jax.Array
    ) -> tuple[jax.Array, Found]:
        middle, normed = _until_feed_forward(config, params, x, segments, positions)
        flat = normed.reshape(-1, config.hidden_size)
        out, found = run(params["mlp"], Observed(flat, hidden(params["mlp"], flat), modality.reshape(-1)))
        return middle + out.reshape(x.shape), found

    states = _embedded(source, sample.input_ids)
    with Progress(console=Console(stderr=True)) as progress:
        for layer in progress.track(range(config.num_layers), description=description):
            # On the device as a whole: numpy's would be copied there again for every chunk.
            params = jax.device_put(layer_params(source, layer))
            every = []
            for number, x in enumerate(states):
                part = (array[number] for array in (sample.segment_ids, sample.positions, sample.modality))
                # "highest": a GPU or TPU would otherwise round products to fewer digits.
                with jax.default_matmul_precision("highest"):
                    after, found = step(params, x, *part)
                states[number] = np.asarray(after)
                every.append(found)
            yield layer, params["mlp"], every


def _until_feed_forward(
    config: DecoderSpec, params: Any, x: jax.Array, segments: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The residual stream [B, T, D] before a layer's feed-forward, and that normed, as the feed-forward sees it."""
    cos, sin = rope_cos_sin(config, positions)
    # As a dense layer, whose feed-forward is not looked at, and so not computed.
    block = Block(config.with_experts(None), {}, jnp.float32, jnp.float32, "xla", True)
    dense = {**params, "mlp": {name: part for name, part in params["mlp"].items() if name != "router"}}
    mask = MaskSpec(segment_ids=segments, window=config.attention.window)
    _, kept = block.apply(
        {"params": dense},
        x,
        jnp.int32(0),
        cos,
        sin,
        mask,
        capture_intermediates=lambda module, _: module.name in ("o_proj", "post_attention_layernorm"),
    )
    seen: Any = kept["intermediates"]
    attended, normed = seen["self_attn"]["o_proj"]["__call__"][0], seen["post_attention_layernorm"]["__call__"][0]
    return x + attended, normed


def _embedded(source: ParamSource, input_ids: np.ndarray) -> list[np.ndarray]:
    """The rows of the embedding [B, T, D] for each chunk of tokens [chunks, B, T]."""
    known, place = np.unique(input_ids, return_inverse=True)
    table = np.concatenate([source.read("embed_tokens/embedding", (slice(i, i + 1),)) for i in known])
    return list(table.astype(np.float32)[place.reshape(input_ids.shape)])
