"""What a `config.json` says, against transformers' own configuration classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import FAMILIES, SHAPES, common, load_shape, read_config, write_config
from jaxlm.spec import DecoderSpec, NormSpec, RopeSpec, flatten
from tests.models import hf
from tests.models.small import SMALL, WITH_ENCODER

transformers = pytest.importorskip("transformers")

KINDS = {FAMILIES[name].architecture: name for name in SMALL}
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=64, intermediate_size=24, num_hidden_layers=2, num_attention_heads=32
)
NO_NULL_KV_HEADS = tuple(f"{name}ForCausalLM" for name in ("Qwen3Moe", "Ministral", "Mistral", "Gemma", "Glm", "Glm4"))
LAYERS_DIFFER = ("gemma2", "gemma3_text", "olmo3", "smollm3")  # by default, so that no field is that of all layers
OTHERS = (*LAYERS_DIFFER, *WITH_ENCODER)
WINDOWED = ("mistral", "ministral", "qwen2", "qwen3", "qwen3_moe", "phi3")  # whose configs have a sliding window
# jaxlm's name of each key of config.json.
FIELDS = {
    "num_key_value_heads": "attention.num_kv_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm.eps",
    "tie_word_embeddings": "tied_head",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "sliding_window": "attention.window",
}


def named(architecture: str, **values: Any) -> dict[str, Any]:
    """The usual keys as an architecture has them, without those that it has not."""
    keys = FAMILIES[KINDS[architecture]].keys
    return {keys.get(key, key): value for key, value in values.items() if keys.get(key, key)}


def theirs(architecture: str, **values: Any) -> Any:
    """transformers' reading of a config.json."""
    return transformers.AutoConfig.for_model(KINDS[architecture]).from_dict(json.loads(json.dumps(values)))


def ours(architecture: str, **values: Any) -> DecoderSpec:
    return read_config({"architectures": [architecture], "model_type": KINDS[architecture], **values})


def assert_same(found: DecoderSpec, want: Any) -> None:
    fields = flatten(found)
    keys = FAMILIES[found.family].keys
    for key, name in FIELDS.items():
        if not keys.get(key, key):
            continue
        value = getattr(want, keys.get(key, key), None)
        slides = "sliding_attention" in (getattr(want, "layer_types", None) or ["sliding_attention"])
        if key == "sliding_window" and not (slides and found.family in WINDOWED):
            value = None
        assert fields[name] == (tuple(value) if isinstance(value, list) else value), key
    if found.attention.rope is None:
        assert getattr(want, "rope_parameters", None) is None
        return
    expected = {key: value for key, value in want.rope_parameters.items() if key != "type"}
    attention = found.attention
    part = expected.pop("partial_rotary_factor", None) or 1.0
    assert (attention.rotary_dim or attention.head_dim) == int(attention.head_dim * part)
    given = {key: value for key, value in dataclasses.asdict(found.attention.rope).items() if value is not None}
    if found.attention.rope.rope_type == "yarn":  # where it is left open, both take max_position_embeddings
        given.setdefault("original_max_position_embeddings", found.max_position_embeddings)
    assert given == expected


@pytest.mark.parametrize("architecture", [name for name, family in KINDS.items() if family not in OTHERS])
def test_a_missing_key_means_what_it_means_to_transformers(architecture: str) -> None:
    """All missing at once, and each alone: null where transformers takes it."""
    sizes = named(architecture, **SIZES)
    if architecture == "FalconForCausalLM":
        sizes["new_decoder_architecture"] = True  # without, num_kv_heads is not read
    assert_same(ours(architecture, **sizes), theirs(architecture, **sizes))
    whole = sizes | named(
        architecture,
        num_key_value_heads=4,
        max_position_embeddings=77,
        rms_norm_eps=1e-3,
        tie_word_embeddings=True,
        initializer_range=0.5,
        bos_token_id=5,
        eos_token_id=[6, 7],
        pad_token_id=8,
        sliding_window=9,
        use_sliding_window=architecture.startswith("Qwen"),
        max_window_layers=0,
        rope_theta=123.0,
    )
    eos = ours(architecture, **whole).eos_token_id
    assert eos == (6, 7)
    for key in whole.keys() - sizes.keys():
        values = {name: value for name, value in whole.items() if name not in (key, "eos_token_id")}
        assert_same(ours(architecture, **values), theirs(architecture, **values))
    for key in named(architecture, num_key_value_heads=0, bos_token_id=0, pad_token_id=0, sliding_window=0):
        if key == "num_key_value_heads" and architecture in NO_NULL_KV_HEADS:
            continue  # transformers refuses it
        values = whole | {"eos_token_id": 6, key: None}
        assert_same(ours(architecture, **values), theirs(architecture, **values))


