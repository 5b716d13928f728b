"""One frame of `jaxlm watch`: a run's state, its loss as a plot of characters, and its figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from jaxlm.runs.metrics import is_number, series, task_names
from jaxlm.runs.overview import Overview
from jaxlm.units import duration, memory_size, short_number

COLOURS = {"running": "green", "starting": "yellow", "complete": "green", "stopped": "yellow"}
WORDS = {
    "starting": "starting: no step yet",
    "complete": "complete",
    "killed": "ended without a word: killed, or its machine went down",
    "ended": "not running",
}
BARS, PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a Braille character, by column and row
QUIET_STEPS, QUIET_SECONDS = 20, 30.0  # without a line for so long, a frame says since when


class Frame:
    """A frame, as wide as the terminal is when it is drawn.

    Args:
        run: what is shown.
        others: names of the other stages.
    """

    def __init__(self, run: Overview, others: Sequence[str] = ()) -> None:
        self._run, self._others = run, others

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = not _can_show(console, "⣿█…")
        width = min(options.max_width, 120)
        rows = list(_rows(self._run, plain, width - 16))
        taken = len(rows) + 7 + bool(self._others)
        height = min(max((options.height or console.size.height) - taken, 4), 12)
        parts: list[Text | Table] = [_head(self._run, width, self._others, plain), _progress(self._run, width, plain)]
        parts += _chart(self._run, width, height, plain)
        table = Table.grid(padding=(0, 2), expand=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value if isinstance(value, Text) else Text(value))
        parts += [Text(""), table]
        yield Group(*parts)


def status_line(run: Overview) -> str:
    """The run in one plain line, for what is no terminal."""
    parts = [f"step {run.step}{f'/{run.total}' if run.total else ''}"]
    if (loss := run.newest("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (validation := run.newest("validation_loss")) is not None:
        parts.append(f"validation {validation:.4f}")
    if (speed := run.recent("tokens_per_second")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    left = run.seconds_left()
    if run.is_over:
        parts.append(_state(run))
    elif left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def _state(run: Overview) -> str:
    text = WORDS.get(run.state, run.state)
    return f"{text}: {run.why}" if run.why else text


def _head(run: Overview, width: int, others: Sequence[str], plain: bool) -> Text:
    state = _state(run)
    if run.processes > 1 and not run.is_over:
        state += f", {run.processes} processes"
    name = str(run.path)
    if len(name) > (room := max(width - len(state) - 2, 20)):
        cut = "..." if plain else "…"
        name = f"{cut}{name[len(cut) - room :]}"
    head = Text.assemble((name, "bold"))
    head.append(" " * max(width - len(name) - len(state), 2))
    head.append(state, style=COLOURS.get(run.state, "red"))
    if others:
        head.append(f"\nother stages: {', '.join(others)}", style="dim")
    return head


def _progress(run: Overview, width: int, plain: bool) -> Text:
    left, total = run.seconds_left(), run.total
    words = f"step {run.step:,}{f' of {total:,}' if total else ''}"
    after = "" if not total else f"{run.step / total:.0%}"
    if run.elapsed is not None:
        after += f"  {duration(run.elapsed)} elapsed"
    if left is not None and not run.is_over:
        after += f", {duration(left)} left"
    line = Text(words)
    room = width - len(words) - len(after) - 4
    if total and room >= 8:
        done = round(room * min(run.step / total, 1.0))
        full, empty = ("#", "-") if plain else ("━", "─")
        line.append("  ").append(full * done, style="green").append(empty * (room - done), style="dim")
    return line.append(f"  {after}" if after else "")


def _chart(run: Overview, width: int, height: int, plain: bool) -> list[Text]:
    """The smoothed training loss and the validation loss over the steps."""
    curve = run.curve
    valid = curve.validation
    if len(curve.step) + len(valid) < 2:
        return [Text("")]
    low, high, _ = curve.loss_range()
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    labels = [f"{value:.4g}" for value in (high, (low + high) / 2, low)]
    margin = max(map(len, labels)) + 1
    columns = max(width - margin - 1, 10)
    end = max(run.total or 0, curve.last_step, 1)
    canvas = _Canvas(columns, height, plain)
    if len(curve.step):
        canvas.line(curve.step / end, (curve.smooth - low) / (high - low), "blue")
    if valid:
        steps, losses = np.array(valid, np.float64).T
        canvas.marks(steps / end, (losses - low) / (high - low), "yellow")
    at = {0: labels[0], (height - 1) // 2: labels[1], height - 1: labels[2]}
    lines = [Text("")]
    for number, row in enumerate(canvas.rows()):
        edge = "|" if plain else "│"
        lines.append(Text.assemble((f"{at.get(number, ''):>{margin}}{edge}", "dim"), row))
    middle = f"{'step':^{max(columns - len(f'{end:,}') - 1, 4)}}"
    lines.append(Text(f"{'0':>{margin + 2}}{middle}{end:,}", style="dim"))
    return lines


class _Canvas:
    """Points in Braille characters, 2 x 4 to a character; or whole characters where a terminal has no others."""

    def __init__(self, columns: int, rows: int, plain: bool) -> None:
        self._size, self._plain = (columns, rows), plain
        self._dots = np.zeros((rows, columns), np.int64)
        self._marks: dict[tuple[int, int], str] = {}
        self._colour = ""

    def line(self, x: np.ndarray, y: np.ndarray, colour: str) -> None:
        """A line through points, which lie in 0 … 1; what lies above stays at the top."""
        self._colour = colour
        columns, rows = self._size
        across = 1 if self._plain else 2
        places = np.arange(columns * across) / max(columns * across - 1, 1)
        inside = places[(places >= x[0] - 1e-9) & (places <= x[-1] + 1e-9)]
        heights = np.interp(inside, x, y)
        down = rows * (1 if self._plain else 4)
        levels = np.clip(np.round((1 - np.clip(heights, 0, 1)) * (down - 1)), 0, down - 1).astype(int)
        numbers = np.round(inside * (columns * across - 1)).astype(int)
        before = None
        for number, level, height in zip(numbers, levels, heights, strict=True):
            if height > 1.001:  # it begins above what is shown
                before = None
                continue
            first = level if before is None else before
            for step in range(min(level, first), max(level, first) + 1):
                self._set(int(number), step)
            before = level

    def _set(self, x: int, y: int) -> None:
        if self._plain:
            self._dots[y, x] = 1
        else:
            self._dots[y // 4, x // 2] |= _DOTS[x % 2][y % 4]

    def marks(self, x: np.ndarray, y: np.ndarray, colour: str) -> None:
        columns, rows = self._size
        for across, up in zip(x, y, strict=True):
            if up <= 1.001:
                place = round((1 - min(max(up, 0.0), 1.0)) * (rows - 1)), round(across * (columns - 1))
                self._marks[place] = colour

    def rows(self) -> Iterator[Text]:
        columns, rows = self._size
        for row in range(rows):
            text = Text()
            for column in range(columns):
                if (row, column) in self._marks:
                    text.append("o" if self._plain else "●", style=self._marks[row, column])
                elif self._dots[row, column]:
                    character = "*" if self._plain else chr(0x2800 + int(self._dots[row, column]))
                    text.append(character, style=self._colour)
                else:
                    text.append(" ")
            text.rstrip()
            yield text


def sparkline(values: Sequence[float], plain: bool = False) -> str:
    """Values as bars of one character each, from 0 to the largest."""
    signs = PLAIN_BARS if plain else BARS
    top = max(values, default=0.0)
    return "".join(signs[round(value / top * (len(signs) - 1))] if top > 0 else signs[0] for value in values)


def _rows(run: Overview, plain: bool, room: int) -> Iterator[tuple[str, Text | str]]:
    loss, rate, norm = run.newest("loss"), run.newest("learning_rate"), run.newest("grad_norm")
    if loss is not None:
        smooth = run.curve.smooth
        mean = f", smoothed {smooth[-1]:.4f}" if len(smooth) > 1 else ""
        yield "loss", Text.assemble(("*" if plain else "━", "blue"), f" {loss:.4f}{mean}")
    if rewards := series(run.lines, "reward"):
        (begun, first), (step, newest) = rewards[0], rewards[-1]
        yield "reward", f"{newest:.3f} at step {step:,}, {first:.3f} at step {begun:,}"
    if valid := series(run.lines, "validation_loss"):
        lowest = min(valid, key=lambda point: point[1])
        text = f" {valid[-1][1]:.4f} at step {valid[-1][0]:,}"
        if lowest[0] != valid[-1][0]:
            text += f", lowest {lowest[1]:.4f} at step {lowest[0]:,}"
        yield "validation", Text.assemble(("o" if plain else "●", "yellow"), text)
    for name in task_names(run.lines):
        points = series(run.lines, name)
        text = f"{points[-1][1]:.4g} at step {points[-1][0]:,}"
        yield name, text if len(points) == 1 else f"{text}, {points[0][1]:.4g} at step {points[0][0]:,}"
    if (speed := run.recent("tokens_per_second")) is not None:
        text = f"{speed:,.0f} tokens/s"
        if (paused := run.newest("tokens_per_second_with_pauses")) is not None:
            text += f" ({paused:,.0f} with pauses)"
        if (seconds := run.recent("step_seconds")) is not None:
            text += f", {seconds:.3g} s a step"
        if (mfu := run.recent("mfu")) is not None:
            text += f", MFU {mfu:.1%}"
        yield "speed", text
    if rate is not None:
        yield "learning rate", f"{rate:.2e}{f', gradient norm {norm:.3g}' if is_number(norm) else ''}"
    if consumed := run.newest("consumed_tokens"):
        passes = run.newest("passes") or {}
        single = f", {next(iter(passes.values())):.2f} passes" if len(passes) == 1 else ""
        yield "tokens", f"{short_number(sum(consumed.values()))}{single}"
        if len(consumed) > 1:
            for name, tokens in list(consumed.items())[:6]:
                yield "", f"{short_number(tokens)}, {passes.get(name, 0):.2f} passes: {name}"
    memory = [
        f"{where} {memory_size(peak)}"
        for where, peak in (("device", run.newest("device_memory")), ("host", run.newest("host_memory")))
        if peak is not None
    ]
    if memory:
        yield "peak memory", ", ".join(memory)
    for name, shares in (run.newest("expert_share") or {}).items():
        evenness = (run.newest("router_entropy") or {}).get(name)
        bars = sparkline(shares[: max(room - 16, 8)], plain)
        yield f"experts: {name}", bars + ("" if evenness is None else f"  even {evenness:.0%}")
    if run.checkpoints:
        newest = max(run.checkpoints)
        text = f"step {newest:,}"
        if not run.is_over:
            text += f", {duration(time.time() - run.checkpoints[newest])} ago"
        if len(run.checkpoints) > 1:
            text += f", {len(run.checkpoints)} kept"
        yield "checkpoint", text
    if skipped := run.newest("skipped"):
        yield "skipped", f"{int(skipped):,} {'step that was' if skipped == 1 else 'steps that were'} not finite"
    if run.warnings:
        more = len(run.warnings) - 1
        yield "warning", Text(f"{run.warnings[-1]}{f' (and {more} more)' if more else ''}", style="yellow")
    seconds = run.recent("step_seconds") or 0.0
    if not run.is_over and run.quiet_seconds is not None:
        silent = run.quiet_seconds > max(QUIET_STEPS * seconds, QUIET_SECONDS)
        if silent:
            yield "last line", Text(f"{duration(run.quiet_seconds)} ago", style="yellow")


def _can_show(console: Console, text: str) -> bool:
    try:
        text.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
