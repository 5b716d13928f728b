"""Z-Bench's tables of questions and systems' answers: read, and written back with columns of one's own.

Facts: `chinese_eval_*.csv` and `src/evaluate.py` of LLM4Academic (patrick-tssn/LM-Research-Hub), `*.samples.csv` of
zhenbench/z-bench. Their headers differ from file to file, so columns are found by their places. People rate answers as
right (正确) or wrong (错误), in a column whose name ends with 评分.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.errors import UserError

RIGHT, WRONG = "正确", "错误"
RATING = "评分"
_MARK = "\ufeff"
_CELL = re.compile(r'"(?:[^"]|"")*"|[^,\r\n]*')


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Args:
        cells: as they stand in the file, with their quotation marks.
        end: what ends the line.
    """

    cells: tuple[str, ...]
    end: str

    def text(self) -> str:
        """The line as it stands in the file."""
        return ",".join(self.cells) + self.end

    def values(self) -> list[str]:
        """What the cells say."""
        return [value(cell) for cell in self.cells]


def value(cell: str) -> str:
    """What a cell says."""
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def cell(value: str) -> str:
    """A text as a cell, in quotation marks where it needs them."""
    if any(sign in value for sign in ',"\r\n'):
        return '"' + value.replace('"', '""') + '"'
    return value


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, the byte order mark as a part of the first cell.

    Raises:
        UserError: when the file is not a table of this form.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read as UTF-8 ({error}); convert it, e.g. with iconv") from None
    lines: list[Line] = []
    cells: list[str] = []
    mark = _MARK if text.startswith(_MARK) else ""
    at = len(mark)
    while at < len(text):
        match = _CELL.match(text, at)
        assert match is not None  # the pattern fits an empty text
        cells.append(match.group())
        at = match.end()
        if at < len(text) and text[at] == ",":
            at += 1
            if at == len(text):
                cells.append("")
            continue
        end = "\r\n" if text.startswith("\r\n", at) else text[at : at + 1]
        is_open = cells[-1].startswith('"') and (len(cells[-1]) == 1 or not cells[-1].endswith('"'))
        if is_open or (end and end not in "\r\n"):
            raise UserError(f"data: {path}: row {len(lines) + 1}: a quotation mark does not stand around a whole cell")
        if cells == [""] and lines:  # an empty line
            lines[-1] = Line(lines[-1].cells, lines[-1].end + end)
        else:
            lines.append(Line((mark + cells[0], *cells[1:]) if not lines else tuple(cells), end))
        cells, at = [], at + len(end)
    if cells:
        lines.append(Line(tuple(cells), ""))
    return lines


@dataclass(frozen=True)
class Layout:
    """Where the columns are.

    Args:
        question, reference, kind: places of the question, the reference answer and the kind of question.
        own: the place in front of which an own column is written.
        has_number: whether the first column is the number of the question.
    """

    question: int
    reference: int
    kind: int
    own: int
    has_number: bool


def layout(path: Path, header: Sequence[str]) -> Layout:
    """The layout of a file: LLM4Academic's (number, question, answers, reference, kind), or Z-Bench's own.

    Raises:
        UserError: for another header.
    """
    names = [name.removeprefix(_MARK).strip() for name in header]
    count = len(names)
    if count >= 4 and names[1] == "Prompt":
        return Layout(1, count - 2, count - 1, count - 2, True)
    if count >= 3 and names[0] == "Prompt":
        return Layout(0, 2, 1, count, False)
    raise UserError(
        f"data: {path} is not a table of Z-Bench; expected the columns 编号, Prompt, …, 参考回答, 任务类型, or Prompt, "
        f"任务类型, 参考回答, …; found {', '.join(names[:6])}"
    )


def with_columns(header: Line, lines: Sequence[Line], columns: Sequence[tuple[str, Sequence[str]]], own: int) -> bytes:
    """A table with further columns; every other byte stays.

    Args:
        header: the first line.
        lines: the others.
        columns: name and values of each further column. One whose name the table has already is written over.
        own: the place in front of which new columns stand.
    """
    names = [name.removeprefix(_MARK).strip() for name in header.values()]
    old = {names.index(name): (name, values) for name, values in columns if name in names}
    new = [(name, values) for name, values in columns if name not in names]
    text = []
    for number, line in enumerate([header, *lines]):
        cells = list(line.cells)
        if number:
            for place, (_, values) in old.items():
                cells[place] = cell(values[number - 1])
        cells[own:own] = [cell(name if number == 0 else values[number - 1]) for name, values in new]
        text.append(",".join(cells) + line.end)
    return "".join(text).encode()


def verdict(rating: str) -> bool | None:
    """What a rating says; None for one that says neither, e.g. an empty one."""
    rating = rating.strip().strip("。.!！*\"'「」“”")
    wrong = rating.startswith((WRONG, "不正确", "不对"))
    return False if wrong else True if rating.startswith(RIGHT) else None
