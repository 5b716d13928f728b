"""`convert VERB SOURCE DESTINATION`: the conversions as commands.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from convert.commands.check import READ_ONLY, add_check_verbs
from convert.commands.combine import add_combine_verbs, normalise
from convert.commands.experts import add_expert_verbs
from convert.commands.formats import add_format_verbs
from convert.commands.routing import add_routing_verbs
from convert.commands.vocab import add_vocab_verb
from jaxlm.errors import exit_status
from jaxlm.hub import Want, is_address
from jaxlm.locate import expand_user, on_disk
from jaxlm.machine import keep_freed_blocks, limit_heaps


def main(arguments: Sequence[str] | None = None, prog: str = "convert") -> int:
    """Runs one command; returns the exit status: 0 done, 1 `verify` found a difference, 2 a mistake in the input."""
    # The products of a merge are too small to be shared out: threads that wait for each other cost more than they do.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if arguments is None or prog != "convert":  # a program that calls this has its own way with its memory
        limit_heaps()
        keep_freed_blocks()
    words = normalise(sys.argv[1:] if arguments is None else arguments)
    parser, verbs = _parser(prog)
    if words and not words[0].startswith("-") and words[0] not in verbs:
        near = difflib.get_close_matches(words[0], verbs, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(verbs)}"
        parser.error(f"{words[0]!r} is not a verb; {hint}")
    options = parser.parse_args(words)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    left = "" if options.verb in READ_ONLY else "; nothing was left at the destination"
    return exit_status(
        lambda: _run(options),
        prefix=f"convert {options.verb}",
        interrupted=f"convert {options.verb}: interrupted{left}",
    )


def _run(options: argparse.Namespace) -> int | None:
    _expand(options)
    status: int | None = options.run(options)
    return status


def _expand(options: argparse.Namespace) -> None:
    """`~` in paths, which a shell leaves alone in quotes and behind an `=`; addresses of the hub, which are fetched."""

    def expanded(value: object, name: str) -> object:
        if isinstance(value, list):
            # The last of the models of `merge` and others is where the result goes.
            ends = "destination" if name == "models" else name
            return [expanded(item, name if number < len(value) else ends) for number, item in enumerate(value, 1)]
        if isinstance(value, str) and is_address(value) and name != "destination":
            want: Want = "small" if name == "tokenizer" else "data" if value.startswith("hf://datasets/") else "model"
            return str(on_disk(value, want, name))
        if not isinstance(value, str) or not (value == "~" or (value.startswith("~") and "/" in value)):
            return value
        return expand_user(value)

    for name, value in vars(options).items():
        lists_tokens = name == "tokens" and isinstance(value, str) and "," in value
        if name not in ("prompt", "verb") and not lists_tokens:
            setattr(options, name, expanded(value, name))


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that the temporary directory is removed.
    raise SystemExit(128 + number)


def _parser(prog: str) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and the names of its verbs."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Take models and adapters from one format to another. Memory stays bounded, whatever their size; "
        "the destination appears only when it is complete.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    add_format_verbs(verbs)
    add_combine_verbs(verbs)
    add_vocab_verb(verbs)
    add_expert_verbs(verbs)
    add_routing_verbs(verbs)
    add_check_verbs(verbs)
    return parser, list(verbs.choices)
