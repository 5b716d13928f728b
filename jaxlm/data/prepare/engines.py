"""Who does the tasks of a phase: this machine's processes, datatrove's executors, or Ray Data.

An engine is given numbers of tasks and one function, `work.perform`; what is done is told by the marks on the (shared)
file system, so an engine need not remember anything, and may be another one after an interruption.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxlm.config.prepare import EngineConfig
from jaxlm.data.prepare.work import Phase, Step, perform
from jaxlm.errors import UserError

# Called with the number of tasks that were finished since the last call.
Progress = Callable[[int], None]
Do = Callable[[int], None]

_CLUSTER = "is not installed; pip install 'jaxlm[cluster]', or set engine.name: local"


class Engine:
    """Does tasks, as a context; what it starts is ended with it.

    Args:
        config: who does them.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._workers = config.workers or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, step: Step, phase: Phase, numbers: Sequence[int], progress: Progress) -> None:
        """Does tasks of a phase.

        Args:
            step: the step.
            phase: the phase.
            numbers: the tasks to do.
            progress: told of finished tasks.

        Raises:
            UserError: what a task says; of a missing library; a process that was killed.
        """
        do = functools.partial(perform, str(step.folder), phase.name, phase.run)
        if not numbers:
            return
        if self._config.name == "ray":
            _run_ray(do, numbers, self._config, progress)
        elif self._config.name in ("datatrove", "slurm"):
            _run_datatrove(step, phase, do, numbers, self._config, progress)
        elif min(self._workers, len(numbers)) == 1:
            for number in numbers:
                do(number)
                progress(1)
        else:
            self._run_in_pool(do, numbers, progress)

    def _run_in_pool(self, do: Do, numbers: Sequence[int], progress: Progress) -> None:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _end_with, (os.getpid(),))
        futures = [self._pool.submit(do, number) for number in numbers]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                progress(1)
        except BrokenProcessPool:
            raise UserError(
                "engine: a worker process was killed, most often because the memory is full; what is finished is kept: "
                f"start again, with engine.workers below {self._workers}"
            ) from None


def _end_with(parent: int) -> None:
    """Ends this worker when its parent is gone, which a killed process cannot see to itself."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# Ray Data ---------------------------------------------------------------------------------------


def _run_ray(do: Do, numbers: Sequence[int], engine: EngineConfig, progress: Progress) -> None:
    try:
        import ray  # heavy, and optional
        import ray.data
    except ImportError:
        raise UserError(f"engine.name: ray {_CLUSTER}") from None
    if not ray.is_initialized():
        options = dict(engine.options)
        if engine.workers and "address" not in options:
            options.setdefault("num_cpus", engine.workers)
        ray.init(**{"log_to_driver": False, **options})
    ray.data.DataContext.get_current().enable_progress_bars = False
    tasks = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    run = functools.partial(_answer, do)
    try:
        for row in tasks.map(run, concurrency=engine.workers or None).iter_rows():
            if row["problem"]:
                raise UserError(row["problem"])
            progress(1)
    except ray.exceptions.RayError as error:
        raise UserError(
            f"engine: Ray gave up ({str(error).strip().splitlines()[-1]}); what is finished is kept: start again"
        ) from None


def _answer(do: Do, row: dict[str, Any]) -> dict[str, Any]:
    """A task's outcome as data, as Ray would wrap an exception in its own."""
    problem = ""
    try:
        do(int(row["number"]))
    except (UserError, OSError) as error:
        problem = _in_words(error)
    return {"number": row["number"], "problem": problem}


def _in_words(error: UserError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return str(error)


# datatrove --------------------------------------------------------------------------------------


def _run_datatrove(
    step: Step, phase: Phase, do: Do, numbers: Sequence[int], engine: EngineConfig, progress: Progress
) -> None:
    """One rank for each task; datatrove's own log of finished ranks is not asked, as marks say it."""
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    except ImportError:
        raise UserError(f"engine.name: {engine.name} {_CLUSTER}") from None

    logs = step.folder / "datatrove" / f"{phase.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    problems = logs / "problems"
    problems.mkdir(parents=True)
    common: dict[str, Any] = {
        "pipeline": [functools.partial(_as_rank, do, tuple(numbers), str(problems))],
        "logging_dir": str(logs),
        "skip_completed": False,
        "tasks": len(numbers),
    }
    workers = engine.workers or len(os.sched_getaffinity(0))
    if engine.name == "slurm":
        missing = [name for name in ("time", "partition") if name not in engine.options]
        if missing:
            raise UserError(
                f"engine.options: Slurm needs {' and '.join(missing)}, e.g. {{partition: cpu, time: 12:00:00}}"
            )
        SlurmPipelineExecutor(
            **{"workers": engine.workers or -1, "job_name": step.name, **common, **engine.options}
        ).run()
    else:
        LocalPipelineExecutor(**{"workers": min(workers, len(numbers)), **common, **engine.options}).run()
    done = 0
    while True:
        # Slurm's jobs go on when `run` has returned; the job that adds up statistics comes after all of them.
        ended = engine.name != "slurm" or (logs / "stats.json").exists()
        for file in sorted(problems.iterdir()):
            raise UserError(file.read_text(encoding="utf-8"))
        left = set(step.missing(phase.name, phase.num_tasks)).intersection(numbers)
        progress(len(numbers) - len(left) - done)
        done = len(numbers) - len(left)
        if not left:
            return
        if ended:
            raise UserError(
                f"engine: datatrove ended and left {len(left)} tasks of {phase.name}; its logs are in {logs}"
            )
        time.sleep(10)


def _as_rank(do: Do, numbers: Sequence[int], problems: str, data: Any, rank: int, world_size: int) -> Any:
    """A pipeline's step in datatrove's form."""
    for number in numbers[rank::world_size]:
        try:
            do(number)
        except (UserError, OSError) as error:
            Path(problems, f"{number}.txt").write_text(_in_words(error), encoding="utf-8")
    yield from data or ()
