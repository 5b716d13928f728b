"""A task with its data file: records, checked before anything is asked, and answers that were made elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import SourceConfig
from jaxlm.config.plain import to_dict
from jaxlm.config.reading import build, check_keys
from jaxlm.data.entries import read_entries
from jaxlm.data.records import FORMATS, read_records
from jaxlm.errors import UserError
from jaxlm.evaluation.journal import from_json
from jaxlm.evaluation.registry import MODULES, get_task
from jaxlm.evaluation.task import Answer, Answers, Figure, Row, Task

# Columns of a file of answers in which a text is looked for.
ANSWERS = ("prediction", "jaxlm_answer", "answer", "output", "text")
# Those that a record with its right answer does not have itself.
BESIDE_RECORDS = ANSWERS[:2]


@dataclasses.dataclass(frozen=True)
class Job:
    """A task on a file.

    Attributes:
        path: the data file.
        options: the task's, read.
        records: those that are evaluated.
        names: of the records, for messages: "file:number".
        digest: sha256 of the file.
        limit: the number of records that was asked for; None: all.
    """

    task: Task
    path: Path
    options: Any
    records: list[Row]
    names: list[str]
    digest: str
    limit: int | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the questions, as JSON has it; the file may lie elsewhere another time."""
        values = {
            "task": self.task.name,
            "version": self.task.version,
            "data (sha256)": self.digest,
            "records": len(self.records),
            "limit": self.limit,
            "options": to_dict(self.options),
        }
        result: dict[str, Any] = json.loads(json.dumps(values))
        return result

    def score(self, answers: Sequence[Answers]) -> dict[str, Figure]:
        """The figures of answers, one for each record."""
        return self.task.score(self.records, answers, self.options)


def read_options(task: Task, values: Mapping[str, Any]) -> Any:
    """The task's options with these values; those that it does not know are not looked at (see `check_options`)."""
    known = {field.name for field in dataclasses.fields(task.options)}
    try:
        options: Any = build({name: value for name, value in values.items() if name in known}, task.options)
    except UserError as error:
        raise UserError(f"options.{error}") from None
    if task.check_options is not None:
        task.check_options(options)
    return options


def check_options(tasks: Sequence[Task], values: Mapping[str, Any]) -> None:
    """Raises UserError for an option that none of the tasks has."""
    known = {field.name for task in tasks for field in dataclasses.fields(task.options)}
    for name in values:
        if name not in known:
            names = ", ".join(task.name for task in tasks)
            if len(tasks) == 1:
                check_keys({name: values[name]}, tasks[0].options, f"options of {names}")
            raise UserError(f"options.{name}: {names} have no such option; known: {', '.join(sorted(known)) or 'none'}")


def read_job(task: Task, path: Path, options: Mapping[str, Any], limit: int | None = None) -> Job:
    """Reads and checks a data file.

    Raises:
        UserError: it is missing or broken, or one of its records is not what the task expects.
    """
    read = read_options(task, options)
    if task.read is None:
        entries = list(read_records(SourceConfig(path=str(path), limit=limit)))
        records: list[Row] = [entry.data for entry in entries]
        names = [entry.name for entry in entries]
    else:
        _check_file(path)
        records = task.read(path, read)
        records = records if limit is None else records[:limit]
        names = [f"{path}:{number}" for number in range(1, len(records) + 1)]
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} must be at least 1")
    if not records:
        raise UserError(f"data: {path} holds no records")
    for name, record in zip(names, records, strict=True):
        problem = task.check(record, read)
        if problem is not None:
            raise UserError(f"data: {name}: {problem}; --task {task.name} expects {task.expects}{_other(task, record)}")
    _check_keys_differ(task, records, names)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return Job(task, path, read, records, names, digest, limit)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"data: {path} does not exist (paths are relative to the working directory)")


def _other(task: Task, record: Row) -> str:
    """The other tasks whose record this could be, for messages; it has a problem with this one."""
    fitting = []
    for name in MODULES:
        other = get_task(name) if name != task.name else None
        if other is not None and other.read is None and other.check(record, other.options()) is None:
            fitting.append(f"--task {name}")
    return f"; it could be a record of {' or '.join(fitting)}" if fitting else ""


