"""Where the time of a compiled step goes: the costliest operations of a device, by JAX's profiler."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax


def by_op(run: Callable[[], object], rounds: int = 2, top: int = 14) -> list[str]:
    """Runs `run` under the profiler.

    Args:
        run: must wait for its result.
        rounds: times are means over these.
        top: number of operations told.

    Returns:
        A line each, the costliest first: milliseconds of a round, share of the busy time, calls, name. Operations that
        differ in a number behind their name count as one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    spent: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    for plane in profile.planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                name = re.sub(r"[._]\d+(?=$|[._])", "", event.name)[:90]
                spent[name] += event.duration_ns / 1e6 / rounds
                calls[name] += 1
    total = sum(spent.values())
    lines = [f"{total:.1f} ms of work on the device a round"]
    for name in sorted(spent, key=lambda name: -spent[name])[:top]:
        lines.append(f"{spent[name]:9.2f} ms {spent[name] / total:6.1%} {calls[name] // rounds:6} x {name}")
    return lines
