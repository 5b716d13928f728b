"""Tokens that are being written, as text: whole characters only, and nothing beyond a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlm.tokenizer import Tokenizer

# Tokens of the prompt that are decoded along: whether a word begins with a space is seen from what stands before it.
CONTEXT = 8
# What decoders write for bytes that are no character, or not one yet.
BROKEN = "\ufffd"


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

    Args:
        prompt: the tokens before the answer.
        stops: texts that end the answer.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._stops = tokenizer, prompt, stops
        self._shown = 0

    def update(self, ids: Sequence[int], last: bool) -> tuple[str, bool]:
        """What can be shown now that was not before.

        Args:
            ids: all tokens of the answer so far.
            last: nothing follows.

        Returns:
            The new text, and whether a stop text was met.
        """
        text, stopped = cut_at_stop(answer_text(self._tokenizer, self._prompt, ids, last), self._stops)
        safe = len(text)
        if not (stopped or last):
            safe = len(text) - self._maybe_stop(text)
        new = text[self._shown : safe]
        self._shown = max(self._shown, safe)
        return new, stopped

    def _maybe_stop(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        lengths = [
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        return max(lengths, default=0)
