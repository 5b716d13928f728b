"""Ministral and SmolLM3 against transformers' own, and what their config.json may say."""

from __future__ import annotations

from typing import Any

import pytest

from jaxlm.errors import UserError
from jaxlm.models.families import read_config, write_config
from jaxlm.spec import DecoderSpec
from tests.models.parity import check_family
from tests.models.small import SIZES

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(("family", "variant"), [("ministral", "everywhere"), ("smollm3", "windows")])
@pytest.mark.slow
def test_each_is_that_of_transformers(family: str, variant: str) -> None:
    check_family(family, variant)


def read(family: str, **more: Any) -> DecoderSpec:
    return read_config({"model_type": family, **SIZES, "num_hidden_layers": 8, **more})


def kinds(spec: DecoderSpec) -> str:
    """r: rotary positions, n: none; a capital for a layer with a window."""
    letters = [("n" if layer.attention.rope is None else "r", layer.attention.window) for layer in spec.layers()]
    return "".join(letter.upper() if window else letter for letter, window in letters)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "rrrnrrrn"),
        ({"no_rope_layer_interval": 3}, "rrnrrnrr"),
        ({"no_rope_layers": [0, 1] * 5}, "nrnrnrnr"),
        ({"use_sliding_window": True, "sliding_window": 5}, "rrrNrrrN"),
        ({"use_sliding_window": False, "sliding_window": 5}, "rrrnrrrn"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"] * 4,
            },
            "RrRnRrRn",
        ),
    ],
)
def test_layers_of_smollm3(more: dict[str, Any], expected: str) -> None:
    found = read("smollm3", **more)
    assert kinds(found) == expected
    theirs = transformers.AutoConfig.for_model("smollm3", num_hidden_layers=8, **more)
    assert [letter in "rR" for letter in expected] == [bool(turns) for turns in theirs.no_rope_layers[:8]]
    assert [letter in "RN" for letter in expected] == [kind == "sliding_attention" for kind in theirs.layer_types]
    assert read_config(write_config(found, "float32")) == found


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]; expected 1 for each of the 8 layers"),
        ("smollm3", {"no_rope_layers": [2] * 8}, "no_rope_layers is"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 8, "sliding_window": 5}, "use_sliding_window is false"),
        (
            "mistral",
            {"layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": 5},
            "the architecture MinistralForCausalLM has windows by layer",
        ),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 8, "sliding_window": 5},
            "5, which it would have",
        ),
        (
            "mistral3",
            {"architectures": ["Mistral3ForConditionalGeneration"]},
            r"'Mistral3ForConditionalGeneration' is not supported: it sees images too; .*save_pretrained",
        ),
        ("llama", {"no_rope_layers": [1] * 8}, "no_rope_layers is .* with which LlamaForCausalLM is not supported"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(family, **more)


def test_layer_types_of_mistral_that_say_what_it_computes_are_read() -> None:
    plain = read("mistral", sliding_window=5)
    assert read("mistral", sliding_window=5, layer_types=["sliding_attention"] * 8) == plain
    assert read("mistral", sliding_window=None, layer_types=["full_attention"] * 8).attention.window is None
