"""Adapters of the feed-forward on models whose neurons moved: the same neurons change, whatever the order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source import open_adapter, open_model
from convert.transforms.adapter_order import NEURON_DIMS, ReorderedAdapter
from jaxlm.errors import UserError
from jaxlm.weights.files import read_tensors
from jaxlm.weights.leaves import AdapterSource, ParamSource
from tests.convert.test_experts import EVERY, TEXT_TWO, F, random_owners, write_owners
from tests.convert.tiny import make_adapter, make_hf_model

MLP = ["gate_proj", "up_proj", "down_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "some": {"layers_to_transform": [0, 2], "rank_pattern": {"up_proj": 1}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, its adapters, and the same model with its neurons in two other orders (one/, two/); plain/ keeps none."""
    pytest.importorskip("peft")
    from convert.commands.main import main

    folder = tmp_path_factory.mktemp("models")
    make_hf_model().save_pretrained(folder / "hf")
    for name, settings in KINDS.items():
        make_adapter(make_hf_model(), folder / name, target_modules=MLP, **settings)
    for name, seed in (("one", 5), ("two", 6)):
        owners = write_owners(folder / f"{name}.npy", random_owners(seed))
        given = ["--partition", str(owners), "--top-k", "text=2", "--router", "modality"]
        assert main(["moefy", str(folder / "hf"), str(folder / name), *given]) == 0
        assert (
            main(["peft-to-jax", str(folder / "lora"), str(folder / f"lora-{name}"), "--base", str(folder / name)]) == 0
        )
    assert main(["peft-to-jax", str(folder / "lora"), str(folder / "lora-hf"), "--base", str(folder / "hf")]) == 0
    shutil.copytree(folder / "one", folder / "plain")
    (folder / "plain" / "jaxlm" / "partition.npy").unlink()
    return folder


def assert_close(first: ParamSource, second: ParamSource) -> None:
    assert list(first.leaves) == list(second.leaves)
    for path in first.leaves:
        a, b = first.read(path, EVERY), second.read(path, EVERY)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=path)


