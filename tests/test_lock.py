"""One writer at a time: who is refused, whom a lock is taken over from, and what stays behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from jaxlm import lock as module
from jaxlm.errors import UserError
from jaxlm.lock import Lock

ROOT = Path(__file__).parents[1]


def make(path: Path) -> Lock:
    return Lock(path, f"output_dir: {path.parent}", "choose another output_dir", lambda text: None)


def start(path: Path, body: str, count: int = 1) -> list[subprocess.Popen[str]]:
    script = f"""
import os, sys, time
from pathlib import Path
from jaxlm.errors import UserError
from jaxlm.lock import Lock
lock = Lock(Path({str(path)!r}), "output_dir: it", "choose another")
{textwrap.dedent(body)}
"""
    return [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(count)
    ]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_living_process_is_named_and_a_dead_one_is_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "run" / "run.lock"
    (holder,) = start(path, "lock.acquire(); print('held', flush=True); sys.stdin.read()")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError) as caught:
        make(path).acquire()
    message = str(caught.value)
    assert re.search(rf"output_dir: .*/run is in use: by pid {holder.pid} on this host, since 20\d\d-", message), (
        message
    )
    assert f"kill {holder.pid}" in message and "choose another output_dir" in message
    holder.kill()
    holder.communicate()
    assert path.exists()
    with make(path):  # what it left behind is no obstacle
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="is in use"):
            make(path).acquire()
    assert not path.exists()
    with make(tmp_path / "new" / "deep" / "run.lock"):
        pass
    assert not (tmp_path / "new").exists(), "folders made for the lock alone do not stay"


@pytest.mark.parametrize(
    ("kind", "words"), [("file", "it is a file"), ("link", "it is a link to nowhere, which is not there")]
)
def test_what_is_in_the_way_of_the_folder_is_named(kind: str, words: str, tmp_path: Path) -> None:
    """Not the lock file, whose name says nothing to anybody; and nothing is left."""
    (tmp_path / "a").mkdir()
    place = tmp_path / "a" / "run"
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to("nowhere")
    for path in (place / "run.lock", place / "more" / "run.lock"):
        with pytest.raises(NotADirectoryError, match=words) as caught:
            make(path).acquire()
        assert caught.value.filename == str(place)
    assert list((tmp_path / "a").iterdir()) == [place]


def test_of_many_that_come_at_once_one_gets_it(tmp_path: Path) -> None:
    """Also when all of them find what a dead process left."""
    path = tmp_path / "run.lock"
    (dead,) = start(path, "lock.acquire(); os._exit(0)")
    dead.wait()
    assert path.exists()
    runs = start(
        path,
        """
        sys.stdin.readline()
        try:
            lock.acquire()
        except UserError:
            print("refused", flush=True)
        else:
            print("got it", flush=True)
            sys.stdin.read()
            lock.release()
        """,
        count=6,
    )
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    said = [run.stdout.readline().strip() for run in runs if run.stdout is not None]
    for run in runs:
        run.communicate()
    assert sorted(said) == ["got it"] + ["refused"] * 5
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell when a process began")
def test_another_process_of_the_same_number_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    holder = make(path)
    holder.acquire()
    edit(path, pid=1)  # alive, but begun at another time
    with make(path):
        pass
    holder.release()


def test_another_host_is_watched_for_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    path = tmp_path / "run.lock"
    told: list[str] = []
    for content in ("", json.dumps({"host": "elsewhere", "pid": 7, "token": "t", "started": "then"})):
        path.write_text(content)
        with Lock(path, "it", "wait", told.append):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "no sign of life; taking over what pid 7 on host elsewhere left" in told[-1]
    with make(path):  # which gives signs of life, and seems to be on another host
        edit(path, host="elsewhere")
        with pytest.raises(UserError, match=rf"by pid {os.getpid()} on host elsewhere, since .* stop it \(there: kill"):
            make(path).acquire()
    assert not path.exists()


def test_a_holder_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    body = """
    from jaxlm import lock as module
    module.BEAT_SECONDS = 0.05
    lock.acquire()
    print("held", flush=True)
    time.sleep(60)
    """
    (holder,) = start(path, body)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    path.unlink()
    with make(path):
        output, _ = holder.communicate(timeout=30)
    assert holder.returncode == 1 and f"was taken over by pid {os.getpid()}" in output


def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems without hard links."""

    def refused(*names: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.os, "link", refused)
    path = tmp_path / "run.lock"
    with make(path):
        with pytest.raises(UserError, match="in use"):
            make(path).acquire()
        time.sleep(0)
    assert not list(tmp_path.iterdir())
