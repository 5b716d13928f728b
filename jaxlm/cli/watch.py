"""`jaxlm watch OUT`: a live view of a run in the terminal, from the files that it writes.

It shows progress, loss, validation, tasks, speed, memory, use of experts, the newest checkpoint and the newest warning,
and ends with the run. It only reads: start it on any machine that sees the directory, and leave it with Ctrl-C. Into a
pipe it writes a line now and then.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.errors import UserError, exit_status

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.runs.overview import Observer, Overview

UNFINISHED = 1


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.watch") -> int:
    """Exit status: 0 the run is complete, or --once; 1 it ended before its last step; 2 a mistake; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("directory", metavar="OUT", help="output_dir of a run; of several stages the current one")
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument("--json", action="store_true", help="with --once: the figures as one JSON object")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="between two looks (default: 2)")
    options = parser.parse_args(argv)
    return exit_status(lambda: _watch(options), interrupted="")


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Console

    from jaxlm.locate import at_home

    if not options.every >= 0.1:
        raise UserError(f"--every: {options.every} must be at least 0.1 seconds")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names of sources may have letters that the terminal has not
    console = Console(highlight=False)
    stages = _Stages(at_home(options.directory))
    if options.json and not options.once:
        raise UserError("--json: goes with --once, which looks a single time")
    if options.json:
        from jaxlm.runs.overview import figures

        print(json.dumps(figures(stages.look()), indent=1, ensure_ascii=False))
        return 0
    if options.once:
        console.print(stages.frame())
        return 0
    run = _live(stages, console, options.every) if console.is_terminal else _lines(stages, options.every)
    if console.is_terminal:
        console.print(stages.frame())
    return 0 if run.state in ("complete", "ended") else UNFINISHED


class _Stages:
    """The runs of a directory, of which that is shown which is trained."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._observers: dict[Path, Observer] = {}
        self.others: list[str] = []
        self.is_over = False

    def look(self) -> Overview:
        """The run as it is now."""
        from jaxlm.runs.overview import Observer, current_run, find_runs

        runs = find_runs(self._path)
        current = current_run(runs)
        if current not in self._observers:
            self._observers[current] = Observer(current)
        run = self._observers[current].look()
        waiting = [path for path in runs if path != current and _is_waiting(path)]
        self.others = [path.name for path in runs if path != current]
        # Between two stages the next one, which holds its lock, has no line yet.
        self.is_over = run.is_over and not (run.state == "complete" and waiting)
        return run

    def frame(self) -> object:
        from jaxlm.runs.watch import Frame

        return Frame(self.look(), self.others)


def _is_waiting(path: Path) -> bool:
    """Whether a stage has been announced, and is not over."""
    from jaxlm.lock import is_held
    from jaxlm.runs.metrics import METRICS
    from jaxlm.runs.overview import LOCK

    return not (path / METRICS).exists() and is_held(path / LOCK)


def _live(stages: _Stages, console: Console, every: float) -> Overview:
    from rich.live import Live

    from jaxlm.runs.watch import Frame

    run = stages.look()
    with Live(Frame(run, stages.others), console=console, screen=True, auto_refresh=False) as live:
        # A resized terminal is drawn anew at once, not only with the next look.
        size, took = console.size, 0.0
        while not stages.is_over:
            # The machine is the run's: a look at 100,000 steps takes a second, and comes less often.
            end = time.monotonic() + max(every, 10 * took)
            while time.monotonic() < end:
                time.sleep(0.1)
                if console.size != size:
                    size = console.size
                    live.refresh()
            begun = time.monotonic()
            run = stages.look()
            live.update(Frame(run, stages.others), refresh=True)
            took = time.monotonic() - begun
    return run


def _lines(stages: _Stages, every: float) -> Overview:
    """A plain line whenever the step has changed."""
    from jaxlm.runs.watch import status_line

    shown = None
    while True:
        run = stages.look()
        line = status_line(run)
        if (run.path, run.step, run.state) != shown:
            print(line if not stages.others else f"{run.path.name}: {line}", flush=True)
        shown = run.path, run.step, run.state
        if stages.is_over:
            return run
        time.sleep(every)
