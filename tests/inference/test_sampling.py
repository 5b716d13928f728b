"""What is drawn: filters against transformers' logits processors, seeds, and frequencies."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.options import check_decoding
from jaxlm.inference.sampling import LEADING, Method, Settings, choose, filtered, leading, penalize, row_keys

VOCAB = 200


def logits_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def spread(scores: Any, ids: Any) -> np.ndarray:
    """Filtered scores in the order of the vocabulary."""
    if ids is None:
        return np.asarray(scores)
    full = np.full((len(scores), VOCAB), -np.inf, np.float32)
    np.put_along_axis(full, np.asarray(ids), np.asarray(scores), axis=1)
    return full


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 13, "temperature": 1.7},
        {"top_k": 70},
        {"top_k": 1000},
        {"top_p": 0.75},
        {"top_p": 0.01},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.1, "top_k": 40, "top_p": 0.75},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    decoding = Decoding(**({"temperature": 1.0} | options))
    logits = logits_of(20)
    (candidates,) = Method.of(decoding, VOCAB).draws
    found = spread(*filtered(jnp.asarray(logits), Settings.of(decoding, 20, VOCAB), candidates))

    warpers = [transformers.TemperatureLogitsWarper(decoding.temperature)]
    if decoding.top_k:
        warpers.append(transformers.TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        warpers.append(transformers.MinPLogitsWarper(decoding.min_p))
    expected = transformers.LogitsProcessorList(warpers)(None, torch.from_numpy(logits.copy())).numpy()
    assert (np.isfinite(found) == np.isfinite(expected)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_penalties_are_those_of_transformers(size: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(size)
    lengths = np.array([1, 2, 3, 7, 30, 40], np.int32)
    tokens = rng.integers(0, 3, (6, 40)).astype(np.int32)  # few kinds, so that n-grams repeat; garbage behind `lengths`
    logits = logits_of(6, size)
    seen = np.zeros((6, VOCAB), bool)
    for row, length in enumerate(lengths):
        seen[row, tokens[row, :length]] = True
    decoding = Decoding(repetition_penalty=1.4, no_repeat_ngram_size=size)
    found = penalize(
        jnp.asarray(logits),
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.asarray(seen),
        Settings.of(decoding, 6, VOCAB),
        Method.of(decoding, VOCAB),
    )
    processors = transformers.LogitsProcessorList(
        [transformers.RepetitionPenaltyLogitsProcessor(1.4), transformers.NoRepeatNGramLogitsProcessor(size)]
    )
    banned = 0
    for row, length in enumerate(lengths):
        text = torch.from_numpy(tokens[row : row + 1, :length].astype(np.int64))
        expected = processors(text, torch.from_numpy(logits[row : row + 1].copy())).numpy()[0]
        np.testing.assert_allclose(found[row], expected, rtol=1e-6)
        banned += np.isinf(expected).sum()
    assert banned, "the n-grams should have repeated"


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_p": 0.5, "min_p": 0.2}, {"top_k": 20, "top_p": 0.8}], ids=str
)
@pytest.mark.parametrize("kind", ["normal", "ties", "flat"])
def test_the_best_tokens_alone_give_what_sorting_all_gives(options: dict[str, Any], kind: str) -> None:
    """The same tokens with the same scores, wherever the best ones are said to be enough."""
    rows, candidates = 400, 32
    logits = logits_of(rows, 3)
    logits = {"normal": logits, "ties": np.round(logits), "flat": logits / 100}[kind]
    settings = Settings.of(Decoding(temperature=0.8, **options), rows, VOCAB)
    scores, ids, is_certain = map(np.asarray, leading(jnp.asarray(logits), settings, candidates))
    all_scores, all_ids = map(np.asarray, filtered(jnp.asarray(logits), settings, VOCAB))
    is_left = np.isfinite(all_scores)
    np.testing.assert_array_equal(ids[is_certain], all_ids[is_certain, :candidates])
    np.testing.assert_array_equal(scores[is_certain], all_scores[is_certain, :candidates])
    assert not is_left[is_certain, candidates:].any()
    share = is_certain.mean()
    assert share == 0 if kind == "flat" and "top_k" not in options else share > 0.5


def test_a_nucleus_is_drawn_from_alike_however_large_it_is() -> None:
    """In one batch whose rows have few tokens, and in one where some row has many: the other way of finding them."""
    rng = np.random.default_rng(4)
    size = 4 * LEADING
    peaked = np.cumsum(-rng.exponential(0.1, (40, size)), axis=1).astype(np.float32)
    peaked = rng.permuted(np.round(peaked, 1), axis=1)  # with ties
    decoding = Decoding(temperature=1.0, top_p=0.9)
    draw = partial(jax.jit(choose, static_argnums=4), method=Method.of(decoding, size))

    def drawn(logits: np.ndarray) -> np.ndarray:
        rows = len(logits)
        settings = Settings.of(decoding, rows, size)
        return np.asarray(draw(logits, row_keys(1, range(rows), 1), np.full(rows, 3, np.int32), settings))

    flat = np.zeros((1, size), np.float32)
    few, many = drawn(peaked), drawn(np.concatenate([peaked, flat]))
    np.testing.assert_array_equal(few, many[:-1])
    settings = Settings.of(decoding, 41, size)
    is_certain = np.asarray(leading(jnp.concatenate([peaked, flat]), settings, LEADING)[2])
    assert is_certain[:-1].all() and not is_certain[-1]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    rows = 20_000
    for options, expected in (
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
    ):
        decoding = Decoding(temperature=1.0, **options)  # type: ignore[arg-type]
        drawn = choose(
            jnp.broadcast_to(logits, (rows, 4)),
            jnp.asarray(row_keys(7, range(rows), 1)),
            jnp.zeros(rows, jnp.int32),
            Settings.of(decoding, rows, 4),
            Method.of(decoding, 4),
        )
        found = np.bincount(np.asarray(drawn), minlength=4) / rows
        np.testing.assert_allclose(found, expected, atol=4 * 0.5 / rows**0.5)


def test_keys_differ_by_seed_prompt_sample_and_step() -> None:
    keys = np.concatenate([row_keys(0, [0, 1, 2], 3), row_keys(1, [0, 1, 2], 3)])
    assert len(np.unique(keys, axis=0)) == len(keys)
    assert (row_keys(5, [3], 2) == row_keys(5, [1, 3], 2)[2:]).all()
    decoding = Decoding(temperature=1.0)
    flat = jnp.zeros((1, VOCAB))
    drawn = [
        int(choose(flat, keys[:1], jnp.array([step]), Settings.of(decoding, 1, VOCAB), Method.of(decoding, VOCAB))[0])
        for step in range(8)
    ]
    assert len(set(drawn)) > 4


def test_settings_may_change_without_compiling_anew() -> None:
    assert Method.of(Decoding(temperature=1.0, top_k=3), VOCAB) == Method.of(
        Decoding(temperature=0.2, top_k=60, top_p=0.5, min_p=0.1), VOCAB
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: 1.1"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p: 2.0"),
        ({"top_k": 5}, "top_k: 5 does nothing at temperature 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: -1"),
        ({"num_beams": 4, "temperature": 0.1}, "num_beams: 4 with temperature 0.1"),
        ({"length_penalty": 2.0}, "length_penalty: 2.0 belongs to beam search"),
        ({"samples": 2}, "samples: 2 equal answers"),
        ({"samples": 3, "num_beams": 2}, "samples: 3 answers need at least as many beams"),
        ({"stop": ("",)}, "stop"),
        ({"stop_ids": (-1,)}, "stop_ids"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_decoding(Decoding(**options))
