"""What is left out of what a model wrote: Alpaca's rules, and instructions that are like one that is there."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.prepare.instructions.tasks import Task
from jaxlm.errors import UserError

# What a model of texts cannot do, as in stanford_alpaca's generate_instruction.py.
UNDOABLE = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip


class Rules(NamedTuple):
    """Which tasks are left out, likeness aside.

    Args:
        min_words, max_words: of the instruction.
        undoable: words of which none may be in the instruction, in small letters.
    """

    min_words: int = 4
    max_words: int = 150
    undoable: Sequence[str] = UNDOABLE

    def broken_by(self, task: Task) -> str | None:
        """The rule that a task breaks, in words for a report; None where it breaks none."""
        text = task.instruction
        words = len(text.split())
        if words < self.min_words:
            return "too short"
        if words > self.max_words:
            return "too long"
        if self.undoable and re.search(rf"\b(?:{'|'.join(map(re.escape, self.undoable))})\b", text.lower()):
            return "not for a model of texts"
        if text.startswith("Write a program"):
            return "asks for a program"
        if text[0] in string.punctuation or not text[0].isascii():
            return "first character"
        if not task.output:
            return "no output"
        return None


class Likeness:
    """ROUGE-L of an instruction to all that are there: the F measure of rouge-score, without stemming.

    Words are kept as single characters of a text, over which rapidfuzz (C++) finds longest common subsequences.

    Attributes:
        instructions: what is there, in order.
    """

    def __init__(self, instructions: Iterable[str] = ()) -> None:
        try:
            from rapidfuzz import process
            from rapidfuzz.distance import LCSseq
        except ModuleNotFoundError:
            raise UserError("comparing instructions needs rapidfuzz: pip install 'jaxlm[prepare]'") from None
        self._compare, self._scorer = process.cdist, LCSseq.similarity
        self._signs: dict[str, str] = {}  # a character for each word
        self._texts: list[str] = []
        self._lengths: list[int] = []
        self.instructions: list[str] = []
        for instruction in instructions:
            self.add(instruction)

    def _encoded(self, instruction: str) -> str:
        # The tokenizer of rouge-score: what is no Latin letter or digit divides words.
        for word in (words := re.sub(r"[^a-z0-9]+", " ", instruction.lower()).split()):
            if word not in self._signs:
                number = len(self._signs)
                # Half of a surrogate pair is no character of its own.
                self._signs[word] = chr(number if number < 0xD800 else number + 0x800)
        return "".join(self._signs[word] for word in words)

    def add(self, instruction: str) -> None:
        """Takes one up."""
        self._texts.append(self._encoded(instruction))
        self._lengths.append(len(self._texts[-1]))
        self.instructions.append(instruction)

    def to_all(self, instruction: str) -> NDArray[np.float64]:
        """F of the instruction and each that is there, float64 [instructions]; 0 where both have no word."""
        if not self._texts:
            return np.zeros(0)
        text = self._encoded(instruction)
        common = self._compare([text], self._texts, scorer=self._scorer, dtype=np.uint32)[0]
        both = np.array(self._lengths) + len(text)
        return np.divide(2 * common, both, out=np.zeros(len(both)), where=both > 0)
