"""Group-relative policy optimisation: weights of tokens and gradients, against formulae in PyTorch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import GrpoConfig
from jaxlm.evaluation.rollouts import group_advantages
from jaxlm.spec import uniform_decoder
from jaxlm.training.objectives import policy as module
from jaxlm.training.objectives.policy import ADVANTAGES, DRAWN, Policy, token_weights

SHAPE = uniform_decoder(
    "llama", vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)


def batch() -> dict[str, Any]:
    """[2, 2, 6]: answers of 1 to 4 tokens; the last row is empty."""
    mask = np.zeros((2, 2, 6), bool)
    for (a, b), (start, stop) in zip(((0, 0), (0, 1), (1, 0)), ((1, 3), (2, 6), (3, 4)), strict=True):
        mask[a, b, start:stop] = True
    rng = np.random.default_rng(0)
    drawn = np.where(mask, rng.uniform(-3, -0.5, mask.shape), 0).astype(np.float32)
    worth = np.array([[1.2, -0.7], [0.4, 0.0]], np.float32)[..., None] * mask
    return {"loss_mask": mask, DRAWN: drawn, ADVANTAGES: worth, "segment_ids": mask.astype(np.int32)}


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_loss_and_gradient_are_those_of_the_formula_in_pytorch(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL 1.16 trainer/grpo_trainer.py, lines 3080-3150, with importance_sampling_level sequence for gspo; with KL."""
    torch = pytest.importorskip("torch")
    settings = GrpoConfig(loss=loss, kl=0.3, epsilon=0.1, max_new_tokens=5, rewards=("exact",))
    rows = {name: value.reshape(4, 6) for name, value in batch().items()}
    now = rows[DRAWN] + np.where(rows["loss_mask"], np.random.default_rng(1).normal(0, 0.2, (4, 6)), 0)
    plain = (now - 0.2 * rows["loss_mask"]).astype(np.float32)
    logp = torch.tensor(now, dtype=torch.float64, requires_grad=True)
    m, a = torch.tensor(rows["loss_mask"], dtype=torch.float64), torch.tensor(rows[ADVANTAGES], dtype=torch.float64)
    change = logp - torch.tensor(rows[DRAWN])
    if loss == "gspo":
        change = ((change * m).sum(-1) / m.sum(-1).clamp(min=1))[:, None].expand(4, 6)
    per_token = -torch.min(change.exp() * a, change.exp().clamp(0.9, 1.1) * a)
    behind = torch.tensor(plain) - logp
    per_token = per_token + 0.3 * (behind.exp() - behind - 1)
    expected = {
        "dapo": lambda: (per_token * m).sum() / m.sum(),
        "dr_grpo": lambda: (per_token * m).sum() / (3 * 5),
        "grpo": lambda: ((per_token * m).sum(-1) / m.sum(-1).clamp(min=1)).sum() / 3,
        "gspo": lambda: ((per_token * m).sum(-1) / m.sum(-1).clamp(min=1)).sum() / 3,
    }[loss]()
    expected.backward()

    class Model:
        spec = SHAPE

        def clone(self, **_: Any) -> Model:
            return self

    def fake(model: Any, variables: Any, micro: Any, **_: Any) -> Any:
        values = variables["params"]
        return jax.lax.dynamic_slice_in_dim(values, micro["row"][0], 2), {}

    monkeypatch.setattr(module, "text_log_probs", fake)
    objective = Policy(Model(), settings, ("reference",))  # type: ignore[arg-type]
    prepared = objective.prepare({name: jnp.asarray(value) for name, value in batch().items()})
    prepared["row"] = jnp.array([[0, 0], [2, 2]])

    def value(params: Any) -> Any:
        parts = [
            objective.loss(
                {"params": params}, {"reference": jnp.asarray(plain)}, {k: v[n] for k, v in prepared.items()}, None, 2
            )
            for n in (0, 1)
        ]
        return sum(part.total for part in parts), parts[0].figures

    (found, figures), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(jnp.asarray(now, jnp.float32))
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(grads * rows["loss_mask"], logp.grad.numpy() * rows["loss_mask"], rtol=1e-4, atol=1e-7)
    ratios = np.exp(now - rows[DRAWN])[:2][rows["loss_mask"][:2]]
    np.testing.assert_allclose([figures["ratio/min"], figures["ratio/max"]], [ratios.min(), ratios.max()], rtol=1e-5)


def test_weights_are_shares_of_the_step() -> None:
    mask = jnp.asarray(batch()["loss_mask"], jnp.float32)
    for loss in ("grpo", "dapo", "gspo"):
        assert float(token_weights(mask, GrpoConfig(loss=loss)).sum()) == pytest.approx(1, abs=1e-6)
    assert float(token_weights(mask, GrpoConfig(loss="dr_grpo", max_new_tokens=7)).sum()) == pytest.approx(7 / (3 * 7))


def test_advantages_are_those_of_trl_and_a_group_without_differences_is_counted() -> None:
    torch = pytest.importorskip("torch")
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    values, silent = group_advantages(rewards, by_deviation=True)
    group = torch.tensor(rewards)
    expected = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(values, expected.numpy(), rtol=1e-12)
    assert silent == 0.5 and not values[1].any()
    np.testing.assert_array_equal(group_advantages(rewards, by_deviation=False)[0][0], [0.5, -0.5, -0.5, 0.5])
