"""What commands print: tables and pairs of one style, and bars that also say something where they cannot be drawn."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress, TaskID
from rich.table import Table

LOG_SECONDS = 30.0  # between the lines that a bar writes into a file or pipe
_UNLIMITED = 10_000


def new_table(*heads: str, title: str | None = None, left: Sequence[str] = ()) -> Table:
    """An empty table: a head above a rule, no frame; the first column and those in `left` are texts, others figures.

    Args:
        heads: names of the columns.
        title: a line above.
        left: names of columns that are texts.
    """
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    table.show_edge, table.pad_edge, table.padding = False, False, (0, 1, 0, 0)
    for number, head in enumerate(heads):
        is_text = number == 0 or head in left
        table.add_column(
            head,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
            min_width=10 if is_text and head else None,
        )
    return table


def print_table(table: Table, *, stderr: bool = False) -> None:
    """Prints a table; texts fold at the edge of a terminal, figures are never cut, and a file or pipe has no edge."""
    console = Console(stderr=stderr, highlight=False)
    wide = Console(stderr=stderr, highlight=False, width=_UNLIMITED)
    if console.is_terminal:
        least = Measurement.get(wide, wide.options, table).minimum
        (console if least <= console.width else wide).print(table)
        return
    with wide.capture() as capture:
        wide.print(table)
    lines = "\n".join(line.rstrip() for line in capture.get().splitlines())
    print(lines, file=sys.stderr if stderr else sys.stdout)


def print_sentence(text: str) -> None:
    """Prints a sentence on standard output; a terminal breaks it between words, a file or pipe has it in one line."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(text, markup=False)
    else:
        print(text)


def print_pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """Prints aligned 'name  value' lines; values are never wrapped, so that paths can be copied."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        console.print(f"{name:{width}}  {value}", highlight=False, markup=False, soft_wrap=True)


class Bars(Progress):
    """Progress bars; into a file or pipe, as of `2>&1 | tee log`, a line now and then instead."""

    _last = 0.0

    def update(self, task_id: TaskID, **values: Any) -> None:
        """As rich's."""
        super().update(task_id, **values)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich's."""
        super().advance(task_id, advance)
        self._say(task_id)

    def stop(self) -> None:
        """As rich's; but a bar that does not stay leaves no empty line in a file or pipe."""
        if self.live.transient and not self.console.is_interactive and not self.disable:
            self.live.stop()
        else:
            super().stop()

    def _say(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if self.console.is_terminal or self.disable:
            return
        self._last = self._last or now
        if now - self._last < LOG_SECONDS:
            return
        self._last = now
        task = next((task for task in self.tasks if task.id == task_id), None)
        if task is None or task.finished:
            return
        share = "" if not task.total else f" of {task.total:,.0f} ({task.completed / task.total:.0%})"
        left = "" if task.time_remaining is None else f", {int(task.time_remaining):,} s left"
        self.console.print(
            f"{task.description or 'done'}: {task.completed:,.0f}{share}{left}".strip(), highlight=False, markup=False
        )
