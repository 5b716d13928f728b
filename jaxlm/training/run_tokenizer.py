"""The tokenizer of a run: the model's own, a named one, or one that is trained for a fresh model."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import RunConfig
from jaxlm.errors import UserError
from jaxlm.locate import on_disk
from jaxlm.modalities import resolve, save
from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from jaxlm.tokenizer.extending import write_extended
from jaxlm.weights.native.layout import CHECKPOINTS, SMALL_FILES, TOKENIZER


def open_tokenizer(config: RunConfig, source: Any) -> tuple[Tokenizer, dict[str, bytes]]:
    """The tokenizer, and its files by name, to be kept with every checkpoint.

    Args:
        config: the run.
        source: the opened model; None for a fresh one.

    Raises:
        UserError: a fresh model has no tokenizer, or the modalities that the run names do not fit its tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        if config.tokenizer.path is not None:
            tokenizer = load_tokenizer(config.tokenizer.path)
            tokenizer.save(folder)
        elif source is not None:
            tokenizer = load_tokenizer(source.tokenizer_dir)
            for path in source.tokenizer_files:
                shutil.copyfile(path, directory / path.name)
        else:
            _train_or_keep(config, directory)
            tokenizer = load_tokenizer(directory)
        tokenizer, files = _with_modalities(config, tokenizer, directory, is_new=source is None)
        if source is not None:
            spec = source.config
            tokenizer.complete(spec.bos_token_id, spec.eos_token_id, spec.pad_token_id)
        return tokenizer, files


def newest_small_files(output_dir: Path) -> Path | None:
    """The folder with the small files of a run's newest checkpoint that has a tokenizer; None without one."""
    steps = [
        path
        for path in (output_dir / CHECKPOINTS).glob("*")
        if path.name.isdigit() and (path / SMALL_FILES / TOKENIZER).is_dir()
    ]
    newest = max(steps, key=lambda path: int(path.name), default=None)
    return None if newest is None else newest / SMALL_FILES


def _train_or_keep(config: RunConfig, directory: Path) -> None:
    """Puts the tokenizer that an earlier start has trained into `directory`, or trains one there."""
    if not config.tokenizer.train_on:
        raise UserError("tokenizer: a fresh model has none; set tokenizer.path, or tokenizer.train_on to train one")
    newest = newest_small_files(Path(config.output_dir))
    kept = {} if newest is None else _read_files(newest / TOKENIZER)
    for name, content in kept.items():
        (directory / name).write_bytes(content)
    if not kept:
        train_sentencepiece(_text_files(config.tokenizer.train_on), config.tokenizer.vocab_size, directory)


def _with_modalities(
    config: RunConfig, tokenizer: Tokenizer, directory: Path, is_new: bool
) -> tuple[Tokenizer, dict[str, bytes]]:
    """The tokenizer with the modalities that the run names, and its files.

    Args:
        config: the run.
        tokenizer: the tokenizer so far.
        directory: copies of its files, which are changed.
        is_new: the model is a fresh one, so that its tokenizer may get the tokens that it lacks.
    """
    entries = config.tokenizer.modalities
    if entries:
        tokens = [token for modality in resolve(entries, 0) for token in modality.tokens()]
        first = tokenizer.id_of(tokens[0])
        modalities = resolve(entries, tokenizer.vocab_size if first is None else first)
        if tokenizer.modalities:
            # How texts are read may be changed; what the tokens are may not.
            unchanged = [
                dataclasses.replace(old, strip=new.strip, fallback=new.fallback)
                for old, new in zip(tokenizer.modalities, modalities, strict=False)
            ]
            if unchanged != modalities or len(unchanged) != len(tokenizer.modalities):
                raise UserError(
                    "tokenizer.modalities: differ from those that the tokenizer has "
                    f"({', '.join(m.name for m in tokenizer.modalities)}, in {tokenizer.path}) in more than fallback "
                    "and strip; leave them out, or give all of them as they are there"
                )
            save(modalities, directory)
        elif first is not None:
            save(modalities, directory)  # loading checks the ids of all tokens
        elif is_new:
            write_extended(sorted(directory.iterdir()), tokenizer, tokens, False, directory, modalities)
        else:
            names = " ".join(f"--modality {shlex.quote(entry.preset or 'FILE')}" for entry in entries)
            raise UserError(
                f"tokenizer.modalities: {tokenizer.path} has no token {tokens[0]!r}; add them to model and tokenizer: "
                f"convert extend-vocab {shlex.quote(str(config.model.path))} OUT {names}"
            )
        tokenizer = load_tokenizer(directory)
    return tokenizer, _read_files(directory)


def _read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _text_files(names: Sequence[str]) -> list[Path]:
    """Files as given; in place of a folder, every .txt file below it."""
    files: list[Path] = []
    for name in names:
        path = on_disk(name, "data", "tokenizer.train_on")
        below = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not below:
            raise UserError(f"tokenizer.train_on: no .txt file below {path}")
        files += below
    return files
