"""Numbers of bytes as people read them: disks are sold in powers of 1000, memory in powers of 1024."""

from __future__ import annotations

from collections.abc import Sequence


def disk_size(nbytes: float) -> str:
    """'1.5 GB'."""
    return _scaled(nbytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory_size(nbytes: float) -> str:
    """'1.5 GiB'."""
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(number: float, step: int, units: Sequence[str]) -> str:
    place = 0
    while number >= step and place < len(units) - 1:
        number, place = number / step, place + 1
    return f"{number:.{min(place, 1)}f} {units[place]}"
