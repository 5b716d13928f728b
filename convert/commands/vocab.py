"""The verb extend-vocab."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from convert.commands.command import add_shard_size, add_verb, result_format, write_result
from jaxlm.errors import UserError

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
        "--init",
        choices=("mean", "zero", "pieces"),
        default="mean",
        help="the new rows of embedding and head: mean of all rows (default), zeros, or the mean of the rows of the "
        "pieces that the token was split into so far",
    )
    verb.add_argument("--special", action="store_true", help="decoding leaves the tokens out")
    verb.add_argument("--pad-to", type=int, metavar="N", help="make the number of rows a multiple of N")
    verb.add_argument("--format", choices=("hf", "jax"), help="of the result (default: jax for jaxlm models, else hf)")
    add_shard_size(verb)


def _extend_vocab(options: argparse.Namespace) -> None:
    from convert.source import open_model
    from convert.transforms.delta import WithTokenizer
    from convert.transforms.vocab import extend, read_modalities, read_tokens
    from jaxlm.modalities import resolve
    from jaxlm.tokenizer import load_tokenizer
    from jaxlm.tokenizer.extending import write_extended

    if options.tokens is None and not options.modality:
        raise UserError("say what to add: --tokens FILE|A,B, or --modality NAME|FILE")
    tokens = [] if options.tokens is None else read_tokens(options.tokens)
    entries = read_modalities(options.modality)
    source = open_model(options.source)
    if not source.tokenizer_files:
        raise UserError(f"{options.source}: has no tokenizer; put tokenizer.json or tokenizer.model there")
    tokenizer = load_tokenizer(source.tokenizer_dir)
    modalities = resolve(entries, tokenizer.vocab_size + len(tokens))
    tokens += [token for modality in modalities for token in modality.tokens()]
    with tempfile.TemporaryDirectory() as folder:
        files = write_extended(source.tokenizer_files, tokenizer, tokens, options.special, Path(folder), modalities)
        extended = WithTokenizer(extend(source, tokenizer, tokens, options.init, options.pad_to), files)
        write_result(result_format(options.format, source), extended, options.destination, options.shard_size)
    first, rows = tokenizer.vocab_size, extended.config.vocab_size
    more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
    shown = ", ".join(map(repr, tokens[:_SHOWN])) + more
    for modality in modalities:
        (start, stop), (opening, closing) = modality.range, modality.tags
        print(f"{'modality':12} {modality.name}: ids {start} to {stop - 1}, {opening}…{closing} in texts")
    print(f"{'new tokens':12} ids {first} to {first + len(tokens) - 1}: {shown}; {rows} rows in embedding and head")
