"""Families that transformers has no module of: their files against a module there that computes the same.

A state dict of that module is renamed by hand as the family's own code names it. Where jaxlm takes the same description
and the same parameters from it, it computes what the module does, to which its family is held elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import save_file

from convert.commands.main import main
from convert.conversion import convert
from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import SHAPES, read_config
from jaxlm.spec import RopeSpec
from jaxlm.weights.names import leaf_shapes, num_params
from tests.models.parity import check_family
from tests.models.small import OWN, hf_model, small_spec, tree_of

torch = pytest.importorskip("torch")
State = dict[str, Any]


def renamed(state: State, names: dict[str, str]) -> State:
    """The tensors by other names, which patterns of whole names tell."""
    result = {}
    for name, tensor in state.items():
        (new,) = {found.expand(to) for pattern, to in names.items() if (found := re.fullmatch(pattern, name))}
        result[new] = tensor
    return result


def joined(state: State, parts: list[str], whole: str, join: Callable[..., Any]) -> State:
    """The tensors with those of several linear layers as one, in every layer.

    Args:
        parts: their names, with '{}' for the number of the layer and 'suffix' for weight or bias.
        whole: likewise.
        join: of the parts' tensors.
    """
    state = dict(state)
    for layer in range(3):
        for suffix in ("weight", "bias"):
            names = [part.format(layer).replace("suffix", suffix) for part in parts]
            if names[0] in state:
                state[whole.format(layer).replace("suffix", suffix)] = join(*(state.pop(name) for name in names))
    return state


def below(*parts: Any) -> Any:
    return torch.cat(parts)


def chatglm(state: State) -> State:
    state = joined(
        state,
        [f"model.layers.{{}}.self_attn.{n}_proj.suffix" for n in "qkv"],
        "model.layers.{}.self_attn.query_key_value.suffix",
        below,
    )
    layer = r"transformer.encoder.layers.\1"
    return renamed(
        state,
        {
            r"model\.embed_tokens\.weight": "transformer.embedding.word_embeddings.weight",
            r"model\.layers\.(\d+)\.(\w+_layernorm|input_layernorm)\.weight": rf"{layer}.\2.weight",
            r"model\.layers\.(\d+)\.self_attn\.(query_key_value)\.(\w+)": rf"{layer}.self_attention.\2.\3",
            r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight": rf"{layer}.self_attention.dense.weight",
            r"model\.layers\.(\d+)\.mlp\.gate_up_proj\.weight": rf"{layer}.mlp.dense_h_to_4h.weight",
            r"model\.layers\.(\d+)\.mlp\.down_proj\.weight": rf"{layer}.mlp.dense_4h_to_h.weight",
            r"model\.norm\.weight": "transformer.encoder.final_layernorm.weight",
            r"lm_head\.weight": "transformer.output_layer.weight",
        },
    )


def as_they_are(state: State) -> State:
    return state


def by_group(q: Any, k: Any, v: Any) -> Any:
    """The two query heads of the first kv head, that, its values; then those of the second."""
    parts = [part.reshape(2, -1, 4, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def internlm2(state: State) -> State:
    parts = [f"model.layers.{{}}.self_attn.{n}_proj.suffix" for n in "qkv"]
    state = joined(state, parts, "model.layers.{}.self_attn.wqkv.suffix", by_group)
    layer = r"model.layers.\1"
    return renamed(
        state,
        {
            r"model\.embed_tokens\.weight": "model.tok_embeddings.weight",
            r"model\.layers\.(\d+)\.input_layernorm\.weight": f"{layer}.attention_norm.weight",
            r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": f"{layer}.ffn_norm.weight",
            r"model\.layers\.(\d+)\.self_attn\.wqkv\.(\w+)": rf"{layer}.attention.wqkv.\2",
            r"model\.layers\.(\d+)\.self_attn\.o_proj\.(\w+)": rf"{layer}.attention.wo.\2",
            r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight": f"{layer}.feed_forward.w1.weight",
            r"model\.layers\.(\d+)\.mlp\.up_proj\.weight": f"{layer}.feed_forward.w3.weight",
            r"model\.layers\.(\d+)\.mlp\.down_proj\.weight": f"{layer}.feed_forward.w2.weight",
            r"model\.norm\.weight": "model.norm.weight",
            r"lm_head\.weight": "output.weight",
        },
    )


def baichuan(state: State) -> State:
    parts = [f"model.layers.{{}}.self_attn.{n}_proj.suffix" for n in "qkv"]
    return joined(state, parts, "model.layers.{}.self_attn.W_pack.suffix", below)


_BAICHUAN: dict[str, Any] = dict(head_dim=4, num_key_value_heads=4, pad_token_id=0)
_FREQUENCIES = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
# Family -> variant -> (family of the module, its variant and values, the renaming, buffers that files have, too).
TWINS: dict[str, dict[str, tuple[str, str, dict[str, Any], Callable[[State], State], dict[str, Any]]]] = {
    "chatglm": {
        "plain": (
            "glm",
            "plain",
            dict(rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=5e5), pad_token_id=None),
            chatglm,
            {"transformer.rotary_pos_emb.inv_freq": torch.ones(2)},
        )
    },
    "internlm2": {
        "plain": ("llama", "plain", dict(head_dim=4, pad_token_id=0), internlm2, {}),
        "biases": ("llama", "plain", dict(head_dim=4, pad_token_id=0, attention_bias=True), internlm2, {}),
    },
    "internlm3": {
        "plain": ("llama", "plain", dict(rms_norm_eps=1e-5, pad_token_id=2), as_they_are, {}),
        "biases": ("llama", "biases", dict(rms_norm_eps=1e-5, pad_token_id=2), as_they_are, {}),
    },
    "baichuan": dict.fromkeys(OWN["baichuan"], ("llama", "plain", _BAICHUAN, baichuan, _FREQUENCIES)),
}
CASES = [(family, variant) for family, variants in TWINS.items() for variant in variants]


def write_files(family: str, variant: str, directory: Path) -> tuple[Any, State]:
    """A model directory with the family's own names; the module that computes the same, and what was stored."""
    twin, twins_variant, values, rename, buffers = TWINS[family][variant]
    module = hf_model(twin, twins_variant, **values)
    state = {name: tensor.detach().contiguous() for name, tensor in rename(dict(module.named_parameters())).items()}
    directory.mkdir()
    save_file(state | buffers, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(OWN[family][variant] | {"auto_map": {"AutoModel": "code.Model"}}))
    return module, state


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_own_names_hold_the_model_that_transformers_has_under_others(family: str, variant: str, tmp_path: Path) -> None:
    module, _ = write_files(family, variant, tmp_path / "own")
    twin, twins_variant, values, *_ = TWINS[family][variant]
    source, spec = open_model(tmp_path / "own"), small_spec(twin, twins_variant, **values)
    # What no module there has, and is held to a reference below.
    rope = source.config.attention.rope or RopeSpec()
    assert replace(source.config, family=twin, normed_head=False).with_attention(rope=rope, alibi=False) == spec
    expected = tree_of(dict(module.named_parameters()), spec)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert paths.keys() == leaf_shapes(source.config).keys()
    for path, leaf in paths.items():
        np.testing.assert_array_equal(source.read(path, ()), leaf, path)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_files_there_and_back_have_their_own_names(
    family: str, variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, state = write_files(family, variant, tmp_path / "own")
    assert main(["hf-to-jax", str(tmp_path / "own"), str(tmp_path / "jax")]) == 0
    assert main(["jax-to-hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    said = capsys.readouterr().out
    assert ("AutoModelForCausalLM" in said) == (family == "internlm3") != ("copy the code of" in said)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), name)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert read_config(config) == small_spec(family, variant)


@pytest.mark.parametrize(("family", "architecture"), [("chatglm", "GlmForCausalLM"), ("internlm2", "llama")])
def test_a_model_goes_out_under_another_architecture(
    family: str, architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers opens it, and has every tensor of the module that computes the same."""
    module, _ = write_files(family, "plain", tmp_path / "own")
    assert main(["hf-to-jax", str(tmp_path / "own"), str(tmp_path / "jax")]) == 0
    words = ["--architecture", architecture]
    assert main(["jax-to-hf", str(tmp_path / "jax"), str(tmp_path / "out"), *words]) == 0
    own_keys = OWN[family]["plain"].keys() - module.config.to_dict().keys()
    assert not own_keys & json.loads((tmp_path / "out" / "config.json").read_text()).keys() and own_keys
    found = type(module).from_pretrained(tmp_path / "out", dtype="float32")
    assert found.state_dict().keys() == module.state_dict().keys()
    assert all(tensor.equal(module.state_dict()[name]) for name, tensor in found.state_dict().items())
    ids = torch.arange(11)[None]
    torch.testing.assert_close(found(ids).logits, module(ids).logits, rtol=1e-5, atol=1e-5)  # another attention
    capsys.readouterr()
    both = str(tmp_path / "own"), str(tmp_path / "out")
    assert main(["verify", *both]) == 0  # whatever the two call their tensors
    assert "note: configuration: family is" in capsys.readouterr().out
    with torch.no_grad():
        next(iter(found.parameters()))[3, 5] += 1
    found.save_pretrained(tmp_path / "out")
    assert main(["verify", "--no-logits", *both]) == 1
    said = capsys.readouterr().out
    assert "1 differ" in said and "embed_tokens/embedding" in said and "only in" not in said


def test_inspect_names_the_architecture_and_the_part_that_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files("chatglm", "plain", tmp_path / "own")
    assert main(["inspect", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().out
    assert "ChatGLMModel: L 3" in said and "h 8, rope default 500000 on 4 dims" in said


def test_an_architecture_that_computes_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files("baichuan", "2-7b", tmp_path / "own")
    assert main(["hf-to-jax", str(tmp_path / "own"), str(tmp_path / "jax")]) == 0
    for name, words in (
        ("LlamaForCausalLM", "LlamaForCausalLM has no place for normed_head True"),
        ("mistral", "MistralForCausalLM has no place for normed_head True"),
        ("NewForCausalLM", "'NewForCausalLM' is not supported; supported: LlamaForCausalLM"),
    ):
        assert main(["jax-to-hf", str(tmp_path / "jax"), str(tmp_path / "out"), "--architecture", name]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="architecture: 'llama' is for models that are written as hf"):
        convert(tmp_path / "own", tmp_path / "out", "jax", architecture="llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("chatglm2-6b", 6.24),
        ("internlm2-1.8b", 1.89),
        ("internlm2-7b", 7.74),
        ("internlm2-20b", 19.86),
        ("internlm3-8b", 8.80),
        ("baichuan-7b", 7.00),
        ("baichuan-13b", 13.26),
        ("baichuan2-7b", 7.51),
        ("baichuan2-13b", 13.90),
        ("glm-4-9b-0414", 9.40),
        ("glm-4-32b-0414", 32.57),
        ("phi-3-mini-4k", 3.82),
        ("phi-4", 14.66),
        ("yi-34b", 34.39),
        ("deepseek-llm-67b", 67.43),
    ],
)
def test_published_numbers_of_parameters(shape: str, billions: float) -> None:
    assert round(num_params(SHAPES[shape]) / 1e9, 2) == billions


# --- ChatGLM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"rope_ratio": 0}, "rope_ratio is 0; expected a positive number"),
        ({"num_layers": None}, "missing: num_layers"),
        ({"ffn_hidden_size": -1}, "ffn_hidden_size is -1"),
    ],
)
def test_what_chatglm_does_not_compute_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_config(OWN["chatglm"]["plain"] | values)


def test_heads_of_chatglm_without_groups() -> None:
    assert small_spec("chatglm", multi_query_attention=False).attention.num_kv_heads == 4
    named = small_spec("chatglm", architectures=["ChatGLMForConditionalGeneration"])
    assert named == small_spec("chatglm", architectures=None) == small_spec("chatglm")


# --- Baichuan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2-7b", "2-13b"])
@pytest.mark.slow
def test_baichuan_computes_what_its_description_says(variant: str) -> None:
    check_family("baichuan", variant)


def test_a_row_of_zeros_in_a_normalised_head() -> None:
    """As PyTorch: it stays zeros, and its gradient is that of a division by the smallest length."""
    spec = small_spec("baichuan", "2-7b")
    x, rows = (
        np.random.default_rng(n).normal(size=shape).astype(np.float32) for n, shape in ((0, (1, 16)), (1, (37, 16)))
    )
    rows[5] = 0.0
    weight, states = torch.from_numpy(rows).requires_grad_(), torch.from_numpy(x)
    states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + spec.norm.eps)
    logits = states @ torch.nn.functional.normalize(weight).T
    logits.logsumexp(-1).sum().backward()

    def total(head: jax.Array) -> jax.Array:
        params = {"norm": {"scale": np.ones(16, np.float32)}, "lm_head": {"kernel": head}}
        return jax.nn.logsumexp(Decoder(spec).apply({"params": params}, x, method="head"))

    grad = jax.grad(total)(rows)
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(np.delete(grad, 5, 0), np.delete(weight.grad.numpy(), 5, 0), rtol=1e-4, atol=1e-6)


def test_what_tells_the_models_of_baichuan_apart() -> None:
    def kind(**more: Any) -> tuple[bool, bool]:
        spec = small_spec("baichuan", "2-7b", **more)
        return spec.attention.alibi, spec.normed_head

    assert kind() == (False, True)
    assert kind(max_position_embeddings=None) == (True, True)
    assert kind(z_loss_weight=None) == (False, False)
    assert kind(z_loss_weight=None, vocab_size=125696) == (False, True)
    assert kind(architectures=["BaiChuanForCausalLM"]) == (False, True)
    for values, words in (
        (dict(max_position_embeddings=None, model_max_length=None), "neither max_position_embeddings"),
        (dict(hidden_size=5120), "says rotary positions, but a hidden_size of 5120"),
        (dict(z_loss_weight=0.1), "z_loss_weight is 0.1"),
    ):
        with pytest.raises(UserError, match=words):
            kind(**values)
