"""`convert VERB SOURCE DESTINATION`: the conversions as commands.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from convert.commands.check import READ_ONLY, add_check_verbs
from convert.commands.combine import add_combine_verbs, normalise
from convert.commands.command import (
    add_dtype,
    add_shard_size,
    add_verb,
    say_adapter,
    write_hf,
    write_jax,
    writing,
)
from convert.commands.experts import add_expert_verbs
from convert.commands.formats import add_format_verbs, open_as
from convert.commands.routing import add_routing_verbs
from convert.commands.vocab import add_vocab_verb
from jaxlm.errors import UserError
from jaxlm.locate import expand_user


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 `verify` found a difference, 2 a mistake in the input."""
    # The products of a merge are too small to be shared out: threads that wait for each other cost more than they do.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    options = _parser().parse_args(normalise(sys.argv[1:] if arguments is None else arguments))
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        _expand(options)
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"convert {options.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output (`| head`) has seen enough; nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        left = "" if options.verb in READ_ONLY else "; nothing was left at the destination"
        print(f"convert {options.verb}: interrupted{left}", file=sys.stderr)
        return 130


def _expand(options: argparse.Namespace) -> None:
    """`~` in paths, which a shell leaves alone in quotes and behind an `=`."""

    def expanded(value: object) -> object:
        if isinstance(value, list):
            return [expanded(item) for item in value]
        if not isinstance(value, str) or not (value == "~" or (value.startswith("~") and "/" in value)):
            return value
        return expand_user(value)

    for name, value in vars(options).items():
        lists_tokens = name == "tokens" and isinstance(value, str) and "," in value
        if name != "prompt" and not lists_tokens:
            setattr(options, name, expanded(value))


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that the temporary directory is removed.
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert",
        description="Take models and adapters from one format to another. Memory stays bounded, whatever their size; "
        "the destination appears only when it is complete.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = add_verb(verbs, "hf-to-jax", _hf_to_jax, "a Hugging Face model becomes a jaxlm model")
    verb.add_argument("source", metavar="SRC", help="directory with config.json and safetensors or .bin weights")
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    add_dtype(verb)

    verb = add_verb(verbs, "jax-to-hf", _jax_to_hf, "a jaxlm model becomes a Hugging Face model")
    verb.add_argument("source", metavar="SRC", help="jaxlm directory, run directory (newest checkpoint) or checkpoint")
    verb.add_argument("destination", metavar="DST", help="Hugging Face directory to create")
    add_dtype(verb)
    add_shard_size(verb)
    verb.add_argument(
        "--layout",
        choices=("dense", "mixtral"),
        help="of a model of experts: a dense model with the experts in files beside it, which jaxlm reads, or "
        "Mixtral's, for a learned router with one k (default: the one that it came in; dense if it was made here)",
    )

    verb = add_verb(verbs, "peft-to-jax", _peft_to_jax, "a PEFT LoRA adapter becomes a jaxlm adapter")
    verb.add_argument("source", metavar="ADAPTER", help="directory with adapter_config.json and adapter_model.*")
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    verb.add_argument("--base", required=True, metavar="BASE", help="the model it belongs to (any format)")

    verb = add_verb(verbs, "jax-to-peft", _jax_to_peft, "a jaxlm adapter becomes a PEFT adapter")
    verb.add_argument("source", metavar="SRC", help="LoRA run directory, one of its checkpoints, or converted adapter")
    verb.add_argument("destination", metavar="DST", help="PEFT directory to create")

    add_format_verbs(verbs)
    add_combine_verbs(verbs)
    add_vocab_verb(verbs)
    add_expert_verbs(verbs)
    add_routing_verbs(verbs)
    add_check_verbs(verbs)
    return parser


def _hf_to_jax(options: argparse.Namespace) -> None:
    write_jax(open_as(options), options.destination)


def _jax_to_hf(options: argparse.Namespace) -> None:
    write_hf(open_as(options), options.destination, options.shard_size, options.layout)


def _peft_to_jax(options: argparse.Namespace) -> None:
    from convert.source import open_adapter, open_model, stored_adapter
    from jaxlm.weights.native import NativeAdapter, write_adapter

    base = open_model(options.base)
    if isinstance(stored_adapter(options.source, base.config), NativeAdapter):
        raise UserError(f"{options.source}: is a jaxlm adapter already")
    adapter = open_adapter(options.source, base)
    with writing(adapter, options.destination) as (directory, advance):
        write_adapter(adapter, directory, options.base, advance)
    say_adapter(adapter, f"convert merge {shlex.quote(options.base)} {shlex.quote(options.destination)} OUT")


def _jax_to_peft(options: argparse.Namespace) -> None:
    from convert.formats.chat_template import asked_or_name, say_asked, write_asked
    from convert.formats.peft import PeftSource, write_peft
    from convert.source import is_adapter, open_adapter

    if is_adapter(options.source) and (Path(options.source) / "adapter_config.json").is_file():
        raise UserError(f"{options.source}: is a PEFT adapter already")
    adapter = open_adapter(options.source)
    assert not isinstance(adapter, PeftSource)
    asked = asked_or_name(adapter)
    with writing(adapter, options.destination) as (directory, advance):
        write_peft(adapter, directory, advance)
        if asked is not None:
            write_asked(asked, directory)
    say_adapter(adapter, f"PeftModel.from_pretrained(base, {json.dumps(options.destination, ensure_ascii=False)})")
    say_asked(asked, written=True)
    if adapter.config.experts is not None:
        print(f"{'base':12} to PEFT, the dense model that convert jax-to-hf writes, all experts on")
