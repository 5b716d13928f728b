"""BPE by a table of the segments that texts are made of, several times faster than by merging every text anew.

Merges never cross a place between two characters that no piece of the vocabulary holds side by side. So a text may be
cut there, its segments be looked up, and the result is that of the whole text. The cuts are: in front of spaces, and on
both sides of a character that stands in no piece but its own, as most CJK characters of LLaMA's vocabulary do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SPACE = "▁"
_MOST_SEGMENTS = 1 << 17  # in the table; about 30 MB
_LONGEST = 32  # characters of a segment that is kept
# The ids of a text, and the characters [begin, end) of each.
Encoded = tuple[Sequence[int], Sequence[tuple[int, int]]]


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


class Segments:
    """A tokenizer of texts that are given with the space that is put in front of them, if there is one.

    Args:
        pattern: see `cutting_pattern`.
        encode: the plain tokenizer, without that space: a segment's ids and offsets.
        space_end: where the token of that space alone ends: 0, or 1 where it counts as the first character's.
    """

    def __init__(self, pattern: re.Pattern[str], encode: Callable[[str], Encoded], space_end: int) -> None:
        self._made_of = pattern, encode, space_end
        self._space_end = space_end
        self._cut = pattern.findall
        self._ids = _Table(lambda segment: np.array(encode(segment)[0], np.int32).tobytes())
        self._places = _Table(lambda segment: np.array(encode(segment)[1], np.int32).reshape(-1, 2).tobytes())

    def __reduce__(self) -> tuple[Any, ...]:
        return Segments, self._made_of

    def encode(self, text: str, has_prefix: bool, with_offsets: bool) -> Ids:
        """Tokens of `text`; `has_prefix`: its first character is the space that was put in front."""
        segments = self._cut(text)
        found = list(map(self._ids.__getitem__, segments))
        ids = np.frombuffer(b"".join(found), np.int32)
        if not with_offsets:
            return Ids(ids)
        places = np.frombuffer(b"".join(map(self._places.__getitem__, segments)), np.int32).reshape(-1, 2)
        lengths = np.fromiter(map(len, segments), np.int64, len(segments))
        starts = np.cumsum(lengths) - lengths
        counts = np.fromiter(map(len, found), np.int64, len(segments)) // ids.itemsize
        first, last = (places + np.repeat(starts, counts)[:, None] - has_prefix).T
        return Ids(ids, np.maximum(first, 0), np.maximum(last, self._space_end if has_prefix else 0))


class _Table(dict[str, bytes]):
    """What was made of each segment; it forgets all when it is full."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, segment: str) -> bytes:
        value = self._make(segment)
        if len(segment) <= _LONGEST:
            if len(self) >= _MOST_SEGMENTS:
                self.clear()
            self[segment] = value
        return value
