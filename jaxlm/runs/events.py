"""events.jsonl: when a run was started, with what, what it warned of, and how each start ended."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


class EventLog:
    """Appends to OUT/events.jsonl: one object a line with `time` (ISO 8601) and `event`.

    Args:
        output_dir: the run directory; None on all processes but the first, which write nothing.
    """

    def __init__(self, output_dir: Path | None) -> None:
        self._path = None if output_dir is None else output_dir / EVENTS

    def write(self, event: str, **values: Any) -> None:
        if self._path is None:
            return
        time = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        line = json.dumps({"time": time, "event": event, **values}, ensure_ascii=False)
        with self._path.open("a+b") as file:
            # Behind half a line, which a machine that died may have left, a new one begins.
            end = file.seek(0, 2)
            if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                line = f"\n{line}"
            file.write(f"{line}\n".encode())

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """A block after which, when an error or a signal leaves it, the file says so."""
        try:
            yield
        except BaseException as error:
            self.write("end", error=(str(error).splitlines() or [type(error).__name__])[0])
            raise


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run; [] of one that wrote none. A line that a crash cut short is passed over."""
    events = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(text)
                if isinstance(value, dict) and "event" in value:
                    events.append(value)
    return events


def resumed_steps(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps from which later starts went on."""
    return [event["step"] for event in events if event["event"] == "start" and event.get("step")]
