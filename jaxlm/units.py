"""Numbers as people read them. Bytes of disks come in powers of 1000, bytes of memory in powers of 1024."""

from __future__ import annotations

from collections.abc import Sequence


def disk_size(nbytes: float) -> str:
    """'1.5 GB'."""
    return _scaled(nbytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory_size(nbytes: float) -> str:
    """'1.5 GiB'."""
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def short_number(number: float) -> str:
    """'950', '23.3 k', '1.5 M', '2 B', '1.4 T': a count, such as one of tokens or parameters."""
    text = _scaled(number, 1000, ("", "k", "M", "B", "T"))
    return text.replace(".0 ", " ").rstrip()


def duration(seconds: float) -> str:
    """'0:07', '12:05', '3:04:05', '2 d 03:04'."""
    minutes, whole = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, rest = divmod(hours, 24)
    if days:
        return f"{days} d {rest:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def _scaled(number: float, step: int, units: Sequence[str]) -> str:
    place = 0
    while number >= step and place < len(units) - 1:
        number, place = number / step, place + 1
    return f"{number:.{min(place, 1)}f} {units[place]}"
