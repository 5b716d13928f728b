"""Families that transformers has no module of: their files against a module there that computes the same.

A state dict of that module is renamed by hand as the family's own code names it. Where jaxlm takes the same description
and the same parameters from it, it computes what the module does, to which its family is held elsewhere.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file
from safetensors.torch import save_file

from convert.commands.main import main
from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.inference.model import unstack
from jaxlm.models import streamed
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import read_config
from jaxlm.models.unrolled import next_logits, prefill
from jaxlm.spec import RopeSpec
from jaxlm.weights.names import leaf_shapes
from tests.models.compare import assert_trees_close
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
def test_files_there_and_back_have_their_own_names(family: str, variant: str, tmp_path: Path) -> None:
    _, state = write_files(family, variant, tmp_path / "own")
    assert main(["hf-to-jax", str(tmp_path / "own"), str(tmp_path / "jax")]) == 0
    assert main(["jax-to-hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), name)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert read_config(config) == small_spec(family, variant)


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


def chatglm_logits(state: State, config: dict[str, Any], ids: Any) -> Any:
    """Logits [T, V] of tokens [T] as the release's code computes them, written from its description."""
    heads, groups, h = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    length = len(ids)

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"]) * state[f"{name}.weight"]

    def turned(x: Any) -> Any:
        # The first half of each head, in pairs of neighbours; the second half as it is.
        half, out = h // 2, x.clone()
        for pair in range(half // 2):
            angle = torch.arange(length)[:, None] * (10000 * config["rope_ratio"]) ** (-2 * pair / half)
            first, second = x[..., 2 * pair], x[..., 2 * pair + 1]
            out[..., 2 * pair] = first * angle.cos() - second * angle.sin()
            out[..., 2 * pair + 1] = second * angle.cos() + first * angle.sin()
        return out

    x = state["transformer.embedding.word_embeddings.weight"][ids]
    for number in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{number}"
        fused = f"{at}.self_attention.query_key_value"
        rows = norm(x, f"{at}.input_layernorm") @ state[f"{fused}.weight"].T + state[f"{fused}.bias"]
        q, k, v = rows.split([heads * h, groups * h, groups * h], dim=-1)
        q, k, v = (part.reshape(length, -1, h) for part in (q, k, v))
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (turned(k), v))
        scores = torch.einsum("qnh,knh->nqk", turned(q), k) / h**0.5
        seen = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        out = torch.einsum("nqk,knh->qnh", seen, v).reshape(length, -1)
        x = x + out @ state[f"{at}.self_attention.dense.weight"].T
        rows = norm(x, f"{at}.post_attention_layernorm") @ state[f"{at}.mlp.dense_h_to_4h.weight"].T
        gate, up = rows.chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * up) @ state[f"{at}.mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm") @ state["transformer.output_layer.weight"].T


def params_of(source: Any) -> dict[str, Any]:
    """All leaves of a model in files as a tree."""
    leaves = {path: source.read(path, ()) for path in source.leaves}
    return dict(traverse_util.unflatten_dict(leaves, sep="/"))


def test_chatglm_computes_what_its_description_says(tmp_path: Path) -> None:
    _, state = write_files("chatglm", "plain", tmp_path / "own")
    source = open_model(tmp_path / "own")
    ids = np.random.default_rng(0).integers(0, 37, 11)
    expected = chatglm_logits(state, OWN["chatglm"]["plain"], torch.from_numpy(ids)).numpy()
    found = Decoder(source.config).apply({"params": params_of(source)}, ids[None])
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# --- Baichuan --------------------------------------------------------------------------------------------------------


def baichuan_logits(state: State, config: dict[str, Any], ids: Any) -> Any:
    """Logits [T, V] of tokens [T] as the code of Baichuan-13B and Baichuan 2 computes them, from its description."""
    heads, length, alibi = config["num_attention_heads"], len(ids), "max_position_embeddings" not in config
    places = torch.arange(length)

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * state[f"{name}.weight"]

    def turned(x: Any) -> Any:
        angles = places[:, None] * 10000 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = state["model.embed_tokens.weight"][ids]
    for number in range(config["num_hidden_layers"]):
        at = f"model.layers.{number}"
        rows = norm(x, f"{at}.input_layernorm") @ state[f"{at}.self_attn.W_pack.weight"].T
        q, k, v = (part.reshape(length, heads, -1) for part in rows.chunk(3, dim=-1))
        if not alibi:
            q, k = turned(q), turned(k)
        scores = torch.einsum("qnh,knh->nqk", q, k) / q.shape[-1] ** 0.5
        if alibi:
            slopes = torch.tensor([2 ** (-8 * (head + 1) / heads) for head in range(heads)])
            scores = scores - slopes[:, None, None] * (places[:, None] - places[None])
        seen = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("nqk,knh->qnh", seen, v).reshape(length, -1) @ state[f"{at}.self_attn.o_proj.weight"].T
        inner = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (inner @ state[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ state[f"{at}.mlp.down_proj.weight"].T
    head = state["lm_head.weight"]
    return norm(x, "model.norm") @ (torch.nn.functional.normalize(head) if "z_loss_weight" in config else head).T


@pytest.mark.parametrize("variant", ["13b", "2-7b", "2-13b"])
def test_baichuan_computes_what_its_description_says(variant: str, tmp_path: Path) -> None:
    """Logits of every runner, the loss and all gradients; a head with a row of zeros."""
    _, state = write_files("baichuan", variant, tmp_path / "own")
    config, spec = OWN["baichuan"][variant], small_spec("baichuan", variant)
    state["lm_head.weight"][5] = 0.0
    for tensor in state.values():
        tensor.requires_grad_()
    ids = np.random.default_rng(0).integers(0, 37, 11)
    given = baichuan_logits(state, config, torch.from_numpy(ids))
    expected, params, model = given.detach().numpy(), tree_of(state, spec), Decoder(spec)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * np.abs(expected).max())
    loss = torch.nn.functional.cross_entropy(given[:-1], torch.from_numpy(ids[1:]), reduction="sum")
    loss.backward()

    def total(params: Any) -> tuple[jax.Array, jax.Array]:
        out = model.apply({"params": params}, ids[None], np.ones((1, 11), np.float32), method="loss")
        return out.loss, model.apply({"params": params}, ids[None])

    (value, logits), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert_close(logits[0], expected)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    wanted = tree_of({name: tensor.grad for name, tensor in state.items()}, spec)
    assert_trees_close(grads, wanted, 1e-4)
    weights = unstack({"params": params}, spec)
    first, caches = prefill(model, weights, jnp.asarray(ids[None, :7]), jnp.array([7]), 16)
    then, _ = next_logits(model, weights, caches, jnp.asarray(ids[7:8]), jnp.array([7]))
    assert_close(np.concatenate([first, then]), expected[6:8])
    by_path = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(params).items()}
    assert_close(streamed.logits(spec, lambda path, index: by_path[path][index], ids[None])[0], expected)


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
