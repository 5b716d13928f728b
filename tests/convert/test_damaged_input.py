"""Every reader on files that were cut, flipped or lie: a UserError that names the file, or nothing wrong.

Exhaustive where the files allow it (every length, every byte), otherwise by Hypothesis; over 20,000 cases.
"""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import jaxlm.weights.mindspore_ckpt
from convert.formats.hf_experts import write_hf
from convert.formats.meta import MetaSource, write_meta
from convert.formats.mindspore import MindSporeSource, write_mindspore
from jaxlm.errors import UserError
from jaxlm.spec import uniform_decoder
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.hf import HfSource
from jaxlm.weights.leaves import LeafInfo
from jaxlm.weights.mindspore_ckpt import CkptWriter, read_ckpt
from jaxlm.weights.names import leaf_shapes
from jaxlm.weights.safetensors import read_safetensors
from jaxlm.weights.tensors import StoredTensor
from jaxlm.weights.torch_write import TensorInfo, TorchZipWriter
from jaxlm.weights.torch_zip import read_torch_zip

ARRAYS = {
    "first": np.arange(12, dtype=np.float32).reshape(3, 4),
    "second": np.arange(12, 24, dtype=np.float32).reshape(3, 4),
    "half": np.arange(10).astype(BFLOAT16).reshape(2, 5),
    "whole": np.arange(3),
}
# More than any of these files holds, far below what they are made to ask for.
MEMORY = 4 << 20


def write_safetensors(path: Path) -> None:
    save_file(ARRAYS, path)


def write_torch(path: Path) -> None:
    with TorchZipWriter(path, [TensorInfo(name, a.shape, a.dtype) for name, a in ARRAYS.items()]) as writer:
        for name, array in ARRAYS.items():
            writer.begin(name)
            writer.write(array)


def write_peer_torch(path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(a.view(np.int16) if a.dtype == BFLOAT16 else a) for name, a in ARRAYS.items()}
    tensors["half"] = tensors["half"].view(torch.bfloat16)
    torch.save(tensors, path)


