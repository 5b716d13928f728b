"""Where the time of a training step goes on this machine: the ten costliest operations, under their source's names.

    python benchmarks/profile_step.py [--mode full] [--dtype float32] [--steps 3]     # the step of train_cpu.py, 110 M
    python benchmarks/profile_step.py out/k2-sft                                      # a run that had train.profile

Times are of one step on one device. Where several operations run at once, each has its part of that time, so that
shares and the time in which nothing runs come to the whole step. docs/profiling.md reads such a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train_cpu import jax_step

from jaxlm.devices.trace import StepTrace, measure, read_trace
from jaxlm.errors import exit_status


def measured(mode: str, dtype: str, steps: int) -> StepTrace:
    """The step that train_cpu.py times beside PyTorch."""
    step = jax_step(mode, dtype)
    for _ in range(2):
        step.run()
    return measure(step.run, step.text(), steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="output_dir of a run with train.profile, or its profile/")
    parser.add_argument("--mode", choices=["full", "lora"], default="full")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=10, help="operations that have a line of their own")
    arguments = parser.parse_args()

    def show() -> int:
        if arguments.run is None:
            trace = measured(arguments.mode, arguments.dtype, arguments.steps)
        else:
            inner = arguments.run / "profile"
            trace = read_trace(inner if inner.is_dir() else arguments.run)
        print("\n".join(trace.lines(arguments.top)))
        return 0

    return exit_status(show)


if __name__ == "__main__":
    sys.exit(main())
