"""Qwen3-MoE against transformers' own, its router and its config.json."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MoeRunConfig
from jaxlm.errors import UserError
from jaxlm.models.families import SHAPES, read_config, write_config
from jaxlm.models.resolve import resolve_experts
from jaxlm.nn.routers import route_learned
from jaxlm.spec import ExpertsSpec
from tests.models.parity import check_family
from tests.models.small import SMALL, hf_config, small_spec

E, F, D = 8, 5, 16  # experts, neurons of each, model


@pytest.mark.parametrize("variant", SMALL["qwen3_moe"])
@pytest.mark.slow
def test_qwen3_moe_is_that_of_transformers(variant: str) -> None:
    check_family("qwen3_moe", variant, experts="loop" if variant == "plain" else "dense")


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("k", [1, 3, E])
def test_weights_of_experts_are_those_of_its_router(k: int, normalised: bool) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    router = module.Qwen3MoeTopKRouter(hf_config("qwen3_moe", num_experts_per_tok=k, norm_topk_prob=normalised))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 6, D)
    with torch.no_grad():
        logits, weights, chosen = router(x)
    spec = ExpertsSpec(E, "learned", top_k=(k,), weights="normalised" if normalised else "shares")
    ours = route_learned(spec, jnp.asarray(logits.numpy())[None], None, jnp.zeros((1, 6), int))
    np.testing.assert_array_equal(ours.experts[0], chosen.numpy())
    np.testing.assert_allclose(ours.weights[0], weights.numpy(), rtol=1e-5)
    assert k == E or np.allclose(weights.sum(-1), 1) == normalised


def test_what_the_configuration_has_no_key_for_is_not_written() -> None:
    spec = SHAPES["qwen3-30b-a3b"]
    experts = spec.experts
    assert experts is not None and spec.feed_forward.size == 128 * 768
    for change in (
        dict(weights="k_times"),
        dict(router="modality"),
        dict(modalities=("text", "smiles"), ranges=((7, 9),), top_k=(8, 2)),
    ):
        with pytest.raises(UserError, match=r"Qwen3MoeForCausalLM has no place for feed_forward\.experts"):
            write_config(spec.with_experts(dataclasses.replace(experts, **change)), "bfloat16")


def test_layers_without_experts_are_a_period_or_refused() -> None:
    spec = small_spec("qwen3_moe", "dense_layers")
    assert [layer.feed_forward.size for layer in spec.layers()] == [24, E * F, 24, E * F, 24]
    written = write_config(spec, "float32")
    assert (written["mlp_only_layers"], written["intermediate_size"]) == ([0, 2, 4], 24)
    assert read_config(written) == spec
    many = dict(num_hidden_layers=40, mlp_only_layers=[20])
    with pytest.raises(UserError, match="not in a pattern that repeats every 16 layers or less"):
        small_spec("qwen3_moe", "plain", **many)
    dense = small_spec("qwen3_moe", "plain", num_experts=0)
    assert dense.experts is None and dense.feed_forward.size == 24
    assert read_config(write_config(dense, "float32")) == dense


def test_a_run_changes_no_dense_layer_of_such_a_model() -> None:
    spec = small_spec("qwen3_moe", "dense_layers")
    assert resolve_experts(spec, MoeRunConfig(balance_loss=0.1), fresh=False) == spec
    made = resolve_experts(spec, MoeRunConfig(top_k={"text": 3}), fresh=False)
    assert [layer.feed_forward.experts and layer.feed_forward.experts.top_k for layer in made.period] == [None, (3,)]
    assert made.experts is not None and made.experts.weights == "normalised"
