"""How a record becomes text, and which characters of it are learnt.

Templates are JSON files beside this module, of three kinds, and a user's own file may be any:

- prompt templates, in alpaca-lora's manner: description, prompt_input, prompt_no_input, response_split;
- conversations, in the manner of FastChat's ADD_COLON_TWO: description, system, user, assistant, separator. A round is
  "{user}: question{separator}{assistant}: answer" and eos; the system text and a separator come first.

- tasks: description, question, answer, frame. Question and answer have the names of columns in braces, `frame` is the
  conversation that they are put into: {"question": "Describe {molecule}.", "answer": "{caption}", "frame": "scimind"}.

Besides there are `text` (plain documents) and `chat` (the tokenizer's own Jinja chat template).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from jaxlm.data.sources import Record
from jaxlm.errors import UserError
from jaxlm.tokenizer import MARK_BEGIN, MARK_END, Tokenizer

DIRECTORY = Path(__file__).parent / "templates"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Span:
    """A stretch of text; `trained` says whether a model learns to write it."""

    text: str
    trained: bool


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
    """

    segments: tuple[Segment, ...]
    has_bos: bool = False
    special_tokens: bool | None = None

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


def _field(record: Record, field: str, columns: Mapping[str, str], template: str, default: str | None = None) -> str:
    """A text field of the record; numbers are written out. UserError when it is missing and has no default."""
    column = columns.get(field, field)
    value = record.data.get(column)
    if value is None and (default is not None and field not in columns):
        return default
    if value is None or isinstance(value, (dict, list, bool)):
        problem = "has no column" if value is None else f"has a {type(value).__name__} in column"
        raise UserError(
            f"data: {record.name} {problem} {column!r}, which the template {template} needs; columns found: "
            f"{', '.join(map(str, record.data)) or 'none'}. Choose another template, or name the column: "
            f"columns: {{{field}: NAME}}"
        )
    return _checked(record, str(value))


def _checked(record: Record, text: str) -> str:
    """The text, unless it holds half of a character: JSON can say "\\ud83d", and no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"data: {record.name} holds an incomplete Unicode character (a lone surrogate) "
            f"after {text[max(0, error.start - 20) : error.start]!r}; repair or remove the record"
        ) from None
    return text


@dataclass(frozen=True)
class TextTemplate:
    """Plain documents: all of the text is learnt, and one eos ends it."""

    columns: Mapping[str, str]
    name: str = "text"

    def render(self, record: Record) -> Rendered:
        return Rendered((Segment((Span(_field(record, "text", self.columns, self.name), True),), True),))

    def render_prompt(self, record: Record) -> Rendered:
        return Rendered((Segment((Span(_field(record, "text", self.columns, self.name), False),), False),))

    def response(self, text: str) -> str:
        return text.strip()


@dataclass(frozen=True)
class PromptTemplate:
    """alpaca-lora's templates; an empty input takes prompt_no_input."""

    columns: Mapping[str, str]
    name: str
    prompt_input: str
    prompt_no_input: str
    response_split: str

    def _prompt(self, record: Record) -> Span:
        instruction = _field(record, "instruction", self.columns, self.name)
        extra = _field(record, "input", self.columns, self.name, default="")
        form = self.prompt_input if extra else self.prompt_no_input
        return Span(form.format(instruction=instruction, input=extra), False)

    def render(self, record: Record) -> Rendered:
        prompt = self._prompt(record)
        output = _field(record, "output", self.columns, self.name)
        return Rendered((Segment((prompt, Span(output, True)), True),))

    def render_prompt(self, record: Record) -> Rendered:
        return Rendered((Segment((self._prompt(record),), False),))

    def response(self, text: str) -> str:
        """alpaca-lora's get_response: what stands between the first and the second response marker."""
        if not self.response_split:
            return text.strip()
        parts = text.split(self.response_split)
        if len(parts) < 2:
            raise UserError(f"template {self.name}: the text does not contain {self.response_split!r}")
        return parts[1].strip()


