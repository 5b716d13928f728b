"""The real MindSpore reads what is written here, and the other way round. `mindspore_env.sh` makes its environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import jaxlm.weights.mindspore_ckpt
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.mindspore_ckpt import CkptWriter, read_ckpt
from jaxlm.weights.safetensors import read_safetensors

PYTHON = os.environ.get("JAXLM_MINDSPORE_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXLM_MINDSPORE_PYTHON does not name a Python with MindSpore")

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "model.layers.0.attention.wq.weight": RANDOM.standard_normal((7, 5), np.float32),
    "f16": RANDOM.standard_normal((300, 11)).astype(np.float16),
    "bf16": RANDOM.standard_normal((4, 3, 2)).astype(BFLOAT16),
    "i64": np.arange(9),
    "bool": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
}

# Runs inside MindSpore's environment. bfloat16 goes through float32, in which it is exact.
CODE = """
import sys, numpy as np, mindspore as ms
verb, file, folder = sys.argv[1:4]
def plain(value):
    return value.float().asnumpy() if value.dtype == ms.bfloat16 else value.asnumpy()
if verb == "read":
    found = ms.load_checkpoint(file, crc_check="crc" in file)
    np.savez(folder + "/found.npz", **{name: plain(value) for name, value in found.items()})
    print({name: str(value.dtype) for name, value in found.items()})
else:
    given = np.load(folder + "/given.npz")
    params = [
        {"name": name, "data": ms.Tensor(given[name]).astype(ms.bfloat16) if name == "bf16" else ms.Tensor(given[name])}
        for name in given.files
    ]
    ms.save_checkpoint(params, file, crc_check="crc" in file, format="safetensors" if "safe" in file else "ckpt")
"""


def mindspore(*arguments: object) -> str:
    assert PYTHON
    command = [PYTHON, "-c", CODE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def plain(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == BFLOAT16 else array


@pytest.mark.parametrize("slice_bytes", [1 << 29, 100])
@pytest.mark.parametrize("name", ["plain.ckpt", "crc.ckpt"])
def test_mindspore_reads_what_we_write(
    name: str, slice_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxlm.weights.mindspore_ckpt, "SLICE_BYTES", slice_bytes)
    with CkptWriter(tmp_path / name, crc="crc" in name) as writer:
        for key, array in ARRAYS.items():
            writer.write(key, array.shape, array.dtype, [array], lambda n: None)
    said = mindspore("read", tmp_path / name, tmp_path)
    assert "'bf16': 'BFloat16'" in said and "'f16': 'Float16'" in said
    found = np.load(tmp_path / "found.npz")
    assert set(found.files) == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert found[key].shape == array.shape and np.array_equal(found[key], plain(array)), key


@pytest.mark.parametrize("name", ["plain.ckpt", "crc.ckpt", "safe.safetensors"])
def test_we_read_what_mindspore_writes(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "given.npz", **{key: plain(array) for key, array in ARRAYS.items()})
    mindspore("write", tmp_path / name, tmp_path)
    found = read_ckpt(tmp_path / name) if name.endswith("ckpt") else read_safetensors(tmp_path / name)
    assert found.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        got = found[key].read()
        assert got.dtype == array.dtype and got.tobytes() == array.tobytes(), key
