"""The model against itself: packing, remat, attention forms, precision, loss."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.decoder import Decoder
from jaxlm.spec import uniform_decoder
from tests.models.compare import assert_trees_close, random_tree

CONFIG = uniform_decoder(
    "llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    window=9,
    qkv_bias=True,
)
RNG = np.random.default_rng(0)
T = 20
IDS = RNG.integers(0, 64, (2, T)).astype(np.int32)
SEGMENTS = np.stack([np.repeat([1, 2], [8, 12]), np.repeat([1, 2, 0], [12, 1, 7])]).astype(np.int32)
POSITIONS = np.stack([np.r_[0:8, 0:12], np.r_[0:12, 0:1, 0:7]]).astype(np.int32)
WEIGHTS = (RNG.random((2, T)) * (SEGMENTS > 0)).astype(np.float32)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), IDS)
    tree = random_tree(nn.unbox(shapes)["params"], 1)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + (path[-1].key == "scale"), tree)


@functools.cache
def step(**options: Any) -> Any:
    model = Decoder(CONFIG, **options)
    return jax.jit(
        jax.value_and_grad(
            lambda p: (
                model.apply({"params": p}, IDS, WEIGHTS, positions=POSITIONS, segment_ids=SEGMENTS, method="loss").loss
            )
        )
    )


@pytest.mark.parametrize("lengths", [(8, 12), (70, 75)])
def test_packed_documents_are_alone(lengths: tuple[int, int], params: Any) -> None:
    """Each document's logits are those it has in a row of its own, below and above the query block of 128."""
    apply = jax.jit(Decoder(CONFIG).apply)
    documents = [RNG.integers(0, 64, (2, n)).astype(np.int32) for n in lengths]
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(2, 0)
    segments = np.repeat([1, 2], lengths)[None].repeat(2, 0)
    packed = apply({"params": params}, np.concatenate(documents, 1), positions, segments)
    alone = np.concatenate([apply({"params": params}, d) for d in documents], 1)
    np.testing.assert_allclose(packed, alone, rtol=0, atol=2e-5)
    mixed = apply({"params": params}, np.concatenate(documents, 1), positions)
    assert np.abs(mixed[:, lengths[0] :] - alone[:, lengths[0] :]).max() > 0.1


def test_loss_is_that_of_the_logits(params: Any) -> None:
    """weights[:, t] weighs the prediction of token t from the logits at t - 1; the first has none."""
    model = Decoder(CONFIG)
    arguments = dict(positions=POSITIONS, segment_ids=SEGMENTS)
    logits = jax.jit(model.apply)({"params": params}, IDS, **arguments)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = hits = 0.0
    for b in range(2):
        for t in range(1, T):
            expected -= WEIGHTS[b, t] * log_probs[b, t - 1, IDS[b, t]]
            hits += float(WEIGHTS[b, t] > 0 and log_probs[b, t - 1].argmax() == IDS[b, t])
    out = jax.jit(lambda w: model.apply({"params": params}, IDS, w, **arguments, accuracy=True, method="loss"))
    found = out(WEIGHTS)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    assert found.correct == hits
    first = WEIGHTS.copy()
    first[:, 0] = 100.0
    assert out(first).loss == found.loss


@pytest.mark.parametrize(
    "options",
    [dict(remat="none"), dict(remat="dots"), dict(remat="qkv_out"), dict(remat="qkv"), dict(attention="reference")],
)
def test_same_loss_and_gradients_however_computed(options: dict[str, str], params: Any) -> None:
    expected_loss, expected = step()(params)  # remat full, blocked attention
    loss, grads = step(**options)(params)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_trees_close(grads, expected, 1e-5)


def test_remat_policies_store_what_they_say(params: Any) -> None:
    """Bytes kept from the forward for the backward pass: full < qkv < qkv_out < dots < none."""

    def kept(remat: str) -> int:
        model = Decoder(CONFIG, remat=remat)

        def loss(p: Any) -> Any:
            return model.apply({"params": p}, IDS, WEIGHTS, method="loss").loss

        _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    sizes = [kept(remat) for remat in ("full", "qkv", "qkv_out", "dots", "none")]
    assert sizes == sorted(set(sizes)), sizes


def test_bfloat16_stays_near(params: Any) -> None:
    """bfloat16 rounds to 2^-9 relative. Three layers of about ten roundings each: the loss stays within 1 %, a
    gradient within 10 % of its leaf's largest value, and the residual path does not drift further."""
    expected_loss, expected = step()(params)
    loss, grads = step(dtype=jnp.bfloat16)(params)
    assert loss.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(loss, expected_loss, rtol=0.01)
    assert_trees_close(grads, expected, 0.1)
    assert abs(loss - expected_loss) > 0  # it does compute in bfloat16


def test_bfloat16_parameters(params: Any) -> None:
    halved = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    expected_loss, expected = step()(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halved))
    loss, grads = step(param_dtype=jnp.bfloat16)(halved)
    # float32 compute on bfloat16 weights: the same numbers, gradients rounded at the end.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))
    assert_trees_close(grads, expected, 2**-8)


def test_unknown_token_is_not_a_silent_row(params: Any) -> None:
    """An id beyond the vocabulary gives NaN, not some other token's row."""
    out = jax.jit(Decoder(CONFIG).apply)({"params": params}, np.full((1, 4), 64, np.int32))
    assert np.isnan(np.asarray(out)).all()
