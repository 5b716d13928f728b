"""What every command does to JAX and its logs before it begins."""

from __future__ import annotations

import os
from pathlib import Path


def use_compilation_cache(setting: str | None) -> None:
    """Compiled programs are kept between runs, so that the second start of a run is quick.

    Args:
        setting: a directory; "none" keeps nothing; None means $JAX_COMPILATION_CACHE_DIR, which JAX reads itself,
            else the user's cache directory.
    """
    import jax

    if setting == "none" or (setting is None and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = Path(setting) if setting else home / "jaxlm" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def quiet_logs() -> None:
    """Keeps what Orbax logs through absl off the terminal; what goes wrong there also arrives as an exception."""
    import logging

    logging.getLogger("absl").setLevel(logging.CRITICAL)
