"""Sampling in batches, adapters, int8: what the engine must keep whatever the settings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Decoding, LoraConfig, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights, unstack
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.nn.weight_types import Int8Weight, StoredWeight
from jaxlm.spec import uniform_decoder
from tests.models.compare import random_tree

CONFIG = uniform_decoder(
    "llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


class TreeSource:
    """A tree of arrays, read like a checkpoint."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.leaves = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.leaves[path][index]


def one_device() -> Any:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def params(seed: int = 0) -> Any:
    import flax.linen as nn

    return random_tree(nn.unbox(abstract_variables(Decoder(CONFIG)))["params"], seed)


def generator(
    decoder: Decoder, tree: Any, adapter: Any = None, weight_type: type[StoredWeight] | None = None
) -> Generator:
    mesh = one_device()
    source = None if adapter is None else TreeSource(adapter)
    return Generator(decoder, load_weights(decoder, mesh, TreeSource(tree), source, weight_type), mesh, [2])


@pytest.fixture(scope="module")
def plain() -> Generator:
    return generator(Decoder(CONFIG), params())


PROMPTS = [[5, 9, 30], [7] * 20, [11, 3, 60, 61], [88]]
SAMPLING = Decoding(max_new_tokens=12, temperature=1.0, top_k=40, top_p=0.95, seed=3)


def test_the_same_seed_gives_the_same_text_on_any_batch_size(plain: Generator) -> None:
    together = plain.generate(PROMPTS, SAMPLING)
    alone = [plain.generate([prompt], SAMPLING, [number])[0] for number, prompt in enumerate(PROMPTS)]
    assert together == alone
    turned = plain.generate(PROMPTS[::-1], SAMPLING, [3, 2, 1, 0])
    assert turned[::-1] == together
    filled = plain.start(PROMPTS, SAMPLING, rows=7)
    list(filled.steps())
    assert filled.answers() == together


def test_another_seed_or_place_gives_another_text(plain: Generator) -> None:
    first = plain.generate([PROMPTS[0]], SAMPLING)
    assert plain.generate([PROMPTS[0]], Decoding(max_new_tokens=12, temperature=1.0, seed=4)) != first
    assert plain.generate([PROMPTS[0]], SAMPLING, [1]) != first


def test_samples_of_a_prompt_differ_and_the_first_is_that_of_one_sample(plain: Generator) -> None:
    from dataclasses import replace

    answers = plain.generate(PROMPTS[:2], replace(SAMPLING, samples=3))
    assert [len(row) for row in answers] == [3, 3]
    assert len({answer.ids for answer in answers[0]}) == 3
    # The first sample is what one sample gives.
    assert [row[0] for row in answers] == [row[0] for row in plain.generate(PROMPTS[:2], SAMPLING)]


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "o_proj", "down_proj")),
        LoraConfig(rank=4, targets=("k_proj", "up_proj"), rank_pattern={"layers.1.*": 2}, rslora=True),
        LoraConfig(rank=3, targets=("q_proj", "gate_proj"), dora=True),
    ],
    ids=["lora", "patterns", "dora"],
)
def test_an_adapter_on_the_fly_is_the_merged_model(lora: LoraConfig) -> None:
    """Against the training model with the same adapter, and against weights with W + AB formed by hand."""
    import flax.linen as nn

    specs = resolve_lora(CONFIG, lora)
    base = params(1)
    shapes = nn.unbox(abstract_variables(Decoder(CONFIG, specs)))["lora"]
    factors = random_tree(shapes, 2, 0.2)
    for name, spec in specs.items():
        parent = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        leaf = factors["layers"][parent][name]
        for layer, rank in enumerate(spec.ranks):
            leaf["lora_A"][layer][..., rank:] = 0
        if lora.dora:
            leaf["magnitude"] = np.abs(leaf["magnitude"]) + 1.0
    decoder = Decoder(CONFIG, specs)
    found = generator(decoder, base, factors)
    decoding = Decoding(max_new_tokens=8)
    answers = found.generate(PROMPTS, decoding)
    # Every token must be the best one that the training model sees after those before it.
    forward = jax.jit(Decoder(CONFIG, specs).apply)
    rows = np.zeros((len(PROMPTS), 32), np.int32)
    for row, (prompt, (answer,)) in enumerate(zip(PROMPTS, answers, strict=True)):
        rows[row, : len(prompt) + len(answer.ids)] = [*prompt, *answer.ids]
    best = np.argmax(forward({"params": base, "lora": factors}, rows), axis=-1)
    for row, (prompt, (answer,)) in enumerate(zip(PROMPTS, answers, strict=True)):
        assert tuple(best[row, len(prompt) - 1 : len(prompt) - 1 + len(answer.ids)]) == answer.ids
    merged = generator(Decoder(CONFIG), merged_by_hand(base, factors, specs, lora.dora))
    assert merged.generate(PROMPTS, decoding) == answers
    assert generator(Decoder(CONFIG), base).generate(PROMPTS, decoding) != answers


