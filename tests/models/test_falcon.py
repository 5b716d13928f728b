"""Falcon against transformers' own, and its older config.json."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config import Decoding, LoraConfig, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import SHAPES, read_config, write_config
from jaxlm.weights.names import num_params
from tests.models.compare import TreeSource
from tests.models.parity import check_family
from tests.models.small import SMALL, hf_config, hf_model, small_spec, tree_of
from tests.models.test_matrix import BY_ROUNDING, steps_on_one_batch


@pytest.mark.parametrize("variant", list(SMALL["falcon"])[1:])  # test_matrix.py has the first
@pytest.mark.slow
def test_falcon_is_that_of_transformers(variant: str) -> None:
    check_family("falcon", variant)


def test_variants_are_told_apart() -> None:
    layers = {variant: small_spec("falcon", variant).uniform_layer for variant in SMALL["falcon"]}
    assert {name: (layer.attention.num_kv_heads, layer.parallel) for name, layer in layers.items()} == {
        "7b": (1, "shared_norm"),
        "40b": (2, "own_norm"),
        "11b": (2, "shared_norm"),
        "by_head": (4, None),
    }
    # Two norms are what a config that says nothing of them means.
    assert small_spec("falcon", "40b", num_ln_in_parallel_attn=None) == small_spec("falcon", "40b")


RW: dict[str, Any] = {
    "architectures": ["RWForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "bias": False,
    "layer_norm_epsilon": 1e-05,
    "parallel_attn": True,
    "vocab_size": 65024,
}


def test_a_config_from_before_falcon_was_in_transformers() -> None:
    small = dict(model_type="RefinedWebModel", hidden_size=4544, n_head=71, n_layer=32, multi_query=True)
    large = dict(model_type="RefinedWeb", hidden_size=8192, n_head=128, n_head_kv=8, n_layer=60)
    assert read_config(RW | small) == SHAPES["falcon-7b"]
    assert read_config(RW | large) == SHAPES["falcon-40b"]


@pytest.mark.parametrize("name", [name for name, spec in SHAPES.items() if spec.family == "falcon"])
def test_published_shapes_there_and_back(name: str) -> None:
    assert read_config(write_config(SHAPES[name], "bfloat16")) == SHAPES[name]


def test_published_shapes_have_as_many_parameters_as_is_said_of_them() -> None:
    assert num_params(SHAPES["falcon-7b"]) == 6_921_720_704
    assert 11.0e9 < num_params(SHAPES["falcon-11b"]) < 11.2e9
    assert 41.2e9 < num_params(SHAPES["falcon-40b"]) < 41.4e9
    assert 178e9 < num_params(SHAPES["falcon-180b"]) < 180e9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alibi": True}, "alibi is True, with which FalconForCausalLM is not supported"),
        ({"bias": 1}, "bias is 1; expected true or false"),
        ({"parallel_attn": 0}, "parallel_attn is 0; expected true or false"),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn is false"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2 without new_decoder_architecture"),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        ({"multi_query": False, "num_kv_heads": 2}, "num_kv_heads is 2; without multi_query it is 4"),
        ({"ffn_hidden_size": -1}, "ffn_hidden_size is -1"),
        ({"activation": "tanh"}, "activation 'tanh' is not supported"),
        ({"n_layer": 5}, "num_hidden_layers is 3 and n_layer is 5; they mean the same"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
    ],
)
def test_a_switch_that_is_not_served_is_refused(values: dict[str, Any], message: str) -> None:
    config = hf_config("falcon").to_dict() | {"architectures": ["FalconForCausalLM"]}
    with pytest.raises(UserError, match=message):
        read_config(config | values)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tensor"), [("falcon", 2), ("falcon", 4), ("llama", 4)])
def test_devices_share_kv_heads(family: str, tensor: int) -> None:
    """One or two kv heads over more devices: tokens, and the steps of training with an adapter, of one device."""
    spec = small_spec(family)
    assert tensor % spec.attention.num_kv_heads == 0 < tensor - spec.attention.num_kv_heads
    params = tree_of(dict(hf_model(family).named_parameters()), spec)
    model, prompts = Decoder(spec), [[5, 9, 30, 7, 8], [11, 3]]
    answers = []
    for devices in (1, tensor):
        mesh = make_mesh(MeshConfig(fsdp=1, tensor=devices), jax.devices()[:devices])
        generator = Generator(model, load_weights(model, mesh, TreeSource(params)), mesh, ())
        found = generator.generate(prompts, Decoding(max_new_tokens=8))
        answers.append([answer.ids for each in found for answer in each])
    assert answers[0] == answers[1] and len({*answers[0][0]}) > 1
    lora = LoraConfig(rank=2, alpha=8.0, targets=("all-linear",))
    (wanted, one), (losses, many) = (
        steps_on_one_batch(spec, lora, params, {"fsdp": 1, "tensor": devices}) for devices in (1, tensor)
    )
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=BY_ROUNDING), many, one)
