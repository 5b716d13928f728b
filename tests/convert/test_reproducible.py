"""The same bits however the work is cut: merges, sums, clusters."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.source import open_adapter, open_model
from convert.transforms import merge
from convert.transforms.experts import DenseSource, MoefiedSource
from convert.transforms.merge import MergedSource
from jaxlm.models.families import FAMILIES
from jaxlm.spec import ExpertsSpec
from jaxlm.weights import leaves, partition, reproducible, tensors, transpose
from jaxlm.weights.leaves import ParamSource, full_index, stored_blocks
from jaxlm.weights.names import hf_entries
from jaxlm.weights.reproducible import ExactSum, low_rank_product, norms
from tests.convert.tiny import make_adapter, make_hf_model

sizes = st.integers(1, 40)


@given(sizes, st.integers(1, 9), sizes, st.integers(1, 500), st.integers(0, 9))
def test_product_does_not_depend_on_the_cut(rows: int, rank: int, columns: int, strip: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
    whole = low_rank_product(left, right)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    size = np.abs(left.astype(np.float64)) @ np.abs(right.astype(np.float64))
    assert (np.abs(whole - exact) <= rank * 2.0**-24 * size).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproducible, "STRIP_ELEMENTS", strip)
        np.testing.assert_array_equal(low_rank_product(left, right), whole)
    np.testing.assert_array_equal(low_rank_product(right.T.copy(), left.T.copy()).T, whole)
    a, b = sorted(int(x) for x in rng.integers(0, rows + 1, 2))
    c, d = sorted(int(x) for x in rng.integers(0, columns + 1, 2))
    np.testing.assert_array_equal(low_rank_product(left[a:b], right[:, c:d]), whole[a:b, c:d])


@given(sizes, sizes, st.integers(-120, 100), st.integers(0, 9))
def test_norms_do_not_depend_on_the_order(rows: int, columns: int, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_normal((rows, columns)) * rng.exponential(1, (1, columns))).astype(np.float32)
    matrix *= np.float32(2.0**exponent)
    found = norms(matrix, 1)
    want = [math.sqrt(math.fsum(float(x) ** 2 for x in row)) for row in matrix]
    np.testing.assert_allclose(found, want, rtol=2.0**-23)
    np.testing.assert_array_equal(norms(matrix[:, rng.permutation(columns)], 1), found)
    np.testing.assert_array_equal(norms(np.ascontiguousarray(matrix.T), 0), found)


@given(st.integers(0, 2000), st.integers(1, 9), st.sampled_from(["float32", "float16"]), st.integers(0, 9))
def test_a_sum_does_not_depend_on_the_order(count: int, parts: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = (rng.standard_normal(count) * np.exp2(rng.integers(-30, 10, count))).astype(dtype)
    one, several = ExactSum(), ExactSum()
    one.add(numbers)
    for part in np.array_split(rng.permutation(numbers), parts):
        several.add(part)
    assert one.total == several.total
    # Each number is a multiple of 2^-44 but for what is below.
    assert abs(one.total - math.fsum(numbers.tolist())) <= count * 2.0**-45 + 1e-15 * abs(one.total)


def test_a_sum_of_what_is_no_weight() -> None:
    total = ExactSum()
    total.add(np.array([1e30, 1.0], np.float32))
    assert total.total == float(np.float32(1e30)) + 1.0
    total.add(np.array([np.nan, 1.0], np.float32))
    assert math.isnan(total.total)


LINEARS = tuple(FAMILIES["llama"].linears)
ADAPTERS = {
    "lora": {"r": 5, "target_modules": list(LINEARS)},
    "dora": {"r": 5, "use_dora": True, "target_modules": list(LINEARS)},
}


@pytest.fixture(scope="module", params=ADAPTERS)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MergedSource:
    folder = tmp_path_factory.mktemp(request.param)
    base = make_hf_model()
    base.save_pretrained(folder / "base")
    make_adapter(base, folder / "peft", **ADAPTERS[request.param])
    source = open_model(folder / "base")
    return MergedSource(source, open_adapter(folder / "peft", source))


@given(
    st.integers(1, 600), st.integers(1, 4000), st.integers(1, 600), st.integers(1, 40), st.integers(1, 4000), st.data()
)
@settings(max_examples=40, deadline=None)
def test_a_merge_does_not_depend_on_the_cut(
    merged: MergedSource, block: int, nbytes: int, strip: int, rows: int, read: int, data: st.DataObject
) -> None:
    """Any slice, any block size, by rows as Hugging Face stores them or in jaxlm's layout: the same bits."""
    paths = [path for path in merged.leaves if path.endswith("kernel")]
    path = data.draw(st.sampled_from(paths))
    want = merged.read(path, ())
    shape = merged.leaves[path].shape
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    index = tuple(slice(a, b, data.draw(st.integers(1, 2))) for a, b in ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaves, "BLOCK_ELEMENTS", block)
        patch.setattr(merge, "BLOCK_BYTES", nbytes)
        patch.setattr(reproducible, "STRIP_ELEMENTS", strip)
        patch.setattr(transpose, "STRIP_ROWS", rows)
        patch.setattr(tensors, "STRIP_ROWS", rows)
        patch.setattr(tensors, "BLOCK_BYTES", read)
        np.testing.assert_array_equal(merged.read(path, index), want[full_index(shape, index)])
        for entry in hf_entries(merged.config):
            if entry.path == path:
                found = np.concatenate(list(stored_blocks(merged, entry)))
                leaf = want if entry.layer is None else want[entry.layer]
                np.testing.assert_array_equal(found, entry.layout.to_stored(np.ascontiguousarray(leaf)))


