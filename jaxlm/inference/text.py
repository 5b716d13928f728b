"""Tokens that are being written, as text: whole characters only, and nothing beyond a stop text."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from jaxlm.tokenizer import Tokenizer

# Tokens of the prompt that are decoded along: whether a word begins with a space is seen from what stands before it.
CONTEXT = 8
# What decoders write for bytes that are no character, or not one yet.
BROKEN = "\ufffd"
# A character has four bytes at most: what is not one after this number of tokens will never be.
HELD = 8


def answer_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], last: bool = True) -> str:
    """The text that `ids` add to the prompt; never ends in half a UTF-8 character.

    Args:
        last: nothing follows; else what closes a molecule or the like at the end is left out.
    """
    context = list(prompt[-CONTEXT:])
    before, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids], open_end=not last)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids, open_end=not last)
    return text.rstrip(BROKEN)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there is one."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


class TextStream:
    """An answer in pieces, to be shown while it is written.

    Tokens are taken one by one, however many come at a time, so that what is shown, and where it stops, does not depend
    on how they come. What was shown stays: bytes that turn out to be no character change nothing before them.

    Args:
        prompt: the tokens before the answer.
        stops: texts that end the answer.

    Attributes:
        text: what the answer says so far, without a stop text and what is behind it.
        ends: for each token that was taken, the number of characters of the text up to its end. A token that ends
            within a character has the end of the one before it.
        stopped: a stop text was met; no more tokens are taken.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._longest = max(map(len, stops), default=0)
        self._ids = list(_context(tokenizer, prompt))
        # Places among the ids where the text was whole; the text behind the last is not known yet.
        self._whole = collections.deque([0, len(self._ids)])
        self._before = tokenizer.decode(self._ids, open_end=True)
        self._shown = 0
        self.text, self.stopped = "", False
        self.ends: list[int] = []

    def update(self, ids: Sequence[int], last: bool) -> tuple[str, bool]:
        """What can be shown now that was not before.

        Args:
            ids: all tokens of the answer so far.
            last: nothing follows.

        Returns:
            The new text, and whether a stop text was met.
        """
        for index in ids[len(self.ends) :]:
            if not self.stopped:
                self._ids.append(index)
                self._take()
        if last and not self.stopped:
            self._take(last)
        safe = len(self.text) if self.stopped or last else len(self.text) - self._maybe_stop()
        new = self.text[self._shown : safe]
        self._shown = max(self._shown, safe)
        return new, self.stopped

    @property
    def shown(self) -> int:
        """The number of characters that were shown."""
        return self._shown

    def _take(self, last: bool = False) -> None:
        """Reads the tokens behind the last place where the text was whole."""
        begin, end = self._whole[0], self._whole[-1]
        text = self._tokenizer.decode(self._ids[begin:], open_end=not last)
        if last:
            text = text.rstrip(BROKEN)
        elif text.endswith(BROKEN) and len(self._ids) - end <= HELD:
            self.ends.append(len(self.text))
            return
        if text.startswith(self._before):
            new = text[len(self._before) :]
        else:  # bytes that are no character, beside some that are one
            new = self._tokenizer.decode(self._ids[end:], open_end=not last)
            new = new.rstrip(BROKEN) if last else new
        seen = len(self.text)
        self.text += new
        if self._stops:
            area = self.text[max(0, seen - self._longest + 1) :]
            cut, self.stopped = cut_at_stop(area, self._stops)
            self.text = self.text[: len(self.text) - len(area) + len(cut)]
            self.ends = [min(end, len(self.text)) for end in self.ends] if self.stopped else self.ends
        if last:
            return
        self.ends.append(len(self.text))
        self._whole.append(len(self._ids))
        while self._whole[1] <= len(self._ids) - CONTEXT:
            self._whole.popleft()
        self._before = self._tokenizer.decode(self._ids[self._whole[0] :], open_end=True)

    def _maybe_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        lengths = [
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(self.text) + 1))
            if self.text.endswith(stop[:size])
        ]
        return max(lengths, default=0)


def _context(tokenizer: Tokenizer, prompt: Sequence[int]) -> Sequence[int]:
    """The prompt's last tokens, from where a character begins."""
    for size in range(min(CONTEXT, len(prompt)), min(CONTEXT + 4, len(prompt)) + 1):
        context = prompt[len(prompt) - size :]
        if not tokenizer.decode(context[:4]).startswith(BROKEN):
            break
    return context
