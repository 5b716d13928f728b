"""A trace of steps, made by JAX's profiler and read back: how long each operation of the source took.

XProf, TensorBoard and Perfetto open the same files. The program's text is kept beside them, because a trace names
operations as the compiler does.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.devices.operations import Operation, Place, ranked, table
from jaxlm.devices.program import Names, read_names
from jaxlm.errors import UserError

STEP = "train"  # the mark around a step, by which XProf counts steps
PROGRAM = "train_step.hlo.txt.gz"


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """What a trace of some steps says of one of them, on one device.

    Attributes:
        steps: number of steps traced.
        seconds: of a step, from the begin of the first one's work to the end of the last one's, over their number.
        busy: seconds of a step in which an operation ran.
        operations: the costliest first, in seconds. Where several run at the same time, each has its part of that time,
            so that together they are `busy`.
    """

    steps: int
    seconds: float
    busy: float
    operations: tuple[Operation, ...]

    def lines(self, top: int = 10) -> list[str]:
        """The costliest operations as a table."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return [
            f"{self.seconds * 1e3:,.1f} ms a step, by {steps}; in {self.busy / self.seconds:.1%} of it operations run",
            *table(self.operations, self.seconds, "ms", 1e-3, top),
        ]


def start_trace(folder: Path, for_perfetto: bool = False) -> None:
    """Begins a trace; the files are written by `stop_trace`.

    Args:
        for_perfetto: also write perfetto_trace.json.gz.

    Raises:
        RuntimeError: a trace is being made by this process already.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function: it slows the host, and hides what matters
    jax.profiler.start_trace(folder, create_perfetto_trace=for_perfetto, profiler_options=options)


def stop_trace(folder: Path, text: str) -> None:
    """Ends the trace begun with this folder, and writes it there.

    Args:
        text: of the compiled step.
    """
    jax.profiler.stop_trace()
    with gzip.open(folder / PROGRAM, "wt", encoding="utf-8") as file:
        file.write(text)


def measure(run: Callable[[], object], text: str = "", steps: int = 2) -> StepTrace:
    """Runs a step under the profiler.

    Args:
        run: must wait for its result.
        text: of the compiled step; without it operations are called as the compiler calls them.
        steps: the number of runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_trace(Path(folder))
        for number in range(steps):
            with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                run()
        stop_trace(Path(folder), text)
        return read_trace(Path(folder))


def read_trace(folder: Path) -> StepTrace:
    """Reads the newest trace of a folder.

    Args:
        folder: OUT/profile of a run with train.profile; of one in several processes OUT/profile/process-NN.

    Raises:
        UserError: it holds no trace of whole steps.
    """
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files or not (folder / PROGRAM).is_file():
        raise UserError(f"{folder}: holds no trace; train.profile makes one in OUT/profile")
    with gzip.open(folder / PROGRAM, "rt", encoding="utf-8") as file:
        names = read_names(file.read())
    profile: Any = jax.profiler.ProfileData.from_file(str(files[-1]))
    steps = sum(
        event.name == STEP
        for plane in profile.planes
        if plane.name.startswith("/host:CPU")
        for line in plane.lines
        for event in line.events
    )
    devices = [runs for plane in profile.planes if (runs := sorted(_runs(plane, names)))]
    if not steps or not devices:
        raise UserError(f"{folder}: its trace holds no whole step: the run ended too early, or nothing was recorded")
    count, total = steps * len(devices), 0.0
    spent: dict[Place, float] = collections.defaultdict(float)
    times: dict[Place, float] = collections.defaultdict(float)
    for runs in devices:
        total += (max(run.end for run in runs) - runs[0].begin) / count
        for run, seconds in zip(runs, _shares(runs), strict=True):
            spent[run.at] += seconds / count
            times[run.at] += 1 / count
    return StepTrace(steps, total, sum(spent.values()), ranked(spent, times))


class _Run(NamedTuple):
    """One run of an operation, in seconds since the trace began."""

    begin: float
    end: float
    at: Place


def _runs(plane: Any, names: Names) -> Iterator[_Run]:
    """The runs of operations on a device. On a CPU they are among the events of its threads."""
    is_host = plane.name == "/host:CPU"
    if not is_host and not plane.name.startswith("/device:"):
        return
    started: dict[Any, tuple[Any, Place]] = {}
    ended: dict[Any, float] = {}
    for line in plane.lines:
        if not is_host and not line.name.startswith(("Stream", "XLA Ops")):
            continue
        for event in line.events:
            if is_host and event.name.startswith("end: "):
                ended[dict(event.stats).get("_c"), event.name[5:]] = event.end_ns
                continue
            stats = dict(event.stats)
            if is_host and "hlo_op" not in stats:
                continue
            name = str(stats.get("hlo_op", event.name)).split(" = ")[0].lstrip("%")
            module = str(stats.get("hlo_module", names.module))
            if names.module and module != names.module:
                at = Place(module, "", "another program")
            elif name in names.containers:
                continue
            else:
                at = names.places.get(name, Place("", "", re.sub(r"[._]\d+(?=$|[._])", "", name)[:90]))
            if is_host:
                started[stats.get("_p"), event.name] = event, at
            else:
                yield _Run(event.start_ns / 1e9, event.end_ns / 1e9, at)
    for key, (event, at) in started.items():
        # Some are only begun by their own event, and end on another thread.
        yield _Run(event.start_ns / 1e9, max(event.end_ns, ended.get(key, 0.0)) / 1e9, at)


def _shares(runs: Sequence[_Run]) -> list[float]:
    """Seconds of each run, where time in which several run is divided among them."""
    marks = sorted(
        [(run.begin, True, number) for number, run in enumerate(runs)]
        + [(run.end, False, number) for number, run in enumerate(runs)]
    )
    shares, each, since = [0.0] * len(runs), 0.0, 0.0
    at_begin = [0.0] * len(runs)
    active = 0
    for time, begins, number in marks:
        if active:
            each += (time - since) / active  # what every active run has had since the first one
        since = time
        if begins:
            at_begin[number], active = each, active + 1
        else:
            shares[number], active = each - at_begin[number], active - 1
    return shares
