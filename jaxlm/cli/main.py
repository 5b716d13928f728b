"""`jaxlm VERB …`: all commands under one name; each is a program of its own too."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jaxlm.errors import MISTAKE, show


class Verb(NamedTuple):
    """A command: the module whose `main(argv, prog)` runs it, and what it does in a line."""

    module: str
    summary: str


VERBS = {
    "train": Verb("jaxlm.cli.train", "pretrain, fine-tune or LoRA-tune a model, by one configuration"),
    "generate": Verb("jaxlm.cli.generate", "answer a prompt, a conversation, or a file of prompts"),
    "serve": Verb("jaxlm.cli.serve", "answer over HTTP: OpenAI's routes, and a page for the browser"),
    "evaluate": Verb("jaxlm.cli.evaluate", "perplexity of a model, or a benchmark's figures of its answers"),
    "watch": Verb("jaxlm.cli.watch", "follow a run in the terminal: progress, loss, speed, memory"),
    "report": Verb("jaxlm.cli.report", "a run as one HTML file: settings, data, curves, checkpoints"),
    "prepare": Verb("jaxlm.cli.prepare", "filter, deduplicate and split data of any size, into a token store"),
    "plan": Verb("jaxlm.cli.plan", "whether a run will fit on given devices, and how fast it can be"),
    "doctor": Verb("jaxlm.cli.doctor", "whether this machine has what a run needs, and what to mend"),
    "tune": Verb("jaxlm.cli.tune", "time the attention kernels on this device and keep the fastest"),
    "run-as": Verb("jaxlm.cli.run_as", "run an old command line of K2, KnowLM, Darwin, Alpaca, SciMind, LLM4Academic"),
    "push": Verb("jaxlm.cli.push", "send a converted model or adapter to the Hugging Face hub"),
    "convert": Verb("convert.commands.main", "take models and adapters from one format to another"),
}


def main(argv: Sequence[str] | None = None, prog: str = "jaxlm") -> int:
    """Exit status: that of the verb; 2 for an unknown one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        show(_help(prog))
        return 0
    if words[0] == "--version":
        show(f"jaxlm {importlib.metadata.version('jaxlm')}\n")
        return 0
    name, *rest = words
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VERBS)}"
        print(f"error: {name!r} is not a command of {prog}; {hint}", file=sys.stderr)
        return MISTAKE
    status: int = importlib.import_module(VERBS[name].module).main(rest, f"{prog} {name}")
    return status


def _help(prog: str) -> str:
    width = max(map(len, VERBS))
    lines = [
        f"usage: {prog} VERB ...",
        "",
        "Adapts LLaMA-family models to a scientific domain: training, generation, conversion.",
        "",
        *(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()),
        "",
        f"{prog} VERB --help explains each; docs/ has a page for each task.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
