"""Merging several adapters, and adapters of models whose layers differ, against PyTorch and PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source import open_adapter, open_model
from convert.transforms.merge import MergedSource, merge_in_order
from jaxlm.config import LoraConfig
from jaxlm.models.adapters import hf_linears
from jaxlm.weights.native.write import write_adapter
from tests.convert.tiny import make_adapter, make_hf_model
from tests.models import small
from tests.models.adapted import InMemory

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

SAVED = ["embed_tokens", "lm_head"]


def chinese_llama(base: Path, adapters: list[Path]) -> dict[str, Any]:
    """merge_llama_with_chinese_lora_low_mem.py: copies what an adapter saves, adds B A in float32."""
    state = load_file(base / "model.safetensors")
    for path in adapters:
        config = json.loads((path / "adapter_config.json").read_text())
        lora = load_file(path / "adapter_model.safetensors")
        for key in list(state):
            stem = f"base_model.model.{key}"
            if stem in lora:
                state[key] = lora[stem]
            a = stem.replace(".weight", ".lora_A.weight")
            if a in lora:
                b = lora[a.replace("lora_A", "lora_B")]
                state[key] = state[key] + (b.float() @ lora[a].float()) * (config["lora_alpha"] / config["r"])
    return state


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base of 37 rows, an adapter that makes them 40 and saves them, and one that was trained on that."""
    base = make_hf_model()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(40)
    first = make_adapter(base, tmp_path / "first", modules_to_save=SAVED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = first.merge_and_unload()
    every = ["q_proj", "v_proj", "up_proj"]
    make_adapter(merged, tmp_path / "second", seed=2, r=3, lora_alpha=5, target_modules=every, modules_to_save=SAVED)
    for name in ("first", "second"):
        (tmp_path / name / "tokenizer.json").write_text(name)
    return tmp_path / "base", [tmp_path / "first", tmp_path / "second"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_several_adapters_are_merged_as_chinese_llama_merges_them(
    dtype: str, chain: tuple[Path, list[Path]], tmp_path: Path, run: Callable[..., str]
) -> None:
    base, adapters = chain
    expected = chinese_llama(base, adapters)
    run("merge", base, *adapters, tmp_path / "out", "--dtype", dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and found["lm_head.weight"].shape[0] == 40
    for name, value in expected.items():
        if "embed" in name or name == "lm_head.weight":
            assert torch.equal(found[name], value.to(found[name].dtype)), name
        tolerance = 1e-6 if dtype == "float32" else 2.0**-11 * float(value.abs().max())
        torch.testing.assert_close(found[name].float(), value, rtol=0, atol=tolerance)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "second"
    names = ["--base_model", base, "--lora_model", ",".join(map(str, adapters)), "--output_dir", tmp_path / "named"]
    said = run("merge", *names, "--output_type", "huggingface", "--dtype", dtype)
    assert "files" in said
    named = load_file(tmp_path / "named" / "model.safetensors")
    assert all(torch.equal(value, named[name]) for name, value in found.items())


def test_order_counts_and_rows_do_not_shrink(
    chain: tuple[Path, list[Path]], tmp_path: Path, refused: Callable[..., str]
) -> None:
    base, (first, second) = chain
    small_one = make_hf_model()
    make_adapter(small_one, tmp_path / "third", modules_to_save=SAVED)
    message = refused("merge", base, first, second, tmp_path / "third", tmp_path / "out")
    assert "third: saves an embedding of 37 rows, and the model before it has 40" in message
    assert "three directories" in refused("merge", base, first, second, tmp_path / "out", "--lora-path", first)


def test_sums_of_several_adapters_are_rounded_once(tmp_path: Path) -> None:
    model = make_hf_model(dtype="bfloat16")
    model.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        make_adapter(make_hf_model(dtype="bfloat16"), tmp_path / f"a{seed}", seed=seed, target_modules=["q_proj"])
    source = open_model(tmp_path / "base")
    opens = [lambda base, seed=seed: open_adapter(tmp_path / f"a{seed}", base) for seed in (1, 2)]
    path = "layers/self_attn/q_proj/kernel"
    wide, narrow = merge_in_order(source, opens, "float32"), merge_in_order(source, opens)
    assert narrow.leaves[path].dtype.name == "bfloat16"
    np.testing.assert_array_equal(narrow.read(path, ()), wide.read(path, ()).astype(narrow.leaves[path].dtype))
    in_turn = source
    for each in opens:
        in_turn = MergedSource(in_turn, each(in_turn))
    assert not np.array_equal(narrow.read(path, ()), in_turn.read(path, ()))
    other = "layers/mlp/up_proj/kernel"
    np.testing.assert_array_equal(narrow.read(other, ()), source.read(other, ()))


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_dora": True, "rank_pattern": {"layers.3.self_attn.k_proj": 3, "down_proj": 1}},
        {"layers_to_transform": [1, 4], "target_modules": ["q_proj", "o_proj"], "modules_to_save": ["model.norm"]},
    ],
)
def test_layers_that_differ(adapter: dict[str, Any], tmp_path: Path, run: Callable[..., str]) -> None:
    """Gemma 3's period: an adapter's files there and back, and merged from files and from jaxlm's own leaves."""
    base = small.hf_model("gemma3_text")
    base.save_pretrained(tmp_path / "base")
    model = make_adapter(base, tmp_path / "peft", **({"target_modules": "all-linear"} | adapter))
    run("peft-to-jax", tmp_path / "peft", tmp_path / "jax", "--base", tmp_path / "base")
    assert len({path.split("/self_attn")[0] for path in open_adapter(tmp_path / "jax").leaves}) > 3
    (tmp_path / "jax" / "jaxlm" / "adapter_config.json").unlink()
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    found = open_adapter(tmp_path / "back", open_model(tmp_path / "base"))
    want = open_adapter(tmp_path / "peft", open_model(tmp_path / "base"))
    assert (found.lora, found.layers) == (want.lora, want.layers)
    run("merge", tmp_path / "base", tmp_path / "jax", tmp_path / "merged")
    run("hf-to-jax", tmp_path / "base", tmp_path / "jax-base")
    run("merge", tmp_path / "jax-base", tmp_path / "peft", tmp_path / "merged-jax", "--format", "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = model.merge_and_unload().state_dict()
    for name in ("merged", "merged-jax"):
        state = load_file(tmp_path / name / "model.safetensors")
        for key, value in state.items():
            torch.testing.assert_close(value, reference[key], rtol=0, atol=1e-6)
    source = open_model(tmp_path / "base")
    merged = MergedSource(source, want)
    written = open_model(tmp_path / "merged")
    for path, leaf in merged.leaves.items():
        np.testing.assert_array_equal(merged.read(path, ()), written.read(path, ()))
        index = tuple(slice(size // 3, size) for size in leaf.shape)
        np.testing.assert_allclose(merged.read(path, index), merged.read(path, ())[index], atol=1e-6)


def test_experts_are_not_linear_layers_to_peft(
    tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    """Qwen3-MoE: what PEFT adapts is there and back; an adapter of experts is jaxlm's own, and can be merged."""
    base = small.hf_model("qwen3_moe", "dense_layers")
    base.save_pretrained(tmp_path / "base")
    make_adapter(base, tmp_path / "peft", target_modules=["q_proj", "o_proj"])
    run("peft-to-jax", tmp_path / "peft", tmp_path / "jax", "--base", tmp_path / "base")
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    spec = small.small_spec("qwen3_moe", "dense_layers")
    assert hf_linears(spec)["gate_proj"].layers == (0, 2, 4)
    adapter = InMemory(spec, LoraConfig(rank=2, targets=("q_proj", "gate_proj")))
    (tmp_path / "own").mkdir()
    write_adapter(adapter, tmp_path / "own", str(tmp_path / "base"), lambda _: None)
    assert "gate_proj of layer 1 belongs to experts" in refused("jax-to-peft", tmp_path / "own", tmp_path / "other")
    source = open_model(tmp_path / "base")
    merged = MergedSource(source, open_adapter(tmp_path / "own", source))
    path = "layers/1/mlp/gate_proj"
    product = adapter.arrays[f"{path}/lora_A"] @ adapter.arrays[f"{path}/lora_B"]
    np.testing.assert_allclose(
        merged.read(f"{path}/kernel", ()), source.read(f"{path}/kernel", ()) + 8 * product, rtol=0, atol=1e-5
    )
