"""The GPU benchmarks run in miniature on a CPU, so that they still run when a GPU is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_gpu_benchmarks_in_miniature(tmp_path: Path) -> None:
    command = [sys.executable, str(GPU), "--miniature", "--seconds", "500", "--output", str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count(" done ") == 6
    assert "of the limit" in done.stdout and "\n      3 | " in done.stdout
    assert "differ from the plain twin's" in done.stdout
    assert done.stdout.count("24 rows") == 2 and "WRONG" not in done.stdout


def test_unknown_parts_are_refused() -> None:
    done = subprocess.run([sys.executable, str(GPU), "--parts", "attention,fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--parts: ['fast'] are none of check, nf4, attention" in done.stderr
