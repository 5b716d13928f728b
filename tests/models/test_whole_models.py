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
    LearnedPositionsSpec,
    NormSpec,
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


@pytest.mark.parametrize("heads", [4, 6])
def test_bloom(heads: int) -> None:
    """ALiBi, with numbers of heads that are a power of two and not; a norm behind the embedding."""
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    width = heads * DIM
    config = bloom.BloomConfig(
        vocab_size=V,
        hidden_size=width,
        n_layer=2,
        n_head=heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attn_implementation="eager",
        pad_token_id=None,
    )

    def params_of(state: dict[str, np.ndarray]) -> Tree:
        layers = []
        for n in range(2):
            at = f"transformer.h.{n}"
            attention = {}
            for part, ours in enumerate(("q_proj", "k_proj", "v_proj")):
                kernel = state[f"{at}.self_attention.query_key_value.weight"].reshape(heads, 3, DIM, width)[:, part]
                bias = state[f"{at}.self_attention.query_key_value.bias"].reshape(heads, 3, DIM)[:, part]
                attention[ours] = {"kernel": kernel.transpose(2, 0, 1), "bias": bias}
            attention["o_proj"] = linear(state, f"{at}.self_attention.dense", (heads, DIM), (width,))
            mlp = {
                "up_proj": linear(state, f"{at}.mlp.dense_h_to_4h", (width,), (4 * width,)),
                "down_proj": linear(state, f"{at}.mlp.dense_4h_to_h", (4 * width,), (width,)),
            }
            norms = {name: norm(state, f"{at}.{name}") for name in ("input_layernorm", "post_attention_layernorm")}
            layers.append(norms | dict(self_attn=attention, mlp=mlp))
        return {
            "embed_tokens": {"embedding": state["transformer.word_embeddings.weight"]},
            "embed_norm": norm(state, "transformer.word_embeddings_layernorm"),
            "norm": norm(state, "transformer.ln_f"),
            "layers": stacked(layers, 1),
        }

    layer = LayerSpec(
        AttentionSpec(heads, heads, DIM, None, True, True, alibi=True),
        FeedForwardSpec(4 * width, "gelu_tanh", True, gated=False),
    )
    norms = NormSpec(1e-5, "layer", bias=True)
    spec = DecoderSpec("made up", V, width, 2, (layer,), norms, tied_head=True, embedding_norm=True)
    check(bloom.BloomForCausalLM(config), params_of, spec)


def opt(max_positions: int) -> tuple[Any, Callable[[dict[str, np.ndarray]], Tree], DecoderSpec]:
    """A model of transformers, jaxlm's parameters from its own, and its description."""
    module = pytest.importorskip("transformers.models.opt.modeling_opt")
    config = module.OPTConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        ffn_dim=F,
        word_embed_proj_dim=D,
        max_position_embeddings=max_positions,
        dropout=0.0,
        attn_implementation="eager",
        pad_token_id=None,
    )

    def params_of(state: dict[str, np.ndarray]) -> Tree:
        layers = []
        for n in range(2):
            at = f"model.decoder.layers.{n}"
            attention = {f"{n}_proj": linear(state, f"{at}.self_attn.{n}_proj", (D,), (H, DIM)) for n in "qkv"}
            attention["o_proj"] = linear(state, f"{at}.self_attn.out_proj", (H, DIM), (D,))
            mlp = {
                "up_proj": linear(state, f"{at}.fc1", (D,), (F,)),
                "down_proj": linear(state, f"{at}.fc2", (F,), (D,)),
            }
            layers.append(
                {
                    "input_layernorm": norm(state, f"{at}.self_attn_layer_norm"),
                    "post_attention_layernorm": norm(state, f"{at}.final_layer_norm"),
                    "self_attn": attention,
                    "mlp": mlp,
                }
            )
        return {
            "embed_tokens": {"embedding": state["model.decoder.embed_tokens.weight"]},
            "embed_positions": {"embedding": state["model.decoder.embed_positions.weight"]},
            "norm": norm(state, "model.decoder.final_layer_norm"),
            "layers": stacked(layers, 1),
        }

    layer = LayerSpec(AttentionSpec(H, H, DIM, None, True, True), FeedForwardSpec(F, "relu", True, gated=False))
    positions = LearnedPositionsSpec(max_positions + 2, 2)
    norms = NormSpec(1e-5, "layer", bias=True)
    spec = DecoderSpec("made up", V, D, 2, (layer,), norms, tied_head=True, learned_positions=positions)
    return module.OPTForCausalLM(config), params_of, spec


def test_opt() -> None:
    """Learned positions, with an offset."""
    check(*opt(20))


def test_padding_and_finished_rows_behind_the_last_learned_position() -> None:
    module, params_of, spec = opt(6)
    assert spec.max_length == 6
    model, params = Decoder(spec), params_of(state_of(module))
    expected = model.apply({"params": params}, IDS[:, :6])
    weights = unstack({"params": params}, spec)
    logits, caches = prefill(model, weights, jnp.asarray(IDS), jnp.array([5, 6]), 16)
    np.testing.assert_allclose(logits, [expected[0, 4], expected[1, 5]], rtol=1e-5, atol=1e-5)
    logits, _ = next_logits(model, weights, caches, jnp.asarray(IDS[:, 5]), jnp.array([5, 6]))
    np.testing.assert_allclose(logits[0], expected[0, 5], rtol=1e-5, atol=1e-5)
    assert np.isfinite(logits).all()
    assert np.isnan(model.apply({"params": params}, IDS[:, :7])[:, 6]).all()  # a text that long is not computed


def test_positions_of_packed_documents_are_their_own() -> None:
    """Learned positions restart with each document, and ALiBi's distances never leave one."""
    module, params_of, spec = opt(20)
    params = params_of(state_of(module))
    for made in (spec, spec.with_attention(alibi=True)):
        apply = Decoder(made).apply
        row = apply({"params": params}, IDS[:1], np.r_[0:5, 0:7][None], np.repeat([1, 2], [5, 7])[None])
        alone = [apply({"params": params}, IDS[:1, part]) for part in (slice(5), slice(5, None))]
        np.testing.assert_allclose(row, np.concatenate(alone, axis=1), rtol=1e-5, atol=1e-5)
    positions = np.r_[0:5, 0:7][None]
    tables = {f"{name}/embedding": params[name]["embedding"] for name in ("embed_tokens", "embed_positions")}
    chunks = [streamed.Tokens(IDS[:1], positions)]
    (states,) = streamed.embedded(spec, lambda path, index: tables[path][index], chunks)
    expected = tables["embed_tokens/embedding"][IDS[:1]] + tables["embed_positions/embedding"][positions + 2]
    np.testing.assert_allclose(states, expected, rtol=1e-6, atol=1e-6)
