"""The verb extend-vocab."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.commands.command import add_shard_size, add_verb, result_format, write_result
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.weights.leaves import ParamSource

# Tokens named at the end.
_SHOWN = 20


def add_vocab_verb(verbs: Any) -> None:
    """Adds the verb to argparse's sub-commands."""
    verb = add_verb(verbs, "extend-vocab", _extend_vocab, "add tokens to a model and its tokenizer")
    verb.add_argument("source", metavar="MODEL", help="model directory with its tokenizer")
    verb.add_argument("destination", metavar="OUT", help="directory to create")
    verb.add_argument("--tokens", metavar="FILE|A,B", help="a file with a token on each line, or a list")
    verb.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="tokens for molecules and the like: smiles, nucleic, protein (SciMind's alphabets), smiles_atoms, or a "
        "YAML or JSON file with a list of them (see docs/experts.md); may be repeated, ids follow the order",
    )
    verb.add_argument(
        "--merge-spm",
        metavar="OTHER.model",
        help="the pieces of another SentencePiece model that the model's tokenizer.model does not have, appended with "
        "score 0, as Chinese-LLaMA's are",
    )
    verb.add_argument(
        "--init",
        choices=("mean", "zero", "pieces"),
        help="the new rows of embedding and head: mean of all rows (default), zeros, or the mean of the rows of the "
        "pieces that the token was split into so far (default with --merge-spm)",
    )
    verb.add_argument("--special", action="store_true", help="decoding leaves the tokens out")
    verb.add_argument("--pad-to", type=int, metavar="N", help="make the number of rows a multiple of N")
    verb.add_argument("--format", choices=("hf", "jax"), help="of the result (default: jax for jaxlm models, else hf)")
    add_shard_size(verb)


def _extend_vocab(options: argparse.Namespace) -> None:
    from convert.source import open_model

    if options.tokens is None and not options.modality and options.merge_spm is None:
        raise UserError("say what to add: --tokens FILE|A,B, --modality NAME|FILE or --merge-spm OTHER.model")
    source = open_model(options.source)
    if not source.tokenizer_files:
        raise UserError(f"{options.source}: has no tokenizer; put tokenizer.json or tokenizer.model there")
    if options.merge_spm is not None:
        _merge_pieces(options, source)
    else:
        _add_tokens(options, source)


def _add_tokens(options: argparse.Namespace, source: ParamSource) -> None:
    from convert.transforms.vocab import extend, read_modalities, read_tokens, split_tokens
    from jaxlm.modalities import resolve
    from jaxlm.tokenizer import load_tokenizer
    from jaxlm.tokenizer.extending import write_extended

    tokens = [] if options.tokens is None else read_tokens(options.tokens)
    entries = read_modalities(options.modality)
    init = options.init or "mean"
    tokenizer = load_tokenizer(source.tokenizer_dir)
    modalities = resolve(entries, tokenizer.vocab_size + len(tokens))
    tokens += [token for modality in modalities for token in modality.tokens()]
    with tempfile.TemporaryDirectory() as folder:
        files = write_extended(source.tokenizer_files, tokenizer, tokens, options.special, Path(folder), modalities)
        splits = split_tokens(tokenizer, tokens) if init == "pieces" else [[]] * len(tokens)
        grown = extend(source, tokenizer, splits, init, options.pad_to)
        _write(options, source, grown, files)
    for modality in modalities:
        (start, stop), (opening, closing) = modality.range, modality.tags
        print(f"{'modality':12} {modality.name}: ids {start} to {stop - 1}, {opening}…{closing} in texts")
    _say_new("new tokens", tokenizer.vocab_size, tokens, grown.config.vocab_size)


def _merge_pieces(options: argparse.Namespace, source: ParamSource) -> None:
    from convert.transforms.pieces import FAST, MODEL, merge_sentencepiece, write_merged
    from convert.transforms.vocab import extend
    from jaxlm.tokenizer import load_tokenizer

    for name, value in (("--tokens", options.tokens), ("--modality", options.modality), ("--special", options.special)):
        if value:
            raise UserError(f"{name} beside --merge-spm: run extend-vocab on the result of --merge-spm to add tokens")
    other = Path(options.merge_spm)
    if not other.is_file():
        raise UserError(f"--merge-spm {other}: no such file; expected a SentencePiece model, e.g. chinese_sp.model")
    files = {file.name: file for file in source.tokenizer_files}
    if MODEL not in files:
        raise UserError(f"{options.source}: has no {MODEL} to merge pieces into; add them with --tokens")
    tokenizer = load_tokenizer(source.tokenizer_dir)
    merged = merge_sentencepiece(files[MODEL], other)
    grown = extend(source, tokenizer, merged.splits, options.init or "pieces", options.pad_to)
    with tempfile.TemporaryDirectory() as folder:
        _write(options, source, grown, write_merged(source.tokenizer_files, tokenizer, merged, Path(folder)))
    reads = f"{FAST}, which jaxlm and transformers read," if FAST in files else f"transformers 5, which makes a {FAST},"
    print(
        f"note: the new pieces have equal scores: among those that overlap, {MODEL} takes the leftmost, as it was done "
        f"for Chinese-LLaMA; {reads} takes the one with the smaller id",
        file=sys.stderr,
    )
    _say_new("new pieces", merged.first, merged.pieces, grown.config.vocab_size)


def _write(options: argparse.Namespace, source: ParamSource, grown: ParamSource, files: list[Path]) -> None:
    """Writes a model with other rows and other tokenizer files."""
    from convert.transforms.delta import WithTokenizer

    form = result_format(options.format, source)
    write_result(form, WithTokenizer(grown, files), options.destination, options.shard_size)


def _say_new(what: str, first: int, names: Sequence[str], rows: int) -> None:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = ", ".join(map(repr, names[:_SHOWN])) + more
    print(f"{what:12} ids {first} to {first + len(names) - 1}: {shown}; {rows} rows in embedding and head")
