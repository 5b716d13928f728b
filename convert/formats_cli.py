"""The verbs for Meta's and MindSpore's formats. Like `cli`, nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from convert.command import add_dtype, add_shard_size, add_verb, say_model, with_dtype, write_hf, write_jax, writing
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from convert.leaves import ParamSource
    from convert.meta import MetaSource


def add_format_verbs(verbs: Any) -> None:
    """Adds the verbs to argparse's sub-commands."""
    verb = add_verb(verbs, "meta-to-jax", _meta_to_jax, "Meta's checkpoint becomes a jaxlm model")
    _add_meta_source(verb)
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    add_dtype(verb)

    verb = add_verb(verbs, "meta-to-hf", _meta_to_hf, "Meta's checkpoint becomes a Hugging Face model")
    _add_meta_source(verb)
    verb.add_argument("destination", metavar="DST", help="Hugging Face directory to create")
    add_dtype(verb)
    add_shard_size(verb)

    for name, what in (("jax-to-meta", "a jaxlm model"), ("hf-to-meta", "a Hugging Face model")):
        verb = add_verb(verbs, name, _to_meta, f"{what} becomes a checkpoint in Meta's format")
        verb.add_argument("source", metavar="SRC", help="directory of the model")
        verb.add_argument("destination", metavar="DST", help="directory to create: consolidated.NN.pth, params.json")
        verb.add_argument(
            "--shards", type=int, default=1, metavar="N", help="files, the model-parallel size to run with (default: 1)"
        )
        add_dtype(verb)


def _add_meta_source(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", metavar="SRC", help="directory with consolidated.NN.pth and params.json")
    verb.add_argument(
        "--max-positions",
        type=int,
        metavar="N",
        help="longest row in tokens, which the files do not say (default: as published for that LLaMA)",
    )


def _open_meta(options: argparse.Namespace) -> tuple[MetaSource, ParamSource]:
    """The source, and how it is read (in which dtype)."""
    from convert.meta import MetaSource
    from convert.source import open_model

    if options.max_positions is not None and options.max_positions < 1:
        raise UserError(f"--max-positions {options.max_positions}: must be at least 1")
    source = open_model(options.source, max_positions=options.max_positions)
    if not isinstance(source, MetaSource):
        raise UserError(f"{options.source}: is no checkpoint in Meta's format (consolidated.00.pth and params.json)")
    if source.assumed:
        print(f"taken: {source.assumed}", file=sys.stderr)
    return source, with_dtype(source, options.dtype)


def _meta_to_jax(options: argparse.Namespace) -> None:
    _, source = _open_meta(options)
    write_jax(source, options.destination)


def _meta_to_hf(options: argparse.Namespace) -> None:
    _, source = _open_meta(options)
    write_hf(source, options.destination, options.shard_size)


def _open_as(options: argparse.Namespace) -> ParamSource:
    """The source of `jax-to-…` or `hf-to-…`, which must be what the verb says."""
    from convert.hf import HfSource
    from convert.native import NativeSource
    from convert.source import open_model

    source = open_model(options.source)
    wanted, name = (NativeSource, "jaxlm") if options.verb.startswith("jax-") else (HfSource, "Hugging Face")
    if not isinstance(source, wanted):
        raise UserError(f"{options.source}: is no {name} model; see `convert --help` for the verb of its format")
    return with_dtype(source, options.dtype)


def _to_meta(options: argparse.Namespace) -> None:
    from convert.meta import FILE_NAMES, write_meta

    if options.shards < 1:
        raise UserError(f"--shards {options.shards}: must be at least 1")
    source = _open_as(options)
    with writing(source, options.destination) as (directory, advance):
        write_meta(source, directory, options.shards, advance)
    length = source.config.max_position_embeddings
    say_model(
        source,
        f"run it with {options.shards} processes ({FILE_NAMES}); max_seq_len up to {length}",
    )