def _check_keys_differ(task: Task, records: Sequence[Row], names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name, record in zip(names, records, strict=True):
        key = None if task.key is None else record.get(task.key)
        if key is None:
            continue
        if str(key) in seen:
            raise UserError(
                f"data: {name}: {task.key} {key!r} stands at {seen[str(key)]} too; give each record its own, or leave "
                f"{task.key} out"
            )
        seen[str(key)] = name


# --- answers of others ------------------------------------------------------------------------------------------------


def read_answers(path: Path, job: Job | None, task: Task, options: Mapping[str, Any]) -> tuple[Job, list[Answers]]:
    """Answers that were made elsewhere, and what they are answers to.

    Args:
        path: a predictions.jsonl of `jaxlm evaluate`; or a file of records (.json, .jsonl, .csv, .tsv, .parquet) with
            the text of an answer each, or a JSON list of texts.
        job: the data; None: the answers bring their records along.

    Raises:
        UserError: for a file that is none of this, an answer without a text, or answers that do not match the records.
    """
    lines = _lines(path)
    if not lines:
        raise UserError(f"predictions: {path} holds no answer")
    ours = all(isinstance(value, dict) and "answers" in value and "number" in value for _, value in lines)
    columns = ANSWERS if job is not None else BESIDE_RECORDS
    if job is None:
        job = _job_of(path, lines, ours, task, options)
    answers: list[Answers] = []
    for name, value in lines:
        answers.append(_own_answers(name, value) if ours else {"answer": _text_answer(name, value, columns)})
    order = _order(path, lines, job)
    if len(answers) != len(job.records):
        raise UserError(
            f"predictions: {path} has {len(answers):,} answers, {job.path} {len(job.records):,} records; each needs "
            "one, in the same order, or both a field id"
        )
    return job, [answers[at] for at in order]


def _lines(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        raise UserError(f"predictions: {path} does not exist (paths are relative to the working directory)")
    kind = FORMATS.get(path.suffix.lower(), "json")
    lines = []
    for entry in read_entries(path, kind, key="predictions", strict=False):
        if entry.problem is not None:
            raise UserError(f"predictions: {entry.name}: {entry.problem}")
        lines.append((entry.name, entry.value))
    return lines


def _job_of(path: Path, lines: Sequence[tuple[str, Any]], ours: bool, task: Task, options: Mapping[str, Any]) -> Job:
    read = read_options(task, options)
    records: list[Row] = []
    for name, value in lines:
        record = value.get("record") if ours else value
        problem = task.check(record, read) if isinstance(record, dict) else "has no record beside its answer"
        if problem is not None:
            raise UserError(
                f"predictions: {name}: {problem}; --task {task.name} expects {task.expects}. Name the file of the "
                "records with --data"
            )
        records.append(record)
    return Job(task, path, read, records, [name for name, _ in lines], hashlib.sha256(path.read_bytes()).hexdigest())


def _own_answers(name: str, value: Mapping[str, Any]) -> Answers:
    try:
        answers = {str(part): from_json(fields) for part, fields in value["answers"].items()}
    except (TypeError, AttributeError):
        raise UserError(f"predictions: {name}: its answers are not those of a predictions.jsonl of jaxlm") from None
    for part, answer in answers.items():
        if any(not math.isfinite(number) for number in answer.log_probs):
            raise UserError(f"predictions: {name}: {part}: a log-probability is not a finite number")
    return answers


def _text_answer(name: str, value: Any, columns: Sequence[str]) -> Answer:
    if isinstance(value, str):
        return Answer(texts=(value,))
    if isinstance(value, dict):
        if value.get("error"):
            return Answer(error=str(value["error"]))
        texts = (value[column] for column in columns if isinstance(value.get(column), str))
        text = next(texts, None)
        if text is not None:
            return Answer(texts=(text,))
    raise UserError(f"predictions: {name}: has no text in {', '.join(columns)}, where an answer is looked for")


def _order(path: Path, lines: Sequence[tuple[str, Any]], job: Job) -> list[int]:
    """For each record, which of the answers is its own: by the key of both, else in the order of the file."""
    key = job.task.key
    mine = [None if key is None else record.get(key) for record in job.records]
    theirs = [value.get(key) if isinstance(value, dict) and key is not None else None for _, value in lines]
    if None in mine or None in theirs:
        return list(range(len(lines)))
    places = {str(value): at for at, value in enumerate(theirs)}
    if len(places) != len(theirs):
        twice = next(str(value) for at, value in enumerate(theirs) if places[str(value)] != at)
        raise UserError(f"predictions: {path}: two answers have the {key} {twice!r}; keep one")
    missing = [str(value) for value in mine if str(value) not in places]
    if missing:
        raise UserError(f"predictions: {path} has no answer with the {key} {missing[0]!r}")
    return [places[str(value)] for value in mine]
