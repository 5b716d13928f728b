"""What every command does to JAX and its logs before it begins."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path


def use_compilation_cache(setting: str | None, least_seconds: float = 0.5) -> None:
    """Compiled programs are kept between runs, so that the second start of a run is quick.

    Args:
        setting: a directory; "none" keeps nothing; None means $JAX_COMPILATION_CACHE_DIR, which JAX reads itself,
            else the user's cache directory.
        least_seconds: programs that compile sooner are not kept.
    """
    import jax

    if setting == "none" or (setting is None and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = Path(setting) if setting else home / "jaxlm" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)


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
