"""BPE by a table of the segments that texts are made of, several times faster than by merging every text anew.

Merges never cross a place between two characters that no piece of the vocabulary holds side by side. So a text may be
cut there, its segments be looked up, and the result is that of the whole text. The cuts are: in front of spaces, and on
both sides of a character that stands in no piece but its own, as most CJK characters of LLaMA's vocabulary do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

SPACE = "▁"
_MOST_SEGMENTS = 1 << 17  # in the table; about 30 MB
_MOST_CHARACTERS = 1 << 22


class Ids(NamedTuple):
    """Tokens of a text as arrays.

    Args:
        ids: int32 [n].
        begin, end: int64 [n], the characters that each stands for, as `Encoding.offsets`; None where not asked for.
    """

    ids: NDArray[np.int32]
    begin: NDArray[np.int64] | None = None
    end: NDArray[np.int64] | None = None


def cutting_pattern(pieces: Iterable[str]) -> re.Pattern[str] | None:
    """What matches the segments of a text, one after the other; None where a piece has a space behind something else.

    Args:
        pieces: all that can come out of merges, spaces written as ▁ (U+2581).
    """
    joined: set[str] = set()
    for piece in pieces:
        if SPACE in piece.lstrip(SPACE):
            return None
        if len(piece) > 1:
            joined.update(piece)
    joined.discard(SPACE)
    if not joined:
        return None
    letters = _character_class(joined)
    return re.compile(f"[ {SPACE}]*[{letters}]+|[ {SPACE}]+|[^ {SPACE}{letters}]")


def _character_class(characters: set[str]) -> str:
    """The inside of a character class, runs of neighbours as ranges."""
    codes = sorted(map(ord, characters))
    parts: list[list[int]] = []
    for code in codes:
        if parts and code == parts[-1][1] + 1:
            parts[-1][1] = code
        else:
            parts.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in parts)


class Plain(Protocol):
    """The tokenizer that segments are looked up for, without the space in front."""

    def ids(self, segments: Sequence[str]) -> Iterable[Sequence[int]]: ...
    def offsets(self, segments: Sequence[str]) -> Iterable[Sequence[tuple[int, int]]]: ...


class Segments:
    """A tokenizer of texts that are given with the space that is put in front of them, if there is one.

    Args:
        pattern: see `cutting_pattern`.
        plain: gives the ids and offsets of segments.
        space_end: where the token of that space alone ends: 0, or 1 where it counts as the first character's.
    """

    def __init__(self, pattern: re.Pattern[str], plain: Plain, space_end: int) -> None:
        self._made_of = pattern, plain, space_end
        self._space_end = space_end
        self._cut = pattern.findall
        self._ids = _Table(plain.ids)
        self._places = _Table(plain.offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        return Segments, self._made_of

    def encode(self, text: str, has_prefix: bool, with_offsets: bool) -> Ids:
        """Tokens of `text`; `has_prefix`: its first character is the space that was put in front."""
        segments = self._cut(text)
        found = self._ids.of(segments)
        ids = np.frombuffer(b"".join(found), np.int32)
        if not with_offsets:
            return Ids(ids)
        places = np.frombuffer(b"".join(self._places.of(segments)), np.int32).reshape(-1, 2)
        lengths = np.fromiter(map(len, segments), np.int64, len(segments))
        starts = np.cumsum(lengths) - lengths
        counts = np.fromiter(map(len, found), np.int64, len(segments)) // ids.itemsize
        first, last = (places + np.repeat(starts, counts)[:, None] - has_prefix).T
        return Ids(ids, np.maximum(first, 0), np.maximum(last, self._space_end if has_prefix else 0))


class _Table:
    """What was made of each segment, as bytes of int32; it forgets all when it is full."""

    def __init__(self, make: Callable[[Sequence[str]], Iterable[Any]]) -> None:
        self._make = make
        self._known: dict[str, bytes] = {}
        self._characters = 0

    def __len__(self) -> int:
        return len(self._known)

    def of(self, segments: list[str]) -> list[bytes]:
        """The bytes of each."""
        try:
            return list(map(self._known.__getitem__, segments))
        except KeyError:
            if len(self._known) > _MOST_SEGMENTS or self._characters > _MOST_CHARACTERS:
                self._known.clear()
                self._characters = 0
            missing = [segment for segment in dict.fromkeys(segments) if segment not in self._known]
            made = self._make(missing)
            self._known.update(zip(missing, (np.array(each, np.int32).tobytes() for each in made), strict=True))
            self._characters += sum(map(len, missing))
            return list(map(self._known.__getitem__, segments))
