"""Adapters without PyTorch: merging, fresh adapters, dropout, padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder, with_saved_modules
from jaxlm.models.families import FAMILIES
from jaxlm.nn.linear import Linear
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import uniform_decoder
from tests.models.compare import random_tree

PARENT = {name: row.path.split("/")[0] for name, row in FAMILIES["llama"].linears.items()}
CONFIG = uniform_decoder(
    "llama", vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6
)
IDS = np.random.default_rng(0).integers(0, 64, (2, 10)).astype(np.int32)


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), IDS)
    return random_tree(nn.unbox(shapes)["params"], 1)


@pytest.fixture(scope="module")
def plain() -> Any:
    return jax.jit(Decoder(CONFIG).apply)


def fresh(model: Decoder, base: Any) -> Any:
    apply = jax.jit(lambda key: model.apply({"params": base}, IDS, rngs={"params": key}, mutable=["lora"]))
    return nn.unbox(apply(jax.random.key(5))[1]["lora"])


def merged(base: Any, lora: Any, specs: dict[str, LoraSpec]) -> Any:
    """W + scale A B, and DoRA's magnitude on top, layer by layer in float64."""
    tree = jax.tree.map(np.array, base)
    for name, spec in specs.items():
        kernel = tree["layers"][PARENT[name]][name]["kernel"]
        leaf = lora["layers"][PARENT[name]][name]
        for i in range(CONFIG.num_layers):
            if spec.ranks[i] == 0:
                continue
            a = np.asarray(leaf["lora_A"][i], np.float64).reshape(-1, spec.rank)
            b = np.asarray(leaf["lora_B"][i], np.float64).reshape(spec.rank, -1)
            weight = kernel[i].reshape(a.shape[0], b.shape[1]) + spec.scales[i] * a @ b
            if spec.dora:
                weight = weight * np.asarray(leaf["magnitude"][i]).reshape(-1) / np.linalg.norm(weight, axis=0)
            kernel[i] = weight.reshape(kernel[i].shape)
    return tree


@pytest.mark.parametrize("dora", [False, True])
def test_fresh_is_base_and_merged_is_unmerged(dora: bool, base: Any, plain: Any) -> None:
    settings = LoraConfig(rank=2, targets=("all-linear",), dora=dora, rank_pattern={"layers.1.self_attn.k_proj": 4})
    # Layer 2 carries no adapter (PEFT's layers_to_transform).
    specs = resolve_lora(CONFIG, settings, layers=(0, 1))
    model = Decoder(CONFIG, specs)
    lora = fresh(model, base)
    apply = jax.jit(model.apply)
    expected = plain({"params": base}, IDS)
    np.testing.assert_allclose(apply({"params": base, "lora": lora}, IDS), expected, rtol=0, atol=2e-5)

    key_a = lora["layers"]["self_attn"]["k_proj"]["lora_A"]
    assert np.any(key_a[1][:, 2:]) and not np.any(key_a[0][:, 2:]) and not np.any(key_a[2])
    assert not np.array_equal(key_a[0][:, :2], key_a[1][:, :2])  # layers draw their own numbers
    assert np.abs(key_a).max() <= 1 / np.sqrt(CONFIG.hidden_size)  # PEFT: kaiming_uniform(a=sqrt(5))

    noise = random_tree(lora, 2)
    for name, spec in specs.items():
        leaf = noise["layers"][PARENT[name]][name]
        for i, rank in enumerate(spec.ranks):
            leaf["lora_A"][i][..., rank:] = 0
            leaf["lora_B"][i][rank:] = 0
        if dora:
            leaf["magnitude"] = np.abs(leaf["magnitude"]) + 0.5
    unmerged = apply({"params": base, "lora": noise}, IDS)
    assert np.abs(unmerged - expected).max() > 0.1
    np.testing.assert_allclose(plain({"params": merged(base, noise, specs)}, IDS), unmerged, rtol=0, atol=5e-5)


def test_saved_modules_replace_the_base(base: Any, plain: Any) -> None:
    other = random_tree(base, 9)
    lora = {"modules_to_save": {"embed_tokens": other["embed_tokens"], "norm": other["norm"]}}
    variables = with_saved_modules(base, lora)
    assert set(variables) == {"params"}
    assert variables["params"]["layers"] is base["layers"]
    expected = plain({"params": {**base, "embed_tokens": other["embed_tokens"], "norm": other["norm"]}}, IDS)
    np.testing.assert_array_equal(plain(variables, IDS), expected)
    with pytest.raises(KeyError):  # a path that the base does not have
        with_saved_modules(base, {"modules_to_save": {"embeddings": {"embedding": np.zeros(3)}}})


