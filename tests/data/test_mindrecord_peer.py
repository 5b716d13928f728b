"""The real MindSpore and jaxlm write the same MindRecord, and read each other's. `mindspore_env.sh` makes it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data.mindrecord import MindRecordWriter, read_rows, shards_of
from tests.data.mindrecord_rows import CASES, HEADER_SIZE, PAGE_SIZE, rows

PYTHON = os.environ.get("JAXLM_MINDSPORE_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXLM_MINDSPORE_PYTHON does not name a Python with MindSpore")

# Runs inside MindSpore's environment; its reader through `MindDataset`, with which SciMind trains.
CODE = """
import sys, numpy as np
sys.path.insert(0, sys.argv[4])
import mindrecord_rows as cases
from mindspore.mindrecord import FileReader, FileWriter
import mindspore.dataset as ds
verb, file, shards = sys.argv[1], sys.argv[2], int(sys.argv[3])
name = file.rpartition("/")[2]
if verb == "write":
    writer = FileWriter(file, shard_num=shards, overwrite=True)
    writer.set_page_size(cases.PAGE_SIZE), writer.set_header_size(cases.HEADER_SIZE)
    writer.add_schema({field: {"type": kind, "shape": [-1]} for field, kind in cases.CASES[name].items()}, "jaxlm")
    writer.write_raw_data(list(cases.rows(name)))
    writer.commit()
else:
    def key(row):
        return tuple((field, str(row[field].dtype), row[field].tobytes()) for field in sorted(row))
    wanted = sorted(key(row) for row in cases.rows(name))
    first = file if shards == 1 else file + "0"
    assert sorted(key(row) for row in FileReader(first).get_next()) == wanted
    fields = sorted(cases.CASES[name])
    found = ds.MindDataset(first, fields, shuffle=False).create_dict_iterator(num_epochs=1, output_numpy=True)
    assert sorted(key(row) for row in found) == wanted
    print("read", len(wanted))
"""


def mindspore(verb: str, file: Path, shards: int) -> str:
    assert PYTHON
    command = [PYTHON, "-c", CODE, verb, str(file), str(shards), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["scimind.mindrecord", "lone.mindrecord"])
def test_mindspore_and_jaxlm_write_and_read_the_same(name: str, shards: int, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    sizes = {"page_size": PAGE_SIZE, "header_size": HEADER_SIZE}
    with MindRecordWriter(tmp_path / name, CASES[name], shards=shards, **sizes) as writer:
        for row in rows(name):
            writer.write(row)
    assert "read" in mindspore("read", tmp_path / name, shards)
    mindspore("write", tmp_path / "theirs" / name, shards)
    if shards == 1:
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / name).read_bytes()

    def contents(folder: Path) -> list[bytes]:
        first = folder / (name if shards == 1 else f"{name}0")
        found = [row for shard in shards_of(first) for row in read_rows(shard)]
        return sorted(b"|".join(np.ascontiguousarray(row[field]).tobytes() for field in sorted(row)) for row in found)

    assert contents(tmp_path / "theirs") == contents(tmp_path)
