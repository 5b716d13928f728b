"""What every command does to JAX and its logs before it begins."""

from __future__ import annotations

import contextlib
import gc
import glob
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.errors import write_line

# How entries begin where the package zstandard is installed, by which JAX then packs them instead of by zlib.
_ZSTD = b"\x28\xb5\x2f\xfd"


def use_compilation_cache(setting: str | None, least_seconds: float = 0.5) -> None:
    """Compiled programs are kept between runs, so that the second start of a run is quick.

    Args:
        setting: a directory; "none" keeps nothing; None means $JAX_COMPILATION_CACHE_DIR, which JAX reads itself,
            else the user's cache directory.
        least_seconds: programs that compile sooner are not kept.
    """
    import jax

    if setting == "none":
        return
    if setting is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        _mend_cache(os.environ["JAX_COMPILATION_CACHE_DIR"])
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = Path(setting) if setting else home / "jaxlm" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    _mend_cache(str(directory))


def _mend_cache(directory: str) -> None:
    """Removes programs from the cache that cannot be unpacked, once JAX warns of one.

    A process that was killed while it wrote one, and a full disk, leave a part of it, which JAX never replaces: it
    would warn and compile again at every start. What is removed is compiled and written anew.
    """
    show = warnings.showwarning
    if isinstance(show, partial) and show.func is _mending:  # one start after the other in one process
        show = show.args[1]
    warnings.showwarning = partial(_mending, Path(directory), show)


def _mending(
    directory: Path,
    show: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    *more: Any,
    **named: Any,
) -> None:
    """`warnings.showwarning` that looks into the cache where JAX could not read a program of it."""
    found = re.match(r"Error reading persistent compilation cache entry for '([^']+)'", str(message))
    entries = directory.glob(f"{glob.escape(found[1])}-*-cache") if found else ()
    broken = [path for path in entries if not _is_whole(path)]
    for path in broken:
        path.unlink(missing_ok=True)
        write_line(f"note: {path}: this compiled program was cut short; it is removed, and compiled anew", sys.stderr)
    if not broken:
        show(message, category, filename, *more, **named)


def _is_whole(path: Path) -> bool:
    """Whether an entry of the cache can be unpacked; True where that cannot be told."""
    try:
        data = path.read_bytes()
    except OSError:
        return True
    if data.startswith(_ZSTD):
        return True
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(data)
    except zlib.error:
        return False
    return unpacker.eof


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A block of imports, in which Python's garbage collector rests.

    It would look through all that is imported again and again, and find no garbage: a sixth of the time. What is there
    at the end of the block is not looked at again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def quiet_logs() -> None:
    """Keeps what Orbax logs through absl off the terminal; what goes wrong there also arrives as an exception."""
    import logging

    logging.getLogger("absl").setLevel(logging.CRITICAL)
