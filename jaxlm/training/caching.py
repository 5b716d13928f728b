"""The cache of tokens that a run uses, and the bar that shows how it is filled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jaxlm.data.store.cache import Cache, Display, cache_directory
from jaxlm.locate import at_home
from jaxlm.processes.distributed import Hosts
from jaxlm.screen import Bars

_SECONDS = 0.2  # between two changes of the bar; without a terminal there is none


class _Bar:
    """A bar for both stages of a build: tokens a second, and the time that is left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._reading = progress.add_task("tokenising", total=None, rate="")
        self._joining: TaskID | None = None
        self._began = self._shown = time.monotonic()

    def reading(self, done: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self._shown < _SECONDS:
            return
        self._shown = now
        rate = f"{tokens:,} tokens, {tokens / max(now - self._began, 1e-3):,.0f} tokens/s"
        # Characters of the texts are counted, and a file has more bytes: the bar may end before its end.
        self._progress.update(self._reading, completed=min(done, total), total=total, rate=rate)

    def joining(self, done: int, total: int) -> None:
        if self._joining is None:
            self._progress.update(self._reading, completed=1, total=1)
            self._joining = self._progress.add_task("writing", total=total, rate="")
        self._progress.update(self._joining, completed=done)


def run_cache(setting: str, console: Console, hosts: Hosts | None = None) -> Cache | None:
    """The cache that `data.cache` asks for; None for `none`.

    Args:
        setting: auto, none or a directory.
        console: for the bar.
        hosts: the processes of the run; None: this one alone.
    """
    if setting == "none":
        return None

    @contextmanager
    def display() -> Iterator[Display]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=console, transient=True) as progress:
            yield _Bar(progress)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    directory = cache_directory() if setting == "auto" else Path(at_home(setting))
    always = setting != "auto"
    if hosts is None:
        return Cache(directory, always, display=display, say=say)
    return Cache(directory, always, hosts.exchange, hosts.process, hosts.processes, display, say)
