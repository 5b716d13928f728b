"""Answers as they come, in a file that survives a kill: a header, then a line for each request that is answered."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxlm.errors import UserError
from jaxlm.evaluation.task import Answer

MARK = "jaxlm evaluation"  # in the first line
HASHES = ("(sha256)", "(hash of samples)")  # how the names of settings end whose values say nothing to a reader
# For such a setting where it was read from: (before, now); a path, or None where it is not known.
Names = Mapping[str, tuple[str | None, str | None]]


def to_json(answer: Answer) -> dict[str, Any]:
    """The fields of an answer that say something."""
    return {name: value for name, value in dataclasses.asdict(answer).items() if value not in ((), None)}


def from_json(values: Mapping[str, Any]) -> Answer:
    """The inverse of `to_json`.

    Raises:
        TypeError: for a field that an answer does not have.
    """
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Answer(**fields)


class Answered:
    """Answers kept in memory only: of a process that writes no file.

    Attributes:
        answers: by number of the request.
    """

    def __init__(self, answers: dict[int, Answer] | None = None) -> None:
        self.answers = answers or {}

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Keeps answers."""
        self.answers |= answers


class Journal(Answered):
    """Answers kept in a file too; arguments and errors as of `JournalFile`."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        origins: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        self._file = JournalFile(path, settings, overwrite, origins)
        super().__init__({line["request"]: from_json(line["answer"]) for line in self._file.lines})

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Keeps answers for good."""
        super().add(answers)
        self._file.add(*({"request": number, "answer": to_json(answer)} for number, answer in answers.items()))

    def close(self) -> None:
        """Gives the file up."""
        self._file.close()


class JournalFile:
    """A file of lines as JSON that survives a kill.

    Args:
        path: of the file; its folder is there.
        settings: what decides the lines, as JSON has it; a run with other settings must not go on with it.
        overwrite: begin anew when it was begun with other settings.
        origins: for settings that are hashes the path of what was hashed, for messages; paths may change.

    Attributes:
        lines: what was in it.

    Raises:
        UserError: it was begun with other settings, another run is writing it, or it is another file.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        origins: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path, self._origins = path, dict(origins)
        self._file = path.open("ab+")
        try:
            self._lock()
            self._open(dict(settings), overwrite)
        except UserError:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self._path}: another run is writing there; wait for it, or name another --output"
            ) from None

    def _open(self, settings: dict[str, Any], overwrite: bool) -> None:
        self._file.seek(0)
        content = self._file.read()
        # A line that was being written when the run was killed has no end; it is written again.
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            lines = [None]
        if lines and not (isinstance(lines[0], dict) and MARK in lines[0]):
            raise UserError(f"{self._path}: is not the journal of an evaluation; move it away")
        before = lines[0]["settings"] if lines else settings
        if before != settings and not overwrite:
            names = joined(lines[0].get("origins", {}), self._origins)
            refuse_other_settings(self._path, before, settings, "an interrupted run was begun with", names)
        same = bool(lines) and before == settings
        self._file.truncate(len(whole) if same else 0)
        if same:
            self.lines = lines[1:]
        else:
            self.add({MARK: 1, "settings": settings, "origins": self._origins})

    def add(self, *lines: Mapping[str, Any]) -> None:
        """Keeps lines for good."""
        self._file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Gives the file up."""
        self._file.close()


def joined(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> Names:
    """Paths of what settings were read from, then and now."""
    return {key: (before.get(key), path) for key, path in now.items()}


def refuse_other_settings(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], how: str, names: Names = MappingProxyType({})
) -> None:
    """Raises UserError that names the settings that differ, with both values.

    Args:
        path: of the file that was written with the earlier ones.
        how: what was done with them, e.g. 'an interrupted run was begun with'.
        names: see `Names`.
    """
    changed = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        label, is_hash, known = key.partition(" (")[0], key.endswith(HASHES), names.get(key, (None, None))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = [each for each in dict.fromkeys([*old, *new]) if old.get(each) != new.get(each)]
            changed += [f"{label}.{each} {old.get(each)!r}, now {new.get(each)!r}" for each in inner]
        elif is_hash and None in (old, new):
            changed.append(f"{'no' if old is None else 'an'} {label}, now {'none' if new is None else 'there is one'}")
        elif is_hash and known[0] == known[1]:
            changed.append(f"other {label}" + ("" if known[1] is None else f" (of {known[1]}, which has changed)"))
        elif is_hash:
            changed.append(f"{label} of {known[0]}, now {known[1]}")
        else:
            changed.append(f"{label} {old!r}, now {new!r}")
    if changed:
        raise UserError(
            f"{path}: {how} {'; '.join(changed)}; go on with the same, name another --output, or begin anew with "
            "--overwrite"
        )
