"""The destination is complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.commands.main import main
from jaxlm.errors import UserError
from jaxlm.units import disk_size, memory_size
from jaxlm.weights.manifest import check_manifest
from jaxlm.weights.output import _locked, output_directory, parse_size
from tests.convert.test_source import write_hf_sharded, write_native


def test_appears_at_the_end(tmp_path: Path) -> None:
    with output_directory(tmp_path / "a" / "b", 0) as folder:
        (folder / "x").write_text("1")
        assert folder.parent == tmp_path / "a" and folder.name.startswith(".b.tmp-")
        assert not (tmp_path / "a" / "b").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_vanishes_on_any_error(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), output_directory(tmp_path / "b", 0) as folder:
        (folder / "x").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_existing_destination(kind: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    write_hf_sharded(tmp_path / "hf")
    target = tmp_path / "out"
    {"file": target.touch, "directory": target.mkdir, "link": lambda: target.symlink_to("nowhere")}[kind]()
    assert "exists already" in refused("hf-to-jax", tmp_path / "hf", target)


def test_no_bar_stands_above_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf_sharded(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    assert main(["hf-to-jax", str(tmp_path / "hf"), str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EACCES, "may not")],
)
@pytest.mark.parametrize("verb", ["hf-to-jax", "jax-to-hf"])
def test_disk_errors(
    verb: str, number: int, words: str, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf_sharded(tmp_path / "hf")
    write_native(tmp_path / "jax")

    def fail(*arguments: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(
        "jaxlm.weights.safetensors._write" if verb == "jax-to-hf" else "jaxlm.weights.native.write._write_small", fail
    )
    assert words in refused(verb, tmp_path / verb.split("-")[0], tmp_path / "out")


def test_too_little_space(tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf_sharded(tmp_path / "hf")
    usage = type(shutil.disk_usage(tmp_path))(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "the disk has only 100 B free" in refused("hf-to-jax", tmp_path / "hf", tmp_path / "out")


def test_tensorstore_reports_a_full_disk(tmp_path: Path, refused: Callable[..., str], monkeypatch: Any) -> None:
    """TensorStore raises ValueError, not OSError."""
    import jaxlm.weights.native.write

    write_hf_sharded(tmp_path / "hf")

    class Full:
        def result(self) -> None:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

        def exception(self) -> None:
            waited.append(self)

    waited: list[Full] = []

    class Store:
        def __getitem__(self, index: Any) -> Any:
            return self

        def write(self, block: Any, **options: bool) -> Full:
            return Full()

    monkeypatch.setattr(jaxlm.weights.native.write, "_create", lambda *arguments: Store())
    assert f"{tmp_path / 'out'}: the disk is full" in refused("hf-to-jax", tmp_path / "hf", tmp_path / "out")
    assert len(waited) > 1  # for the writes under way, before their directory is removed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_parent(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_hf_sharded(tmp_path / "hf")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "may not be written" in refused("hf-to-jax", tmp_path / "hf", tmp_path / "locked" / "out")


def test_parent_is_a_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_hf_sharded(tmp_path / "hf")
    (tmp_path / "file").touch()
    assert "cannot be created" in refused("hf-to-jax", tmp_path / "hf", tmp_path / "file" / "out")


def test_truncated_while_reading_leaves_nothing(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_hf_sharded(tmp_path / "hf")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1)
    message = refused("hf-to-jax", tmp_path / "hf", tmp_path / "out")
    assert str(shard) in message and "cut short inside tensor 'model.layers." in message


def test_terminated(tmp_path: Path) -> None:
    """SIGTERM in the middle of writing removes the temporary directory."""
    write_hf_sharded(tmp_path / "hf")
    code = (
        "import sys, time, jaxlm.weights.native.write as n\n"
        "n._write_tree = lambda *a: (print('writing', flush=True), time.sleep(60))\n"
        "from convert.commands.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "hf-to-jax", str(tmp_path / "hf"), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


KILL = """
import os, signal, sys
import jaxlm.weights.output as output
import jaxlm.weights.safetensors as safetensors

target, count = sys.argv[1], int(sys.argv[2])

def die(function):
    def call(*arguments, **more):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)
    return call

holder = {"write": (safetensors, "_write"), "sync": (os, "fsync"), "rename": (output.Path, "rename")}[target]
setattr(*holder, die(getattr(*holder)))
from convert.commands.main import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("moment", [("write", 1), ("write", 25), ("sync", 1), ("sync", 3), ("rename", 1)])
def test_killed(moment: tuple[str, int], tmp_path: Path, run: Callable[..., str]) -> None:
    """SIGKILL leaves nothing under the final name, and the next run to it clears away what is left beside it."""
    write_native(tmp_path / "jax")
    arguments = ["jax-to-hf", str(tmp_path / "jax"), str(tmp_path / "out")]
    command = [sys.executable, "-c", KILL, moment[0], str(moment[1]), *arguments]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.glob(".out.tmp-*")
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.tmp-x").mkdir()  # somebody else's
    (tmp_path / f".outer{leftover.name[4:]}").mkdir()
    run(*arguments)
    assert not leftover.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"jax", "out", ".out.tmp-x", f".outer{leftover.name[4:]}"}
    run("verify", tmp_path / "out")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    write_hf_sharded(tmp_path / "hf")
    command = [sys.executable, "-m", "convert", "hf-to-jax", str(tmp_path / "hf"), str(tmp_path / "out")]
    random = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("*out*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(float(random.uniform(0, 0.05)))
        process.kill()
        process.wait()
        if (tmp_path / "out").exists():
            assert all(problem is None for _, problem in check_manifest(tmp_path / "out"))
            shutil.rmtree(tmp_path / "out")
    subprocess.run(command, check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


def test_leftovers_of_living_processes_stay(tmp_path: Path) -> None:
    """One whose process lives, and one that is locked by a process this machine does not see."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive, locked, dead = (tmp_path / f".out.tmp-{pid}" for pid in (os.getppid(), gone.pid, gone.pid + 4_000_000))
    for path in (alive, locked, dead):
        path.mkdir()
    with _locked(locked), output_directory(tmp_path / "out", 0) as folder:
        # A second run to the same name does not disturb the first.
        with pytest.raises(UserError), output_directory(tmp_path / "out", 0):
            pytest.fail("entered")
        assert folder.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, locked.name}


def test_sizes() -> None:
    assert [parse_size(s) for s in ("5GB", "400mb", "1.5 KB", "12", "7B")] == [5 * 10**9, 4 * 10**8, 1500, 12, 7]
    for bad in ("", "GB", "5XB", "-1GB", "0", "nan", "inf"):
        with pytest.raises(UserError, match="--shard-size"):
            parse_size(bad)
    assert [disk_size(n) for n in (0, 999, 1000, 2.4e9, 1e13)] == ["0 B", "999 B", "1.0 kB", "2.4 GB", "10.0 TB"]
    assert [memory_size(n) for n in (0, 1023, 1024, 2.4e9, 2**54)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "2.2 GiB",
        "16384.0 TiB",
    ]


def test_help_is_fast_and_complete() -> None:
    """No heavy import before a command is known."""
    code = (
        "import sys, convert.commands.main\n"
        "convert.commands.main._parser('convert')[0].format_help()\n"
        "print([m for m in ('numpy', 'jax', 'tensorstore', 'rich', 'torch') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
    for verb in ("hf-to-jax", "jax-to-hf", "peft-to-jax", "jax-to-peft", "merge", "inspect"):
        command = [sys.executable, "-m", "convert", verb, "--help"]
        assert verb in subprocess.run(command, capture_output=True, text=True, check=True).stdout
