"""Logits and gradients against transformers' own models, float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.decoder import Decoder
from jaxlm.nn.positions import rope_cos_sin
from tests.models import hf
from tests.models.compare import assert_trees_close

LOGITS = 1e-4  # max abs
GRADS = 1e-4  # of a leaf's largest gradient


def rope(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **more}}


# Numbers with which the ramp has an inside: pairs 0..3 of a head of 8 get 0, 0.33, 0.67, 1.
YARN = dict(rope_theta=100.0, factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=0.5)
# name: (architecture, rows, length, options of the HF config)
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "mha": ("LlamaForCausalLM", 2, 24, dict(num_key_value_heads=4, head_dim=12)),
    "mqa-tied": ("LlamaForCausalLM", 2, 24, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "biases": ("LlamaForCausalLM", 2, 24, dict(attention_bias=True, mlp_bias=True)),
    "linear": ("LlamaForCausalLM", 2, 24, rope("linear", factor=3.0)),
    "dynamic": ("LlamaForCausalLM", 2, 24, rope("dynamic", factor=2.0)),
    "dynamic-beyond": ("LlamaForCausalLM", 2, 24, rope("dynamic", factor=2.0) | dict(max_position_embeddings=10)),
    "llama3": (
        "LlamaForCausalLM",
        2,
        24,
        rope(
            "llama3",
            rope_theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "yarn": ("LlamaForCausalLM", 2, 24, rope("yarn", **YARN)),
    "yarn-mscale": (
        "LlamaForCausalLM",
        2,
        24,
        rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.4, truncate=False),
    ),
    "yarn-factor": (
        "LlamaForCausalLM",
        2,
        24,
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3),
    ),
    "mistral": ("MistralForCausalLM", 2, 24, dict(sliding_window=7)),
    "mistral-blocks": ("MistralForCausalLM", 1, 300, dict(sliding_window=37, head_dim=16)),
    "qwen2-tied-window": (
        "Qwen2ForCausalLM",
        2,
        24,
        dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=0),
    ),
    "qwen3-biases-tied": (
        "Qwen3ForCausalLM",
        2,
        24,
        dict(head_dim=12, attention_bias=True, tie_word_embeddings=True, num_key_value_heads=1),
    ),
    # Heads of 10 do not fill D.
    "qwen3-window": (
        "Qwen3ForCausalLM",
        2,
        24,
        dict(head_dim=10, use_sliding_window=True, sliding_window=5, max_window_layers=0),
    ),
}


def torch_step(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits; leaves the gradients of the summed next-token loss on the model."""
    tokens = hf.torch.from_numpy(ids).long()
    logits = model(tokens).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    hf.torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1), reduction="sum").backward()
    return logits.detach().numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str) -> None:
    architecture, rows, length, options = CASES[case]
    torch_model, config = hf.build(architecture, **options)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    expected = torch_step(torch_model, ids)
    model = Decoder(config, remat="none")

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, ids)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1).sum(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(hf.weights(torch_model, config))
    assert np.abs(expected).max() > 1  # otherwise an absolute tolerance says little
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS)
    assert_trees_close(grads, hf.gradients(torch_model, config), GRADS)


@pytest.mark.parametrize("case", [name for name, value in CASES.items() if "rope_parameters" in value[3]])
def test_rope_tables(case: str) -> None:
    """Cos and sin far along the row, where an error of a frequency shows most."""
    _, _, _, options = CASES[case]
    torch_model, config = hf.build(**options)
    positions = np.array([[0, 1, 5, 100, 255]])
    x = hf.torch.zeros(1, 5, 4)
    cos, sin = torch_model.model.rotary_emb(x, hf.torch.from_numpy(positions))
    rope, head_dim = config.attention.rope, config.attention.head_dim
    found = rope_cos_sin(rope, head_dim, config.max_position_embeddings, jnp.asarray(positions))
    half = head_dim // 2
    # At position 255 one unit in the last place of a frequency is 1.5e-5 radians.
    np.testing.assert_allclose(found[0], cos.numpy()[..., :half], rtol=0, atol=4e-5)
    np.testing.assert_allclose(found[1], sin.numpy()[..., :half], rtol=0, atol=4e-5)


@pytest.mark.parametrize("lengths", [(9, 15), (70, 131)])
def test_packed_documents_against_hf_alone(lengths: tuple[int, int]) -> None:
    torch_model, config = hf.build("MistralForCausalLM", sliding_window=33)
    rng = np.random.default_rng(2)
    documents = [rng.integers(0, config.vocab_size, n) for n in lengths]
    with hf.torch.no_grad():
        alone = [torch_model(hf.torch.from_numpy(d)[None]).logits[0].numpy() for d in documents]
    packed = jax.jit(Decoder(config, remat="none").apply)(
        {"params": hf.weights(torch_model, config)},
        np.concatenate(documents)[None].astype(np.int32),
        np.concatenate([np.arange(n) for n in lengths])[None],
        np.repeat([1, 2], lengths)[None],
    )
    np.testing.assert_allclose(packed[0], np.concatenate(alone), rtol=0, atol=LOGITS)