def write_ckpt(path: Path, crc: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch, CkptWriter(path, crc) as writer:
        patch.setattr(jaxlm.weights.mindspore_ckpt, "SLICE_BYTES", 30)
        for name, array in ARRAYS.items():
            writer.write(name, array.shape, array.dtype, [array], lambda n: None)


FORMATS: dict[str, tuple[Callable[[Path], None], Callable[[Path], dict[str, StoredTensor]]]] = {
    "safetensors": (write_safetensors, read_safetensors),
    "torch": (write_torch, read_torch_zip),
    "torch_peer": (write_peer_torch, read_torch_zip),
    "ckpt": (write_ckpt, read_ckpt),
    "ckpt_crc": (lambda path: write_ckpt(path, crc=True), read_ckpt),
}


def payload(tensor: StoredTensor) -> set[int]:
    """Places in the file that hold the tensor's elements."""
    pieces = tensor.pieces or ((tensor.offset, tensor.nbytes),)
    return {place for offset, nbytes in pieces for place in range(offset, offset + nbytes)}


def check(path: Path, read: Callable[[Path], dict[str, StoredTensor]], spoiled: set[str] = frozenset()) -> bool:  # type: ignore[assignment]
    """Whether the file was read. What is read under a true name, shape and dtype must be true but for `spoiled`."""
    try:
        for name, tensor in read(path).items():
            found = tensor.read()
            assert found.shape == tensor.shape and found.dtype == tensor.dtype
            want = ARRAYS.get(name)
            if want is not None and name not in spoiled and (want.shape, want.dtype) == (found.shape, found.dtype):
                assert found.tobytes() == want.tobytes(), name
    except UserError as error:
        assert str(path) in str(error)
        return False
    return True


@pytest.fixture(params=FORMATS)
def good(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bytes, Any]:
    write, read = FORMATS[request.param]
    write(tmp_path / "x")
    assert check(tmp_path / "x", read) and read(tmp_path / "x").keys() == ARRAYS.keys()
    return tmp_path / "x", (tmp_path / "x").read_bytes(), read


def test_cut_anywhere(good: tuple[Path, bytes, Any], request: pytest.FixtureRequest) -> None:
    path, whole, read = good
    read_anyway = set()
    # The zip's directory comes last, so all cuts of a torch file fail alike; every seventh is enough there.
    for length in range(0, len(whole), 7 if len(whole) > 1500 else 1):
        path.write_bytes(whole[:length])
        if check(path, read):
            read_anyway.add(length)
    ends = set()
    if "[ckpt" in request.node.name:
        # After a tensor the file is a whole one; only its configuration can tell that more should follow.
        path.write_bytes(whole)
        tensors = list(read(path).values())
        ends = {max(payload(tensor)) + 1 for tensor in tensors}
    assert read_anyway <= ends


def test_every_byte_flipped(good: tuple[Path, bytes, Any], request: pytest.FixtureRequest) -> None:
    path, whole, read = good
    owner = {place: name for name, tensor in read(path).items() for place in payload(tensor)}
    dice = random.Random(0)
    noticed = 0
    for place, byte in enumerate(whole):
        # Reading a zip takes a millisecond, so those get one change a byte.
        changes = {1 << dice.randrange(8), 0x80, byte ^ 0xFF} - {0}
        for change in changes if len(whole) < 1500 else list(changes)[:1]:
            spoiled = bytearray(whole)
            spoiled[place] = byte ^ change
            path.write_bytes(spoiled)
            fine = check(path, read, {owner[place]} if place in owner else set())
            noticed += not fine
            if place in owner and "crc" not in request.node.name:
                assert fine  # these formats have no checksum of the elements that would have to be read first
    assert noticed > len(whole) / 4


def test_crc_notices_everything(tmp_path: Path) -> None:
    write_ckpt(tmp_path / "x", crc=True)
    whole = (tmp_path / "x").read_bytes()
    for place in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << place % 8
        (tmp_path / "x").write_bytes(spoiled)
        with pytest.raises(UserError, match=r"x: "):
            read_ckpt(tmp_path / "x")


def test_pieces_missing_doubled_or_lying(good: tuple[Path, bytes, Any]) -> None:
    path, whole, read = good
    dice = random.Random(1)
    numbers = [n.to_bytes(8, "little") for n in (0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)]
    numbers += [b"\xff" * 10, b"\x80" * 9 + b"\x01", b"99999999", b"-1", b"1e9", b"\x00" * 40]
    for _ in range(400):
        spoiled = bytearray(whole)
        for _ in range(dice.randrange(1, 3)):
            a, b = sorted(dice.randrange(len(spoiled) + 1) for _ in range(2))
            b = min(b, a + dice.choice((1, 4, 30, 300)))
            kind = dice.randrange(4)
            if kind == 0:
                del spoiled[a:b]
            elif kind == 1:
                spoiled[a:a] = spoiled[a:b]
            elif kind == 2:
                number = dice.choice(numbers)[: dice.choice((1, 2, 4, 8, 40))]
                spoiled[a : a + len(number)] = number
            else:
                spoiled[a:b] = dice.randbytes(b - a)
        path.write_bytes(spoiled)
        # Elements may have moved or changed; what is left to see is that nothing else happens.
        check(path, read, set(ARRAYS))


# ---- what a few bytes ask for is not allocated


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def lying_files() -> Iterator[tuple[str, bytes]]:
    for size in (2**20, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1):
        yield "safetensors", size.to_bytes(8, "little") + b"{}"
        header = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
        yield "safetensors", len(header).to_bytes(8, "little") + header
        yield "ckpt", b"\x0a" + varint(size)
        yield "ckpt", b"\x0a\x40\x0a" + varint(size)
        tensor = b"\x08" + varint(size) + b"\x12\x07Float32\x1a" + varint(size)
        value = b"\x0a\x01a\x12" + varint(len(tensor)) + tensor
        yield "ckpt", b"\x0a" + varint(len(value)) + value
        tensor = b"\x08" + varint(size) + b"\x12\x07Float32\x1a\x00"
        value = b"\x0a\x01a\x12" + varint(len(tensor)) + tensor
        yield "ckpt", b"\x0a" + varint(len(value)) + value


def torch_program(program: bytes, path: Path, storage: bytes = b"12345678") -> None:
    """A torch file around a given pickle program."""
    with TorchZipWriter(path, [TensorInfo("a", (2,), np.dtype(np.float32))]) as writer:
        writer.begin("a")
        writer.write(np.frombuffer(storage, np.float32))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ"
# A tuple of the same tuple twice, sixty times over: tiny in memory, endless to print or to hash.
NESTED = b")" + b"q\x00h\x00\x86" * 60
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
END = b"\x89ccollections\nOrderedDict\n)RtRs."
HOSTILE = {
    "huge": b"}" + text("a") + REBUILD + b"(" + STORAGE + b"K\x00\x8a\x06\xff\xff\xff\xff\xff\x00\x85K\x01\x85" + END,
    "negative": b"}" + text("a") + REBUILD + b"(" + STORAGE + b"J\xff\xff\xff\xffK\x02\x85K\x01\x85" + END,
    "expanded": b"}" + text("a") + REBUILD + b"(" + STORAGE + b"K\x00" + b"\x8a\x05\xff\xff\xff\xff\x0f" * 2 + END,
    "dimensions": b"}" + text("a") + REBUILD + b"(" + STORAGE + b"K\x00(" + b"K\x01" * 5000 + b"tK\x01\x85" + END,
    "nested key": b"}" + NESTED + b"Ns.",
    "nested storage": b"}" + text("a") + NESTED + b"Q" + b"s.",
    "nested storage key": b"}" + text("a") + b"(" + text("storage") + b"ctorch\nFloatStorage\n" + NESTED + b"NNtQs.",
    "nested kind": b"}" + text("a") + b"(" + NESTED + b"NNNNtQs.",
    "nested global": b"}" + text("a") + NESTED + NESTED + b"\x93s.",
    "nested shape": b"}" + text("a") + REBUILD + b"(" + STORAGE + b"K\x00" + NESTED + NESTED + END,
    "nested state": NESTED + b".",
    "nested entry": b"}" + text("a") + NESTED + b"s.",
    "nested pairs": b"ccollections\nOrderedDict\n(" + b"]" + NESTED + b"aatR.",
    "deep": b"}" + text("a") + b"]" * 20000 + b"a" * 19999 + b"s.",
    "long number": b"}" + text("a") + b"I" + b"9" * 100_000 + b"\ns.",
    "long text": b"X\xff\xff\xff\x7f",
    "long text 8": b"\x8d" + (2**62).to_bytes(8, "little"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs(name: str, tmp_path: Path) -> None:
    torch_program(b"\x80\x02" + HOSTILE[name], tmp_path / "x.bin")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"x\.bin: ") as error:
            for tensor in read_torch_zip(tmp_path / "x.bin").values():
                tensor.rows(0, 1)
        assert len(str(error.value)) < 1000
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_lying_sizes_are_not_allocated(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for form, content in lying_files():
            (tmp_path / "x").write_bytes(content)
            with pytest.raises(UserError, match=r"x: "):
                FORMATS[form][1](tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


# ---- whole models: configurations and indexes

CONFIG = uniform_decoder(
    "llama", vocab_size=6, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2
)


class Memory:
    """A model held in memory."""

    def __init__(self) -> None:
        dice = np.random.default_rng(0)
        self.path = self.tokenizer_dir = Path("memory")
        self.config, self.hf_config = CONFIG, None
        self.tokenizer_files: list[Path] = []
        self.prompt_files: list[Path] = []
        self.arrays = {p: dice.standard_normal(s).astype(np.float32) for p, s in leaf_shapes(CONFIG).items()}
        self.leaves = {path: LeafInfo(array.shape, array.dtype) for path, array in self.arrays.items()}

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[path][index]


MODEL = Memory()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("hf", "sharded", "meta", "ms"):
        (root / name).mkdir()
    write_hf(MODEL, root / "hf", 10**9, lambda n: None)
    write_hf(MODEL, root / "sharded", 500, lambda n: None)
    write_meta(MODEL, root / "meta", 1, lambda n: None)
    write_mindspore(MODEL, root / "ms", lambda n: None)
    return root


OPEN: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "hf": ("config.json", HfSource),
    "sharded": ("model.safetensors.index.json", HfSource),
    "meta": ("params.json", MetaSource),
    "ms": ("config.json", MindSporeSource),
}


def check_model(directory: Path, opener: Callable[[Path], Any], file: Path) -> None:
    try:
        source = opener(directory)
    except UserError as error:
        assert str(directory) in str(error) or file.name in str(error), str(error)
        return
    for path, leaf in source.leaves.items():
        found = source.read(path, ())
        assert found.shape == leaf.shape == leaf_shapes(source.config)[path]
        # Meta's order of rows depends on the number of heads, which nothing but params.json says.
        if found.shape == MODEL.arrays[path].shape and "q_proj" not in path and "k_proj" not in path:
            assert found.tobytes() == MODEL.arrays[path].tobytes(), path


@pytest.mark.parametrize("name", OPEN)
def test_small_files_cut_and_flipped(name: str, models: Path) -> None:
    file_name, opener = OPEN[name]
    file = models / name / file_name
    whole = file.read_bytes()
    dice = random.Random(2)
    try:
        for place in range(0, len(whole), 3):
            file.write_bytes(whole[:place])
            check_model(models / name, opener, file)
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << dice.randrange(8)
            file.write_bytes(spoiled)
            check_model(models / name, opener, file)
    finally:
        file.write_bytes(whole)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, -1, 2**31, 2**62, 10**400, 0.0, -2.5, 1e300, float("nan"), float("inf")]),
    st.sampled_from(["", "4", "x", "\ud800", "\x00", "../x", "/etc/passwd", "model.safetensors", "llama3", "Infinity"]),
    st.sampled_from([[], [1, 2], {}, {"a": 1}, [[]], {"rope_type": "llama3", "factor": "x"}, {"rope_theta": "x"}]),
)


