"""The streamed runner: one layer's weights in memory at a time, in float32, so models of any size pass through.

A layer is read, used and dropped; the hidden states of all chunks of tokens stay in host memory.
Shapes: B rows, T length, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxlm.models.decoder import Angles, Block, Decoder, abstract_layer
from jaxlm.spec import DecoderSpec

# Rows of the output matrix that are multiplied at a time.
HEAD_ROWS = 8192

Result = TypeVar("Result")
# (path such as 'layers/mlp/up_proj/kernel', slices) -> that part of the leaf.
Read = Callable[[str, tuple[slice, ...]], np.ndarray]


@flax.struct.dataclass
class Tokens:
    """A chunk of tokens, each array [B, T] int32, of NumPy or JAX.

    Attributes:
        input_ids: token ids.
        positions: position ids.
        segment_ids: 0 for padding; None: one segment.
        modality: for a model of experts; None: by its ranges of token ids.
    """

    input_ids: Any
    positions: Any
    segment_ids: Any = None
    modality: Any = None


# (the layer, its parameters, x [B, T, D], index, angles, tokens) -> (x after the layer, anything else)
Step = Callable[[Block, Any, jax.Array, jax.Array, Angles, Tokens], tuple[jax.Array, Result]]


def run_layers(
    spec: DecoderSpec, read: Read, chunks: Sequence[Tokens], states: list[np.ndarray], step: Step[Result]
) -> Iterator[tuple[int, Any, list[Result]]]:
    """Goes through a model layer by layer.

    Args:
        read: reads the model's leaves.
        chunks: tokens; chunks of one shape share a compiled program.
        states: what `embedded` gave, [B, T, D] for each chunk; replaced by the hidden states after each layer.
        step: what a layer does, a pure function.

    Yields:
        the layer, its parameters on the device, and what `step` gave beside the hidden states for each chunk.
    """
    decoder = Decoder(spec)

    @partial(jax.jit, static_argnums=0)
    def run(p: int, params: Any, x: jax.Array, number: jax.Array, tokens: Tokens) -> tuple[jax.Array, Result]:
        if tokens.modality is None:
            tokens = dataclasses.replace(tokens, modality=decoder.modality(tokens.input_ids, tokens.segment_ids))
        positions, places, segments = decoder.prefixed(tokens.input_ids, tokens.positions, tokens.segment_ids)
        angles = decoder.angles(positions, places=places)[p]
        tokens = dataclasses.replace(tokens, segment_ids=segments)
        return step(decoder.block(p), params, x, number, angles, tokens)

    for number in range(spec.num_layers):
        # On the device as a whole: numpy's would be copied there again for every chunk.
        params = jax.device_put(layer_params(spec, read, number))
        results = []
        for at, tokens in enumerate(chunks):
            # "highest": a GPU or TPU would otherwise round products to fewer digits.
            with jax.default_matmul_precision("highest"):
                x, result = run(number % len(spec.period), params, jnp.asarray(states[at]), jnp.int32(number), tokens)
            states[at] = np.asarray(x)
            results.append(result)
        yield number, params, results


def logits(spec: DecoderSpec, read: Read, input_ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] float32 of token ids [B, T]."""
    positions = np.broadcast_to(np.arange(input_ids.shape[1], dtype=np.int32), input_ids.shape)

    def step(
        block: Block, params: Any, x: jax.Array, number: jax.Array, angles: Angles, tokens: Tokens
    ) -> tuple[jax.Array, None]:
        after, _ = cast(Any, block.apply({"params": params}, x, number, angles, tokens.segment_ids, tokens.modality))
        return after, None

    chunks = [Tokens(input_ids, positions)]
    states = embedded(spec, read, chunks)
    for _ in run_layers(spec, read, chunks, states, step):
        pass
    behind: dict[str, Any] = {"norm": _norm_params(spec, read, "norm")} if spec.final_norm else {}
    if spec.embedding_size is not None:
        behind["project_out"] = _whole(read, "project_out/kernel")
    parts = [_logits_of(spec, behind, rows, states[0]) for rows in _head_rows(spec, read)]
    return np.concatenate(parts, axis=-1)


def layer_params(spec: DecoderSpec, read: Read, number: int) -> dict[str, Any]:
    """The parameters of one layer as `Decoder.block` takes them, in float32."""
    stack = next(stack for stack in spec.stacks if number in stack.numbers)
    index = stack.numbers.index(number)
    leaves = traverse_util.flatten_dict(abstract_layer(Decoder(spec), number)["params"], sep="/")
    tree = {name: read(f"{stack.path}/{name}", (slice(index, index + 1),))[0].astype(np.float32) for name in leaves}
    return traverse_util.unflatten_dict(tree, sep="/")


def _whole(read: Read, path: str) -> dict[str, np.ndarray]:
    """The parameters of a module that has one."""
    return {path.rpartition("/")[2]: read(path, ()).astype(np.float32)}


def _norm_params(spec: DecoderSpec, read: Read, path: str) -> dict[str, np.ndarray]:
    scale = _whole(read, f"{path}/scale") if spec.norm.scale else {}
    return scale | (_whole(read, f"{path}/bias") if spec.norm.bias else {})


def embedded(spec: DecoderSpec, read: Read, chunks: Sequence[Tokens]) -> list[np.ndarray]:
    """What the first layer sees [B, T, D] of each chunk; only the embedding's rows of tokens that occur are read."""
    spec.refuse_encoder("reading a model layer by layer")
    known = np.unique(np.concatenate([chunk.input_ids.ravel() for chunk in chunks]))
    table = np.concatenate([read("embed_tokens/embedding", (slice(i, i + 1),)) for i in known]).astype(np.float32)
    part = Decoder(dataclasses.replace(spec, vocab_size=len(known)))
    params = {"embed_tokens": {"embedding": table}}
    if spec.embedding_size is not None:
        params["project_in"] = _whole(read, "project_in/kernel")
    if spec.learned_positions is not None:
        params["embed_positions"] = _whole(read, "embed_positions/embedding")
    if spec.embedding_norm:
        params["embed_norm"] = _norm_params(spec, read, "embed_norm")
    apply = partial(part.apply, {"params": params}, method="embed")
    return [np.asarray(apply(np.searchsorted(known, chunk.input_ids), chunk.positions)) for chunk in chunks]


def _logits_of(spec: DecoderSpec, behind: Any, rows: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Logits [B, T, n] float32 for n rows of the output matrix, of what the last layer gives.

    Args:
        behind: parameters between the last layer and the output matrix.
    """
    part = Decoder(dataclasses.replace(spec, vocab_size=len(rows), tied_head=False))
    with jax.default_matmul_precision("highest"):
        return np.asarray(part.apply({"params": {**behind, "lm_head": {"kernel": rows}}}, hidden, method="head"))


def _head_rows(spec: DecoderSpec, read: Read) -> Iterator[np.ndarray]:
    path = "embed_tokens/embedding" if spec.tied_head else "lm_head/kernel"
    for start in range(0, spec.vocab_size, HEAD_ROWS):
        yield read(path, (slice(start, min(start + HEAD_ROWS, spec.vocab_size)),)).astype(np.float32)
