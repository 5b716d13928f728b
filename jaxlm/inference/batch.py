"""Answering a file of prompts: answers are kept at once, and a run that was killed goes on where it was."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxlm.config import Decoding
from jaxlm.data.entries import Entry, read_entries
from jaxlm.data.records import Record
from jaxlm.errors import UserError
from jaxlm.inference.answering import complete
from jaxlm.inference.best_of import Judge
from jaxlm.inference.generator import Generator
from jaxlm.inference.prompts import Prompter

KINDS = (".json", ".jsonl", ".csv", ".txt")
MARK = "jaxlm answers"  # in the first line of a journal


@dataclass(frozen=True)
class FilePrompt:
    """One prompt of a file.

    Args:
        name: "file:number", for messages; lines where prompts are lines, else counting from 1.
        question: a prompt that is a text.
        fields: a prompt that is a record.
        error: why the prompt is neither.
    """

    name: str
    question: str | None = None
    fields: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """The outcome of a prompt: its answers with the reasons for their ends, or an error.

    Args:
        reward: of the answer, the best of several.
    """

    answers: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()
    error: str | None = None
    reward: float | None = None


def read_prompts(path: Path) -> list[FilePrompt]:
    """The prompts of a file. A broken prompt becomes one with an error; the others are not lost.

    Raises:
        UserError: for a file that is missing, of unknown kind, empty, or broken as a whole.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"predict_data: {path}: the ending must be one of {', '.join(KINDS)}")
    if not path.is_file():
        raise UserError(f"predict_data: {path} does not exist (paths are relative to the working directory)")
    if kind == ".txt":
        prompts = _read_txt(path)
    else:
        prompts = [_prompt(entry) for entry in read_entries(path, kind[1:], key="predict_data", strict=False)]
    if not prompts:
        raise UserError(f"predict_data: {path} holds no prompt")
    return prompts


def _prompt(entry: Entry) -> FilePrompt:
    name, value = entry.name, entry.value
    if entry.problem is not None:
        return FilePrompt(name, error=entry.problem)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return FilePrompt(name, error="holds an incomplete Unicode character (a lone surrogate)")
    if isinstance(value, str):
        return FilePrompt(name, question=value)
    if isinstance(value, dict):
        return FilePrompt(name, fields=value)
    return FilePrompt(
        name, error=f"a prompt must be a text or a record with named fields, found {type(value).__name__}"
    )


def _read_txt(path: Path) -> list[FilePrompt]:
    """A prompt a line, blank ones too, which a model may be asked; MindFormers' \\n stands for a line break."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"predict_data: {path} is not UTF-8 ({error}); convert it, e.g. with iconv") from None
    # Not splitlines: it also breaks at characters that stand in the middle of texts.
    lines = text.removesuffix("\n").split("\n") if text.strip() else []
    return [
        FilePrompt(f"{path}:{number}", question=line.removesuffix("\r").replace("\\n", "\n"))
        for number, line in enumerate(lines, 1)
    ]


class Answers:
    """Answers as they come, kept in memory: for a process that writes no file.

    Attributes:
        results: the outcome of each prompt that is done, by its number.
    """

    def __init__(self, results: dict[int, Result]) -> None:
        self.results = results

    def add(self, results: dict[int, Result]) -> None:
        """Keeps results, by the number of their prompt."""
        self.results |= results


class Journal(Answers):
    """Answers as they come, in a file beside the final one: a header, then a line for each prompt that is done.

    Args:
        path: of the journal.
        settings: what decides the answers; a run with other settings must not go on with it.
        discard: begin anew when it was begun with other settings.

    Raises:
        UserError: it was begun with other settings, another run is writing it, or it is not a journal.
    """

    def __init__(self, path: Path, settings: dict[str, Any], discard: bool = False) -> None:
        super().__init__({})
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._locked(path)
        try:
            self._open(settings, discard)
        except UserError:
            self._file.close()
            raise

    def _locked(self, path: Path) -> IO[bytes]:
        while True:
            file = path.open("ab+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(f"{path}: another run is answering into this file; wait for it, or stop it") from None
            # The run that had the lock may have ended and removed the file in between.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
            file.close()

    def _open(self, settings: dict[str, Any], discard: bool) -> None:
        self._file.seek(0)
        content = self._file.read()
        # A line that was being written when the run was killed has no end; it is written again.
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            ours = all(isinstance(line, dict) for line in lines) and (lines or content[:1] in (b"", b"{"))
        except ValueError:
            ours = False
        if not ours or (lines and MARK not in lines[0]):
            raise UserError(f"{self.path}: is not the journal of an interrupted run; move it away")
        same = {key: lines[0].get(key) for key in settings} == settings if lines else False
        if lines and not same and not discard:
            key = next(key for key in settings if lines[0].get(key) != settings[key])
            raise UserError(
                f"{self.path}: an interrupted run was begun with {key} {lines[0].get(key)!r}, now it is "
                f"{settings[key]!r}; go on with the same, or begin anew with --overwrite"
            )
        self._file.truncate(len(whole) if same else 0)
        if not same:
            self._write({MARK: 1, **settings})
            return
        for line in lines[1:]:
            answers, finish = tuple(line["answers"]), tuple(line["finish"])
            self.results[line["number"]] = Result(answers, finish, line["error"], line.get("reward"))

    def _write(self, *values: dict[str, Any]) -> None:
        self._file.write(b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values))
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, results: dict[int, Result]) -> None:
        """Keeps results for good, by the number of their prompt."""
        super().add(results)
        self._write(
            *(
                {
                    "number": number,
                    "answers": result.answers,
                    "finish": result.finish,
                    "error": result.error,
                    **({} if result.reward is None else {"reward": result.reward}),
                }
                for number, result in results.items()
            )
        )

    def close(self, remove: bool = False) -> None:
        """Gives up the lock; `remove`: the final file is written, and the journal goes."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()