def read_messages(record: Record, columns: Mapping[str, str], template: str) -> list[dict[str, str]]:
    """The conversation of a record as [{"role": system|user|assistant, "content": text}, …].

    Read from `messages` (role, content), `conversations` or SciMind's `conversation` (from, value), or from Alpaca's
    columns: instruction and input, with an empty line between, are the question.
    """
    name = columns.get("messages") or next((c for c in CONVERSATION_COLUMNS if record.data.get(c) is not None), None)
    if name is None and columns.get("instruction", "instruction") in record.data:
        question = _field(record, "instruction", columns, template)
        extra = _field(record, "input", columns, template, default="")
        answer = record.data.get(columns.get("output", "output"))
        messages = [{"role": "user", "content": question + (f"\n\n{extra}" if extra else "")}]
        return (
            messages if answer is None else [*messages, {"role": "assistant", "content": _checked(record, str(answer))}]
        )
    turns = record.data.get(name) if name else None
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise UserError(
            f"data: {record.name}: the template {template} needs a list of messages in one of the columns "
            f"{', '.join(CONVERSATION_COLUMNS)}; columns found: {', '.join(map(str, record.data)) or 'none'}. "
            "Choose another template, or name the column: columns: {messages: NAME}"
        )
    messages = []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise UserError(
                f"data: {record.name}: message {number} must have a role ({', '.join(ROLES)}) and a text content, "
                f"found role {role!r} and content of type {type(content).__name__}"
            )
        messages.append({"role": ROLES[role], "content": _checked(record, content)})
    return messages


def _without_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _refuse_without_answer(record: Record, messages: list[dict[str, str]]) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"data: {record.name} has no message of the assistant, so there is nothing to learn from it")


@dataclass(frozen=True)
class ConversationTemplate:
    """Roles with a colon; every answer ends with eos."""

    columns: Mapping[str, str]
    name: str
    system: str
    user: str
    assistant: str
    separator: str

    def render(self, record: Record) -> Rendered:
        messages = read_messages(record, self.columns, self.name)
        _refuse_without_answer(record, messages)
        return self._segments(messages, record)

    def render_prompt(self, record: Record) -> Rendered:
        messages = _without_answer(read_messages(record, self.columns, self.name))
        rendered = self._segments(messages, record)
        return Rendered((*rendered.segments[:-1], self._ask(rendered.segments[-1])))

    def response(self, text: str) -> str:
        return text.rsplit(f"{self.assistant}:", 1)[-1].strip()

    def _ask(self, segment: Segment) -> Segment:
        return Segment((*segment.spans, Span(f"{self.assistant}:", False)), False)

    def _segments(self, messages: list[dict[str, str]], record: Record) -> Rendered:
        system = self.system
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        segments: list[Segment] = []
        spans = [Span(system + self.separator, False)]
        for number, message in enumerate(messages):
            expected = ("user", "assistant")[number % 2]
            if message["role"] != expected:
                raise UserError(
                    f"data: {record.name}: in the template {self.name} user and assistant take turns, "
                    f"but the role of message {number + 1} is {message['role']}"
                )
            if expected == "user":
                spans.append(Span(f"{self.user}: {message['content']}{self.separator}", False))
            else:
                # The space is learnt with the answer's first word: tokenizers make one token of the two.
                spans += [Span(f"{self.assistant}:", False), Span(f" {message['content']}", True)]
                segments.append(Segment(tuple(spans), True))
                spans = []
        if spans:
            segments.append(Segment(tuple(spans), False))
        return Rendered(tuple(segments))


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template.

    What is learnt: {% generation %} blocks where the template has them, else the contents of the assistant's messages;
    and the special token that ends each turn, without which a model would not learn to stop.
    """

    columns: Mapping[str, str]
    tokenizer: Tokenizer
    name: str = "chat"

    def render(self, record: Record) -> Rendered:
        messages = read_messages(record, self.columns, self.name)
        _refuse_without_answer(record, messages)
        if any(mark in message["content"] for message in messages for mark in (MARK_BEGIN, MARK_END)):
            raise UserError(f"data: {record.name} contains a Unicode noncharacter (U+FDD0 or U+FDD1); remove it")
        text = self.tokenizer.render_chat(messages, keep_marks=True)
        if MARK_BEGIN not in text:
            text = self._mark_answers(messages, text, record)
        spans: list[Span] = []
        for number, part in enumerate(re.split(f"[{MARK_BEGIN}{MARK_END}]", text)):
            ending = self._turn_end.match(part) if number % 2 == 0 and number > 0 else None
            if ending and not self._ends_special(spans[-1].text):
                spans.append(Span(ending.group(), True))
                part = part[ending.end() :]
            spans.append(Span(part, number % 2 == 1))
        spans = [span for span in spans if span.text]
        # A template without such tokens: eos ends the conversation.
        ended = any(self._ends_special(span.text) for span in spans if span.trained)
        return Rendered((Segment(tuple(spans), not ended),), True, True)

    def render_prompt(self, record: Record) -> Rendered:
        messages = _without_answer(read_messages(record, self.columns, self.name))
        text = self.tokenizer.render_chat(messages, add_generation_prompt=True)
        return Rendered((Segment((Span(text, False),), False),), True, True)

    def response(self, text: str) -> str:
        return text.strip()

    @functools.cached_property
    def _special(self) -> str:
        return "|".join(re.escape(t) for t in sorted(self.tokenizer.special_tokens(), key=len, reverse=True) if t)

    @functools.cached_property
    def _turn_end(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{self._special})" if self._special else r"(?!)")

    def _ends_special(self, text: str) -> bool:
        return bool(self._special) and re.search(rf"(?:{self._special})\s*\Z", text) is not None

    def _mark_answers(self, messages: list[dict[str, str]], plain: str, record: Record) -> str:
        """The rendered text with marks around the assistant's contents.

        Searching for a content would find "a" within "assistant". So the conversation is rendered once more with
        marks in it; that counts only if without the marks it is the same text. Templates often trim contents, hence two
        tries.
        """
        for trim in (False, True):
            marked = []
            for message in messages:
                content = message["content"].strip() if trim else message["content"]
                if message["role"] == "assistant":
                    content = f"{MARK_BEGIN}{content}{MARK_END}"
                marked.append({**message, "content": content})
            text = self.tokenizer.render_chat(marked, keep_marks=True)
            if re.sub(f"[{MARK_BEGIN}{MARK_END}]", "", text) == plain and text.count(MARK_BEGIN) == sum(
                message["role"] == "assistant" for message in messages
            ):
                return text
        raise UserError(
            f"data: {record.name}: the chat template of {self.tokenizer.path} changes or leaves out what the assistant "
            "says, so it is unclear what to learn; put {% generation %} … {% endgeneration %} around it in the chat "
            "template, or choose another template"
        )


@dataclass(frozen=True)
class TaskTemplate:
    """A question about a record's columns, and its answer, as a conversation of another template."""

    columns: Mapping[str, str]
    name: str
    question: str
    answer: str
    inner: Template

    def render(self, record: Record) -> Rendered:
        answer = {"role": "assistant", "content": self._filled(self.answer, record)}
        return self.inner.render(self._conversation(record, [answer]))

    def render_prompt(self, record: Record) -> Rendered:
        return self.inner.render_prompt(self._conversation(record, []))

    def response(self, text: str) -> str:
        return self.inner.response(text)

    @property
    def asks_for(self) -> tuple[str, ...]:
        """The columns that the question names, before `columns` renames them."""
        return _placeholders(self.question)

    def _conversation(self, record: Record, answer: list[dict[str, str]]) -> Record:
        question = {"role": "user", "content": self._filled(self.question, record)}
        return Record(record.name, {"messages": [question, *answer]})

    def _filled(self, text: str, record: Record) -> str:
        fields = {name: _field(record, name, self.columns, self.name) for name in _placeholders(text)}
        return text.format(**fields)


