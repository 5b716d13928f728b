"""Preference losses: their formulae against PyTorch, their sums over packed rows against each text by itself."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import PreferenceConfig
from jaxlm.models.decoder import Decoder
from jaxlm.spec import uniform_decoder
from jaxlm.training.objectives.preference import REFERENCE, Pairs, Preference, kto_losses, pair_losses
from jaxlm.training.objectives.reward import Reward
from jaxlm.training.objectives.sequences import apart

SHAPE = uniform_decoder(
    "llama", vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
MODEL = Decoder(SHAPE, {}, jnp.float32, jnp.float32, "reference", "none")
# Prompt, chosen and rejected answer of each pair, and the row that it lies in.
LENGTHS = [((3, 4, 2), 0), ((1, 2, 6), 0), ((5, 3, 3), 1)]
T = 32

LOSSES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "simpo", "orpo")


@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_are_those_of_the_formula_in_pytorch(loss: str) -> None:
    """TRL 1.16 trainer/dpo_trainer.py, lines 1387-1510; experimental/cpo and orpo for the last two."""
    torch = pytest.importorskip("torch")
    log_sigmoid, sigmoid = torch.nn.functional.logsigmoid, torch.sigmoid
    smoothing = 0.2 if loss in ("sigmoid", "robust") else 0.0
    settings, b, e, gamma = PreferenceConfig(loss=loss, beta=0.3, label_smoothing=smoothing), 0.3, smoothing, 0.5
    rng = np.random.default_rng(0)
    c, r = (-rng.uniform(0.5, 30, 6).astype(np.float32) for _ in range(2))
    m, n = (rng.integers(1, 9, 6).astype(np.float32) for _ in range(2))
    tc, tr = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (c, r))
    tm, tn = torch.tensor(m), torch.tensor(n)
    delta, by_token = tc - tr, tc / tm - tr / tn
    expected = {
        "sigmoid": lambda: -(1 - e) * log_sigmoid(b * delta) - e * log_sigmoid(-b * delta),
        "robust": lambda: (-(1 - e) * log_sigmoid(b * delta) + e * log_sigmoid(-b * delta)) / (1 - 2 * e),
        "ipo": lambda: (by_token - 1 / (2 * b)) ** 2,
        "hinge": lambda: torch.relu(1 - b * delta),
        "sigmoid_norm": lambda: -log_sigmoid(b * by_token),
        "apo_zero": lambda: 1 - sigmoid(b * tc) + sigmoid(b * tr),
        "simpo": lambda: -log_sigmoid(b * (by_token - gamma / b)),
        "orpo": lambda: (
            -b * log_sigmoid(by_token - (torch.log1p(-torch.exp(tc / tm)) - torch.log1p(-torch.exp(tr / tn))))
        ),
    }[loss]()
    expected.sum().backward()

    def value(c: Any, r: Any) -> Any:
        return pair_losses(settings, Pairs(c, r, jnp.asarray(m), jnp.asarray(n)))

    np.testing.assert_allclose(value(c, r), expected.detach().numpy(), rtol=2e-6, atol=1e-7)
    for mine, theirs in zip(jax.grad(lambda *x: value(*x).sum(), (0, 1))(c, r), (tc.grad, tr.grad), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5, atol=1e-7)


def test_kto_is_its_formula_in_pytorch() -> None:
    """TRL 1.16 trainer/kto_trainer.py."""
    torch = pytest.importorskip("torch")
    ratios, kl = np.array([0.5, -2.0, 3.0, 0.1], np.float32), 0.4
    wanted = np.array([True, True, False, False])
    t = torch.tensor(ratios, requires_grad=True)
    chosen, rejected = 1 - torch.sigmoid(0.2 * (t[:2] - kl)), 1 - torch.sigmoid(0.2 * (kl - t[2:]))
    expected = torch.cat((1.5 * chosen, 0.7 * rejected))
    expected.sum().backward()
    settings = PreferenceConfig(loss="kto", beta=0.2, wanted=1.5, unwanted=0.7)

    def value(x: Any) -> Any:
        return kto_losses(settings, x, jnp.float32(kl), jnp.asarray(wanted))

    np.testing.assert_allclose(value(ratios), expected.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: value(x).sum())(jnp.asarray(ratios)), t.grad.numpy(), rtol=1e-5)


@pytest.fixture(scope="module")
def packed() -> tuple[dict[str, Any], list[list[tuple[np.ndarray, int]]], Any]:
    """A batch [1, 2, T] of packed pairs, the same texts one by one with the length of their prompt, and parameters."""
    rng = np.random.default_rng(0)
    batch = {name: np.zeros((1, 2, T), kind) for name, kind in (("input_ids", np.int32), ("loss_mask", bool))}
    batch["segment_ids"], batch[REFERENCE] = np.zeros((1, 2, T), np.int32), np.zeros((1, 2, T), np.float32)
    ends, documents, pairs = [0, 0], [0, 0], []
    for (prompt, *answers), row in LENGTHS:
        question, texts = rng.integers(1, 48, prompt), []
        documents[row] += 1
        for answer in answers:
            text = np.concatenate([question, rng.integers(1, 48, answer)])
            at = slice(ends[row], ends[row] + len(text))
            batch["input_ids"][0, row, at] = text
            batch["loss_mask"][0, row, at.start + prompt : at.stop] = True
            batch["segment_ids"][0, row, at] = documents[row]
            ends[row] = at.stop
            texts.append((text, prompt))
        pairs.append(texts)
    batch[REFERENCE] = np.where(batch["loss_mask"], rng.uniform(-5, -1, (1, 2, T)), 0).astype(np.float32)
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return {name: jnp.asarray(value) for name, value in batch.items()}, pairs, params


def of_each_text(params: Any, pairs: list[list[tuple[np.ndarray, int]]]) -> jax.Array:
    """Log-probabilities [pairs, 2] of the answers, from the logits of each text in a row of its own."""
    texts = [text for pair in pairs for text in pair]
    ids, trained = np.zeros((len(texts), T), np.int32), np.zeros((len(texts), T), bool)
    for row, (text, prompt) in enumerate(texts):
        ids[row, : len(text)], trained[row, prompt : len(text)] = text, True  # what is behind a text, it does not see
    scores = jax.nn.log_softmax(MODEL.apply({"params": params}, jnp.asarray(ids)))[:, :-1]
    picked = jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1)[..., 0]
    return (picked * trained[:, 1:]).sum(axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("orpo", marks=pytest.mark.slow)])
def test_packed_pairs_have_the_loss_and_the_gradient_of_each_text_by_itself(packed: Any, loss: str) -> None:
    import flax.linen as nn

    batch, pairs, boxed = packed
    params = nn.unbox(boxed)
    settings = PreferenceConfig(loss=loss, sft=0.5)
    objective = Preference(MODEL, settings=settings)
    sizes = jnp.asarray([answers for (_, *answers), _ in LENGTHS], jnp.float32)
    # Each text's reference, in the order of the pairs: the texts of a row stand one behind the other.
    runs = [
        list(group)
        for key, group in itertools.groupby(
            [
                (bool(m), float(v))
                for row in (0, 1)
                for m, v in zip(batch["loss_mask"][0, row], batch[REFERENCE][0, row], strict=True)
            ],
            key=lambda pair: pair[0],
        )
        if key
    ]
    reference = jnp.asarray([sum(value for _, value in run) for run in runs]).reshape(-1, 2)

    def plain(params: Any) -> Any:
        sums = of_each_text(params, pairs)
        used = sums - reference if settings.needs_reference else sums
        columns = used[:, 0], used[:, 1], sizes[:, 0], sizes[:, 1]
        return pair_losses(settings, Pairs(*columns)).mean() - 0.5 * sums[:, 0].sum() / sizes[:, 0].sum(), sums

    def fused(params: Any) -> Any:
        micro = {name: value[0] for name, value in objective.prepare(batch).items()}
        share = objective.loss({"params": params}, {}, micro, jax.random.key(0), 1)
        return share.total, share.figures

    (expected, sums), wanted = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    (found, figures), grads = jax.jit(jax.value_and_grad(fused, has_aux=True))(params)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert figures["target_tokens"] == sizes.sum()
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * max(1.0, float(jnp.abs(theirs).max())))
    np.testing.assert_allclose(figures["logps/chosen"], sums[:, 0].mean(), rtol=1e-5)
    evaluated = jax.jit(objective.evaluate)({"params": params}, {}, {name: value[0] for name, value in batch.items()})
    validated, _ = objective.validation({name: float(value) for name, value in evaluated.items()})
    assert validated["validation_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert validated["validation_rewards/margins"] == pytest.approx(float(figures["rewards/margins"]), rel=1e-4)


def test_an_unwanted_answer_is_known_by_the_token_behind_its_texts() -> None:
    """Rows of labelled answers: text, mismatched text, and the mark."""
    mask = np.zeros((1, 1, 16), bool)
    mask[0, 0, [1, 2, 4, 8, 10, 11]] = True  # 0 1 1 | 0 1 | mark, then 0 0 1 | 0 1 1
    documents = np.array([[[1] * 6 + [2] * 6 + [0] * 4]], np.int32)
    micro = {"loss_mask": jnp.asarray(mask), "segment_ids": jnp.asarray(documents)}
    split = apart(micro)
    assert split["segment_ids"][0, 0].tolist() == [1, 1, 1, 2, 2, 3, 4, 4, 4, 5, 5, 5, 0, 0, 0, 0]
    assert split["positions"][0, 0].tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0]
    assert split["places"][0, 0].tolist() == [3, 3, 3, 4, 4, 5, 6, 6, 6, 7, 7, 7, 0, 0, 0, 0]
    objective = Preference(MODEL, settings=PreferenceConfig(loss="kto"))
    shares = objective.prepare(micro)
    assert [float(shares[name][0, 0]) for name in ("share", "wanted_share", "unwanted_share")] == [0.5, 1, 1]
    policy = jnp.array([[[-3.0, -1.0, 0.0], [-5.0, -4.0, 0.0], [0.0, 0.0, 0.0]]])
    real = jnp.array([[[True, True, True], [True, True, False], [False] * 3]])
    figures = objective._labelled(policy, policy + 4, real)
    assert figures["kl"] == 2 * 1.5 and figures["wanted"] == 1
    expected = kto_losses(objective.settings, jnp.array([1.0, -1.0]), jnp.float32(1.5), jnp.array([False, True])).sum()
    np.testing.assert_allclose(figures["loss"], expected, rtol=1e-6)


@pytest.mark.slow
def test_a_reward_is_read_at_the_last_token_of_each_answer(packed: Any) -> None:
    """The row of the end token in the output matrix, applied to each text in a row of its own."""
    import flax.linen as nn

    batch, pairs, boxed = packed
    params = nn.unbox(boxed)
    sums = Reward(MODEL).evaluate({"params": params}, {}, {name: value[0] for name, value in batch.items()})

    def one(text: np.ndarray) -> jax.Array:
        x, matrix = MODEL.apply({"params": params}, jnp.asarray(text)[None], method="hidden")
        return x[0, -1] @ matrix[SHAPE.reward_token_id]

    chosen, rejected = (np.array([one(texts[side][0]) for texts in pairs]) for side in (0, 1))
    np.testing.assert_allclose(sums["rewards/margins"], (chosen - rejected).sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["loss"], np.log1p(np.exp(rejected - chosen)).sum(), rtol=1e-5)
    assert sums["rewards/accuracies"] == (chosen > rejected).sum() and sums["documents"] == 3