def merged_by_hand(base: Any, factors: Any, specs: Any, dora: bool) -> Any:
    tree = jax.tree.map(np.copy, base)
    for name, spec in specs.items():
        parent = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        leaf, kernel = factors["layers"][parent][name], tree["layers"][parent][name]["kernel"]
        for layer, scale in enumerate(spec.scales):
            weight = kernel[layer] + scale * np.tensordot(leaf["lora_A"][layer], leaf["lora_B"][layer], 1)
            if dora:
                inputs = tuple(range(2 if name == "o_proj" else 1))
                weight = weight * leaf["magnitude"][layer] / np.sqrt((weight**2).sum(inputs))
            kernel[layer] = weight
    return tree


def test_modules_saved_in_full_take_the_place_of_the_bases(plain: Generator) -> None:
    lora = LoraConfig(rank=2, targets=("q_proj",), modules_to_save=("lm_head",))
    specs = resolve_lora(CONFIG, lora)
    import flax.linen as nn

    factors = random_tree(nn.unbox(abstract_variables(Decoder(CONFIG, specs)))["lora"], 3)
    factors["layers"]["self_attn"]["q_proj"]["lora_B"][:] = 0
    head = np.random.default_rng(4).normal(0, 0.3, (CONFIG.vocab_size, CONFIG.hidden_size)).astype(np.float32)
    adapter = {**factors, "modules_to_save": {"lm_head": {"kernel": head}}}
    found = generator(Decoder(CONFIG, specs), params(), adapter)
    base = params()
    base["lm_head"]["kernel"] = head
    decoding = Decoding(max_new_tokens=6)
    assert found.generate(PROMPTS, decoding) == generator(Decoder(CONFIG), base).generate(PROMPTS, decoding)
    assert found.generate(PROMPTS, decoding) != plain.generate(PROMPTS, decoding)


def test_int8_is_the_model_with_rounded_weights() -> None:
    """Token by token what the float model gives with the weights that int8 stands for; memory is a quarter."""
    tree = params(5)
    rounded = jax.tree.map(np.copy, tree)
    for parent, names in (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        for name in names:
            kernel = rounded["layers"][parent][name]["kernel"]
            for layer in range(CONFIG.num_layers):
                stored = Int8Weight.of_array(kernel[layer], 2 if name == "o_proj" else 1)
                q, factor = stored.values, stored.factors
                assert q.dtype == np.int8 and np.abs(q).max() == 127
                np.testing.assert_allclose(q * factor, kernel[layer], atol=factor.max() / 2 + 1e-7)
                kernel[layer] = q * factor
    small = generator(Decoder(CONFIG), tree, weight_type=Int8Weight)
    decoding = Decoding(max_new_tokens=10)
    assert small.generate(PROMPTS, decoding) == generator(Decoder(CONFIG), rounded).generate(PROMPTS, decoding)
    kernel = small.weights["params"]["layers"][1]["self_attn"]["o_proj"]["kernel"]
    assert isinstance(kernel, Int8Weight) and kernel.values.dtype == jnp.int8


def test_int8_with_an_adapter_is_the_same_on_a_mesh() -> None:
    import flax.linen as nn

    specs = resolve_lora(CONFIG, LoraConfig(rank=4, targets=("q_proj", "down_proj"), dora=True))
    factors = random_tree(nn.unbox(abstract_variables(Decoder(CONFIG, specs)))["lora"], 6, 0.2)
    decoder = Decoder(CONFIG, specs)
    expected = generator(decoder, params(6), factors, Int8Weight).generate(PROMPTS, SAMPLING)
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    spread = load_weights(decoder, mesh, TreeSource(params(6)), TreeSource(factors), Int8Weight)
    assert Generator(decoder, spread, mesh, [2]).generate(PROMPTS, SAMPLING) == expected


def test_bfloat16_runs_and_keeps_its_caches_in_bfloat16() -> None:
    from jaxlm.models.unrolled import prefill

    decoder = Decoder(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    found = generator(decoder, params())
    assert all(answer.complete for row in found.generate(PROMPTS, SAMPLING) for answer in row)
    logits, caches = prefill(decoder, found.weights, jnp.ones((1, 16), jnp.int32), jnp.array([4]), 16)
    assert (logits.dtype, caches[0][0].dtype) == (jnp.float32, jnp.bfloat16)


def test_unstacked_weights_are_those_that_are_loaded() -> None:
    tree = params(7)
    loaded = load_weights(Decoder(CONFIG), one_device(), TreeSource(tree))
    jax.tree.map(np.testing.assert_array_equal, loaded, unstack({"params": tree}, CONFIG))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([5] * 128, "the prompt has 128 tokens, the model's context is 128"),
        ([3, -1], "token id -1, the model has 0 to 95"),
        ([96], "token id 96, the model has 0 to 95"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(plain: Generator, prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plain.generate([[5], prompt], SAMPLING)