@pytest.mark.parametrize("family", SMALL)
def test_what_transformers_fills_in_is_what_a_missing_key_means(family: str) -> None:
    """All that a config.json may leave out at once, and each key of a small model alone."""
    architecture = FAMILIES[family].architecture
    # As many heads as defaults of the number of kv heads divide.
    small = next(iter(SMALL[family].values()))
    if family not in WITH_ENCODER:
        small = small | dict(hidden_size=64, num_attention_heads=32)
    sizes = {key: value for key, value in small.items() if key in hf_sizes(family)}
    for values in (sizes, *({name: small[name] for name in small if name != key} for key in small.keys() - sizes)):
        whole = theirs(architecture, **values).to_dict()
        assert ours(architecture, **values) == ours(architecture, **whole), small.keys() - values.keys()


def hf_sizes(family: str) -> set[str]:
    """What a family calls the keys that must be there."""
    return {FAMILIES[family].keys.get(key, key) for key in common.SIZES}


@pytest.mark.parametrize(
    ("more", "window"),
    [
        ({}, None),
        ({"use_sliding_window": True}, None),  # from layer 28 on, of 2
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 7}, 7),
        ({"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 7}, None),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2, "sliding_window": 7}, 7),
        ({"use_sliding_window": True, "max_window_layers": 21, "num_hidden_layers": 28}, "on 7 of 28 layers"),
        ({"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers is 'x'"),
        ({"use_sliding_window": True, "layer_types": 3}, "layer_types is 3"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 3}, "for each of the 2 layers"),
        ({"use_sliding_window": True, "layer_types": ["full_attention", "x"]}, "layer_types has 'x'"),
    ],
)
def test_windows_of_qwen2(more: dict[str, Any], window: int | str | None) -> None:
    if isinstance(window, str):
        with pytest.raises(UserError, match=window):
            ours("Qwen2ForCausalLM", **SIZES | more)
        return
    assert ours("Qwen2ForCausalLM", **SIZES, **more).attention.window == window
    want = theirs("Qwen2ForCausalLM", **SIZES, **more)
    slides = {kind == "sliding_attention" for kind in want.layer_types}
    assert slides == {window is not None}


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("more", "slides"),
    [
        ({"max_window_layers": 3}, "00011"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}, "10101"),
    ],
)
def test_windows_of_some_layers_are_a_period(architecture: str, more: dict[str, Any], slides: str) -> None:
    values = SIZES | dict(num_hidden_layers=5, use_sliding_window=True, sliding_window=7) | more
    found = ours(architecture, **values)
    assert [layer.attention.window for layer in found.layers()] == [7 if slide == "1" else None for slide in slides]
    assert len(found.period) == (5 if slides == "00011" else 2)
    written = write_config(found, "float32")
    assert read_config(written) == found
    want = theirs(architecture, **written)
    assert want.layer_types == theirs(architecture, **values).layer_types and want.sliding_window == 7


YARN = {"type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NEW = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": NEW, "rope_scaling": YARN},
        {"rope_parameters": NEW | {"rope_theta": 1e6}, "rope_theta": 5e5, "rope_scaling": YARN},
        {"rope_parameters": NEW | {"rope_theta": 1e6}, "rope_scaling": YARN | {"rope_theta": 1e6}},
        {"rope_parameters": YARN | {"factor": 2.0}, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope_parameters": YARN, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": YARN, "rope_scaling": None},
        {"rope_parameters": YARN, "rope_scaling": {}},
        {"rope_parameters": None, "rope_scaling": YARN | {"original_max_position_embeddings": 32}},
        {"rope_parameters": NEW | {"rope_theta": 1e6}, "rope_theta": 5e5},
        {"rope_parameters": {"factor": 2.0, "type": "linear"}, "rope_theta": 5e5},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "max_position_embeddings": 64},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "original_max_position_embeddings": 16},
        {"partial_rotary_factor": 1.0},
    ],
)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_both_spellings_of_rope(architecture: str, values: dict[str, Any]) -> None:
    """The same parameters as transformers takes, and again so from what is written."""
    found, want = ours(architecture, **SIZES, **values), theirs(architecture, **SIZES, **values)
    want.rope_parameters.pop("partial_rotary_factor", None)
    assert_same(found, want)
    written = write_config(found, "float32")
    assert read_config(written) == found
    assert_same(found, theirs(architecture, **written))


def test_a_rope_scaling_that_would_lose_theta_is_refused() -> None:
    """transformers replaces rope_parameters as a whole, and takes 10,000."""
    values = {"rope_parameters": NEW | {"rope_theta": 1e6}, "rope_scaling": YARN}
    assert theirs("LlamaForCausalLM", **SIZES, **values).rope_parameters["rope_theta"] == 10000
    with pytest.raises(UserError, match=r'"rope_theta": 1000000\.0 into rope_scaling'):
        ours("LlamaForCausalLM", **SIZES, **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": NEW | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": YARN, "rope_parameters": 3}, "rope_parameters is 3"),
        ({"rope_parameters": {"full_attention": NEW}}, "full_attention"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}, "rope_parameters": NEW}, "'longrope'"),
    ],
)
def test_rope_that_is_not_read_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ours("LlamaForCausalLM", **SIZES, **values)


