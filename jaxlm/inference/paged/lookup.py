"""Guesses by lookup: what followed the last few tokens where they stood before is guessed to follow again.

Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding). It needs no second model, and is right where an answer
repeats its prompt or itself: extraction, summaries, corrections, tables. What is done with a guess, so that it changes
no token, stands in `schedule`.
"""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that must have stood before: the longest match counts, the latest one of several.
LONGEST, SHORTEST = 4, 2


class Lookup:
    """Where the n-grams of a text stand.

    Args:
        tokens: prompt and answer; only ever appended to.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens, self._read = tokens, SHORTEST
        self._behind: dict[tuple[int, ...], int] = {}

    def guess(self, most: int) -> list[int]:
        """`most` tokens behind the latest earlier place of the last tokens; none if they are new.

        A place so close that the text ends before is taken to repeat.
        """
        tokens, behind = self._tokens, self._behind
        # An n-gram is there when a token stands behind it: the text's last ones must not find themselves.
        for end in range(self._read, len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                behind[tuple(tokens[end - size : end])] = end
        self._read = max(SHORTEST, len(tokens))
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = behind.get(tuple(tokens[-size:]))
            if start is not None:
                period = len(tokens) - start
                return [tokens[start + ahead % period] for ahead in range(most)]
        return []
