"""The `gguf` package, which reads and writes headers and packs numbers: an extra, imported when it is needed."""

from __future__ import annotations

from types import ModuleType

from jaxlm.errors import UserError


def load_gguf() -> ModuleType:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files are read and written with the package gguf: pip install 'jaxlm[gguf]'") from None
    return gguf