def for_questions(template: Template) -> Template:
    """The template for a question that a user words: of a task, the conversation that it is put into."""
    return template.inner if isinstance(template, TaskTemplate) else template


def _placeholders(text: str) -> tuple[str, ...]:
    """The names in braces, each once.

    Raises:
        ValueError: for braces that hold anything but a name.
    """
    names = []
    for _, name, form, conversion in Formatter().parse(text):
        if name is not None and (not name.isidentifier() or form or conversion):
            raise ValueError(f"{{{name}}} is no name of a column")
        if name is not None:
            names.append(name)
    return tuple(dict.fromkeys(names))


def template_names() -> list[str]:
    """Names that `load_template` knows."""
    return sorted(["text", "chat", *(path.stem for path in DIRECTORY.glob("*.json"))])


def load_template(name: str, tokenizer: Tokenizer, columns: Mapping[str, str] | None = None) -> Template:
    """A template by name, or from a user's JSON file (a name ending in .json).

    Args:
        name: see `template_names`.
        tokenizer: its chat template is used by `chat`.
        columns: the template's field names mapped to column names of the data.

    Raises:
        UserError: unknown name, broken file, or `chat` for a tokenizer without a chat template.
    """
    columns = dict(columns or {})
    template = _load(name, tokenizer, columns)
    known = {"instruction", "input", "output", "text", "messages"}
    if isinstance(template, TaskTemplate):
        known = {*template.asks_for, *_placeholders(template.answer)}
    if unknown := set(columns) - known:
        raise UserError(
            f"data: columns names the field {sorted(unknown)[0]!r}; a template's fields are {', '.join(sorted(known))}"
        )
    return template


