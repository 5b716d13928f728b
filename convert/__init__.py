"""Conversion between jaxlm and the formats of the field, tensor by tensor.

    import convert
    convert.convert("out/run", "tuned", to="hf")

The public names are those in `__all__`; docs/convert.md has the verbs of the command `convert`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.conversion import Converted, convert

__all__ = ["Converted", "convert"]


def __getattr__(name: str) -> Any:
    """The public names, whose module (numpy, JAX) is imported when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from convert import conversion

    return getattr(conversion, name)


def __dir__() -> list[str]:
    return sorted(__all__)
