"""Embeddings of a server: those of a loaded model, by programs that are there before anybody asks."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.inference.embedding import Embedder, padded_lengths
from jaxlm.models.decoder import Decoder
from tests.inference.test_generation import CONFIG, generator, params


@pytest.mark.parametrize(
    ("longest", "lengths"), [(20, [20]), (64, [64]), (65, [64, 65]), (2048, [64, 256, 1024, 2048])]
)
def test_a_few_lengths_have_programs(longest: int, lengths: list[int]) -> None:
    assert padded_lengths(longest) == lengths


def test_embeddings_are_means_of_hidden_states_and_compile_nothing() -> None:
    decoder, tree = Decoder(CONFIG), params()
    embed, compiled = Embedder(generator(decoder, tree), 100), list[str]()
    embed.wait()

    def listen(name: str, *_: Any, **__: Any) -> None:
        if "compile" in name:
            compiled.append(name)

    texts = [[(7 * place) % 90 for place in range(size)] for size in (3, 100, 5, 64, 1, 2, 65)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    found = embed(texts)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    forward = jax.jit(lambda ids: decoder.apply({"params": tree}, ids, method="hidden")[0])
    for ids, vector in zip(texts, found, strict=True):
        padded = np.array([ids + [0] * (100 - len(ids))])
        states = np.asarray(forward(padded))[0, : len(ids)]
        np.testing.assert_allclose(vector, states.mean(axis=0), rtol=1e-4, atol=1e-5)
