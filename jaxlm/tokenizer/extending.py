"""Adding tokens to a tokenizer's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.modalities import Modality
from jaxlm.modalities import save as save_modalities
from jaxlm.tokenizer.files import find_tokenizer_files
from jaxlm.tokenizer.tokenizer import Tokenizer


def write_extended(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    tokens: Sequence[str],
    special: bool,
    directory: Path,
    modalities: Sequence[Modality] = (),
) -> list[Path]:
    """Copies a tokenizer's files to a directory with the new tokens added, and returns the copies.

    Files that are in the directory already are changed.

    tokenizer.json gets them through the `tokenizers` library. A SentencePiece .model and a vocab.json stay as they are;
    the tokens stand in added_tokens.json beside it and, with their kind, in tokenizer_config.json, where transformers
    and jaxlm look.

    Args:
        special: whether decoding leaves them out.
        modalities: those that the new tokens are of; recorded beside the ones that the tokenizer has.

    Raises:
        UserError: when one of the tokens, or of the modalities' names or tags, exists already.
    """
    for modality in modalities:
        known = {name for old in tokenizer.modalities for name in (old.name, *old.tags)}
        for name in (modality.name, *modality.tags):
            if name in known:
                raise UserError(f"{tokenizer.path}: has a modality with the name or tag {name!r} already")
    for token in tokens:
        index = tokenizer.id_of(token)
        if index is not None:
            raise UserError(f"{tokenizer.path}: has the token {token!r} already, with id {index}")
    ids = {token: tokenizer.vocab_size + number for number, token in enumerate(tokens)}
    for file in files:
        if file.parent != directory:
            shutil.copyfile(file, directory / file.name)
    fast = directory / "tokenizer.json"
    is_beside = not fast.is_file() or (directory / "tokenizer.model").is_file()
    if fast.is_file():
        _add_to_fast(fast, ids, special)
    if is_beside:
        _update_json(directory / "added_tokens.json", ids)
    settings = directory / "tokenizer_config.json"
    old = read_object(settings).get("added_tokens_decoder") if settings.is_file() else None
    if old is not None or is_beside:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
        new = {str(index): {"content": token, **flags} for token, index in ids.items()}
        _update_json(settings, {"added_tokens_decoder": (old or {}) | new})
    if modalities:
        save_modalities([*tokenizer.modalities, *modalities], directory)
    return find_tokenizer_files(directory)


def _add_to_fast(file: Path, ids: dict[str, int], special: bool) -> None:
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(file))
    model.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in ids])
    for token, index in ids.items():
        there = model.token_to_id(token)
        if there != index:
            raise UserError(
                f"{file.name}: the new token {token!r} would get id {there} there instead of {index}: "
                "its ids have a gap, or its files do not belong together"
            )
    model.save(str(file))


def _update_json(file: Path, values: dict[str, Any]) -> None:
    content = read_object(file) if file.is_file() else {}
    file.write_text(json.dumps(content | values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