def settings_of(path: Path, options: Decoding, model: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the answers to a file: its contents, the decoding options, and the facts of `model`."""
    values = {"predict_data (sha256)": hashlib.sha256(path.read_bytes()).hexdigest(), **model}
    # Through JSON, as it will be read back: tuples become lists.
    result: dict[str, Any] = json.loads(json.dumps(values | dataclasses.asdict(options)))
    return result


def answer_all(
    prompts: Sequence[FilePrompt],
    generator: Generator,
    prompter: Prompter,
    options: Decoding,
    batch_size: int,
    journal: Answers,
    advance: Callable[[int, int], None],
    judge: Judge | None = None,
) -> None:
    """Answers the prompts that the journal does not hold yet, in the batches of `complete`.

    Args:
        advance: called with the numbers of prompts and tokens done.
        judge: says which of the samples of a prompt is kept; None: all are.
    """
    ids_of: dict[int, list[int]] = {}
    refused: dict[int, Result] = {}
    for number, prompt in enumerate(prompts):
        if number in journal.results:
            continue
        try:
            if prompt.error is not None:
                raise UserError(f"{prompt.name}: {prompt.error}")
            if prompt.fields is not None:
                ids = prompter.record(Record(prompt.name, prompt.fields))
            else:
                ids = prompter.question(prompt.question or "", None, prompt.name)
            generator.check_prompt(ids, prompt.name)
            if judge is not None:
                judge.check_prompt(len(ids), options, generator.max_length, prompt.name)
            ids_of[number] = ids
        except UserError as error:
            refused[number] = Result(error=str(error))
    if refused:
        journal.add(refused)
        advance(len(refused), 0)
    strip = not prompter.is_text
    for batch in complete(generator, prompter.tokenizer, ids_of, options, batch_size, strip):
        if judge is None:
            results = {
                number: Result(tuple(each.text for each in completions), tuple(each.finish for each in completions))
                for number, completions in batch.items()
            }
        else:
            best = judge.best(ids_of, batch)
            results = {
                number: Result((each.text,), (each.finish,), reward=reward) for number, (each, reward) in best.items()
            }
        journal.add(results)
        advance(len(results), sum(len(each.ids) for completions in batch.values() for each in completions))


def write_results(path: Path, prompts: Sequence[FilePrompt], results: dict[int, Result]) -> None:
    """The final file, in the order of the prompts; its kind goes by its ending."""
    rows = [_row(prompt, results[number]) for number, prompt in enumerate(prompts)]
    kind = path.suffix.lower()
    if kind == ".json":
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    elif kind == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == ".csv":
        text = _csv(rows)
    else:
        text = "".join(_line(results[number]) + "\n" for number in range(len(prompts)))
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _row(prompt: FilePrompt, result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"question": prompt.question} if prompt.fields is None else dict(prompt.fields)
    if prompt.error is not None:
        row = {}
    if result.error is not None:
        return row | {"error": result.error}
    # A record may bring the right answer along, which must stay.
    name = "answer"
    for taken, other in (("answer", "prediction"), ("prediction", "jaxlm_answer")):
        if taken in row or f"{taken}s" in row:
            name = other
    reward = {} if result.reward is None else {"jaxlm_reward" if "reward" in row else "reward": result.reward}
    answers = {name: result.answers[0]} if len(result.answers) == 1 else {f"{name}s": list(result.answers)}
    return row | answers | reward


def _line(result: Result) -> str:
    if result.error is not None:
        return f"[error] {result.error}".replace("\n", "\\n")
    # Backslashes stay as they are: SMILES have them.
    escapes = str.maketrans({"\n": "\\n", "\t": "\\t", "\r": "\\r"})
    return "\t".join(answer.translate(escapes) for answer in result.answers)


def _csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v for k, v in row.items()}
        )
    return out.getvalue()
