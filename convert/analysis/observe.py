"""A model seen from inside: its feed-forward layers on a sample, one layer's weights in memory at a time.

Everything is float32. Shapes: N tokens of a chunk, D model, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import flax.struct
import jax
from rich.console import Console

from convert.analysis.sample import Sample
from jaxlm.models.decoder import Angles, Block
from jaxlm.models.streamed import Tokens, embedded, run_layers
from jaxlm.nn.feed_forward import ACTIVATIONS
from jaxlm.screen import Bars
from jaxlm.weights.leaves import ParamSource

Found = TypeVar("Found")


@flax.struct.dataclass
class Observed:
    """What a feed-forward layer sees.

    Attributes:
        x: [N, D], its input, which is normed.
        h: [N, F], activation(gate) * up.
        modality: [N] int32, -1 where there is no token.
    """

    x: jax.Array
    h: jax.Array
    modality: jax.Array


def hidden(mlp: Any, x: jax.Array, activation: str) -> jax.Array:
    """activation(gate) * up, [N, F], of inputs [N, D]."""
    gate, up = (_linear(mlp[name], x) for name in ("gate_proj", "up_proj"))
    return ACTIVATIONS[activation](gate) * up


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
    chunks = [
        Tokens(*(array[number] for array in (sample.input_ids, sample.positions, sample.segment_ids, sample.modality)))
        for number in range(len(sample.input_ids))
    ]

    def step(
        block: Block, params: Any, x: jax.Array, number: jax.Array, angles: Angles, tokens: Tokens
    ) -> tuple[jax.Array, Found]:
        variables = {"params": params}
        middle, normed, _ = cast(Any, block.apply(variables, x, number, angles, tokens.segment_ids, method="attend"))
        flat = normed.reshape(-1, normed.shape[-1])
        modality = cast(jax.Array, tokens.modality).reshape(-1)
        out, found = run(params["mlp"], Observed(flat, hidden(params["mlp"], flat, activation), modality))
        after = cast(jax.Array, block.apply(variables, middle, out.reshape(x.shape), method="add_feed_forward"))
        return after, found

    spec = source.config
    activation = spec.feed_forward.activation
    states = embedded(spec, source.read, chunks)
    with Bars(console=Console(stderr=True)) as progress:
        layers = run_layers(spec, source.read, chunks, states, step)
        for number, params, found in progress.track(layers, total=spec.num_layers, description=description):
            yield number, params["mlp"], found
