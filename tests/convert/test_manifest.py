"""manifest.json: made while writing, checked later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from jaxlm.errors import UserError
from jaxlm.sums import ALGORITHMS
from jaxlm.weights import manifest
from jaxlm.weights.manifest import MANIFEST, Hasher, check_manifest, files_not_listed
from tests.convert.test_source import write_hf_sharded


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PIECE_BYTES", 1000)
    monkeypatch.setattr(manifest, "_READ_BYTES", 77)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 3500])
@pytest.mark.parametrize("steps", [[], [500, 1500, 2999]])
def test_digests(size: int, steps: list[int], tmp_path: Path) -> None:
    """Those of xxhash in one go, whatever part of a file was told to be final before the end."""
    data = np.random.default_rng(0).bytes(size)
    with Hasher(tmp_path) as hasher:
        (tmp_path / "sub").mkdir()
        with (tmp_path / "sub" / "a").open("wb", buffering=0) as handle:
            done = 0
            for step in [step for step in steps if step < size]:
                handle.write(data[done:step])
                hasher.final(tmp_path / "sub" / "a", step)
                done = step
            handle.write(data[done:])
        if steps:
            hasher.final(tmp_path / "sub" / "a", None)
        assert hasher.finish() == {"sub/a": size}
    content = json.loads((tmp_path / MANIFEST).read_text())
    entry = content["files"]["sub/a"]
    pieces = [data[i : i + 1000] for i in range(0, max(1, size), 1000)]
    assert content["algorithm"] == "xxh3_128"
    assert entry == {"bytes": size, "sums": [xxhash.xxh3_128_hexdigest(piece) for piece in pieces]}
    assert list(check_manifest(tmp_path)) == [("sub/a", None)]


def test_sums_are_those_of_other_programs() -> None:
    """xxHash's own test vector of an empty input, as `xxh128sum` prints it, and NIST's of "abc"."""
    assert ALGORITHMS["xxh3_128"]().hexdigest() == "99aa06d3014798d86001c324468d497f"
    digest = ALGORITHMS["sha256"]()
    digest.update(memoryview(b"abc"))
    assert digest.hexdigest() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_manifests_of_version_1_are_checked(tmp_path: Path) -> None:
    """Those had SHA-256 only, and did not say so."""
    data = np.random.default_rng(0).bytes(2500)
    (tmp_path / "a").write_bytes(data)
    sums = [hashlib.sha256(data[start : start + 1000]).hexdigest() for start in range(0, 2500, 1000)]
    content = {"format": "jaxlm-manifest", "version": 1, "piece_bytes": 1000}
    text = json.dumps(content | {"files": {"a": {"bytes": 2500, "sha256": sums}}})
    (tmp_path / MANIFEST).write_text(text)
    assert list(check_manifest(tmp_path)) == [("a", None)] and files_not_listed(tmp_path) == []
    (tmp_path / "a").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert list(check_manifest(tmp_path)) == [("a", "has changed (bytes 2000 to 2500)")]
    (tmp_path / MANIFEST).write_text(text.replace('"sha256"', '"sums"'))
    with pytest.raises(UserError, match="not one digest"):
        list(check_manifest(tmp_path))


def test_an_error_ends_the_threads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), Hasher(tmp_path) as hasher:
        (tmp_path / "a").write_bytes(bytes(5000))
        hasher.final(tmp_path / "a", 5000)
        raise ValueError("x")
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("verb", ["hf-to-jax", "hf-to-mindspore"])
def test_every_writer_leaves_one(
    verb: str, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxlm.weights.native.layout.CHUNK_BYTES", 200)  # arrays in several files
    write_hf_sharded(tmp_path / "hf")
    run(verb, tmp_path / "hf", tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    found = dict(check_manifest(tmp_path / "out"))
    assert set(found) == names - {MANIFEST} and not any(found.values())


def test_what_has_changed(tmp_path: Path, run: Callable[..., str]) -> None:
    write_hf_sharded(tmp_path / "hf")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "hf-jax")
    run("jax-to-hf", tmp_path / "hf-jax", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[2345] ^= 1
    weights.write_bytes(data)
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "notes.md").write_text("mine")
    found = dict(check_manifest(tmp_path / "out"))
    assert found["model.safetensors"] == "has changed (bytes 2000 to 3000)"
    assert "2 bytes" in str(found["config.json"])
    assert files_not_listed(tmp_path / "out") == ["notes.md"]
    weights.unlink()
    assert dict(check_manifest(tmp_path / "out"))["model.safetensors"] == "is missing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format="x"), "its format is 'x'; expected 'jaxlm-manifest'"),
        (lambda c: c.update(version=3), "its version is 3; this jaxlm reads versions up to 2"),
        (lambda c: c.update(algorithm="md5"), "'algorithm' is 'md5'; known are sha256, xxh3_128"),
        (lambda c: c.update(algorithm=["sha256"]), "'algorithm' is"),
        (lambda c: c.update(piece_bytes=0), "piece_bytes"),
        (lambda c: c.update(piece_bytes=1 << 70), "not one digest"),
        (lambda c: c.update(files=[]), "files"),
        (lambda c: c["files"].update({"../a": c["files"]["a"]}), "lies outside"),
        (lambda c: c["files"].update({"/etc/passwd": c["files"]["a"]}), "lies outside"),
        (lambda c: c["files"].update(a=3), "not one digest"),
        (lambda c: c["files"]["a"].update(bytes=-1), "not one digest"),
        (lambda c: c["files"]["a"]["sums"].pop(), "not one digest"),
    ],
)
def test_broken_manifests(change: Callable[[dict], object], words: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1500))
    with Hasher(tmp_path) as hasher:
        hasher.finish()
    content = json.loads((tmp_path / MANIFEST).read_text())
    change(content)
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        list(check_manifest(tmp_path))


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no manifest"):
        list(check_manifest(tmp_path))
