"""The tasks by name. A task's module is imported when it is asked for: some need packages of their own."""

from __future__ import annotations

import difflib
import importlib

from jaxlm.errors import UserError
from jaxlm.evaluation.task import Task

# Name for --task -> module of `jaxlm.evaluation.tasks`, which has it as TASK or in TASKS (by name).
MODULES: dict[str, str] = {
    "geobench": "geobench",
    "geobench_subjective": "geobench",
    "ie": "ie",
    "lpm24_captions": "lpm24",
    "lpm24_molecules": "lpm24",
    "matbench": "mdp",
    "mdp": "mdp",
    "molinstructions": "molinstructions",
    "multiple_choice": "multiple_choice",
    "numbers": "numbers",
    "qa": "qa",
    "sii": "sii",
    "zbench": "zbench",
}
# The same for the task without requests: its texts are scored in rows, see `evaluation.perplexity`.
TEXTS = {"perplexity": "perplexity"}
# Tasks of `jaxlm evaluate` that have a command of their own, and are run one at a time.
ALONE = ("smiles2text", "text2smiles")


def names() -> list[str]:
    """What --task may name."""
    return [*sorted(MODULES | TEXTS), *ALONE]


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        UserError: there is none, with the nearest.
    """
    modules = MODULES | TEXTS
    if name not in modules:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise UserError(f"task: {name!r} is not a task; {hint}")
    module = importlib.import_module(f"jaxlm.evaluation.tasks.{modules[name]}")
    tasks: dict[str, Task] = getattr(module, "TASKS", None) or {module.TASK.name: module.TASK}
    return tasks[name]
