"""Self-attention as a layer, held to transformers' modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.attention import KVCache
from jaxlm.nn.positions import rope_cos_sin
from jaxlm.nn.self_attention import SelfAttention
from jaxlm.spec import AttentionSpec, NormSpec, RopeSpec

torch = pytest.importorskip("torch")
qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")

D, H, K, DIM, LENGTH = 24, 4, 2, 10, 9


def twins() -> tuple[Any, SelfAttention, dict[str, Any]]:
    """transformers' attention of Qwen3 with random weights, norms too; the same here, and its parameters."""
    config = qwen3.Qwen3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=K, head_dim=DIM, rms_norm_eps=1e-6, rope_theta=1e4
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module = qwen3.Qwen3Attention(config, layer_idx=0)
    for norm in (module.q_norm, module.k_norm):
        torch.nn.init.normal_(norm.weight, 1.0, 0.5)
    module.rotary = qwen3.Qwen3RotaryEmbedding(config)
    spec = AttentionSpec(H, K, DIM, rope=RopeSpec(rope_theta=1e4), qk_norm=NormSpec(1e-6))
    layer = SelfAttention(D, 0.02, {}, jnp.float32, jnp.float32, spec, "xla")
    state = {name: value.detach().numpy() for name, value in module.state_dict().items() if "rotary" not in name}
    params = {
        name: {"kernel": state[f"{name}.weight"].T.reshape(D, -1, DIM)} for name in ("q_proj", "k_proj", "v_proj")
    }
    params["o_proj"] = {"kernel": state["o_proj.weight"].T.reshape(H, DIM, D)}
    params |= {name: {"scale": state[f"{name}.weight"]} for name in ("q_norm", "k_norm")}
    return module, layer, params


def run_torch(module: Any, x: np.ndarray) -> np.ndarray:
    hidden = torch.from_numpy(x)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    angles = module.rotary(hidden, torch.arange(LENGTH)[None])
    with torch.no_grad():
        out: np.ndarray = module(hidden, position_embeddings=angles, attention_mask=mask)[0].numpy()
    return out


def angles(positions: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return rope_cos_sin(RopeSpec(rope_theta=1e4), DIM, 64, jnp.asarray(positions))


def test_a_norm_of_q_and_k_comes_before_the_positions_as_in_qwen3() -> None:
    module, layer, params = twins()
    x = np.random.default_rng(0).normal(0, 1, (2, LENGTH, D)).astype(np.float32)
    expected = run_torch(module, x)
    cos_sin = angles(np.broadcast_to(np.arange(LENGTH), (2, LENGTH)))
    out, _ = layer.apply({"params": params}, x, 0, *cos_sin, None, True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    # ... and it is not without effect.
    ones = params | {name: {"scale": np.ones(DIM, np.float32)} for name in ("q_norm", "k_norm")}
    assert np.abs(layer.apply({"params": ones}, x, 0, *cos_sin, None, True)[0] - expected).max() > 0.01


def test_a_norm_of_q_and_k_is_computed_with_a_cache_too() -> None:
    module, layer, params = twins()
    x = np.random.default_rng(0).normal(0, 1, (1, LENGTH, D)).astype(np.float32)
    expected = run_torch(module, x)
    cache = KVCache(*(jnp.zeros((1, K, 16, DIM)) for _ in "kv"), None)
    for at in range(LENGTH):
        places = np.array([[at]], np.int32)
        out, cache = layer.apply(
            {"params": params}, x[:, at : at + 1], 0, *angles(places), None, True, cache.replace(places=places)
        )
        np.testing.assert_allclose(out[:, 0], expected[:, at], rtol=1e-5, atol=1e-5)
