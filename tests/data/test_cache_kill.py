"""A build that is killed in the middle, by SIGKILL, with its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import resolve_ends
from jaxlm.data.store.build import Work, join, make_parts, open_parts, reports_of
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import WORDS

CODE = """
import sys
from pathlib import Path
from tests.data.test_cache_kill import work_of
from jaxlm.data.store.build import make_parts
from jaxlm.tokenizer import load_tokenizer
make_parts(work_of(Path(sys.argv[1]), load_tokenizer(sys.argv[2])), Path(sys.argv[3]), processes=2)
"""


def work_of(file: Path, tokenizer: Tokenizer) -> Work:
    source = SourceConfig(path=str(file), template="text")
    config, _ = resolve_ends(DataConfig(train=(source,), sequence_length=64), tokenizer)
    return Work((source,), config, tokenizer, part_characters=300_000)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(number) for number in text.split()]


@pytest.mark.slow
def test_a_killed_build_goes_on_where_it_was_and_leaves_no_process(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "texts.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for number in range(60_000):
            text = " ".join(WORDS[(number * k) % len(WORDS)] for k in range(1, 12 + number % 9))
            stream.write(json.dumps({"text": text}) + "\n")
    parts = tmp_path / "parts"
    words = [sys.executable, "-c", CODE, str(file), str(tokenizer.path), str(parts)]
    process = subprocess.Popen(words, cwd=Path(__file__).parents[2], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 120
    while not (parts / "part-000001").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-??????")}
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    work = work_of(file, load_tokenizer(tokenizer.path))
    number = make_parts(work, parts)
    assert 1 < len(done) < number
    assert {name: (parts / name).stat().st_mtime_ns for name in done} == done
    assert make_parts(work, tmp_path / "whole") == number
    for folder in (parts, tmp_path / "whole"):
        opened = open_parts(folder, number)
        assert opened is not None
        join(work, folder / "store", opened, reports_of(opened), {})
    for path in (parts / "store").iterdir():
        assert path.read_bytes() == (tmp_path / "whole/store" / path.name).read_bytes()
