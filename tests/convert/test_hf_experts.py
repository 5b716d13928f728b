"""Models of experts as Hugging Face directories: dense to transformers, the very same model to jaxlm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.formats.hf_experts import FOLDER, HfExperts
from convert.source import open_model
from convert.transforms.experts import MoefiedSource
from jaxlm.spec import ROUTERS, ExpertsSpec
from jaxlm.weights.files import read_tensors
from jaxlm.weights.leaves import LeafInfo
from jaxlm.weights.native.write import write_model
from jaxlm.weights.partition import npy_bytes, permutation
from tests.convert.test_experts import EVERY, E, F, L, assert_same_leaves, random_owners
from tests.convert.test_experts import logits as jaxlm_logits
from tests.convert.tiny import logits, make_adapter, make_hf_model

MODALITIES = {"modalities": ("text", "smiles"), "ranges": ((20, 30),), "top_k": (3, 1)}


class Trained(MoefiedSource):
    """With a router that is not zero."""

    def read(self, path: str, index: Any) -> np.ndarray:
        if path != "layers/mlp/router":
            return super().read(path, index)
        values = np.random.default_rng(3).normal(size=self.leaves[path].shape).astype(np.float32)
        return values.astype(self.leaves[path].dtype)[index]


def save(source: Any, directory: Path) -> Path:
    directory.mkdir()
    write_model(source, directory, lambda nbytes: None)
    return directory


def make_moe(hf: Path, out: Path, order: np.ndarray | None, moe: ExpertsSpec) -> Path:
    """A jaxlm directory of experts with a trained router; without an original order when there is none."""
    return save(Trained(open_model(hf), order, moe), out)


def make_order() -> np.ndarray:
    return np.stack([permutation(row) for row in random_owners()])


def assert_same_model(first: Path, second: Path) -> None:
    a, b = open_model(first), open_model(second)
    assert a.config == b.config
    assert (a.partition is None) == (b.partition is None)
    assert a.partition is None or np.array_equal(a.partition, b.partition)
    assert_same_leaves(a, b)


@pytest.mark.parametrize("router", ROUTERS)
def test_there_and_back(router: str, hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    moe = make_moe(hf_dir, tmp_path / "moe", make_order(), ExpertsSpec(E, router, **MODALITIES))
    said = run("jax-to-hf", moe, tmp_path / "out")
    assert f"transformers computes all {E} for every token" in said and f"router {router}" in said
    # Every file of the dense model is as it was.
    for name in ("model.safetensors", "config.json"):
        wanted, found = hf_dir / name, tmp_path / "out" / name
        if name.endswith("json"):
            assert json.loads(found.read_text()) == json.loads(wanted.read_text())
        else:
            a, b = read_tensors(wanted), read_tensors(found)
            assert a.keys() == b.keys() and all(a[key].read().tobytes() == b[key].read().tobytes() for key in a)
    assert (tmp_path / "out" / FOLDER / "router.safetensors").exists() is (router == "learned")
    assert_same_model(tmp_path / "out", moe)
    run("hf-to-jax", tmp_path / "out", tmp_path / "back")
    assert_same_model(tmp_path / "back", moe)
    for name in ("model.json", "partition.npy"):
        assert (tmp_path / "back/jaxlm" / name).read_bytes() == (moe / "jaxlm" / name).read_bytes()
    assert "equal" in run("verify", tmp_path / "out", moe)
    assert "files are as they were written" in run("verify", tmp_path / "out")


def test_transformers_computes_all_experts(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    transformers = pytest.importorskip("transformers")
    moe = make_moe(hf_dir, tmp_path / "moe", make_order(), ExpertsSpec(E, "modality", top_k=(E,)))
    run("jax-to-hf", moe, tmp_path / "out")
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    np.testing.assert_array_equal(found, logits(make_hf_model()))
    np.testing.assert_allclose(jaxlm_logits(tmp_path / "out"), found, atol=2e-5)


def test_no_original_order(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Experts from the start: neurons stay where they are, and demoefy has nothing to go by."""
    moe = make_moe(hf_dir, tmp_path / "moe", None, ExpertsSpec(E, "learned", top_k=(2,)))
    assert open_model(moe).partition is None
    run("jax-to-hf", moe, tmp_path / "out")
    assert not (tmp_path / "out" / FOLDER / "partition.npy").exists()
    assert_same_model(tmp_path / "out", moe)


