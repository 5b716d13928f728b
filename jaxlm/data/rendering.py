"""A record as text: what templates make, and what is tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxlm.data.records import Record


@dataclass(frozen=True)
class Span:
    """A stretch of text.

    Args:
        text: the characters.
        trained: whether a model learns to write it.
        end: it ends an answer.
    """

    text: str
    trained: bool
    end: bool = False


@dataclass(frozen=True)
class Segment:
    """Spans that are tokenised together as one text; `eos`: the end-of-sequence token follows."""

    spans: tuple[Span, ...]
    eos: bool

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True)
class Rendered:
    """A record as text.

    Args:
        segments: in order.
        has_bos: bos is in the text already, or must not be there: none is to be added. A chat template has the say.
        special_tokens: passed to Tokenizer.encode: whether special tokens written in the text count as such.
        answers: what is trained of it as answers, without their ends; empty for a plain document.
        lost: roles of messages whose text is not in it as they say it.
    """

    segments: tuple[Segment, ...]
    has_bos: bool = False
    special_tokens: bool | None = None
    answers: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    def text(self, eos: str = "") -> str:
        """The whole text, with `eos` written where the token goes."""
        return "".join(segment.text + (eos if segment.eos else "") for segment in self.segments)


class Template(Protocol):
    """What turns records into text. `name` is for messages."""

    @property
    def name(self) -> str: ...

    def render(self, record: Record) -> Rendered:
        """The whole record, answers included and marked as trained."""
        ...

    def render_prompt(self, record: Record) -> Rendered:
        """Everything before the last answer, for inference; the record needs no answer."""
        ...

    def response(self, text: str) -> str:
        """The answer within the text of prompt and answer."""
        ...

    def used(self, record: Record) -> frozenset[str]:
        """The columns of the record that it reads; of messages also their keys, as `messages[].role`."""
        ...
