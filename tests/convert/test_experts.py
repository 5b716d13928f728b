"""moefy and demoefy: every bit back, the same function with all experts on, partitions that are given, clusters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert.commands import experts as experts_cli
from convert.source import open_model
from convert.transforms import experts
from convert.transforms.experts import DenseSource, MoefiedSource
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.spec import ROUTERS, ExpertsSpec
from jaxlm.weights.leaves import ParamSource, stored_blocks
from jaxlm.weights.names import hf_entries
from jaxlm.weights.partition import assign_balanced, cluster_neurons, load_partition, npy_bytes, permutation, read_npy
from tests.convert.tiny import make_adapter, make_hf_model

EVERY: tuple[slice, ...] = ()
L, F, E = 3, 24, 4  # of tests.convert.tiny.BASE
ALL = f"text={E}"
TEXT_TWO = ["--experts", E, "--top-k", "text=2"]
TOKENS = (np.arange(24).reshape(2, 12) * 7 % 37).astype(np.int32)


def params(source: ParamSource) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path in source.leaves:
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = source.read(path, EVERY)
    return tree


def logits(path: Path, compute: str = "dense") -> np.ndarray:
    source = open_model(path)
    model = Decoder(source.config, dtype="float32", experts=compute)
    return np.asarray(jax.jit(model.apply)({"params": params(source)}, TOKENS))


def assert_same_leaves(first: ParamSource, second: ParamSource) -> None:
    assert list(first.leaves) == list(second.leaves)
    for path, leaf in first.leaves.items():
        a, b = first.read(path, EVERY), second.read(path, EVERY)
        assert leaf.dtype == second.leaves[path].dtype and a.tobytes() == b.tobytes(), path


def random_owners(seed: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(F) % E) for _ in range(L)]).astype(np.int32)


def write_patterns(folder: Path, owners: np.ndarray) -> Path:
    folder.mkdir()
    for layer, row in enumerate(owners):
        np.save(folder / f"patterns_{layer}.npy", row == np.arange(E)[:, None])
    return folder


def write_owners(file: Path, owners: np.ndarray) -> Path:
    np.save(file, owners)
    return file


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["learned", "activation"])
@pytest.mark.parametrize("method", ["kmeans", "order", "partition"])
def test_there_and_back(method: str, router: str, hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Every weight comes back bit by bit, from jaxlm's and from HF's layout."""
    given = ["--partition", write_owners(tmp_path / "owners.npy", random_owners())] if method == "partition" else []
    said = run("moefy", hf_dir, tmp_path / "moe", "--method", method, "--router", router, *TEXT_TWO, *given)
    assert f"4 of 6 neurons by {method}, router {router}; a token uses: text 2" in said
    moefied = open_model(tmp_path / "moe")
    assert moefied.config.experts == ExpertsSpec(E, router, top_k=(2,))
    assert ("layers/mlp/router" in moefied.leaves) is (router == "learned")
    assert f"{sum(math.prod(leaf.shape) for leaf in moefied.leaves.values()):,} parameters" in said
    kept = np.load(tmp_path / "moe" / "jaxlm" / "partition.npy")
    assert kept.dtype == np.int32 and (np.sort(kept) == np.arange(F)).all()
    assert (kept == np.arange(F)).all() == (method == "order")
    run("demoefy", tmp_path / "moe", tmp_path / "dense")
    assert_same_leaves(open_model(tmp_path / "dense"), open_model(hf_dir))
    assert open_model(tmp_path / "dense").config == open_model(hf_dir).config
    assert not (tmp_path / "dense" / "jaxlm" / "partition.npy").exists()
    run("demoefy", tmp_path / "moe", tmp_path / "dense-hf", "--format", "hf")
    assert_same_leaves(open_model(tmp_path / "dense-hf"), open_model(hf_dir))