def test_logits_with_yarn_switched_on_by_hand() -> None:
    """A config.json as transformers 5 writes it, with what model cards say added."""
    import torch

    model, _ = hf.build("LlamaForCausalLM", seed=3)
    saved = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    assert saved["rope_parameters"]["rope_type"] == "default"
    saved["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(json.loads(json.dumps(saved)))).eval()
    other.load_state_dict(model.state_dict())
    config = read_config(saved)
    tokens = np.arange(24)[None] % config.vocab_size
    with torch.no_grad():
        want = other(torch.tensor(tokens)).logits.numpy()
        plain = model(torch.tensor(tokens)).logits.numpy()
    found = Decoder(config, dtype=jnp.float32).apply({"params": hf.weights(other, config)}, jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(found), want, atol=1e-4)
    assert np.abs(plain - want).max() > 1e-2


def test_longest_row_of_yarn() -> None:
    config = SHAPES["llama-7b"].with_attention(rope=RopeSpec("yarn", factor=4.0))
    assert config.max_length == 4 * config.max_position_embeddings


# --- architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LLaMAForCausalLM", "YiForCausalLM"])
def test_other_names_of_llama(name: str) -> None:
    found = read_config({"architectures": [name], "model_type": "Yi", **SIZES})
    assert found.family == "llama"
    assert found == ours("LlamaForCausalLM", **SIZES)


@pytest.mark.parametrize("model_type", [*KINDS.values(), "Yi"])
def test_without_architectures_the_model_type_counts(model_type: str) -> None:
    family = "llama" if model_type == "Yi" else model_type
    assert read_config({"model_type": model_type, **SIZES}).family == family


def test_architectures_that_are_not_a_list_are_refused() -> None:
    # Ignored, the model_type would decide against what the file says.
    with pytest.raises(UserError, match="architectures is 'LlamaForCausalLM'; expected a list"):
        read_config({"architectures": "LlamaForCausalLM", "model_type": "qwen3", **SIZES})


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize(
    "values",
    [{"final_logit_softcapping": 30.0}, {"embedding_multiplier": 12}, {"use_qk_norm": True}, {"num_local_experts": 8}],
)
def test_a_key_that_changes_numbers_and_is_not_read_is_refused_by_name(
    architecture: str, values: dict[str, Any]
) -> None:
    (key,) = values
    if key in FAMILIES[KINDS[architecture]].reads:
        return
    with pytest.raises(UserError, match=f"{key} is .* with which {architecture} is not supported"):
        ours(architecture, **SIZES, **values)
    assert ours(architecture, **SIZES, **{key: None}) == ours(architecture, **SIZES)
    assert ours(architecture, **SIZES, scale_emb=1.0) == ours(architecture, **SIZES)


def test_an_unknown_architecture_is_refused_by_name() -> None:
    for values in ({"architectures": ["NewForCausalLM"]}, {"model_type": "NewForCausalLM"}):
        with pytest.raises(UserError, match="'NewForCausalLM' is not supported; supported: LlamaForCausalLM"):
            read_config({**values, **SIZES})
    with pytest.raises(UserError, match="family is 'new'; known: llama"):
        write_config(dataclasses.replace(SHAPES["llama-7b"], family="new"), "float32")


@pytest.mark.parametrize(
    ("architecture", "attention", "feed_forward"),
    [
        ("LlamaForCausalLM", {"qkv_bias": True}, {}),
        ("LlamaForCausalLM", {"window": 5}, {}),
        ("LlamaForCausalLM", {"scale": 0.5}, {}),
        ("LlamaForCausalLM", {"soft_cap": 50.0}, {}),
        ("LlamaForCausalLM", {"qk_norm": NormSpec()}, {}),
        ("MistralForCausalLM", {"qkv_bias": True, "o_bias": True}, {}),
        ("MistralForCausalLM", {}, {"bias": True}),
        ("Qwen2ForCausalLM", {"qkv_bias": False}, {}),
        ("Qwen2ForCausalLM", {"qkv_bias": True, "o_bias": True}, {}),
        ("Qwen3ForCausalLM", {"qk_norm": None}, {}),
        ("Qwen3ForCausalLM", {"qk_norm": NormSpec(1e-3)}, {}),
    ],
)
def test_what_an_architecture_has_no_key_for_is_not_written(
    architecture: str, attention: dict[str, Any], feed_forward: dict[str, Any]
) -> None:
    """A config.json that leaves it out would be that of another model."""
    spec = dataclasses.replace(SHAPES["llama-7b"], family=KINDS[architecture])
    spec = spec.with_attention(**attention).with_feed_forward(**feed_forward)
    with pytest.raises(UserError, match=f"{architecture} has no place for"):
        write_config(spec, "float32")


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_come_back(name: str, tmp_path: Path) -> None:
    config = SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, "bfloat16")))
    assert load_shape(str(tmp_path / "config.json")) == config
