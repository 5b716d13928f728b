"""Weight files: what is read, and that damaged or hostile ones are refused by name."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.errors import UserError
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.files import read_tensors, shard_path
from jaxlm.weights.safetensors import read_safetensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.arange(5).astype(BFLOAT16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.0, np.float32),
}


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    found = read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        got = found[name].read()
        assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    from jaxlm.weights.safetensors import write_safetensors
    from jaxlm.weights.tensors import TensorSpec

    specs = [TensorSpec(name, a.shape, a.dtype, [a]) for name, a in reversed(TENSORS.items())]
    write_safetensors(tmp_path, "model", specs, 10**9, lambda n: None)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(found[name].tobytes() == want.tobytes() for name, want in TENSORS.items())
    (tmp_path / "s").mkdir()
    write_safetensors(tmp_path / "s", "model", specs, 20, lambda n: None)
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in TENSORS.values())
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / "s" / file)[name].tobytes() == TENSORS[name].tobytes()
        assert sum(a.nbytes for a in load_file(tmp_path / "s" / file).values()) <= 24


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry([2], 0, 8)}, b"1234567", "cut short inside tensor 'a'"),
        ({"a": entry([2], 0, 8)}, b"123456789", "1 bytes after the last tensor"),
        ({"a": entry([3], 0, 8)}, b"12345678", "tensor 'a' of shape [3] and dtype F32 needs 12 bytes"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"123456789012", "overlaps"),
        ({"a": entry([1], 4, 8)}, b"12345678", "4 bytes before tensor 'a'"),
        ({"a": entry([2], 8, 0)}, b"", "needs 8 bytes"),
        ({"a": entry([-2], 0, 8)}, b"12345678", "shape [-2]"),
        ({"a": entry([2**62], 0, 8)}, b"12345678", "needs 18446744073709551616 bytes"),
        ({"a": entry([2], 0, 8, "F7")}, b"12345678", "unknown dtype 'F7'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678", "lacks dtype, shape or data_offsets"),
        ({"a": entry(["x"], 0, 8)}, b"12345678", "shape ['x']"),  # type: ignore[list-item]
        (b"{not json", b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "occurs twice"),
        (b"[1, 2]", b"", "not a JSON object"),
    ],
)
def test_bad_headers(header: Any, data: bytes, words: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError) as error:
        read_safetensors(path)
    assert words in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"1234", (10**12).to_bytes(8, "little") + b"{}"])
def test_files_cut_in_the_header(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cut short in its header"):
        read_safetensors(tmp_path / "x.safetensors")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "y.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_safetensors(tmp_path / "y.safetensors")


def test_cut_short_after_opening(tmp_path: Path) -> None:
    save_file({"a": np.ones(100, np.float32)}, tmp_path / "x.safetensors")
    tensor = read_safetensors(tmp_path / "x.safetensors")["a"]
    os.truncate(tmp_path / "x.safetensors", tensor.offset + 100)
    with pytest.raises(UserError, match="ends inside tensor 'a'"):
        tensor.read()


# ---- index.json


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.safetensors", "a/../../x", "C:\\x", "..\\x", "", None, 3])
def test_index_names_outside_are_refused(name: Any, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    save_file(TENSORS, tmp_path / "x.safetensors")
    index = tmp_path / "d" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="must lie inside"):
        read_tensors(index)


def test_links_out_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    save_file(TENSORS, tmp_path / "x.safetensors")
    (tmp_path / "d" / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is a link to"):
        shard_path(tmp_path / "d", "x.safetensors", tmp_path / "d" / "index.json")


def test_hugging_face_cache_links_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "0f")
    (snapshot / "x.safetensors").symlink_to("../../blobs/0f")
    assert shard_path(snapshot, "x.safetensors", snapshot / "index.json").is_file()


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    every = dict.fromkeys(TENSORS, "x.safetensors")
    for weight_map, words in (
        (every | {"d": "x.safetensors"}, "holds 'd'; it does not"),
        ({k: v for k, v in every.items() if k != "b"}, "holds tensor 'b', which"),
        (every | {"d": "y.safetensors"}, "'y.safetensors', which is not in"),
        ({}, "no 'weight_map'"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=r"safetensors|weight_map") as error:
            read_tensors(index)
        assert words in str(error.value)


# ---- torch files


def test_torch_views_and_shared_storages(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(60.0).reshape(5, 12)
    weird = {
        "base": base,
        "same": base,
        "transposed": base.t(),
        "rows": base[1:4],
        "columns": base[:, 2:9:3],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "bf16": torch.randn(4, 5).to(torch.bfloat16),
        "f16": torch.randn(4, 5).to(torch.float16),
        "long": torch.arange(3),
    }
    torch.save(weird, tmp_path / "x.bin")
    found = read_tensors(tmp_path / "x.bin")
    assert found.keys() == weird.keys()
    for name, want in weird.items():
        got = found[name].read()
        plain = want.detach().contiguous()
        raw = plain.view(torch.int16).numpy().tobytes() if plain.element_size() == 2 else plain.numpy().tobytes()
        assert got.shape == tuple(want.shape) and got.tobytes() == raw, name


def test_module_state_dict_with_metadata(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 4)
    torch.save(layer.state_dict(), tmp_path / "x.bin")
    assert np.array_equal(read_tensors(tmp_path / "x.bin")["weight"].read(), layer.weight.detach().numpy())


def test_legacy_torch_format(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6; re-save it .*weights_only=True"):
        read_tensors(tmp_path / "x.bin")


def torch_zip(path: Path, program: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", program)
        for name, content in members.items():
            archive.writestr(f"m/{name}", content)
    return path


def text(value: str) -> bytes:
    """Pickle's BINUNICODE."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def test_hostile_pickles_are_refused_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    argument = text(f"touch {mark}")
    calls = [
        b"cposix\nsystem\n" + argument + b"\x85R",  # GLOBAL, REDUCE
        text("os") + text("system") + b"\x93" + argument + b"\x85R",  # STACK_GLOBAL
        b"(" + argument + b"iposix\nsystem\n",  # INST
        b"(cposix\nsystem\n" + argument + b"o",  # OBJ
        b"cbuiltins\neval\n" + text(f"open({str(mark)!r}, 'w')") + b"\x85R",
        b"cbuiltins\nobject\n)\x81",  # NEWOBJ
        b"\x82\x01",  # EXT1
        b"ccollections\nOrderedDict\n)R}" + text("__class__") + text("x") + b"sb" + b"0cposix\nsystem\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nFloatStorage\nK\x00))tR",  # no storage
        b"ctorch\nFloatStorage\n)R",
        text("collections OrderedDict") + b")R",  # a string is no function
    ]
    for call in calls:
        for program in (b"\x80\x02" + call + b".", b"\x80\x02}" + text("a") + call + b"s."):
            path = torch_zip(tmp_path / "x.bin", program)
            with pytest.raises(UserError, match=r"refused: it ") as error:
                read_tensors(path)
            assert str(path) in str(error.value)
            assert not mark.exists()
            if b"posix" in call and b"OrderedDict" not in call and call[:1] == b"c":
                assert "asks for posix.system" in str(error.value)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"]K\x01a.", "holds list"),
        (b"}" + text("a") + b"K\x01s.", "entry 'a' is int"),
        (b"}" + text("state_dict") + b"}s.", "entry 'state_dict' is dict"),
    ],
)
def test_other_contents_are_refused(program: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_tensors(torch_zip(tmp_path / "x.bin", b"\x80\x02" + program))


@pytest.mark.parametrize("program", [b"", b"\x80\x02", b"\x80\x02h\x05.", b"\x80\x02t.", b"\x80\x02R.", b"\xff", b"."])
def test_broken_programs(program: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_tensors(torch_zip(tmp_path / "x.bin", program))


def test_tensor_beyond_its_storage(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(4, 4)}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    root = next(name for name in content if name.endswith("data.pkl")).removesuffix("data.pkl")
    for name, change, words in (
        ("data/0", lambda b: b[:60], "reaches byte 64 of data/0, which has 60"),
        ("data/0", None, "data/0, which is not in the file"),
        ("byteorder", lambda b: b"big", "big-endian"),
    ):
        with zipfile.ZipFile(tmp_path / "bad.bin", "w") as archive:
            for member, data in content.items():
                if member == root + name:
                    if change is None:
                        continue
                    data = change(data)
                archive.writestr(member, data)
        with pytest.raises(UserError, match=words):
            read_tensors(tmp_path / "bad.bin")
    with zipfile.ZipFile(tmp_path / "bad.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in content.items():
            archive.writestr(member, data)
    with pytest.raises(UserError, match="compressed"):
        read_tensors(tmp_path / "bad.bin")


def test_truncated_torch_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(50, 4)}, buffer)
    whole = buffer.getvalue()
    for length in range(0, len(whole), 37):
        (tmp_path / "x.bin").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.bin"):
            read_tensors(tmp_path / "x.bin")