def assert_same_adapter(first: AdapterSource, second: AdapterSource) -> None:
    assert list(first.leaves) == list(second.leaves)
    for path in first.leaves:
        np.testing.assert_array_equal(first.read(path, EVERY), second.read(path, EVERY), err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapter_of_the_dense_model(kind: str, models: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Merging and then dividing is dividing and then merging."""
    run("merge", models / "hf", models / kind, tmp_path / "merged")
    run(
        "moefy",
        tmp_path / "merged",
        tmp_path / "a",
        "--partition",
        models / "one.npy",
        *TEXT_TWO[2:],
        "--router",
        "modality",
    )
    run("merge", models / "one", models / kind, tmp_path / "b")
    assert_close(open_model(tmp_path / "a"), open_model(tmp_path / "b"))
    # So that the above can fail: as it is stored, the adapter changes other neurons.
    path = "layers/mlp/down_proj/lora_A"
    moved, stored = (
        open_adapter(models / kind, open_model(models / "one")),
        open_adapter(models / kind, open_model(models / "hf")),
    )
    assert isinstance(moved, ReorderedAdapter)
    assert not np.array_equal(moved.read(path, EVERY), stored.read(path, EVERY))
    cuts = (slice(1, None), slice(None, None, 2), slice(1, 9))
    for path in [path for path in moved.leaves if tuple(path.split("/")[-2:]) in NEURON_DIMS]:
        cut = cuts[: len(moved.leaves[path].shape)]
        np.testing.assert_array_equal(moved.read(path, cut), moved.read(path, EVERY)[cut])


@pytest.mark.parametrize("base", ["hf", "one", "two"])
@pytest.mark.parametrize("trained_on", ["hf", "one", "two"])
def test_own_adapters_go_to_every_order(trained_on: str, base: str, models: Path) -> None:
    model = open_model(models / base)
    found = open_adapter(models / f"lora-{trained_on}", model)
    assert_same_adapter(found, open_adapter(models / f"lora-{base}", model))
    assert isinstance(found, ReorderedAdapter) is (trained_on != base)
    assert found.config == model.config


@pytest.mark.parametrize("kind", KINDS)
def test_peft_there_and_back(kind: str, models: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """PEFT's files are in the dense model's order, whichever model an adapter was trained on."""
    run("peft-to-jax", models / kind, tmp_path / "jax", "--base", models / "one")
    partition = (tmp_path / "jax/jaxlm/partition.npy").read_bytes()
    assert partition == (models / "one/jaxlm/partition.npy").read_bytes()
    said = run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    assert "the dense model that convert jax-to-hf writes" in said
    first, second = (
        read_tensors(folder / "adapter_model.safetensors") for folder in (tmp_path / "back", models / kind)
    )
    assert {name: tensor.read().tobytes() for name, tensor in first.items()} == {
        name: tensor.read().tobytes() for name, tensor in second.items()
    }
    for base in ([], ["--base", models / "one"], ["--base", models / "hf"]):
        assert "equal" in run("verify", tmp_path / "jax", models / kind, *base)
    assert "DoRA" in run("inspect", tmp_path / "jax", "--base", models / "one") or kind != "dora"


def test_mindspore_adapter(models: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Of the dense model too."""
    from tests.convert.test_mindspore import write

    hidden, rng = 16, np.random.default_rng(0)
    factors = {}
    for layer in range(3):
        stem = f"model.layers.{layer}.feed_forward.w2.mindpet_delta_lora"
        factors |= {
            f"{stem}_a": rng.normal(size=(2, F)).astype(np.float32),
            f"{stem}_b": rng.normal(size=(hidden, 2)).astype(np.float32),
        }
    write(tmp_path / "lora.ckpt", factors)
    base = models / "one"
    run("mindspore-to-jax", tmp_path / "lora.ckpt", tmp_path / "jax", "--lora", "--base", base)
    run("mindspore-to-hf", tmp_path / "lora.ckpt", tmp_path / "peft", "--lora", "--base", base)
    own, peft = (open_adapter(tmp_path / name, open_model(base)) for name in ("jax", "peft"))
    assert_same_adapter(own, peft)
    order = open_model(base).partition
    assert order is not None
    stored = factors["model.layers.1.feed_forward.w2.mindpet_delta_lora_a"]
    np.testing.assert_array_equal(own.read("layers/mlp/down_proj/lora_A", EVERY)[1], stored[:, order[1]].T)


def test_order_that_is_not_known(
    models: Path, tmp_path: Path, refused: Callable[..., str], run: Callable[..., str]
) -> None:
    base = models / "plain"
    message = refused("merge", base, models / "lora-one", tmp_path / "out")
    assert "lora-one: adapts gate_proj" in message and "plain has no jaxlm/partition.npy" in message
    shutil.copytree(models / "lora-one", tmp_path / "lost")
    (tmp_path / "lost" / "jaxlm" / "partition.npy").unlink()
    for other in ("hf", "two", "one"):
        message = refused("merge", models / other, tmp_path / "lost", tmp_path / "out")
        assert "has no jaxlm/partition.npy, the order of that model" in message
    run("merge", base, tmp_path / "lost", tmp_path / "out")  # neither is in another order
    # A shape alone tells nothing of an order; what was trained in the same kind of model is taken as it is.
    config = open_model(models / "one").config
    for name in ("lora", "lora-hf"):
        with pytest.raises(UserError, match=r"4 experts. Put it in their order first: convert peft-to-jax") as raised:
            open_adapter(models / name, config)
        assert name in str(raised.value)
    assert_same_adapter(open_adapter(models / "lora-one", config), open_adapter(models / "lora-one"))


def test_attention_has_no_order(models: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    make_adapter(make_hf_model(), tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    for base in ("one", "hf", "plain"):
        run("peft-to-jax", tmp_path / "adapter", tmp_path / base, "--base", models / base)
    for base in ("one", "hf", "two", "plain"):
        for name in ("one", "hf", "plain"):
            found = open_adapter(tmp_path / name, open_model(models / base))
            assert not isinstance(found, ReorderedAdapter)
    assert open_adapter(tmp_path / "adapter", open_model(models / "one").config).config.experts is not None
