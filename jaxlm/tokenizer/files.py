"""The files of a tokenizer, as they lie in the directory of a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from jaxlm.modalities import MODALITIES_FILE

# What a tokenizer is loaded from, the first that is there; the other files say more about it.
MAIN_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "ice_text.model", "vocab.json")
# Whatever belongs to a tokenizer (or to generation) in a model directory; the rest is weights and documentation.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer.json",
    "spiece.model",
    "ice_text.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    MODALITIES_FILE,
)


def main_file(names: Collection[str]) -> str | None:
    """The one among the files of a directory that its tokenizer is loaded from; None without one."""
    return next((name for name in MAIN_FILES if name in names), None)


def find_tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer and generation files of a directory, in the order of their names."""
    return sorted({path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()})