def test_neurons_move_together(tmp_path: Path, run: Callable[..., str]) -> None:
    """Matrices and biases against plain indexing; a new router is zero and of the model's dtype."""
    make_hf_model(mlp_bias=True, dtype="bfloat16").save_pretrained(tmp_path / "hf")
    owners = random_owners()
    write_owners(tmp_path / "owners.npy", owners)
    run("moefy", tmp_path / "hf", tmp_path / "moe", "--partition", tmp_path / "owners.npy", "--top-k", "text=2")
    dense, moe = open_model(tmp_path / "hf"), open_model(tmp_path / "moe")
    for layer in range(L):
        order = np.concatenate([np.flatnonzero(owners[layer] == expert) for expert in range(E)])
        for name in ("gate_proj", "up_proj"):
            for part in ("kernel", "bias"):
                path = f"layers/mlp/{name}/{part}"
                np.testing.assert_array_equal(moe.read(path, EVERY)[layer], dense.read(path, EVERY)[layer][..., order])
        path = "layers/mlp/down_proj/kernel"
        np.testing.assert_array_equal(moe.read(path, EVERY)[layer], dense.read(path, EVERY)[layer][order])
    router = moe.read("layers/mlp/router", EVERY)
    assert router.shape == (L, 16, E) and router.dtype.name == "bfloat16" and not router.astype(np.float32).any()
    run("demoefy", tmp_path / "moe", tmp_path / "dense")
    assert_same_leaves(open_model(tmp_path / "dense"), dense)


def test_slices_and_blocks(hf_dir: Path) -> None:
    """Any slice is the slice of the whole; HF's blocks are those of the whole too, from both kinds of source."""
    dense = open_model(hf_dir)
    order = np.stack([permutation(row) for row in random_owners()])
    moe = MoefiedSource(dense, order, ExpertsSpec(E, "learned", top_k=(2,)))
    cuts = (slice(1, None), slice(None, None, 2), slice(3, 11))
    for source in (moe, DenseSource(moe)):
        for path in source.leaves.keys() & {*experts.NEURON_DIMENSION, experts.ROUTER}:
            whole = source.read(path, EVERY)
            for a, b, c in itertools.product((*cuts, slice(2, 3)), cuts, (*cuts, slice(None))):
                np.testing.assert_array_equal(source.read(path, (a, b, c)), whole[a, b, c])
    for entry in hf_entries(dense.config):
        found = np.concatenate(list(stored_blocks(DenseSource(moe), entry)))
        np.testing.assert_array_equal(found, np.concatenate(list(stored_blocks(dense, entry))))


