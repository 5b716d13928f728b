"""`benchmarks/scaling.py`: its arithmetic, with a compiler that is not asked; mistakes of the user."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from benchmarks import scaling
from jaxlm.devices.program import Collective, Program
from jaxlm.planning.compiled import CompiledStep


def test_efficiency_is_by_cycles_and_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = {16: 20e9, 64: 20e9, 256: 120e9}  # at 200 GB/s 0.1, 0.1 and 0.6 s

    def compiled(config: object, shape: object, topology: scaling.Topology) -> CompiledStep:
        moved = Collective("all-reduce", False, 1, waited[topology.count]), Collective("all-gather", True, 1, 30e9)
        program = Program(0.0, 1.35e9, moved, {})  # at 1.5 GHz 0.9 s
        return CompiledStep(2**30, 0, 2**31, 0, 1.0, {}, 0, program)

    monkeypatch.setattr(scaling, "compile_step", compiled)
    assert scaling.main(["--only", "slices", "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "| v5e:4x4, 16 chips | 2.00 | 1.35 | 20.0 / 30.0 | 0.90 + 0.10 | 100% |" in shown
    assert re.findall(r"(\d+)% \|", shown) == ["100", "100", "67"]


def test_processor_seconds_are_those_of_the_children() -> None:
    """By the child's own clock of its processor, however long that takes on a busy machine."""
    body = "import time\nwhile time.process_time() < 0.5: pass\nprint(time.process_time(), flush=True)\ninput()"
    before = scaling._processor_seconds(os.getpid())
    with subprocess.Popen([sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None
        told = float(busy.stdout.readline())
        found = scaling._processor_seconds(os.getpid()) - before
        busy.kill()
    assert found == pytest.approx(told, abs=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("v5e:4", "--only: 'v5e:4': slices have 2 dims.*or slices, or local"),
        ("h100:8", "--only: h100:8: slices are TPUs'"),
    ],
)
def test_mistakes(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--only", words]) == 2
    assert re.search(message, capsys.readouterr().err)
