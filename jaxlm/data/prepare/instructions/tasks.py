"""Seed tasks, the prompt made of some of them, and the tasks that a reply holds: the format of Alpaca's script."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.data.entries import read_entries
from jaxlm.errors import UserError

NO_INPUT = "<noinput>"
SEPARATOR = "###"
# Stands in front of the examples. In our own words; {number} is the number of the last task that is asked for.
REQUEST = """\
Write {number} tasks for a language model. A task has an instruction, an input and an output.

1. Every task asks for something that the others do not ask for.
2. Use many different verbs, and both questions and requests.
3. Take tasks of many kinds: explaining, rewriting, sorting, choosing, calculating, summarising, inventing, and others.
4. A language model that reads and writes nothing but text must be able to do the task.
5. The instruction is in English and has one or two sentences.
6. The input is what the instruction is about, such as a text or a list, in at most 100 words. Where none is needed, it is {no_input}.
7. The output is the right and complete answer, in at most 100 words.

The tasks:
"""  # noqa: E501
_SPACES = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class Task:
    """An instruction, what it is about (may be empty), and the answer."""

    instruction: str
    input: str
    output: str


def read_seed_tasks(path: str) -> list[Task]:
    """Tasks of a .json, .jsonl, .csv or .parquet file: fields `instruction`, `input`, `output`, or Self-Instruct's.

    Self-Instruct's have a list `instances` of inputs and outputs, of which the first counts.

    Raises:
        UserError: the file, or a record by its number, is not of that form.
    """
    kind = path.rpartition(".")[2]
    if kind not in ("json", "jsonl", "csv", "parquet"):
        raise UserError(f"seed_tasks: {path}: the ending must be .json, .jsonl, .csv or .parquet")
    tasks = []
    for entry in read_entries(Path(path), kind, key="seed_tasks"):
        if entry.problem is not None:
            raise UserError(f"seed_tasks: {entry.name}: {entry.problem}")
        tasks.append(_seed_task(entry.name, entry.value))
    if not tasks:
        raise UserError(f"seed_tasks: {path} holds no task")
    return tasks


def _seed_task(name: str, record: Any) -> Task:
    values = record if isinstance(record, dict) else {}
    instances = values.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        values = {**values, **instances[0]}
    task = Task(*(values.get(field) or "" for field in ("instruction", "input", "output")))
    if not all(isinstance(text, str) for text in dataclasses.astuple(task)):
        raise UserError(f"seed_tasks: {name}: instruction, input and output must be texts")
    for field in ("instruction", "output"):
        if not getattr(task, field).strip():
            raise UserError(f"seed_tasks: {name}: no {field}; a task has instruction, input and output")
    return task


def choose(tasks: Sequence[Task], count: int, seed: int, number: int) -> list[Task]:
    """The examples of a request: drawn without repetition, by a seed and the number of the request alone."""
    return random.Random(f"{seed} {number}").sample(tasks, count)


def make_prompt(examples: Sequence[Task], last: int, request: str = REQUEST) -> str:
    """A request for tasks up to number `last`, the examples being the first, and the beginning of the next one."""
    text = request.replace("{number}", str(last)).replace("{no_input}", NO_INPUT).rstrip() + "\n"
    for number, task in enumerate(examples, 1):
        instruction = _SPACES.sub(" ", task.instruction).strip().rstrip(":")
        text += (
            f"{SEPARATOR}\n{number}. Instruction: {instruction}\n{number}. Input:\n{task.input or NO_INPUT}\n"
            f"{number}. Output:\n{task.output}\n"
        )
    return text + f"{SEPARATOR}\n{len(examples) + 1}. Instruction:"


def stop_texts(last: int) -> list[str]:
    """Texts before which a reply should end: the task behind the last one."""
    return [f"\n{last + 1}.", f"{SEPARATOR}\n{last + 1}"]


def parse_reply(text: str, first: int, is_cut: bool) -> Iterator[Task | None]:
    """The tasks of a reply; None for each that is not of the form of the examples.

    Args:
        text: what was written behind `make_prompt`'s text.
        first: the number of the first task in it.
        is_cut: whether the reply ended because it was too long; then its last task is not whole, and left out.
    """
    begins = rf"\s*(?:{SEPARATOR}\s*)?{first}\.\s+Instruction:"
    # A model that is asked in a chat often says the beginning again.
    whole = text if re.match(begins, text) else f"{first}. Instruction:{text}"
    pieces = [piece for piece in whole.split(SEPARATOR) if piece.strip()]
    for place, piece in enumerate(pieces[:-1] if is_cut else pieces):
        number = first + place
        parts = re.split(rf"(?:^|(?<=\s)){number}\.\s+(Instruction|Input|Output):", piece)
        if len(parts) != 7 or parts[1::2] != ["Instruction", "Input", "Output"]:
            yield None
            continue
        instruction, given, output = (parts[place].strip() for place in (2, 4, 6))
        yield Task(instruction, "" if given.lower() == NO_INPUT else given, output)
