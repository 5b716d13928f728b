"""Whole models of families that compute what LLaMA does not, with random weights, held to transformers.

Logits of every runner (scanned, unrolled with caches, streamed), the loss and all gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference.model import unstack
from jaxlm.models import streamed
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.models.unrolled import extend, next_logits, prefill, repeat_rows
from jaxlm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
)
from tests.models.test_layers import linear, norm, state_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

V, D, H, K, DIM, F, T = 40, 32, 4, 2, 8, 48, 12
IDS = np.random.default_rng(3).integers(0, V, (2, T)).astype(np.int32)
# One layer's names and those outside of the layers -> the parameters without the stack.
Tree = dict[str, Any]


def stacked(layers: list[Tree], period: int) -> Tree:
    """The layers' trees as `DecoderSpec.stacks` has them; whole periods only."""
    parts = [jax.tree.map(lambda *leaves: np.stack(leaves), *layers[p::period]) for p in range(period)]
    return parts[0] if period == 1 else {str(p): part for p, part in enumerate(parts)}


def check(module: Any, params_of: Callable[[dict[str, np.ndarray]], Tree], spec: DecoderSpec) -> None:
    """Holds every runner's logits, the loss and all gradients to a model of transformers.

    Args:
        params_of: jaxlm's parameters, or gradients, from those of transformers by name.
    """
    params = params_of(state_of(module.eval()))
    model = Decoder(spec)
    shapes = jax.tree.map(lambda leaf: leaf.value.shape, abstract_variables(model)["params"], is_leaf=is_box)
    assert jax.tree.map(np.shape, params) == shapes  # nothing is left over on either side
    given = module(torch.from_numpy(IDS).long(), use_cache=False).logits
    expected = given.detach().numpy()
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    assert_close(jax.jit(model.apply)({"params": params}, IDS), expected)

    weights = unstack({"params": params}, spec)
    first, caches = prefill(model, weights, jnp.asarray(IDS[:, :5]), jnp.array([5, 3]), 16)
    assert_close(first, np.stack([expected[0, 4], expected[1, 2]]))
    rest = np.stack([IDS[0, 5:9], IDS[1, 3:7]])
    more, caches = extend(model, weights, caches, jnp.asarray(rest), jnp.array([5, 3]), jnp.array([4, 4]))
    assert_close(more, np.stack([expected[0, 8], expected[1, 6]]))
    caches, rows = repeat_rows(caches, 2), np.repeat(np.arange(2), 2)  # as beams are
    for step in range(3):
        at = np.array([9, 9, 7, 7]) + step
        logits, caches = next_logits(model, weights, caches, jnp.asarray(IDS[rows, at]), jnp.asarray(at))
        assert_close(logits, expected[rows, at])

    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert_close(streamed.logits(spec, lambda path, index: by_path[path][index], IDS), expected)

    loss = torch.nn.functional.cross_entropy(
        given[:, :-1].reshape(-1, V), torch.from_numpy(IDS[:, 1:]).reshape(-1).long(), reduction="sum"
    )
    loss.backward()
    expected_grads = params_of({name: parameter.grad.numpy() for name, parameter in module.named_parameters()})

    def total(params: Any) -> jax.Array:
        out = model.apply({"params": params}, IDS, np.ones(IDS.shape, np.float32), method="loss")
        return out.loss

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    # A bias of k adds the same to all scores of a query, so its gradient is 0 but for rounding.
    rounding = 1e-6 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True)
    for (path, found), leaf in leaves:
        atol = max(1e-3 * np.abs(leaf).max(), rounding)
        np.testing.assert_allclose(found, leaf, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def is_box(leaf: Any) -> bool:
    return hasattr(leaf, "value")


def gated_layer(state: dict[str, np.ndarray], at: str, norms: dict[str, str]) -> Tree:
    """A layer with LLaMA's names of its linear layers.

    Args:
        norms: our name of each norm -> theirs.
    """
    attention = {f"{n}_proj": linear(state, f"{at}.self_attn.{n}_proj", (D,), (-1, DIM)) for n in "qkv"}
    attention["o_proj"] = linear(state, f"{at}.self_attn.o_proj", (H, DIM), (D,))
    mlp = {f"{n}_proj": linear(state, f"{at}.mlp.{n}_proj", (D,), (F,)) for n in ("gate", "up")}
    mlp["down_proj"] = linear(state, f"{at}.mlp.down_proj", (F,), (D,))
    return {ours: norm(state, f"{at}.{theirs}") for ours, theirs in norms.items()} | dict(self_attn=attention, mlp=mlp)


def test_olmo_2() -> None:
    """Norms of outputs alone, and of q and k over all heads."""
    olmo = pytest.importorskip("transformers.models.olmo2.modeling_olmo2")
    config = olmo.Olmo2Config(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=K,
        intermediate_size=F,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        pad_token_id=None,
    )
    norms = {
        "attention_output_norm": "post_attention_layernorm",
        "feed_forward_output_norm": "post_feedforward_layernorm",
    }

    def params_of(state: dict[str, np.ndarray]) -> Tree:
        layers = [gated_layer(state, f"model.layers.{n}", norms) for n in range(2)]
        for n, layer in enumerate(layers):
            layer["self_attn"] |= {
                name: norm(state, f"model.layers.{n}.self_attn.{name}") for name in ("q_norm", "k_norm")
            }
        return {
            "embed_tokens": {"embedding": state["model.embed_tokens.weight"]},
            "lm_head": {"kernel": state["lm_head.weight"]},
            "norm": norm(state, "model.norm"),
            "layers": stacked(layers, 1),
        }

    attention = AttentionSpec(H, K, DIM, RopeSpec(), qk_norm=NormSpec(1e-6), qk_norm_over="all")
    layer = LayerSpec(attention, FeedForwardSpec(F), norms="post")
    check(olmo.Olmo2ForCausalLM(config), params_of, DecoderSpec("made up", V, D, 2, (layer,), NormSpec(1e-6)))
