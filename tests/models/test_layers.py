"""What a layer's description can say beyond LLaMA, each field held to the layers of transformers that have it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.decoder import Decoder
from jaxlm.nn.feed_forward import FeedForward
from jaxlm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

D, H, DIM, F, LENGTH, BASE = 32, 4, 8, 48, 9, 1e4


def state_of(module: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights for all of a module's parameters, put into it."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.3, tuple(parameter.shape)).astype(np.float32)))
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def linear(state: dict[str, np.ndarray], name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Any:
    part = {"kernel": state[f"{name}.weight"].T.reshape(*inputs, *outputs)}
    if f"{name}.bias" in state:
        part["bias"] = state[f"{name}.bias"].reshape(outputs)
    return part


def norm(state: dict[str, np.ndarray], name: str) -> Any:
    part = {"scale": state[f"{name}.weight"]}
    return part | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path).removesuffix(".value") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def run(layer: LayerSpec, norms: NormSpec, params: Any, x: np.ndarray) -> np.ndarray:
    model = Decoder(DecoderSpec("made up", 8, D, 1, (layer,), norm=norms))
    block = model.block(0)
    angles = model.angles(jnp.broadcast_to(jnp.arange(LENGTH), x.shape[:2]))[0]
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, jnp.int32(0), angles)["params"]
    assert paths(params) == paths(shapes)  # nothing is left over on either side
    return np.asarray(jax.jit(block.apply)({"params": params}, x, jnp.int32(0), angles)[0])


def causal() -> Any:
    return torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1, (2, LENGTH, D)).astype(np.float32)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rotary_pct", [0.5, 1.0])
def test_layer_norms_parallel_layers_and_partial_rotary_positions_as_in_gpt_neox(
    parallel: bool, rotary_pct: float
) -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    config = neox.GPTNeoXConfig(
        hidden_size=D,
        num_attention_heads=H,
        intermediate_size=F,
        hidden_act="gelu",
        use_parallel_residual=parallel,
        rotary_pct=rotary_pct,
        rotary_emb_base=BASE,
        layer_norm_eps=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    config._attn_implementation = "eager"
    module = neox.GPTNeoXLayer(config, 0).eval()
    state = state_of(module)
    x = inputs()
    hidden = torch.from_numpy(x)
    angles = neox.GPTNeoXRotaryEmbedding(config)(hidden, torch.arange(LENGTH)[None])
    with torch.no_grad():
        expected = module(hidden, attention_mask=causal(), position_embeddings=angles)
    expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    fused, bias = (state[f"attention.query_key_value.{name}"] for name in ("weight", "bias"))
    fused = fused.reshape(H, 3, DIM, D)
    attention = {
        name: {"kernel": fused[:, at].transpose(2, 0, 1), "bias": bias.reshape(H, 3, DIM)[:, at]}
        for at, name in enumerate(("q_proj", "k_proj", "v_proj"))
    }
    params = {
        "input_layernorm": norm(state, "input_layernorm"),
        "post_attention_layernorm": norm(state, "post_attention_layernorm"),
        "self_attn": attention | {"o_proj": linear(state, "attention.dense", (H, DIM), (D,))},
        "mlp": {
            "up_proj": linear(state, "mlp.dense_h_to_4h", (D,), (F,)),
            "down_proj": linear(state, "mlp.dense_4h_to_h", (F,), (D,)),
        },
    }
    rotary = int(DIM * rotary_pct)
    spec = LayerSpec(
        AttentionSpec(H, H, DIM, RopeSpec(rope_theta=BASE), True, True, rotary_dim=None if rotary == DIM else rotary),
        FeedForwardSpec(F, "gelu", True, gated=False),
        parallel="own_norm" if parallel else None,
    )
    found = run(spec, NormSpec(1e-5, "layer", bias=True), params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_one_norm_for_parallel_layers_and_interleaved_positions_as_in_gpt_j() -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    config = gptj.GPTJConfig(
        n_embd=D,
        n_head=H,
        n_inner=F,
        rotary_dim=4,
        activation_function="gelu_new",
        n_positions=32,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
    )
    config._attn_implementation = "eager"
    module = gptj.GPTJBlock(config, 0).eval()
    state = state_of(module)
    x = inputs()
    with torch.no_grad():
        angles = gptj.GPTJRotaryEmbedding(config)(torch.from_numpy(x), torch.arange(LENGTH)[None])
        expected = module(torch.from_numpy(x), attention_mask=causal(), position_embeddings=angles)
    expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    params = {
        "input_layernorm": norm(state, "ln_1"),
        "self_attn": {f"{n}_proj": linear(state, f"attn.{n}_proj", (D,), (H, DIM)) for n in "qkv"}
        | {"o_proj": linear(state, "attn.out_proj", (H, DIM), (D,))},
        "mlp": {
            "up_proj": linear(state, "mlp.fc_in", (D,), (F,)),
            "down_proj": linear(state, "mlp.fc_out", (F,), (D,)),
        },
    }
    spec = LayerSpec(
        AttentionSpec(H, H, DIM, rotary_dim=4, rotary_interleaved=True),
        FeedForwardSpec(F, "gelu_tanh", True, gated=False),
        parallel="shared_norm",
    )
    found = run(spec, NormSpec(1e-5, "layer", bias=True), params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_norms_of_outputs_and_an_offset_of_the_scale_as_in_gemma_2() -> None:
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    config = gemma.Gemma2Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=2,
        head_dim=DIM,
        intermediate_size=F,
        query_pre_attn_scalar=DIM,
        attn_logit_softcapping=None,
        rms_norm_eps=1e-6,
        num_hidden_layers=2,
        layer_types=["full_attention", "full_attention"],
    )
    config._attn_implementation = "eager"
    module = gemma.Gemma2DecoderLayer(config, 0).eval()
    state = state_of(module)
    x = inputs()
    hidden = torch.from_numpy(x)
    angles = gemma.Gemma2RotaryEmbedding(config)(hidden, torch.arange(LENGTH)[None])
    with torch.no_grad():
        expected = module(hidden, position_embeddings=angles, attention_mask=causal())
    expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    params = {
        "input_layernorm": norm(state, "input_layernorm"),
        "attention_output_norm": norm(state, "post_attention_layernorm"),
        "post_attention_layernorm": norm(state, "pre_feedforward_layernorm"),
        "feed_forward_output_norm": norm(state, "post_feedforward_layernorm"),
        "self_attn": {
            "q_proj": linear(state, "self_attn.q_proj", (D,), (H, DIM)),
            "k_proj": linear(state, "self_attn.k_proj", (D,), (2, DIM)),
            "v_proj": linear(state, "self_attn.v_proj", (D,), (2, DIM)),
            "o_proj": linear(state, "self_attn.o_proj", (H, DIM), (D,)),
        },
        "mlp": {
            "gate_proj": linear(state, "mlp.gate_proj", (D,), (F,)),
            "up_proj": linear(state, "mlp.up_proj", (D,), (F,)),
            "down_proj": linear(state, "mlp.down_proj", (F,), (D,)),
        },
    }
    spec = LayerSpec(AttentionSpec(H, 2, DIM), FeedForwardSpec(F, "gelu_tanh"), norms="both")
    found = run(spec, NormSpec(1e-6, offset=1.0), params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "hf"), [("relu", "relu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("silu", "silu")]
)
def test_feed_forward_layers_without_a_gate(activation: str, hf: str) -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    module = neox.GPTNeoXMLP(
        neox.GPTNeoXConfig(hidden_size=D, num_attention_heads=H, intermediate_size=F, hidden_act=hf)
    )
    state = state_of(module)
    params = {
        "up_proj": linear(state, "dense_h_to_4h", (D,), (F,)),
        "down_proj": linear(state, "dense_4h_to_h", (F,), (D,)),
    }
    layer = FeedForward(D, 0.02, {}, jnp.float32, jnp.float32, FeedForwardSpec(F, activation, True, gated=False))
    with torch.no_grad():
        expected = module(torch.from_numpy(inputs())).numpy()
    np.testing.assert_allclose(layer.apply({"params": params}, inputs(), 0, True), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_are_scaled_in_the_compute_dtype_as_in_gemma() -> None:
    layer = LayerSpec(AttentionSpec(H, H, DIM), FeedForwardSpec(F))
    table = np.random.default_rng(0).normal(0, 1, (16, D)).astype(np.float32)
    scale = math.sqrt(D)
    model = Decoder(DecoderSpec("made up", 16, D, 1, (layer,), embedding_scale=scale), dtype=jnp.bfloat16)
    ids = np.arange(16)[None]
    found = model.apply({"params": {"embed_tokens": {"embedding": table}}}, ids, method="embed")
    rows = torch.from_numpy(table).to(torch.bfloat16)
    expected = rows * torch.tensor(scale, dtype=torch.bfloat16)  # GemmaModel.forward
    np.testing.assert_array_equal(np.asarray(found[0].astype(jnp.float32)), expected.float().numpy())


def test_a_norm_behind_the_embedding_as_in_bloom() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    module = bloom.BloomModel(bloom.BloomConfig(vocab_size=16, hidden_size=D, n_layer=1, n_head=H))
    state = state_of(module)
    layer = LayerSpec(AttentionSpec(H, H, DIM), FeedForwardSpec(F))
    norms = NormSpec(module.word_embeddings_layernorm.eps, "layer", bias=True)
    model = Decoder(DecoderSpec("made up", 16, D, 1, (layer,), norm=norms, embedding_norm=True))
    ids = np.arange(16)[None]
    params = {
        "embed_tokens": {"embedding": state["word_embeddings.weight"]},
        "embed_norm": norm(state, "word_embeddings_layernorm"),
    }
    with torch.no_grad():
        expected = module.word_embeddings_layernorm(module.word_embeddings(torch.from_numpy(ids))).numpy()
    found = model.apply({"params": params}, ids, method="embed")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