def test_a_merge_does_not_depend_on_the_order_of_the_neurons(merged: MergedSource) -> None:
    """With experts, merged and made dense again, as without."""
    base: ParamSource = merged._base
    config = base.config
    order = np.stack([np.random.default_rng(i).permutation(config.feed_forward.size) for i in range(config.num_layers)])
    experts = MoefiedSource(base, order.astype(np.int32), ExpertsSpec(4, "learned", top_k=(2,)))
    again = open_adapter(merged._adapter.path, experts)
    dense = DenseSource(MergedSource(experts, again))
    for path in merged.leaves:
        np.testing.assert_array_equal(dense.read(path, ()), merged.read(path, ()), err_msg=path)


def test_clusters_do_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of which many are equally far from a centre, so that a last bit would decide."""
    weights = np.random.default_rng(0).integers(-1, 2, (24, 480)).astype(np.float32)
    want = [partition.cluster_neurons(weights, 16, seed) for seed in range(3)]
    for size in (480, 7 * 480, 5000):
        monkeypatch.setattr(partition, "CLUSTER_ELEMENTS", size)
        for seed, owners in enumerate(want):
            np.testing.assert_array_equal(partition.cluster_neurons(weights, 16, seed), owners)


SCRIPT = """
import hashlib, sys
import numpy as np
from jaxlm.weights.partition import cluster_neurons
from jaxlm.weights.reproducible import ExactSum, low_rank_product, norms
from convert.transforms.merge import MergedSource
from convert.source import open_adapter, open_model
found = hashlib.sha256()
rng = np.random.default_rng(0)
weights = rng.standard_normal((256, 768)).astype(np.float32)
found.update(cluster_neurons(weights, 12, 0))
found.update(norms(weights, 0))
total = ExactSum()
total.add(weights)
found.update(repr(total.total).encode())
found.update(low_rank_product(weights[:, :64], weights[:64]))
base = open_model(sys.argv[1])
merged = MergedSource(base, open_adapter(sys.argv[2], base))
for path in merged.leaves:
    found.update(np.ascontiguousarray(merged.read(path, ())))
print(found.hexdigest())
"""


def digest(merged: MergedSource, **environment: str) -> str:
    """Of a merge and a clustering in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, str(merged.path), str(merged._adapter.path)]
    folder = Path(__file__).parents[2]
    done = subprocess.run(command, env=os.environ | environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_threads_do_not_matter(merged: MergedSource) -> None:
    first, *others = [digest(merged, OPENBLAS_NUM_THREADS=threads) for threads in ("1", "4")]
    assert others == [first]
