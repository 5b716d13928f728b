"""The real Megatron-Core reads our store, and we read its. `megatron_env.sh` makes its environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data.store.megatron import read_index
from tests.data.store_samples import small_store

PYTHON = os.environ.get("JAXLM_MEGATRON_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXLM_MEGATRON_PYTHON does not name a Python with Megatron-Core")

# Runs inside Megatron's environment.
CODE = """
import sys, json, torch, numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
verb, prefix = sys.argv[1:3]
if verb == "read":
    data = IndexedDataset(prefix)
    print(json.dumps({
        "dtype": np.dtype(data.index.dtype).name,
        "sequences": [data[i].tolist() for i in range(len(data))],
        "documents": data.document_indices.tolist(),
        "part": data.get(2, offset=1, length=1).tolist(),
    }))
else:
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.dtype(sys.argv[3]).type, multimodal=len(sys.argv) > 4)
    modes = [1, 0, 2] if len(sys.argv) > 4 else [0, 0, 0]
    for ids, mode in zip(([5, 6, 7], [8], [9, 10]), modes):
        builder.add_item(torch.tensor(ids), mode)
        if len(ids) != 3:
            builder.end_document()
    builder.finalize(prefix + ".idx")
"""


def megatron(*words: str) -> str:
    done = subprocess.run([str(PYTHON), "-c", CODE, *words], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_our_store(tmp_path: Path, dtype: str) -> None:
    wanted = small_store(tmp_path / "s", dtype)
    found = json.loads(megatron("read", str(tmp_path / "s/tokens")).splitlines()[-1])
    assert found["dtype"] == dtype
    assert found["sequences"] == [wanted[number].input_ids.tolist() for number in range(len(wanted))]
    starts = [*np.flatnonzero(np.diff(wanted.record, prepend=-1)).tolist(), len(wanted)]
    assert found["documents"] == starts
    assert found["part"] == found["sequences"][2][1:2]


@pytest.mark.parametrize("extra", [[], ["modes"]])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_we_read_megatrons_store(tmp_path: Path, dtype: str, extra: list[str]) -> None:
    megatron("write", str(tmp_path / "m"), dtype, *extra)
    index = read_index(tmp_path / "m.idx")
    assert index.dtype == np.dtype(dtype)
    assert index.lengths.tolist() == [3, 1, 2] and index.documents.tolist() == [0, 2, 3]
    assert (None if index.modes is None else index.modes.tolist()) == ([1, 0, 2] if extra else None)