@pytest.mark.parametrize("name", OPEN)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_that_lie(name: str, models: Path, data: st.DataObject) -> None:
    file_name, opener = OPEN[name]
    file = models / name / file_name
    whole = file.read_text()
    content = json.loads(whole)
    places: list[tuple[Any, Any]] = [(content, key) for key in content]
    for value in content.values():
        if isinstance(value, dict):
            places += [(value, key) for key in value]
    extra = ["rope_scaling", "head_dim", "use_scaled_rope", "rope_scaling_factor", "hidden_dim", "sliding_window"]
    for _ in range(data.draw(st.integers(1, 2))):
        holder, key = data.draw(st.sampled_from([*places, *((content, key) for key in extra)]))
        if data.draw(st.integers(0, 9)) == 0:
            holder.pop(key, None)
        else:
            holder[key] = data.draw(VALUES)
    try:
        file.write_text(json.dumps(content))
        check_model(models / name, opener, file)
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("name", ["x\x00", "\ud800", "a\nb", "../hf/model.safetensors", "/dev/zero", "~", "CON", " "])
def test_index_file_names(name: str, models: Path) -> None:
    with pytest.raises(UserError, match="index"):
        directory = models / "sharded"
        index = directory / "model.safetensors.index.json"
        whole = index.read_text()
        try:
            index.write_text(json.dumps({"weight_map": dict.fromkeys(json.loads(whole)["weight_map"], name)}))
            HfSource(directory)
        finally:
            index.write_text(whole)


def test_links_out_of_a_model(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "sharded", tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="is a link to"):
        HfSource(tmp_path / "m")


def test_storage_without_a_tensor(tmp_path: Path) -> None:
    """Two tensors that point at one storage leave another one behind: one of them reads the wrong numbers."""
    write_torch(tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (program,) = (name for name in members if name.endswith("data.pkl"))
    key = b"X\x01\x00\x00\x00"
    members[program] = members[program].replace(key + b"1", key + b"0")
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="data/1 belongs to no tensor"):
        read_torch_zip(tmp_path / "x.bin")


def test_layers_that_are_not_there(models: Path) -> None:
    file = models / "hf" / "config.json"
    whole = file.read_text()
    try:
        for layers, words in (
            (60_000, "has 60000 layers, but there are 21 tensors"),
            (1 << 30, "at most 65,536 layers"),
        ):
            file.write_text(json.dumps(json.loads(whole) | {"num_hidden_layers": layers}))
            with pytest.raises(UserError, match=words):
                HfSource(models / "hf")
    finally:
        file.write_text(whole)
