"""`convert VERB SOURCE DESTINATION`: the conversions as commands.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
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

    add_format_verbs(verbs)
    add_combine_verbs(verbs)
    add_vocab_verb(verbs)
    add_expert_verbs(verbs)
    add_routing_verbs(verbs)
    add_check_verbs(verbs)
    return parser
