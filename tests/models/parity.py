"""A small model of a family, held to transformers' own in float32: every runner's logits, the loss, all gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference.model import unstack
from jaxlm.models import streamed
from jaxlm.models.decoder import Decoder
from jaxlm.models.unrolled import extend, next_logits, prefill, repeat_rows
from jaxlm.spec import DecoderSpec
from tests.models.small import hf_model, small_spec, tree_of

T = 14
# Documents of each row, of which the first are packed; the rest of a row is padding.
ROWS: tuple[tuple[int, ...], ...] = ((T,), (9, 4), (11,))


def random_model(family: str, variant: str, std: float = 0.3, **more: Any) -> tuple[Any, DecoderSpec, dict[str, Any]]:
    """transformers' model with random values in every parameter, its description here, and its parameters here."""
    torch = pytest.importorskip("torch")
    module, spec = hf_model(family, variant, **more), small_spec(family, variant, **more)
    module.get_input_embeddings().padding_idx = None  # a token of the text like any other; torch would not train it
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, std)
    return module, spec, tree_of(dict(module.named_parameters()), spec)


def check_family(family: str, variant: str, experts: str = "dense", **more: Any) -> None:
    """Holds a small model to transformers': rows whole, packed and padded; with caches, also of beams; streamed.

    Args:
        variant: a key of SMALL[family].
        experts: how a layer of experts computes (see `ExpertsFeedForward`).
        more: values of its configuration.
    """
    torch = pytest.importorskip("torch")
    module, spec, params = random_model(family, variant, **more)
    model = Decoder(spec, remat="none", experts=experts)
    rng = np.random.default_rng(3)
    ids = rng.integers(0, spec.vocab_size, (len(ROWS), T)).astype(np.int32)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    expected = np.zeros((*ids.shape, spec.vocab_size), np.float32)
    total = torch.zeros(())
    for row, lengths in enumerate(ROWS):
        at = 0
        for number, length in enumerate(lengths, 1):
            part = slice(at, at := at + length)
            if spec.prefix is not None:  # all but the first token is an answer, as caches take it
                ids[row, part] %= min(spec.prefix.start_id, *spec.prefix.mask_ids)
                ids[row, at - length : at - length + 2] = spec.prefix.mask_ids[0], spec.prefix.start_id
            tokens = torch.from_numpy(ids[row : row + 1, part]).long()
            logits = module(tokens, use_cache=False).logits
            expected[row, part] = logits[0].detach().numpy()
            segments[row, part], positions[row, part] = number, np.arange(length)
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
    total.backward()
    is_text = segments > 0
    assert 0.5 < np.abs(expected).max() < 1e3  # else the tolerances say little
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    weights = (is_text & (positions > 0)).astype(np.float32)  # a document's first token is not predicted
    inputs = dict(positions=positions, segment_ids=segments)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        value = model.apply({"params": params}, ids, weights, **inputs, method="loss").loss
        return value, model.apply({"params": params}, ids, **inputs)

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(logits[is_text], expected[is_text])
    np.testing.assert_allclose(value, total.item(), rtol=2e-5)
    wanted = tree_of({name: parameter.grad for name, parameter in module.named_parameters()}, spec)
    # A bias of k adds the same to all scores of a query, so its gradient is 0 but for rounding.
    rounding = 1e-6 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    pairs = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True)
    for (path, found), leaf in pairs:
        atol = max(1e-3 * np.abs(leaf).max(), rounding)
        np.testing.assert_allclose(found, leaf, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    by_layer = unstack({"params": params}, spec)
    step = jax.jit(functools.partial(next_logits, model))
    _check_caches(model, by_layer, step, ids, expected)
    _check_greedy(module, model, by_layer, step, ids[[0, 2], :5])
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in _leaves(params)}
    found = streamed.logits(spec, lambda path, index: by_path[path][index], ids[:1])
    assert_close(found, expected[:1])


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return list(jax.tree_util.tree_leaves_with_path(tree))


def _check_caches(model: Decoder, weights: Any, step: Any, ids: np.ndarray, expected: np.ndarray) -> None:
    """Row 0 whole and the text of row 2, read in two parts, then token by token in two rows each, as beams are."""
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    rows = np.array([0, 2])
    first, caches = prefill(model, weights, jnp.asarray(ids[rows, :5]), jnp.array([5, 3]), 16)
    assert_close(first, expected[rows, [4, 2]])
    rest = np.stack([ids[0, 5:9], ids[2, 3:7]])
    then, caches = extend(model, weights, caches, jnp.asarray(rest), jnp.array([5, 3]), jnp.array([4, 4]))
    assert_close(then, expected[rows, [8, 6]])
    caches, rows = repeat_rows(caches, 2), np.repeat(rows, 2)
    for more in range(3):
        at = np.array([9, 9, 7, 7]) + more
        logits, caches = step(weights, caches, jnp.asarray(ids[rows, at]), jnp.asarray(at))
        assert_close(logits, expected[rows, at])


def _check_greedy(module: Any, model: Decoder, weights: Any, step: Any, prompts: np.ndarray, new: int = 8) -> None:
    """The tokens that transformers' own loop with caches gives for prompts [2, n]."""
    torch = pytest.importorskip("torch")
    tokens = torch.from_numpy(prompts).long()
    options = dict(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, bos_token_id=None)
    length = prompts.shape[1]
    with torch.no_grad():
        wanted = module.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, length:].numpy()
    logits, caches = prefill(model, weights, jnp.asarray(prompts), jnp.array([length, length]), 16)
    caches = repeat_rows(caches, 2)  # the shapes that `step` is compiled for
    found = [np.repeat(logits.argmax(-1), 2)]
    while len(found) < new:
        logits, caches = step(weights, caches, jnp.asarray(found[-1]), jnp.full(4, length + len(found) - 1))
        found.append(np.asarray(logits.argmax(-1)))
    np.testing.assert_array_equal(np.stack(found, axis=1), np.repeat(wanted, 2, axis=0))
