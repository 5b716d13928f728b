"""The description of a decoder: where its layers' weights lie, what it refuses, and its JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from jaxlm.errors import UserError
from jaxlm.spec import (
    AttentionSpec,
    DecoderSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    LearnedPositionsSpec,
    NormSpec,
    RelativeBiasSpec,
    RopeSpec,
    is_stacked,
)

LOCAL = LayerSpec(AttentionSpec(4, 2, 8, window=16, qk_norm=NormSpec(1e-6)), FeedForwardSpec(48))
GLOBAL = LayerSpec(
    AttentionSpec(4, 2, 8, rope=RopeSpec("linear", factor=2.0)),
    FeedForwardSpec(48, experts=ExpertsSpec(4, "learned", ("text", "smiles"), ((10, 20),), (1, 2), layout="mixtral")),
)


def spec(period: tuple[LayerSpec, ...] = (LOCAL, LOCAL, GLOBAL), layers: int = 8) -> DecoderSpec:
    return DecoderSpec("llama", 100, 32, layers, period, eos_token_id=(2, 3))


def test_one_description_is_one_stack() -> None:
    (stack,) = spec((LOCAL,), 5).stacks
    assert (stack.path, stack.layer, list(stack.numbers)) == ("layers", LOCAL, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("layers", range(10))
def test_stacks_hold_every_layer_once_with_its_description(layers: int) -> None:
    made = spec(layers=layers)
    found = {number: stack.layer for stack in made.stacks for number in stack.numbers}
    assert [found[number] for number in range(layers)] == list(made.layers())
    assert sum(len(stack.numbers) for stack in made.stacks) == layers
    assert all(is_stacked(f"{stack.path}/self_attn/q_proj/kernel") for stack in made.stacks)
    assert not any(map(is_stacked, ("embed_tokens/embedding", "norm/scale", "modules_to_save/norm/scale")))


def test_layers_after_the_last_whole_period_lie_in_the_tail() -> None:
    places = {stack.path: list(stack.numbers) for stack in spec(layers=8).stacks}
    assert places == {"layers/0": [0, 3], "layers/1": [1, 4], "layers/2": [2, 5], "tail/0": [6], "tail/1": [7]}


def test_json_there_and_back() -> None:
    made = spec()
    again = DecoderSpec.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made and again.experts is not None and again.experts.layout == "mixtral"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(hidden=3), r"^model\.hidden: no such field; did you mean 'hidden_size'"),
        (lambda v: v.pop("family"), r"^model\.family: is missing"),
        (
            lambda v: v["period"][1]["attention"].update(num_heads="4"),
            r"^model\.period\[1\]\.attention\.num_heads is '4'",
        ),
        (
            lambda v: v["period"][1]["attention"].update(num_heads=3),
            r"^model\.period\[1\]\.attention: .*not a multiple",
        ),
        (lambda v: v["period"][0]["attention"]["rope"].update(rope_type="yarn"), r"\.rope: .*'yarn' needs a 'factor'"),
        (lambda v: v["period"][2]["feed_forward"]["experts"].update(num_experts=5), "does not divide the 48 neurons"),
        (lambda v: v["period"][0]["attention"].update(alibi=True), "rotary positions or alibi, not both"),
        (lambda v: v["period"][0]["attention"].update(rope=None, rotary_dim=4), "but rope is null"),
        (lambda v: v["period"][0]["attention"].update(relative_bias={}), "a relative bias has no other positions"),
        (lambda v: v["period"][0]["attention"].update(relative_bias={"num_buckets": 6}), "relative_bias: .* 4 divides"),
        (
            lambda v: v["period"][0]["attention"].update(rope=None, relative_bias={"max_distance": 16}),
            "32 buckets up to distance 16: .* half of it is below the distance",
        ),
        (lambda v: v["period"][0]["attention"].update(soft_cap=0), "soft_cap is 0; expected a positive number"),
        (lambda v: v.update(logits_soft_cap=-1.0), "logits_soft_cap is -1.0; expected a positive number"),
        (lambda v: v.update(logits_scale=0.0), "logits_scale is 0.0; expected a positive number"),
        (lambda v: v["period"][0].update(residual_scale=-0.2), "residual_scale is -0.2; expected a positive number"),
        (lambda v: v.update(learned_positions={"num_rows": 2, "offset": 2}), "learned_positions: .*below offset 2"),
        (lambda v: v["period"][0].update(norms="after"), "norms 'after' is not one of pre, post, both"),
        (lambda v: v["period"][0].update(norms="post", parallel="own_norm"), "norms 'post' has none"),
        (lambda v: v["period"][0]["attention"].update(qk_norm_over="layer"), "'layer' is not one of head, all"),
        (lambda v: v.update(vocab_size=0), "vocab_size is 0; expected a positive number"),
        (lambda v: v.update(period=[]), "period is empty"),
        (lambda v: v.update(period=v["period"][:1] * 2), "period repeats one description"),
    ],
)
def test_json_that_describes_no_decoder_is_refused_by_field(change: Any, message: str) -> None:
    values = json.loads(json.dumps(spec().to_dict()))
    change(values)
    with pytest.raises(UserError, match=message):
        DecoderSpec.from_dict(values)


def test_layers_that_differ_have_no_uniform_description() -> None:
    assert spec((LOCAL,)).uniform_layer == LOCAL
    with pytest.raises(UserError, match="layers differ"):
        _ = spec().uniform_layer


def test_fields_that_older_files_do_not_have_change_nothing() -> None:
    values = json.loads(json.dumps(spec().to_dict()))
    del values["logits_soft_cap"], values["learned_positions"], values["logits_scale"]
    for layer in values["period"]:
        del layer["norms"], layer["residual_scale"]
        for name in ("scale", "soft_cap", "alibi", "qk_norm_over", "relative_bias"):
            del layer["attention"][name]
    assert DecoderSpec.from_dict(values) == spec()


def test_other_positions_there_and_back() -> None:
    made = dataclasses.replace(spec((LOCAL,)), learned_positions=LearnedPositionsSpec(100, 2))
    made = made.with_attention(rope=None)
    assert made.max_length == 98
    assert DecoderSpec.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    made = spec((LOCAL,)).with_attention(rope=None, relative_bias=RelativeBiasSpec(8, 20))
    assert DecoderSpec.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    made = spec((LOCAL,)).with_attention(rope=None, alibi=True)
    assert DecoderSpec.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.max_length == 2048
    with pytest.raises(UserError, match="without rotary positions"):
        _ = made.attention.rotary


def test_experts_are_set_and_removed_in_every_layer() -> None:
    experts = spec().experts
    assert experts is not None and spec().learned_router
    dense = spec().with_experts(None)
    assert dense.experts is None and not dense.learned_router
    assert all(layer.feed_forward.experts == experts for layer in dense.with_experts(experts).period)


def test_one_division_into_experts_for_all_layers() -> None:
    other = dataclasses.replace(GLOBAL.feed_forward, experts=ExpertsSpec(2, "learned", top_k=(1,)))
    with pytest.raises(UserError, match="must share one division"):
        spec((GLOBAL, dataclasses.replace(GLOBAL, feed_forward=other)))


def test_rope_scaling_stretches_the_longest_row() -> None:
    assert spec((LOCAL,)).max_length == 2048
    assert spec((GLOBAL,)).max_length == 4096
    assert spec().max_length == 2048
