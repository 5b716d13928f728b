"""Greedy answers to a few prompts from a model as training has it: layers in stacks, on the mesh of the run.

A layer is copied out of its stack when it is used, so a look at the model takes no more memory than a layer and the
caches; a generator keeps its layers apart, which a run that fills its devices has no room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.devices.mesh import use_mesh
from jaxlm.inference.model import layer_at, layer_places
from jaxlm.inference.rows import bucket, divisible, fetch
from jaxlm.models.decoder import Decoder
from jaxlm.models.encoder_decoder import read_sources
from jaxlm.models.unrolled import Weights, extend, prefill
from jaxlm.sharding import RULES


@jax.tree_util.register_pytree_node_class
class _Layers:
    """The layers of a collection one after the other, each a copy that lives as long as it is used.

    A tree of the stacks, so that compiled programs take it too, and slice the stacks in themselves.
    """

    def __init__(self, collection: Any, places: tuple[tuple[str, int], ...]) -> None:
        self._stacks = {name: collection[name] for name in ("layers", "tail") if name in collection}
        self._places = places

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self._stacks,), self._places

    @classmethod
    def tree_unflatten(cls, places: Any, stacks: Any) -> _Layers:
        return cls(stacks[0], places)

    def __iter__(self) -> Iterator[Any]:
        return (_copied(self._stacks, path, np.int32(index)) for path, index in self._places)


_copied = jax.jit(layer_at, static_argnums=1)


def stacked_weights(model: Decoder, variables: Any) -> Weights:
    """The variables of a model with stacked layers for the unrolled runner: no copy of them all is made.

    Inside of a compiled loop every layer is sliced at every token, which a generator's separate layers save.
    """
    params, places = variables["params"], tuple(layer_places(model.spec))
    top = {name: tree for name, tree in params.items() if name not in ("layers", "tail")}
    weights: Weights = {
        "params": {**top, "layers": _Layers(params, places)},
        "lora": _Layers(variables.get("lora", {}), places),
    }
    if model.spec.encoder is not None:
        weights["encoder_lora"] = variables.get("lora", {}).get("encoder", {})
    return weights


def greedy_answers(
    model: Decoder,
    variables: Any,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """New tokens for each prompt, without the stop token.

    Args:
        model: the model; texts of at most its spec's max_length tokens are generated.
        variables: what `Decoder.apply` takes.
        mesh: where the variables are.
        prompts: token ids, each at least one and fewer than max_length.
        max_tokens: most tokens of an answer.
        stop_ids: tokens that end an answer.
    """
    rows = divisible(len(prompts), mesh)
    lengths = np.array([*map(len, prompts), *[1] * (rows - len(prompts))], np.int32)
    tokens = np.zeros((rows, bucket(int(lengths.max()))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    weights = stacked_weights(model, variables)
    answers: list[list[int]] = [[] for _ in range(rows)]
    read, placed = prefill, (jnp.asarray(tokens), jnp.asarray(lengths))
    if model.spec.encoder is not None:
        read, lengths = read_sources, np.ones_like(lengths)  # the decoder's text begins with one token
    limits = np.minimum(lengths + max_tokens, model.spec.max_length)
    running = lengths < limits
    running[len(prompts) :] = False
    # One new token cannot be divided over the mesh axis `sequence`.
    rules = [("length", None) if name == "length" else (name, axes) for name, axes in RULES]
    with use_mesh(mesh), nn.logical_axis_rules(rules):
        slots = max(bucket(int(lengths.max())), bucket(int(limits.max())))
        logits, caches = read(model, weights, *placed, slots)
        while True:
            best = fetch(jnp.argmax(logits, axis=-1), mesh).astype(np.int32)
            running &= ~np.isin(best, list(stop_ids))
            for row in np.flatnonzero(running).tolist():
                answers[row].append(int(best[row]))
            starts = np.minimum(lengths, slots - 1)
            lengths = lengths + running
            running &= lengths < limits
            if not running.any():
                return answers[: len(prompts)]
            if model.spec.switch_length is not None and (running & (lengths == model.spec.switch_length + 1)).any():
                # Longer texts are turned by other factors from their first token on: all are read again.
                tokens = np.zeros((rows, bucket(int(lengths.max()))), np.int32)
                for row, prompt in enumerate(prompts):
                    tokens[row, : lengths[row]] = [*prompt, *answers[row]]
                logits, caches = prefill(model, weights, jnp.asarray(tokens), jnp.asarray(lengths), slots)
                continue
            logits, caches = extend(
                model, weights, caches, jnp.asarray(best[:, None]), jnp.asarray(starts), jnp.ones(rows, jnp.int32)
            )
