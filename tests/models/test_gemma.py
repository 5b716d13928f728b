"""Gemma, Gemma 2 and Gemma 3's text models against transformers' own, and what their config.json may say."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from jaxlm.errors import UserError
from jaxlm.models.families import read_config, write_config
from jaxlm.spec import DecoderSpec, RopeSpec
from tests.models.parity import check_family
from tests.models.small import SMALL

transformers = pytest.importorskip("transformers")

# The plain ones: test_matrix.py.
CASES = [(family, variant) for family in ("gemma", "gemma2", "gemma3_text") for variant in [*SMALL[family]][1:]]


@pytest.mark.parametrize(("family", "variant"), CASES)
@pytest.mark.slow
def test_gemma_is_that_of_transformers(family: str, variant: str) -> None:
    check_family(family, variant)


def read(family: str, **more: Any) -> DecoderSpec:
    """Of a config.json with these keys beside the sizes; None takes a key away."""
    sizes = {key: SMALL["qwen2"]["plain"][key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    values = sizes | dict(num_hidden_layers=8, num_attention_heads=16, model_type=family) | more
    return read_config({key: value for key, value in values.items() if value is not None})


def windows(spec: DecoderSpec) -> str:
    return "".join("F" if layer.attention.window is None else "s" for layer in spec.layers())


def test_gelu_in_a_file_of_the_first_gemma_is_the_approximation() -> None:
    for activation in ("gelu", "gelu_pytorch_tanh", None):
        assert read("gemma", hidden_act=activation).feed_forward.activation == "gelu_tanh"
    assert transformers.AutoConfig.for_model("gemma", hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"


def test_layers_with_a_window_are_those_of_transformers() -> None:
    """By default, by the pattern of older files, and by name."""
    assert windows(read("gemma2")) == "sFsFsFsF"
    assert windows(read("gemma3_text")) == "sssssFss"
    assert windows(read("gemma3_text", sliding_window_pattern=3)) == "ssFssFss"
    types = ["full_attention", *["sliding_attention"] * 3] * 2
    assert windows(read("gemma3_text", layer_types=types, sliding_window_pattern=3)) == "FsssFsss"
    assert len(read("gemma3_text", layer_types=types).period) == 4
    for more in (dict(), dict(sliding_window_pattern=3), dict(layer_types=types)):
        theirs = transformers.AutoConfig.for_model("gemma3_text", num_hidden_layers=8, **more)
        found = [layer.attention.window is not None for layer in read("gemma3_text", **more).layers()]
        assert found == [kind == "sliding_attention" for kind in theirs.layer_types]


def test_layers_in_no_short_period_are_refused() -> None:
    kinds = ["full_attention" if layer == 20 else "sliding_attention" for layer in range(40)]
    with pytest.raises(UserError, match="not in a pattern that repeats every 16 layers or less"):
        read("gemma3_text", num_hidden_layers=40, layer_types=kinds)
    assert read("gemma3_text", num_hidden_layers=16, layer_types=kinds[10:26]).num_layers == 16


FAR, NEAR = RopeSpec(rope_theta=1e6), RopeSpec(rope_theta=1e4)
LINEAR = {"rope_type": "linear", "factor": 8.0}
FAR8 = RopeSpec("linear", 1e6, factor=8.0)


@pytest.mark.parametrize(
    ("more", "far", "near"),
    [
        ({}, FAR, NEAR),
        ({"rope_theta": 5e5, "rope_local_base_freq": 7}, RopeSpec(rope_theta=5e5), RopeSpec(rope_theta=7.0)),
        ({"rope_scaling": LINEAR}, FAR8, NEAR),
        ({"rope_parameters": {"full_attention": LINEAR}}, FAR8, NEAR),
        ({"rope_parameters": {"sliding_attention": LINEAR | {"rope_theta": 9.0}}}, FAR, RopeSpec("linear", 9.0, 8.0)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 9.0}}, "rope_theta": 3}, RopeSpec(rope_theta=9.0), NEAR),
    ],
)
def test_rotary_positions_of_both_kinds_of_layers(more: dict[str, Any], far: RopeSpec, near: RopeSpec) -> None:
    found = read("gemma3_text", **more)
    assert {layer.attention.window: layer.attention.rope for layer in found.layers()} == {None: far, 4096: near}
    written = write_config(found, "float32")
    assert read_config(written) == found
    others = {key: value for key, value in written.items() if not key.startswith("rope_")}
    for values in (written, others | copy.deepcopy(more)):  # their class changes what it is given
        whole = transformers.AutoConfig.for_model("gemma3_text").from_dict(values).to_dict()
        assert read_config(whole) == found


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has the keys rope_theta; expected"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention is 3"),
        ({"rope_parameters": {"full_attention": {"rope_type": "new"}}}, "rope_type 'new' is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True, with which"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, with which"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; expected a positive number"),
        ({"hidden_activation": "tanh"}, "hidden_activation 'tanh' is not supported"),
        ({"layer_types": ["sliding_attention"] * 7}, "one name for each of the 8 layers"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
            r"'Gemma3ForConditionalGeneration' is not supported: it sees images too; save its text .*save_pretrained",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read("gemma3_text", **more)


def test_query_pre_attn_scalar_comes_back_as_the_whole_number_that_it_was() -> None:
    for scalar in (144, 168, 224, 256, 3):
        written = write_config(read("gemma2", query_pre_attn_scalar=scalar), "float32")["query_pre_attn_scalar"]
        assert (written, type(written)) == (scalar, int)