def one_layer(spec: LoraSpec, x: np.ndarray, key: int | None, variables: Any, layer: int = 0) -> np.ndarray:
    module = Linear((8,), (6,), ("embed",), ("mlp",), adapter=spec)
    rngs = {} if key is None else {"dropout": jax.random.key(key)}
    return np.asarray(module.apply(variables, x, jnp.int32(layer), deterministic=key is None, rngs=rngs))


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_on_the_adapter_alone(dora: bool) -> None:
    rng = np.random.default_rng(0)
    spec = LoraSpec((2, 0), (1.5, 0.0), 0.5, dora)
    kernel = rng.normal(size=(8, 6)).astype(np.float32)
    lora = {"lora_A": rng.normal(size=(8, 2)), "lora_B": np.zeros((2, 6))}
    if dora:
        lora["magnitude"] = np.linalg.norm(kernel, axis=0)
    x = rng.normal(size=(4, 8)).astype(np.float32)
    variables = {"params": {"kernel": kernel}, "lora": lora}
    # A fresh adapter changes nothing, whatever is dropped; neither does a layer without one.
    np.testing.assert_allclose(one_layer(spec, x, 1, variables), x @ kernel, rtol=0, atol=1e-5)
    lora["lora_B"] = rng.normal(size=(2, 6))
    still = one_layer(spec, x, None, variables)
    assert np.abs(one_layer(spec, x, 1, variables) - still).max() > 0.1
    off = {
        "params": {"kernel": kernel},
        "lora": {k: np.zeros_like(v) if k != "magnitude" else v for k, v in lora.items()},
    }
    if dora:
        off["lora"]["magnitude"] = lora["magnitude"] * 2
    np.testing.assert_allclose(one_layer(spec, x, 1, off, layer=1), x @ kernel, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_keeps_the_mean(dora: bool) -> None:
    rng = np.random.default_rng(0)
    spec = LoraSpec((2,), (1.5,), 0.5, dora)
    kernel = rng.normal(size=(8, 6)).astype(np.float32)
    lora = {"lora_A": rng.normal(size=(8, 2)), "lora_B": rng.normal(size=(2, 6))}
    if dora:
        lora["magnitude"] = 1.5 * np.linalg.norm(kernel, axis=0)
    variables = {"params": {"kernel": kernel}, "lora": lora}
    row = rng.normal(size=(1, 8)).astype(np.float32)
    n = 40000
    samples = one_layer(spec, np.repeat(row, n, 0), 7, variables)
    expected = one_layer(spec, row, None, variables)[0]
    # Six standard errors of the mean.
    assert (np.abs(samples.mean(0) - expected) < 6 * samples.std(0) / np.sqrt(n)).all()
    assert samples.std(0).min() > 0.1


def test_dropout_is_fixed_by_its_key_and_differs_between_layers(base: Any) -> None:
    settings = LoraConfig(rank=2, targets=("q_proj", "down_proj"), dropout=0.5)
    model = Decoder(CONFIG, resolve_lora(CONFIG, settings))
    seen: list[np.ndarray] = []

    def record(mask: np.ndarray) -> np.ndarray:
        seen.append(np.array(mask))
        return seen[-1]

    class Recorded(nn.Module):
        rate: float

        @nn.compact
        def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
            mask = jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)
            return x * jax.pure_callback(record, mask, mask) * 2

    lora = random_tree(fresh(model, base), 3)
    apply = jax.jit(
        lambda key: model.apply({"params": base, "lora": lora}, IDS, deterministic=False, rngs={"dropout": key})
    )
    first = apply(jax.random.key(1))
    np.testing.assert_array_equal(first, apply(jax.random.key(1)))
    assert np.abs(first - apply(jax.random.key(2))).max() > 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.nn.linear.nn.Dropout", Recorded)
        again = jax.jit(
            lambda key: model.apply({"params": base, "lora": lora}, IDS, deterministic=False, rngs={"dropout": key})
        )
        jax.block_until_ready(again(jax.random.key(1)))
    masks = {m.tobytes() for m in seen}
    assert len(seen) == len(masks) == 2 * CONFIG.num_layers  # one for each adapted linear of each layer


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(targets=("q_prj",)), "did you mean 'q_proj'"),
        (dict(targets=()), "lora.targets is empty"),
        (dict(rank=0), "lora.rank: 0"),
        (dict(rank_pattern={"layers.7.self_attn.q_proj": 4}), "layers.7.self_attn.q_proj match no"),
        (dict(alpha_pattern={"k_proj": 4.0}), "k_proj match no"),
        (dict(modules_to_save=("embeddings",)), "'embeddings' is not one of"),
    ],
)
def test_errors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_lora(CONFIG, LoraConfig(**settings))


def test_tied_head_cannot_be_saved() -> None:
    tied = dataclasses.replace(CONFIG, tied_head=True)
    with pytest.raises(UserError, match="tied"):
        resolve_lora(tied, LoraConfig(modules_to_save=("lm_head",)))
