"""Samples at the end of a run: what the scanned model finds most likely, token by token, whatever the mesh."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh, tree_shardings
from jaxlm.inference.samples import greedy_answers
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec

LAYER = LayerSpec(AttentionSpec(4, 4, 8), FeedForwardSpec(32))
SPEC = DecoderSpec("llama", 64, 32, 3, (LAYER,), max_position_embeddings=24)
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


def setup(**options: Any) -> tuple[Decoder, Any, Any]:
    model = Decoder(SPEC, **options)
    boxed = abstract_variables(model)
    rng = np.random.default_rng(0)
    shapes = nn.unbox(boxed)
    leaves, tree = jax.tree.flatten(shapes)
    return model, boxed, jax.tree.unflatten(tree, [rng.normal(0, 0.4, x.shape).astype(np.float32) for x in leaves])


def expected(model: Decoder, variables: Any, prompt: list[int], max_tokens: int, stops: set[int]) -> list[int]:
    """The whole row again for each token."""
    row = list(prompt)
    while len(row) < min(len(prompt) + max_tokens, SPEC.max_length):
        padded = np.zeros((1, SPEC.max_length), np.int32)
        padded[0, : len(row)] = row
        best = int(jnp.argmax(model.apply(variables, padded)[0, len(row) - 1]))
        if best in stops:
            break
        row.append(best)
    return row[len(prompt) :]


@pytest.mark.parametrize("adapted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_samples_are_the_scanned_models_most_likely_tokens(adapted: bool) -> None:
    adapters = {"q_proj": LoraSpec((2, 1, 0), (1.0, 2.0, 0.0), 0.1, False)} if adapted else {}
    model, _, variables = setup(adapters=adapters)
    free = [expected(model, variables, prompt, 6, set()) for prompt in PROMPTS]
    assert [len(answer) for answer in free] == [6, 6, 4]  # the last is at the end of the context
    stop = free[1][3]
    stopped = [expected(model, variables, prompt, 6, {stop}) for prompt in PROMPTS]
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    assert greedy_answers(model, variables, mesh, PROMPTS, 6, []) == free
    assert greedy_answers(model, variables, mesh, PROMPTS, 6, [stop]) == stopped
    assert stopped != free


@pytest.mark.parametrize(
    "axes", [dict(data=2, fsdp=2, tensor=2), pytest.param(dict(fsdp=2, sequence=2, tensor=2), marks=pytest.mark.slow)]
)
def test_samples_are_the_same_on_a_mesh(axes: dict[str, int]) -> None:
    model, boxed, variables = setup()
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:8])
    placed = jax.device_put(variables, tree_shardings(boxed, mesh))
    free = [expected(model, variables, prompt, 6, set()) for prompt in PROMPTS]
    assert greedy_answers(model, placed, mesh, PROMPTS, 6, []) == free