def test_casts_shards_merges_and_runs(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Other ways to the same format: another dtype, several files, a merge into a directory of this kind."""
    moe = make_moe(hf_dir, tmp_path / "moe", make_order(), ExpertsSpec(E, "learned", **MODALITIES))
    run("jax-to-hf", moe, tmp_path / "out", "--dtype", "bfloat16", "--shard-size", "6KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    run("hf-to-jax", tmp_path / "out", tmp_path / "back")
    found, wanted = open_model(tmp_path / "back"), open_model(moe)
    for path, leaf in found.leaves.items():
        assert leaf == LeafInfo(wanted.leaves[path].shape, np.dtype("bfloat16"))
        np.testing.assert_array_equal(found.read(path, EVERY), wanted.read(path, EVERY).astype(leaf.dtype))
    pytest.importorskip("peft")
    make_adapter(make_hf_model(), tmp_path / "adapter", target_modules=["q_proj"])
    run("jax-to-hf", moe, tmp_path / "whole")
    run("merge", tmp_path / "whole", tmp_path / "adapter", tmp_path / "merged")  # Hugging Face again
    run("merge", moe, tmp_path / "adapter", tmp_path / "expected")
    assert isinstance(open_model(tmp_path / "merged"), HfExperts)
    assert_same_model(tmp_path / "merged", tmp_path / "expected")


def test_verbs_know_what_it_is(
    hf_dir: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    moe = make_moe(hf_dir, tmp_path / "moe", make_order(), ExpertsSpec(E, "learned", **MODALITIES))
    run("jax-to-hf", moe, tmp_path / "out")
    run("demoefy", tmp_path / "out", tmp_path / "dense")
    assert_same_leaves(open_model(tmp_path / "dense"), open_model(hf_dir))
    assert "4 experts already" in refused(
        "moefy", tmp_path / "out", tmp_path / "x", "--experts", 4, "--top-k", "text=1"
    )
    assert "Hugging Face model already" in refused("jax-to-hf", tmp_path / "out", tmp_path / "x")
    assert "jaxlm/partition.npy" in refused(
        "demoefy", make_moe(hf_dir, tmp_path / "no", None, ExpertsSpec(E, "learned", top_k=(2,))), tmp_path / "x"
    )


# --- files that do not fit --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    make_hf_model().save_pretrained(folder / "hf")
    moe = make_moe(folder / "hf", folder / "moe", make_order(), ExpertsSpec(E, "learned", **MODALITIES))
    from convert.commands.main import main

    assert main(["jax-to-hf", str(moe), str(folder / "out")]) == 0
    return folder / "out"


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            target = content
            *parents, last = key.split("__")
            for parent in parents:
                target = target[parent]
            target[last] = value
        (folder / name).write_text(json.dumps(content))

    return change


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


TWICE = np.tile(np.arange(F, dtype=np.int32), (L, 1))
TWICE[1, 3] = 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "experts.json").unlink(), ["experts.json", "no such file"]),
        (replace("experts.json", b"{"), ["experts.json", "JSON"]),
        (edit("experts.json", version=2), ["experts.json", "its version is 2"]),
        (edit("experts.json", moe=[1]), ["experts.json", "moe must have experts"]),
        (edit("experts.json", moe__unheard="of"), ["experts.json", "moe must have experts", "unheard"]),
        (edit("experts.json", moe__experts=5), ["experts.json", "5 does not divide", "another model"]),
        (edit("experts.json", moe__experts="4"), ["experts.json", "moe.experts is '4'"]),
        (edit("experts.json", moe__experts=True), ["experts.json", "moe.experts is True"]),
        (edit("experts.json", moe__top_k=[3, 9]), ["experts.json", "smiles: 9"]),
        (edit("experts.json", moe__ranges=[[20]]), ["experts.json", "moe.ranges is [[20]]"]),
        (edit("experts.json", moe__ranges=[[20, 99]]), ["experts.json", "smiles are 20 to 98", "has 37"]),
        (edit("experts.json", moe__router="other"), ["experts.json", "'other'"]),
        (edit("experts.json", moe__router="modality"), ["router.safetensors", "modality, which has no matrices"]),
        (edit("experts.json", sha256=3), ["experts.json", "sha256 is 3"]),
        (edit("experts.json", sha256={"/etc/passwd": "0"}), ["experts.json", "sha256"]),
        (edit("experts.json", sha256={}), ["partition.npy", "does not know it"]),
        (lambda f: (f / "partition.npy").unlink(), ["partition.npy", "no such file"]),
        (replace("partition.npy", npy_bytes(TWICE[:2])), ["partition.npy", "[2, 24]", "[3, 24]"]),
        (replace("partition.npy", npy_bytes(TWICE)), ["partition.npy", "layer 1", "neuron 4 twice and misses 3"]),
        (replace("partition.npy", npy_bytes(TWICE * 0 + np.arange(F, dtype=np.int32))), ["partition.npy", "sha256"]),
        (lambda f: (f / "router.safetensors").unlink(), ["router.safetensors", "No such file"]),
        (lambda f: spoil_router(f, "drop"), ["router.safetensors", "'model.layers.1.mlp.router.weight' is missing"]),
        (lambda f: spoil_router(f, "shape"), ["router.safetensors", "shape [3, 16]", "[4, 16]"]),
        (lambda f: spoil_router(f, "zero"), ["router.safetensors", "sha256"]),
        (edit("../config.json", num_hidden_layers=2), ["model.safetensors", "layers.2"]),
    ],
)
def test_files_that_do_not_fit(
    change: Callable[[Path], None], words: list[str], exported: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(exported, tmp_path / "m")
    change(tmp_path / "m" / FOLDER)
    message = refused("hf-to-jax", tmp_path / "m", tmp_path / "out")
    assert all(word in message for word in words), message


def spoil_router(folder: Path, how: str) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "router.safetensors")
    name = "model.layers.1.mlp.router.weight"
    changed = {"drop": None, "shape": tensors[name][:3], "zero": tensors[name] * 0}[how]
    del tensors[name]
    save_file(tensors | ({} if changed is None else {name: changed}), folder / "router.safetensors")


def test_router_of_no_learned_model(exported: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(exported, tmp_path / "m")
    (tmp_path / "m" / FOLDER / "router.safetensors").unlink()
    content = json.loads((tmp_path / "m" / FOLDER / "experts.json").read_text())
    del content["sha256"]["router.safetensors"]
    (tmp_path / "m" / FOLDER / "experts.json").write_text(json.dumps(content))
    assert "router is learned, but there is no router.safetensors" in refused("inspect", tmp_path / "m")
    # Without the folder it is the dense model that transformers sees.
    shutil.rmtree(tmp_path / "m" / FOLDER)
    assert open_model(tmp_path / "m").config.experts is None


def test_trained_further_as_a_dense_model(exported: Path, tmp_path: Path) -> None:
    """Other weights of the same shape beside the same experts are theirs."""
    shutil.copytree(exported, tmp_path / "m")
    other = make_hf_model(seed=7)
    other.save_pretrained(tmp_path / "m")
    found = open_model(tmp_path / "m")
    assert found.config.experts is not None
    other.save_pretrained(tmp_path / "plain")
    wanted = MoefiedSource(open_model(tmp_path / "plain"), make_order(), found.config.experts)
    for path in ("layers/mlp/down_proj/kernel", "layers/mlp/up_proj/kernel"):
        np.testing.assert_array_equal(found.read(path, EVERY), wanted.read(path, EVERY))
    assert found.config.with_experts(None) == open_model(tmp_path / "plain").config


# --- what is said of them ---------------------------------------------------------------------------------------------


def test_inspect(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    make_moe(hf_dir, tmp_path / "moe", make_order(), ExpertsSpec(E, "learned", **MODALITIES))
    said = run("inspect", tmp_path / "moe")
    assert (
        "experts: 4 of 6 neurons, router learned; a token uses: text 3 (all other tokens), smiles 1 (tokens 20 to 29)"
        in said
    )
    assert "neurons: moved by convert moefy, the original order is kept (sha256 " in said
    make_moe(hf_dir, tmp_path / "plain", None, ExpertsSpec(E, "modality", top_k=(2,), shared=1))
    said = run("inspect", tmp_path / "plain")
    assert "router modality, 1 shared by all; a token uses: text 2 (all tokens)" in said and "as they stand" in said
    assert json.loads(run("inspect", tmp_path / "moe", "--json"))["order"].startswith("moved")
    assert "experts" not in run("inspect", hf_dir) and "neurons" not in run("inspect", hf_dir)


def test_other_order_is_another_model(
    hf_dir: Path,
    tmp_path: Path,
    run: Callable[..., str],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Even where every number is the same."""
    from convert.commands.main import main

    moe = make_moe(hf_dir, tmp_path / "moe", make_order(), ExpertsSpec(E, "modality", top_k=(2,)))
    shutil.copytree(moe, tmp_path / "other")
    (tmp_path / "other/jaxlm/partition.npy").write_bytes(npy_bytes(make_order()[::-1].copy()))
    assert main(["verify", str(moe), str(tmp_path / "other")]) == 1
    assert "configuration: partition is 'sha256" in capsys.readouterr().out
    for base, delta in ((moe, hf_dir), (hf_dir, moe), (moe, tmp_path / "other")):
        message = refused("apply-delta", base, delta, tmp_path / "out")
        assert "another order" in message and "convert demoefy" in message
    run("make-delta", moe, moe, tmp_path / "delta", "--format", "jax")
    run("apply-delta", moe, tmp_path / "delta", tmp_path / "same")
    assert_same_leaves(open_model(tmp_path / "same"), open_model(moe))
