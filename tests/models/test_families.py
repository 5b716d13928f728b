"""Every family's file against its module, and its names in transformers; what it can do: test_matrix.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from jaxlm.config import LoraConfig
from jaxlm.models import families
from jaxlm.models.adapters import resolve_lora, saveable
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.models.families import FAMILIES, read_config, write_config
from jaxlm.spec import DecoderSpec, ExpertsSpec, is_stacked
from jaxlm.weights.experts import own_experts
from jaxlm.weights.names import (
    adapter_leaves,
    fused_entries,
    hf_entries,
    leaf_shapes,
    model_leaves,
    num_params,
    peft_entries,
)
from tests.models.small import OWN, SMALL, VARIANTS, WITH_ENCODER, hf_config, hf_model, small_spec, whole_experts

EXPERTS = ExpertsSpec(4, "learned", top_k=(2,))
# Families whose feed-forward layers can be divided into experts, and whose layers are named as LLaMA's.
LIKE_LLAMA = ["llama", "mistral", "qwen2", "qwen3"]


def alternating(spec: DecoderSpec) -> DecoderSpec:
    """Five layers of a period of two: with other heads, neurons and experts in every second one."""
    (layer,) = spec.period
    attention = dataclasses.replace(layer.attention, num_kv_heads=4, head_dim=8, window=3)
    other = dataclasses.replace(layer.feed_forward, size=32, experts=EXPERTS)
    return dataclasses.replace(spec, num_layers=5, period=(layer, type(layer)(attention, other)))


def shapes(family: str) -> dict[str, DecoderSpec]:
    """Small models of a family: every variant and, where it can be so, of experts and with layers that differ."""
    specs = {variant: small_spec(family, variant) for variant in {**SMALL, **OWN}[family]}
    if family in LIKE_LLAMA:
        plain = small_spec(family)
        specs |= {"experts": plain.with_experts(EXPERTS), "alternating": alternating(plain)}
    return specs


CASES = [(family, shape) for family in FAMILIES for shape in shapes(family)]


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_rows_are_what_the_module_declares(family: str, shape: str) -> None:
    """Paths and shapes of every parameter and of every adapter leaf, and which dims of a kernel are its inputs."""
    spec = shapes(family)[shape]
    lora = LoraConfig(rank=3, targets=("all-linear",), dora=True)
    specs = resolve_lora(spec, lora)
    boxed = abstract_variables(Decoder(spec, specs))
    declared = {"lora": {}} | {
        name: {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
        for name, tree in nn.unbox(boxed).items()
    }
    assert leaf_shapes(spec) == declared["params"]
    assert {leaf.path: leaf.shape for leaf in adapter_leaves(spec, specs)} == declared["lora"]
    outside = {path for path in declared["params"] if not is_stacked(path)}
    assert outside == {row.path for rows in saveable(spec).values() for row in rows}
    if spec.experts is None:
        assert num_params(spec) == sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nn.unbox(boxed["params"])))


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_layers_of_a_period_are_stored_under_their_own_numbers(family: str) -> None:
    spec = alternating(small_spec(family))
    places = {entry.name: (entry.path, entry.layer) for entry in hf_entries(spec)}
    kernels = [places[f"model.layers.{number}.mlp.up_proj.weight"] for number in range(5)]
    assert kernels == [
        ("layers/0/mlp/up_proj/kernel", 0),
        ("layers/1/mlp/up_proj/kernel", 0),
        ("layers/0/mlp/up_proj/kernel", 1),
        ("layers/1/mlp/up_proj/kernel", 1),
        ("tail/0/mlp/up_proj/kernel", 0),
    ]
    assert places["model.layers.3.mlp.router.weight"] == ("layers/1/mlp/router", 1)
    assert "model.layers.2.mlp.router.weight" not in places
    names = [entry.name for entry in hf_entries(spec)]
    numbers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert numbers == sorted(numbers) and names[0] == "model.embed_tokens.weight" and names[-1] == "lm_head.weight"
    specs = resolve_lora(spec, LoraConfig(rank=2, targets=("q_proj",), rank_pattern={"layers.4.self_attn.q_proj": 1}))
    factors = {entry.name: (entry.path, entry.layer, entry.layout.stored) for entry in peft_entries(spec, specs)}
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    assert factors[stem.format(3)] == ("layers/1/self_attn/q_proj/lora_A", 1, (2, 16))
    assert factors[stem.format(4)] == ("tail/0/self_attn/q_proj/lora_A", 0, (1, 16))


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_names_are_those_of_transformers(family: str, variant: str) -> None:
    """Names and shapes of every tensor, and of every linear layer of the layers, which PEFT calls by them."""
    torch = pytest.importorskip("torch")
    model = hf_model(family, variant)
    spec = small_spec(family, variant)
    arrays = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    theirs = {name: array.shape for name, array in whole_experts(arrays).items()}
    fused = fused_entries(spec)
    parts = {part.name for whole in fused for part in whole.parts}
    ours = {entry.name: entry.layout.stored for entry in hf_entries(spec) if entry.name not in parts}
    ours |= {whole.name: whole.stored for whole in fused}
    assert ours == theirs
    modules = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    matrices = {name.removesuffix(".weight") for name, shape in ours.items() if len(shape) == 2}
    # Those of experts, and of routers, are no linear layers of transformers'.
    matrices -= {entry.whole.name.removesuffix(".weight") for entry in own_experts(spec)}
    matrices -= {entry.name.removesuffix(".weight") for entry in hf_entries(spec) if entry.path.endswith("/router")}
    outside = {row.hf_module for row in FAMILIES[family].rows if not row.in_layer}
    assert modules - outside == matrices - outside


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_a_config_written_anew_says_the_same_to_transformers(family: str, variant: str) -> None:
    spec = small_spec(family, variant)
    theirs = type(hf_config(family, variant))(**write_config(spec, "float32")).to_dict()
    assert read_config(theirs | {"architectures": [FAMILIES[family].architecture]}) == spec


@pytest.mark.parametrize("family", FAMILIES)
def test_model_json_there_and_back(family: str) -> None:
    for spec in shapes(family).values():
        assert DecoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_family_is_a_small_file() -> None:
    files = sorted(Path(families.__file__).parent.glob("*.py"))
    assert {file.stem for file in files} >= {*FAMILIES}
    for family in FAMILIES:
        text = (Path(families.__file__).parent / f"{family}.py").read_text()
        assert len(text.splitlines()) <= (150 if family not in WITH_ENCODER else 200), family
        own = FAMILIES[family].architecture  # ChatGLM-6B and its successors share one
        others = {other.architecture for other in FAMILIES.values()} - {own}
        assert not any(f'"{other}"' in text for other in others), family
    assert all(name == family.name for name, family in FAMILIES.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_of_a_published_shape_has_a_row(family: str) -> None:
    for spec in FAMILIES[family].shapes.values():
        assert spec.family == family
        assert sum(1 for _ in model_leaves(spec)) == len(leaf_shapes(spec))