def test_the_permutation_travels(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """A copy made with other verbs keeps it."""
    run("moefy", hf_dir, tmp_path / "moe", *TEXT_TWO)
    pytest.importorskip("peft")
    make_adapter(make_hf_model(), tmp_path / "adapter", target_modules=["q_proj"])
    run("merge", tmp_path / "moe", tmp_path / "adapter", tmp_path / "merged")
    run("demoefy", tmp_path / "merged", tmp_path / "back")
    run("merge", hf_dir, tmp_path / "adapter", tmp_path / "expected", "--format", "jax")
    assert_same_leaves(open_model(tmp_path / "back"), open_model(tmp_path / "expected"))


# --- all experts on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_all_experts_on_is_the_dense_model(router: str, hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    expected = logits(hf_dir)
    for method in ("order", "kmeans"):
        run("moefy", hf_dir, tmp_path / method, "--experts", E, "--top-k", ALL, "--router", router, "--method", method)
    assert logits(tmp_path / "order").tobytes() == expected.tobytes()
    found = logits(tmp_path / "kmeans")
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    if router == "modality":
        found = logits(tmp_path / "kmeans", "loop")
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    # So that the above can fail: with fewer experts it is another function.
    run("moefy", hf_dir, tmp_path / "few", "--experts", E, "--top-k", "text=2", "--router", router)
    assert np.abs(logits(tmp_path / "few") - expected).max() > 1e-2 * np.abs(expected).max()


# --- partitions -------------------------------------------------------------------------------------------------------


def test_patterns_of_scimind(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    owners = random_owners()
    write_owners(tmp_path / "owners.npy", owners.astype(np.int64))
    write_patterns(tmp_path / "patterns", owners)
    options = ["--method", "partition", "--top-k", "text=3,smiles=1", "--range", "smiles=20:30"]
    run("moefy", hf_dir, tmp_path / "a", "--partition", tmp_path / "patterns", *options)
    run("moefy", hf_dir, tmp_path / "b", "--partition", tmp_path / "owners.npy", "--experts", E, *options)
    assert open_model(tmp_path / "a").config == open_model(tmp_path / "b").config
    assert open_model(tmp_path / "a").config.experts == ExpertsSpec(
        E, "learned", ("text", "smiles"), ((20, 30),), (3, 1)
    )
    assert_same_leaves(open_model(tmp_path / "a"), open_model(tmp_path / "b"))


def test_kmeans_finds_clear_clusters() -> None:
    """E directions with noise and any length, shuffled: exactly these clusters, for every seed."""
    rng = np.random.default_rng(0)
    for count, size, width in ((4, 6, 16), (8, 32, 24), (16, 43, 64)):
        truth = rng.permutation(np.repeat(np.arange(count), size))
        directions = np.linalg.qr(rng.normal(size=(width, width)))[0][:count]
        rows = directions[truth] + 0.03 * rng.normal(size=(len(truth), width))
        rows *= rng.uniform(0.1, 10.0, (len(truth), 1))
        for seed in range(5):
            found = cluster_neurons(rows.T.astype(np.float32), count, seed)
            pairs = set(zip(found.tolist(), truth.tolist(), strict=True))
            assert len(pairs) == count, (count, seed)


def test_kmeans_is_balanced_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(1).normal(size=(12, 60)).astype(np.float32)
    found = cluster_neurons(weights, 6, 3)
    assert (np.bincount(found) == 10).all()
    np.testing.assert_array_equal(found, cluster_neurons(weights, 6, 3))
    assert (found != cluster_neurons(weights, 6, 4)).any()
    # Nearer to its own centre than by chance: the clustering is about something.
    unit = weights / np.linalg.norm(weights, axis=0)

    def tightness(owners: np.ndarray) -> float:
        return float(sum(np.linalg.norm(unit[:, owners == e].mean(axis=1)) for e in range(6)))

    chance = max(tightness(np.random.default_rng(s).permutation(np.arange(60) % 6)) for s in range(50))
    assert tightness(found) > 1.2 * chance
    monkeypatch.setattr("jaxlm.weights.partition.CLUSTER_ELEMENTS", 100)  # the same by strips, up to the order of sums
    again = cluster_neurons(weights, 6, 3)
    assert tightness(again) > 1.2 * chance and (np.bincount(again) == 10).all()


def test_kmeans_goes_by_direction() -> None:
    """Lengths of the neurons make no difference; powers of two, so that not a bit does."""
    rng = np.random.default_rng(4)
    weights = rng.normal(size=(12, 60)).astype(np.float32)
    longer = weights * np.exp2(rng.integers(-6, 7, 60)).astype(np.float32)
    for seed in range(3):
        np.testing.assert_array_equal(cluster_neurons(longer, 6, seed), cluster_neurons(weights, 6, seed))


@pytest.mark.parametrize("weights", [np.zeros((4, 12)), np.ones((4, 12)), np.eye(4, 12)])
def test_kmeans_of_neurons_that_are_alike(weights: np.ndarray) -> None:
    for count in (1, 3, 12):
        assert (np.bincount(cluster_neurons(weights, count, 0)) == 12 // count).all()


def test_balanced_assignment_goes_by_distance() -> None:
    """Against the plain form: all pairs in order, one after the other."""
    rng = np.random.default_rng(2)
    for neurons, count in ((12, 3), (40, 8), (9, 9), (5, 1)):
        distances = rng.normal(size=(neurons, count))
        owners, free = np.full(neurons, -1), np.full(count, neurons // count)
        for pair in np.argsort(distances, axis=None):
            neuron, expert = divmod(int(pair), count)
            if owners[neuron] < 0 and free[expert]:
                owners[neuron] = expert
                free[expert] -= 1
        np.testing.assert_array_equal(assign_balanced(distances), owners)


def test_methods_and_routers_are_all_offered() -> None:
    assert experts_cli.METHODS == experts.METHODS
    assert set(experts_cli.ROUTERS) == set(ROUTERS)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts", 5, "--top-k", "text=2"], ["--experts 5", "24 neurons", "3, 4, 6"]),
        (["--experts", 0, "--top-k", "text=2"], ["--experts 0", "24 neurons"]),
        (["--top-k", "text=2"], ["--experts", "give the number"]),
        (["--experts", 4, "--top-k", "text=5"], ["--top-k", "text: 5", "1 to 4"]),
        (["--experts", 4, "--top-k", "text=0"], ["--top-k", "text: 0", "1 to 4"]),
        (["--experts", 4, "--top-k", "text=2,smiles=1"], ["--top-k", "'smiles'", "--range"]),
        (["--experts", 4, "--top-k", "smiles=1", "--range", "smiles=3:5"], ["--top-k", "'text'"]),
        (["--experts", 4, "--top-k", "text=2", "--range", "smiles=3:5"], ["--top-k", "'smiles'"]),
        (["--experts", 4, "--top-k", "text=2,a=1", "--range", "a=30:38"], ["--range", "token 38", "37"]),
        (["--experts", 4, "--top-k", "text=2,a=1", "--range", "a=5:5"], ["--range", "a", "5 to 5"]),
        (["--experts", 4, "--top-k", "text=2,a=1", "--range", "a=5"], ["--range a=5", "32000:32066"]),
        (["--experts", 4, "--top-k", "text=two"], ["--top-k text=two", "whole number"]),
        (["--experts", 4, "--top-k", "2"], ["--top-k 2", "NAME=VALUE"]),
        (["--experts", 4, "--top-k", "text=2,text=3"], ["--top-k", "'text'", "twice"]),
        (["--experts", 4, "--top-k", "text=2", "--shared", 3, "--router", "modality"], ["--shared: 3", "at most 2"]),
        (["--experts", 4, "--top-k", "text=2", "--method", "partition"], ["--method partition", "--partition PATH"]),
        (["--experts", 4, "--top-k", "text=2", "--seed", -1], ["--seed -1"]),
    ],
)
def test_bad_options(
    options: list[Any], words: list[str], hf_dir: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    message = refused("moefy", hf_dir, tmp_path / "out", *options)
    assert all(word in message for word in words), message


def spoil(owners: np.ndarray, **cells: int) -> np.ndarray:
    owners = owners.copy()
    for place, value in cells.items():
        layer, neuron = place.removeprefix("n").split("_")
        owners[int(layer), int(neuron)] = value
    return owners


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: random_owners()[:2], ["int32 [2, 24]", "[3, 24]"]),
        (lambda: random_owners()[:, :20], ["[3, 20]", "[3, 24]"]),
        (lambda: random_owners().astype(np.float32), ["float32"]),
        (lambda: random_owners() * 2, ["layer 0", "expert 1 has 0"]),
        (lambda: np.zeros((L, F), np.int32) + np.arange(L)[:, None].astype(np.int32), ["layer 0", "has 0"]),
        (lambda: spoil(random_owners() * 0 + np.arange(F) % E, n1_0=1), ["layer 1", "expert 1 has 7", "must have 6"]),
        (lambda: spoil(random_owners(), n2_3=-1), ["expert -1"]),
        (lambda: spoil(random_owners(), n2_3=1 << 30), ["expert 1073741824"]),
    ],
)
def test_bad_partition_file(
    make: Callable[[], np.ndarray], words: list[str], hf_dir: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    write_owners(tmp_path / "p.npy", make())
    message = refused("moefy", hf_dir, tmp_path / "out", "--partition", tmp_path / "p.npy", "--top-k", "text=1")
    assert all(word in message for word in ["--partition", "p.npy", *words]), message


def change_pattern(file: Path, change: Callable[[np.ndarray], Any]) -> None:
    pattern = np.load(file)
    result = change(pattern)
    np.save(file, pattern if result is None else result)


def put(pattern: np.ndarray, neuron: int, value: bool) -> None:
    pattern[:, neuron] = value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "patterns_1.npy").unlink(), ["patterns_1.npy", "no such file"]),
        (lambda f: np.save(f / "patterns_3.npy", np.ones((4, 24), bool)), ["more than 3 layers"]),
        (
            lambda f: change_pattern(f / "patterns_1.npy", lambda p: put(p, 7, False)),
            ["patterns_1", "neuron 7 is in 0"],
        ),
        (lambda f: change_pattern(f / "patterns_2.npy", lambda p: put(p, 9, True)), ["patterns_2", "neuron 9 is in 4"]),
        (lambda f: change_pattern(f / "patterns_2.npy", lambda p: p[:, :-1]), ["patterns_2", "[4, 23]"]),
        (lambda f: change_pattern(f / "patterns_2.npy", lambda p: p.astype(float)), ["patterns_2", "float64"]),
        (lambda f: change_pattern(f / "patterns_1.npy", lambda p: p[[0, 1, 2, 3, 3]]), ["patterns_1", "5 experts"]),
        (lambda f: change_pattern(f / "patterns_1.npy", lambda p: np.eye(3, dtype=bool)[np.arange(F) % 3].T), ["3 ex"]),
        (lambda f: (f / "patterns_0.npy").write_bytes(b""), ["patterns_0", ".npy"]),
        (
            lambda f: (f / "patterns_0.npy").write_bytes((f / "patterns_0.npy").read_bytes()[:-1]),
            ["patterns_0", "copy"],
        ),
        (lambda f: np.save(f / "patterns_0.npy", np.array([{}, 1]), allow_pickle=True), ["patterns_0", "numbers"]),
    ],
)
def test_bad_patterns(
    change: Callable[[Path], Any], words: list[str], hf_dir: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    change(write_patterns(tmp_path / "patterns", random_owners()))
    message = refused("moefy", hf_dir, tmp_path / "out", "--partition", tmp_path / "patterns", "--top-k", "text=1")
    assert all(word.lower() in message.lower() for word in words), message


def test_partition_and_experts_contradict(hf_dir: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    given = ["--partition", write_owners(tmp_path / "p.npy", random_owners()), "--top-k", "text=1"]
    assert "has 4" in refused("moefy", hf_dir, tmp_path / "out", *given, "--experts", 8)
    assert "takes no --partition" in refused("moefy", hf_dir, tmp_path / "out", *given, "--method", "order")


def test_wrong_kinds_of_model(
    hf_dir: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    assert "dense model already" in refused("demoefy", hf_dir, tmp_path / "out")
    run("moefy", hf_dir, tmp_path / "moe", *TEXT_TWO)
    again = refused("moefy", tmp_path / "moe", tmp_path / "out", *TEXT_TWO)
    assert "4 experts already" in again and "convert demoefy" in again
    (tmp_path / "moe" / "jaxlm" / "partition.npy").unlink()
    assert "no jaxlm/partition.npy" in refused("demoefy", tmp_path / "moe", tmp_path / "out")


CLAIMS_TERABYTES = npy_bytes(np.zeros((1, 1), np.int32)).replace(b"(1, 1), }" + b" " * 13, b"(99999999, 9999999), }")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy_bytes(np.zeros((L, F), np.int32)), "neuron 0 twice and misses 1"),
        (npy_bytes(np.tile(np.arange(F), (L, 1))), "int64"),
        (npy_bytes(np.tile(np.arange(F, dtype=np.int32), (2, 1))), "[2, 24]"),
        (npy_bytes(np.tile(np.arange(1, F + 1, dtype=np.int32), (L, 1))), "neuron 24"),
        (npy_bytes(np.tile(np.arange(F, dtype=np.int32), (L, 1)))[:-4], "not what its header says"),
        (CLAIMS_TERABYTES, "not what its header says"),
        (b"PK\x03\x04", "not a .npy file"),
    ],
)
def test_damaged_partition_of_a_model(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "partition.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"partition\.npy") as raised:
        load_partition(tmp_path / "partition.npy", L, F)
    assert words in str(raised.value), raised.value


def test_weights_that_are_not_numbers(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    model = make_hf_model()
    model.model.layers[1].mlp.up_proj.weight.data[5, 2] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    message = refused("moefy", tmp_path / "hf", tmp_path / "out", *TEXT_TWO)
    assert "layer 1" in message and "neuron 5" in message and "--method order" in message
    run("moefy", tmp_path / "hf", tmp_path / "out", *TEXT_TWO, "--method", "order")


def test_any_npy_file_is_read_or_refused(tmp_path: Path) -> None:
    """Arrays of every form against numpy; every byte of a header changed at random."""
    file = tmp_path / "a.npy"
    for shape in ((), (5,), (2, 3), (2, 3, 4), (0, 4)):
        for dtype in (bool, np.int8, np.int32, np.uint64, np.float16, np.float64):
            for order in ("C", "F"):
                array = np.asarray(np.arange(np.prod(shape)).reshape(shape), dtype, order=order)
                np.save(file, array)
                np.testing.assert_array_equal(read_npy(file), array)
    good, rng = npy_bytes(np.arange(6, dtype=np.int32).reshape(2, 3)), np.random.default_rng(0)
    for place in range(128):
        for value in rng.integers(0, 256, 8).tolist():
            file.write_bytes(good[:place] + bytes([value]) + good[place + 1 :])
            try:
                assert read_npy(file).size == 6
            except UserError as error:
                assert "a.npy" in str(error)
