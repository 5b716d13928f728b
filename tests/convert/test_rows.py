"""Rows of tensors that lie in pieces, in several files, side by side, or strided; files written for torch."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.formats.meta import PairedHeads
from jaxlm.errors import UserError
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.files import read_tensors
from jaxlm.weights.names import make_layout
from jaxlm.weights.tensors import JoinedColumns, JoinedRows, StoredTensor, Tensor
from jaxlm.weights.torch_write import TensorInfo, TorchZipWriter

MATRIX = np.arange(84, dtype=np.float32).reshape(12, 7)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "x"
    path.write_bytes(b"head" + MATRIX.tobytes() + b"tail")
    return path


def tensor(file: Path, rows: slice = slice(0, 12)) -> StoredTensor:
    part = MATRIX[rows]
    return StoredTensor("x", file, 4 + rows.start * 28, part.shape, part.dtype)


def same(found: Tensor, want: np.ndarray) -> None:
    assert found.shape == want.shape and found.dtype == want.dtype and found.nbytes == want.nbytes
    assert found.read().tobytes() == want.tobytes()
    for start, stop in itertools.combinations_with_replacement(range(want.shape[0] + 1), 2):
        got = found.rows(start, stop)
        assert got.shape == want[start:stop].shape and got.tobytes() == want[start:stop].tobytes(), (start, stop)


def test_below_each_other(stored: Path) -> None:
    whole = tensor(stored)
    parts = ((whole, 5, 9), (tensor(stored, slice(3, 6)), 1, 3), (whole, 0, 0), (whole, 11, 12), (whole, 0, 2))
    same(JoinedRows("j", parts), np.concatenate([MATRIX[5:9], MATRIX[4:6], MATRIX[11:12], MATRIX[0:2]]))


def test_side_by_side(stored: Path) -> None:
    parts = tensor(stored, slice(0, 4)), tensor(stored, slice(4, 8)), tensor(stored, slice(7, 11))
    joined = JoinedColumns("j", parts)
    same(joined, np.concatenate([MATRIX[0:4], MATRIX[4:8], MATRIX[7:11]], axis=1))
    same(JoinedRows("k", ((joined, 2, 4), (joined, 0, 1))), joined.read()[[2, 3, 0]])


def test_pairs_to_halves(stored: Path) -> None:
    # Two heads of six: Meta's row 2i + j is HF's row 3j + i.
    order = [head * 6 + 2 * i + j for head in range(2) for j in range(2) for i in range(3)]
    same(PairedHeads(tensor(stored), 6), MATRIX[order])


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, MATRIX.nbytes), max_size=6), data=st.data())
def test_pieces_at_any_byte(stored: Path, cuts: list[int], data: st.DataObject) -> None:
    ends = sorted({0, *cuts, MATRIX.nbytes})
    pieces = tuple((4 + a, b - a) for a, b in itertools.pairwise(ends))
    found = StoredTensor("x", stored, 4, MATRIX.shape, MATRIX.dtype, pieces=pieces)
    start = data.draw(st.integers(0, 12))
    stop = data.draw(st.integers(start, 12))
    assert found.rows(start, stop).tobytes() == MATRIX[start:stop].tobytes()
    layout = make_layout("D H h", "(H h) D", {"D": 7, "H": 3, "h": 4})
    leaf = MATRIX.reshape(3, 4, 7).transpose(2, 0, 1)
    index = tuple(data.draw(st.slices(size).filter(lambda s: (s.step or 1) > 0)) for size in leaf.shape)
    full = tuple(slice(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True))
    full = tuple(slice(part.start, max(part.start, part.stop), part.step) for part in full)
    out = np.empty(leaf[full].shape, np.float32)
    found.read_into(out, layout, full)
    assert np.array_equal(out, leaf[full])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_views_of_a_storage(stored: Path, data: st.DataObject) -> None:
    """Any strides, with blocks of 256 bytes (see conftest) for 336 bytes of storage."""
    rows, columns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    steps = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    last = (rows - 1) * steps[0] + (columns - 1) * steps[1]
    first = data.draw(st.integers(0, 83)) if last == 0 else 0
    if first + last > 83:
        return
    flat = MATRIX.reshape(-1)
    want = np.lib.stride_tricks.as_strided(flat[first:], (rows, columns), tuple(4 * step for step in steps)).copy()
    same(StoredTensor("x", stored, 4 + 4 * first, (rows, columns), MATRIX.dtype, steps), want)


def test_cut_while_reading(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(stored.read_bytes()[:100])
    with pytest.raises(UserError, match=r"y: ends inside tensor 'x'"):
        JoinedRows("j", ((tensor(tmp_path / "y"), 0, 12),)).read()
    (tmp_path / "y").unlink()
    with pytest.raises(UserError, match=r"y: cannot be read \(No such file"):
        tensor(tmp_path / "y").rows(0, 1)


ARRAYS: dict[str, np.ndarray] = {
    "empty": np.zeros((0, 3), np.float32),
    "odd": np.arange(5, dtype=np.int8),
    "scalar": np.array(2.0, np.float64),
    "b": np.arange(300, dtype=np.float32).astype(BFLOAT16).reshape(100, 3),
    "flags": np.array([True, False]),
    "a name with ü": np.arange(70_000, dtype=np.float16),
}


def test_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    infos = [TensorInfo(name, array.shape, array.dtype) for name, array in ARRAYS.items()]
    with TorchZipWriter(path, infos) as writer:
        settled = []
        for name, array in ARRAYS.items():
            writer.begin(name)
            settled.append((writer.settled, path.read_bytes()[: writer.settled]))
            for block in np.split(array.reshape(-1), [array.size // 3]):
                writer.write(block)
    whole = path.read_bytes()
    assert all(whole.startswith(content) and len(content) == end for end, content in settled)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert [i.filename.split("/", 1)[1] for i in archive.infolist()][:3] == ["data.pkl", "byteorder", "data/0"]
    found = read_tensors(path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].offset % 64 == 0
        same_or_scalar = found[name].read()
        assert same_or_scalar.shape == array.shape and same_or_scalar.tobytes() == array.tobytes()


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it(mmap: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    infos = [TensorInfo(name, array.shape, array.dtype) for name, array in ARRAYS.items()]
    with TorchZipWriter(tmp_path / "x.pth", infos) as writer:
        for name, array in ARRAYS.items():
            writer.begin(name)
            writer.write(array)
    found: dict[str, Any] = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert tuple(found[name].shape) == array.shape and found[name].is_contiguous()
        assert found[name].to(torch.float64).tolist() == array.astype(np.float64).tolist()


def test_a_file_given_up_is_no_torch_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TorchZipWriter(tmp_path / "x", [TensorInfo("a", (2,), np.dtype("f4"))]) as writer:
        writer.begin("a")
        raise RuntimeError
    with pytest.raises(UserError):
        read_tensors(tmp_path / "x")
