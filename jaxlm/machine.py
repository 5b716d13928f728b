"""What this machine has, and how a process uses it, as far as that needs no JAX."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# What libtpu would ask Google's metadata server for. Neither matters where no TPU is.
QUIET = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
KEPT_BYTES = 1 << 30
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus


def has_tpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether there is a TPU on the PCI bus, as JAX looks for it."""
    return any(vendor.read_text(encoding="ascii").strip() == _GOOGLE for vendor in devices.glob("*/vendor"))


def quiet_libtpu() -> None:
    """Keeps an installed libtpu from complaining that it does not find out which TPU it is on, where there is none.

    To be called before JAX is imported.
    """
    if not has_tpu():
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)


def limit_heaps(number: int = 1) -> None:
    """Lets glibc's allocator keep this number of heaps for all threads; before there are any.

    By default it makes one for nearly every thread that compiles, runs programs or writes checkpoints, and keeps in it
    what the thread gives back: a tenth of the memory of a process that evaluates, and more with every save of one that
    trains (benchmarks/README.md, "Questions with several answers" and "Long runs"). Other allocators have no such
    setting, and $MALLOC_ARENA_MAX is the user's own.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _mallopt(_ARENA_MAX, number)


def keep_freed_blocks() -> None:
    """Has glibc's allocator use freed blocks of any size again, instead of fresh pages of the system for each.

    For a process that takes and gives back matrices all the time; it keeps up to KEPT_BYTES that it does not use.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        _mallopt(_MMAP_MAX, 0)
        _mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
