"""The tokenizer's own chat template, and what of its text is trained."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.data.messages import (
    Message,
    columns_read,
    messages_column,
    read_messages,
    read_tools,
    refuse_without_answer,
    without_answer,
)
from jaxlm.data.records import Record
from jaxlm.data.rendering import Rendered, Segment, Span
from jaxlm.errors import UserError
from jaxlm.tokenizer import MARK_BEGIN, MARK_END, ChatError, Tokenizer

MARKS = f"[{MARK_BEGIN}{MARK_END}]"
# Keys of a message that change what the assistant writes: where it does is found by rendering the turns before it.
WRITTEN_BESIDE = ("tool_calls", "reasoning_content", "reasoning", "thinking")
# What ends a thought within a content. Templates often leave the thoughts of earlier turns out.
THOUGHT = "</think>"


@dataclass(frozen=True)
class _Answer:
    """Where in the rendered text an assistant's turn is; `ended`: its end may be part of it."""

    begin: int
    end: int
    message: Message
    ended: bool


@dataclass(frozen=True)
class _Habits:
    """How a chat template ends what the assistant says; empty where it does not.

    Args:
        last: what it writes behind a last answer, up to the first special token in it.
        special: what it writes between turns, up to the special token that ends the first of them.
        words: what it writes there where it has no special tokens.
    """

    last: str
    special: str
    words: str


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template.

    What is trained: {% generation %} blocks where the template has them, else what the assistant's messages say, tool
    calls included; and the end of each turn, without which a model would not learn to stop. Where the template leaves
    the end off the last message, the one that it writes between turns follows, or else eos.
    """

    columns: Mapping[str, str]
    tokenizer: Tokenizer
    name: str = "chat"

    def render(self, record: Record) -> Rendered:
        messages = read_messages(record, self.columns, self.name, tools=True)
        refuse_without_answer(record, messages, self.columns)
        if any(mark in message.content for message in messages for mark in (MARK_BEGIN, MARK_END)):
            raise UserError(f"data: {record.name} contains a Unicode noncharacter (U+FDD0 or U+FDD1); remove it")
        self._refuse_lost_calls(record, messages)
        try:
            text, answers = self._located(messages, record, read_tools(record, self.columns))
        except ChatError as error:
            raise UserError(f"data: {record.name}: {error}") from None
        lost = [m.role for m in messages if m.role in ("system", "user") and m.content.strip() not in text]
        spans: list[Span] = []
        at, ends = 0, []
        for answer in answers:
            spans.append(Span(text[at : answer.begin], False))
            at = answer.end
            said, end = text[answer.begin : at], ""
            if answer.ended and (special := self._special_at_the_end(said)):
                said, end = said[: -len(special)], special
            elif behind := self._end_behind(text, at):
                end, at = behind, at + len(behind)
            spans += [Span(said, answer.message.trained), Span(end, answer.message.trained, True)]
            ends.append(end)
        last, rest, eos = messages[-1], text[at:], False
        trained = last.role == "assistant" and last.trained
        if last.role == "assistant" and not self._has_special(ends[-1]):
            # The end is missing. What stands before the one that is added is trained too: nothing is left to guess.
            added = self._habits.special or next((end for end in reversed(ends) if self._has_special(end)), "")
            eos = not added
            if added and not rest.strip():  # as between turns: the end first
                spans += [Span(added, trained, True), Span(rest, False)]
            else:
                words = "" if ends[-1] else self._habits.words
                spans += [Span(words + rest, trained), Span(added or self._end_but_eos, trained, True)]
        else:
            spans.append(Span(rest, False))
        spans = [span for span in spans if span.text]
        said_by = tuple(text[a.begin : a.end] for a in answers if a.message.trained)
        return Rendered((Segment(tuple(spans), eos),), True, True, said_by, tuple(dict.fromkeys(lost)))

    def render_prompt(self, record: Record) -> Rendered:
        messages = without_answer(read_messages(record, self.columns, self.name, tools=True))
        tools = read_tools(record, self.columns)
        try:
            text = self.tokenizer.render_chat([_plain(m) for m in messages], add_generation_prompt=True, tools=tools)
        except ChatError as error:
            raise UserError(f"data: {record.name}: {error}") from None
        return Rendered((Segment((Span(text, False),), False),), True, True)

    def _refuse_lost_calls(self, record: Record, messages: Sequence[Message]) -> None:
        """A template that knows no tools would write "None" for a content that is not there, to be trained."""
        if self._mentions("tool_calls"):
            return
        for number, message in enumerate(messages, 1):
            if "tool_calls" in message.extra and not message.content.strip():
                raise UserError(
                    f"data: {record.name}: message {number} has no text but tool_calls, and the chat template of "
                    f"{self.tokenizer.path} does not write the tool_calls; choose a tokenizer whose chat template "
                    "does, or leave the record out"
                )

    def response(self, text: str) -> str:
        return text.strip()

    def used(self, record: Record) -> frozenset[str]:
        used = set(columns_read(record, self.columns))
        if self._mentions("tools"):
            used.add(self.columns.get("tools", "tools"))
        column = messages_column(record, self.columns)
        turns = record.data.get(column) if column else None
        keys = {key for turn in turns or () if isinstance(turn, Mapping) for key in turn}
        # An older name of what templates call tool_calls; `read_messages` translates it.
        spoken = {key for key in keys if self._mentions("tool_calls" if key == "function_call" else str(key))}
        return frozenset(used | {f"{column}[].{key}" for key in spoken})

    def _mentions(self, name: str) -> bool:
        """Whether the template speaks of a field."""
        if name not in self._mentioned:
            source = self.tokenizer.chat_template or ""
            self._mentioned[name] = re.search(rf"\b{re.escape(name)}\b", source) is not None
        return self._mentioned[name]

    @functools.cached_property
    def _mentioned(self) -> dict[str, bool]:
        return {}

    # The ends of turns ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _special(self) -> str:
        return "|".join(re.escape(t) for t in sorted(self.tokenizer.special_tokens(), key=len, reverse=True) if t)

    @functools.cached_property
    def _turn_end(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{self._special})" if self._special else r"(?!)")

    def _has_special(self, text: str) -> bool:
        return bool(self._special) and re.search(self._special, text) is not None

    def _special_at_the_end(self, text: str) -> str:
        """The special token at the end of a text and white space beside it, or nothing."""
        match = re.search(rf"(?:{self._special})\s*\Z", text) if self._special else None
        return match.group() if match else ""

    def _end_behind(self, text: str, at: int) -> str:
        """What ends the turn whose answer ends at a place: the template's own words, or the next special token."""
        words = self._habits.last or self._habits.words
        if words and text.startswith(words, at):
            return words
        match = self._turn_end.match(text, at)
        return match.group() if match else ""

    @property
    def _end_but_eos(self) -> str:
        """Where there is no eos: what generation_config.json names as an end."""
        if self.tokenizer.eos_id is None and self.tokenizer.end_ids:
            return self.tokenizer.token(self.tokenizer.end_ids[0])
        return ""

    @functools.cached_property
    def _habits(self) -> _Habits:
        """How the template ends turns, seen from conversations of one round and two."""
        try:
            text, answers = self._located(_TALK[:2], _PROBE, None)
            rest = text[answers[-1].end :]
            match = re.search(self._special, rest) if self._special else None
            last = rest[: match.end()] if match else rest.rstrip()
            text, answers = self._located(_TALK, _PROBE, None)
            asked = self.tokenizer.render_chat([_plain(_TALK[0])])
            opened = self.tokenizer.render_chat([_plain(_TALK[0])], add_generation_prompt=True)
        except UserError:  # a template that wants other conversations
            return _Habits("", "", "")
        gap = text[answers[0].end : text.find(_TALK[2].content, answers[0].end)]
        between = re.findall(self._special, gap) if self._special else []
        known = {self.tokenizer.token(index) for index in self.tokenizer.end_ids}
        # What follows an answer may also be the next turn's opening. It is an end if it is known as one; else if more
        # special tokens stand between an answer and the next question than in the opening of an answer.
        opening = re.findall(self._special, opened.removeprefix(asked)) if between else []
        special = ""
        if between and (between[0] in known or len(between) > len(opening)):
            special = gap[: gap.index(between[0]) + len(between[0])]
        # Words that end a turn stand in front of the words that open the next question.
        before = asked[: asked.find(_TALK[0].content)]
        same = next((k for k in range(len(gap)) if before.endswith(gap[k:])), len(gap))
        return _Habits(last, special, "" if between else gap[:same].rstrip())

    # Where the answers are --------------------------------------------------------------------------------------------

    def _located(
        self, messages: Sequence[Message], record: Record, tools: list[Any] | None
    ) -> tuple[str, list[_Answer]]:
        """The rendered conversation, and where the assistant speaks in it."""
        said = [message for message in messages if message.role == "assistant"]
        text = self._rendered(messages, tools)
        if MARK_BEGIN in text:
            return self._blocks(text, said, record)
        beside = [k for k, m in enumerate(messages) if m.role == "assistant" and self._writes_beside(m)]
        places = {k: place for k in beside if (place := self._turn(messages, k, text, tools, record)) is not None}
        places |= self._marked(messages, text, tools, places.keys(), record)
        return text, [places[k] for k in sorted(places)]

    def _rendered(self, messages: Sequence[Message], tools: list[Any] | None, **options: bool) -> str:
        return self.tokenizer.render_chat([_plain(m) for m in messages], keep_marks=True, tools=tools, **options)

    def _writes_beside(self, message: Message) -> bool:
        return (
            any(key in message.extra and self._mentions(key) for key in WRITTEN_BESIDE)
            or ("tool_calls" in message.extra and not message.content.strip())
            or THOUGHT in message.content
        )

    def _blocks(self, marked: str, said: list[Message], record: Record) -> tuple[str, list[_Answer]]:
        """The {% generation %} blocks."""
        parts = re.split(MARKS, marked)
        blocks = len(parts) // 2
        if blocks != len(said) and not all(message.trained for message in said):
            raise UserError(
                f"data: {record.name}: some messages are not to be trained, but the chat template of "
                f"{self.tokenizer.path} has {blocks} generation blocks for {len(said)} messages of the assistant: it "
                "is unclear which; take the weights out, or mend the template"
            )
        answers, at = [], 0
        for number, part in enumerate(parts):
            if number % 2:
                message = said[number // 2] if blocks == len(said) else said[-1]
                answers.append(_Answer(at, at + len(part), message, True))
            at += len(part)
        return "".join(parts), answers

    def _turn(
        self, messages: Sequence[Message], number: int, text: str, tools: list[Any] | None, record: Record
    ) -> _Answer | None:
        """An assistant's whole turn: what is there with it, and is not when only its opening is rendered."""
        message = messages[number]
        before = self._rendered(messages[:number], tools)
        opened = self._rendered(messages[:number], tools, add_generation_prompt=True)
        until = self._rendered(messages[: number + 1], tools)
        same = _common(text, until)
        end = len(text[:same].rstrip())
        begin = len(opened)
        if not text.startswith(opened) and text.startswith(before) and opened.startswith(before):
            # An opening that the template itself does not keep, as one that begins a thought: up to where they part,
            # and back to where a word or a special token ends.
            same = len(before) + _common(text[len(before) :], opened[len(before) :])
            borders = [found.end() for found in re.finditer(rf"\s|{self._special}" if self._special else r"\s", text)]
            begin = max([len(before), *(border for border in borders if border <= same)])
        if text.startswith(before) and begin < end:
            ending = self._special_at_the_end(text[begin:end])
            if text[begin : end - len(ending)].strip():
                return _Answer(begin, end, message, True)
        if message.content.strip():
            return None  # then its content alone is trained
        raise UserError(
            f"data: {record.name}: the chat template of {self.tokenizer.path} does not write the tool_calls of message "
            f"{number + 1}, or changes with what follows, so it is unclear what to learn; put {{% generation %}} … "
            "{% endgeneration %} around what the assistant writes, choose a tokenizer whose chat template does, or "
            "leave the record out"
        )

    def _marked(
        self,
        messages: Sequence[Message],
        plain: str,
        tools: list[Any] | None,
        done: Any,
        record: Record,
    ) -> dict[int, _Answer]:
        """The contents of the assistant's messages, by their number, but for those that are `done`.

        Searching for a content would find "a" within "assistant". So the conversation is rendered once more with
        marks in it; that counts only if without the marks it is the same text. Templates often trim contents, or take
        the thought out of them, hence several tries.
        """
        wanted = [k for k, m in enumerate(messages) if m.role == "assistant" and k not in done]
        for trim, whole in itertools.product((False, True), (True, False)):
            marked = list(messages)
            for k, message in enumerate(messages):
                content = message.content.strip() if trim else message.content
                if k in wanted:
                    thought, mark, said = ("", "", content) if whole else content.rpartition(THOUGHT)
                    gap = said[: len(said) - len(said.lstrip())] if mark else ""
                    content = f"{thought}{mark}{gap}{MARK_BEGIN}{said[len(gap) :]}{MARK_END}"
                marked[k] = dataclasses.replace(message, content=content)
            text = self._rendered(marked, tools)
            parts = re.split(MARKS, text)
            if "".join(parts) == plain and text.count(MARK_BEGIN) == len(wanted) == len(parts) // 2:
                places, at = [], 0
                for part in parts:
                    places.append((at, at + len(part)))
                    at += len(part)
                return {k: _Answer(*places[2 * n + 1], messages[k], False) for n, k in enumerate(wanted)}
        raise UserError(
            f"data: {record.name}: the chat template of {self.tokenizer.path} changes or leaves out what the assistant "
            "says, so it is unclear what to learn; put {% generation %} … {% endgeneration %} around it in the chat "
            "template, or choose another template"
        )


# What a template does with turns in general is tried with these.
_TALK = [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]
_PROBE = Record("a trial conversation", {})


def _common(first: str, second: str) -> int:
    """The number of characters that two texts have in common at their beginning."""
    return next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    return {"role": message.role, "content": message.content, **message.extra}