def _load(name: str, tokenizer: Tokenizer, columns: Mapping[str, str]) -> Template:
    if name == "text":
        return TextTemplate(columns)
    if name == "chat":
        if tokenizer.chat_template is None:
            raise UserError(
                f"data: template is chat, but the tokenizer of {tokenizer.path} has no chat template; choose another "
                f"({', '.join(template_names())})"
            )
        return ChatTemplate(columns, tokenizer)
    path = Path(name).expanduser() if name.endswith(".json") else DIRECTORY / f"{name}.json"
    if not path.is_file():
        raise UserError(
            f"data: template {name!r} is unknown; choose {', '.join(template_names())}, or give an own file NAME.json"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"template {path} is not valid JSON: {error}") from None
    return _from_json(content, name, path, columns, tokenizer)


def _from_json(content: Any, name: str, path: Path, columns: Mapping[str, str], tokenizer: Tokenizer) -> Template:
    kinds: tuple[tuple[type[PromptTemplate] | type[ConversationTemplate], set[str]], ...] = (
        (PromptTemplate, {"prompt_input", "prompt_no_input", "response_split"}),
        (ConversationTemplate, {"system", "user", "assistant", "separator"}),
    )
    fields = {key: v for key, v in content.items() if key != "description"} if isinstance(content, dict) else {}
    for kind, keys in kinds:
        if set(fields) == keys and all(isinstance(value, str) for value in fields.values()):
            template = kind(columns=columns, name=name, **fields)
            if isinstance(template, PromptTemplate):
                _check_placeholders(template, path)
            return template
    task = {"question", "answer", "frame"}
    if set(fields) == task and all(isinstance(value, str) for value in fields.values()):
        return _task(fields, name, path, columns, tokenizer)
    raise UserError(
        f"template {path} has the keys {', '.join(sorted(fields)) or 'none'}; it must have either "
        + " or ".join(", ".join(sorted(keys)) for keys in (*(keys for _, keys in kinds), task))
        + " (and may have description), all of them texts"
    )


def _task(
    fields: Mapping[str, str], name: str, path: Path, columns: Mapping[str, str], tokenizer: Tokenizer
) -> TaskTemplate:
    for key in ("question", "answer"):
        try:
            found = _placeholders(fields[key])
        except ValueError as error:
            raise UserError(
                f"template {path}: {key} may contain {{NAME}} for a column, other braces doubled: {error}"
            ) from None
        if not found:
            raise UserError(f"template {path}: {key} must contain the name of a column in braces")
    inner = load_template(fields["frame"], tokenizer)
    if not isinstance(inner, (ConversationTemplate, ChatTemplate)):
        raise UserError(f"template {path}: frame {fields['frame']!r} is no conversation; choose scimind or chat, say")
    return TaskTemplate(columns, name, fields["question"], fields["answer"], inner)


def _check_placeholders(template: PromptTemplate, path: Path) -> None:
    for key in ("prompt_input", "prompt_no_input"):
        form: str = getattr(template, key)
        try:
            shown = form.format(instruction=MARK_BEGIN, input=MARK_END)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"template {path}: {key} may contain {{instruction}} and {{input}}, other braces doubled: {error!r}"
            ) from None
        if MARK_BEGIN not in shown or (key == "prompt_input" and MARK_END not in shown):
            raise UserError(
                f"template {path}: prompt_input must contain {{instruction}} and {{input}}, "
                "prompt_no_input {instruction}"
            )


def choose_template(record: Record, tokenizer: Tokenizer, columns: Mapping[str, str] | None = None) -> str:
    """The template name that `auto` stands for, by the columns of a source's first record."""
    columns = columns or {}
    has = {field for field in ("text", "instruction", "messages") if columns.get(field, field) in record.data}
    if "text" in has:
        return "text"
    if "instruction" in has:
        return "alpaca"
    if "messages" in has or "conversations" in record.data:
        return "chat" if tokenizer.chat_template is not None else "vicuna_v1.1"
    if "conversation" in record.data:
        return "scimind"
    raise UserError(
        f"data: {record.name}: no template goes by itself with the columns "
        f"{', '.join(map(str, record.data)) or 'none'}; set template, and columns if they are "
        "named otherwise, e.g. columns: {instruction: question, output: answer}"
    )
