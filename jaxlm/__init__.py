"""jaxlm: adapt LLaMA-family models to a scientific domain with JAX.

The public names are below; everything else is private by convention. They are imported when they are first used, so
that `import jaxlm` takes no time.

    load       a trained model, to generate, score and embed with (docs/python_api.md)
    train      trains by a `RunConfig`, as `jaxlm train` does
    RunConfig  the configuration of a run; its sections are in `jaxlm.config`
    tokenizer  loading tokenizers: `jaxlm.tokenizer.load_tokenizer`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxlm.version import __version__

if TYPE_CHECKING:
    from jaxlm import tokenizer as tokenizer
    from jaxlm.api import load as load
    from jaxlm.config import RunConfig as RunConfig
    from jaxlm.train import train as train

__all__ = ["RunConfig", "__version__", "load", "tokenizer", "train"]

# Public name -> the module that it is in. `tokenizer` is a module, and `train` one that can be called: see there.
_HOMES = {"RunConfig": "jaxlm.config", "load": "jaxlm.api"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("tokenizer", "train"):
        return importlib.import_module(f"jaxlm.{name}")
    raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
