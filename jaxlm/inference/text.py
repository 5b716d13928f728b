"""Tokens that are being written, as text: whole characters only, and nothing beyond a stop text."""

from __future__ import annotations

import codecs
import collections
import functools
from collections.abc import Sequence

from jaxlm.tokenizer import Tokenizer

# Tokens of the prompt that are decoded along: whether a word begins with a space is seen from what stands before it.
CONTEXT = 8
# What decoders write for bytes that are no character, or not one yet.
BROKEN = "\ufffd"
# A character has four bytes at most: tokens that decide whether a text ends within one.
TAIL = 8


def answer_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], last: bool = True) -> str:
    """The text that `ids` add to the prompt; never ends in half a UTF-8 character.

    Args:
        last: nothing follows; else what closes a molecule or the like at the end is left out.
    """
    context, ids = list(_context(tokenizer, prompt)), ids[: len(ids) - _half(tokenizer, ids)]
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
    on how they come. What was shown stays: a text is held back until no token to come can change it, which for bytes
    that are decoded together (`Tokenizer.run_bytes`) is when something else follows them. So without stop texts all
    that is shown is `answer_text`.

    Args:
        prompt: the tokens before the answer.
        stops: texts that end the answer; they are looked for in what is held back, too.

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
        self._start = len(self._ids)
        # Places among the ids where the text was certain; the text behind the last is not known yet.
        self._whole = collections.deque([0, self._start])
        self._before = tokenizer.decode(self._ids, open_end=True)
        self._certain = self._shown = 0  # characters
        self._begun = [0] * len(stops)  # how much of each stop text ends what is certain
        self._run: codecs.IncrementalDecoder | None = None
        self._is_character = True  # what the run says so far
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
                self._take(index)
                self.ends.append(len(self.text))
        if last and not self.stopped:
            self._decode(is_open=False, last=True)
        safe = len(self.text) if self.stopped or last else self._certain - max(self._begun, default=0)
        new = self.text[self._shown : safe]
        self._shown = max(self._shown, safe)
        return new, self.stopped

    @property
    def shown(self) -> int:
        """The number of characters that were shown."""
        return self._shown

    def _take(self, index: int) -> None:
        """Reads one token more."""
        tokenizer = self._tokenizer
        byte = tokenizer.run_bytes.get(index)
        if byte is not None:
            self._take_byte(byte)
        elif self._run is not None and (index in tokenizer.special_ids or index >= tokenizer.vocab_size):
            pass  # is left out before anything is decoded: what follows may belong to the same run
        else:
            self._run = None
            held = len(self._ids) - self._whole[-1]
            # A long row of what is no character is not decoded anew with each token.
            if held <= TAIL or not tokenizer.decode(self._ids[-TAIL:], open_end=True).endswith(BROKEN):
                self._decode(is_open=False)

    def _take_byte(self, byte: int) -> None:
        """Reads a token of a run, whose characters can be seen before it is certain that they stay."""
        if self._run is None:
            self._run, self._is_character = codecs.getincrementaldecoder("utf-8")(), True
        if not self._is_character:
            return
        try:
            new = self._run.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._is_character = False
            return
        area = self.text[max(0, len(self.text) - self._longest + 1) :] + new
        if any(stop in area for stop in self._stops):
            self._decode(is_open=True)
        else:
            self.text += new

    def _decode(self, is_open: bool, last: bool = False) -> None:
        """Reads the tokens behind the last place where the text was certain.

        Args:
            is_open: what follows may change them.
        """
        begin, end = self._whole[0], self._whole[-1]
        known = len(self._ids) - (_half(self._tokenizer, self._ids[self._start :]) if last else 0)
        text = self._tokenizer.decode(self._ids[begin:known], open_end=not last)
        if text.startswith(self._before):
            new = text[len(self._before) :]
        else:  # bytes of the prompt and of the answer are one character, or none together
            new = self._tokenizer.decode(self._ids[end:known], open_end=not last)
        if not last and (text.endswith(BROKEN) or new.endswith(BROKEN)):
            return
        self.text = self.text[: self._certain] + (new.rstrip(BROKEN) if last else new)
        area = self.text[max(0, self._certain - self._longest + 1) :]
        cut, self.stopped = cut_at_stop(area, self._stops)
        self.text = self.text[: len(self.text) - len(area) + len(cut)]
        if self.ends and self.ends[-1] > len(self.text):
            self.ends = [min(end, len(self.text)) for end in self.ends]
        if is_open or last:
            return
        self._begun = [
            _begun(stop, size, self.text[self._certain :]) for stop, size in zip(self._stops, self._begun, strict=True)
        ]
        self._certain = len(self.text)
        self._whole.append(len(self._ids))
        while self._whole[1] <= len(self._ids) - CONTEXT:
            self._whole.popleft()
        self._before = self._tokenizer.decode(self._ids[self._whole[0] :], open_end=True)


def _begun(stop: str, size: int, text: str) -> int:
    """How many characters of `stop` end a text that ended with `size` of them, and goes on with `text`."""
    borders = _borders(stop)
    for letter in text:
        while size and (size == len(stop) or stop[size] != letter):
            size = borders[size - 1]
        size += stop[size] == letter
    return size


@functools.lru_cache(64)
def _borders(text: str) -> list[int]:
    """For each beginning of a text the longest shorter one that also ends it (Knuth, Morris and Pratt, 1977)."""
    borders, size = [0], 0
    for letter in text[1:]:
        while size and text[size] != letter:
            size = borders[size - 1]
        size += text[size] == letter
        borders.append(size)
    return borders


def _half(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """The number of tokens at the end that begin a character, where they would break those in front of it."""
    for size in range(min(3, len(ids)), 0, -1):
        part = bytes(tokenizer.run_bytes.get(index, 0) for index in ids[len(ids) - size :])
        try:
            if not codecs.getincrementaldecoder("utf-8")().decode(part):
                return size
        except UnicodeDecodeError:
            pass
    return 0


def _context(tokenizer: Tokenizer, prompt: Sequence[int]) -> Sequence[int]:
    """The prompt's last tokens, from where a character begins, and no run of bytes that are decoded together."""
    start = max(0, len(prompt) - CONTEXT)
    if runs := tokenizer.run_bytes:
        while start and prompt[start - 1] in runs:
            start -= 1
        return prompt[start:]
    for size in range(min(CONTEXT, len(prompt)), min(CONTEXT + 4, len(prompt)) + 1):
        context = prompt[len(prompt) - size :]
        if not tokenizer.decode(context[:4]).startswith(BROKEN):
            break
    return context
