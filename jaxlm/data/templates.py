"""How a record becomes text, and which characters of it are trained: templates by name.

Templates are JSON files beside this module, of three kinds, and a user's own file may be any:

- prompt templates, in alpaca-lora's manner: description, prompt_input, prompt_no_input, response_split;
- conversations, in the manner of FastChat's ADD_COLON_TWO: description, system, user, assistant, separator. A round is
  "{user}: question{separator}{assistant}: answer" and eos; the system text and a separator come first.

- tasks: description, question, answer, frame. Question and answer have the names of columns in braces, `frame` is the
  conversation that they are put into: {"question": "Describe {molecule}.", "answer": "{caption}", "frame": "scimind"}.

Besides there are `text` (plain documents) and `chat` (the tokenizer's own Jinja chat template).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from jaxlm.data.chat import ChatTemplate
from jaxlm.data.messages import (
    CONVERSATION_COLUMNS,
    Message,
    columns_read,
    is_empty,
    read_messages,
    refuse_without_answer,
    text_field,
    without_answer,
)
from jaxlm.data.records import Record
from jaxlm.data.rendering import Rendered, Segment, Span, Template
from jaxlm.errors import UserError
from jaxlm.jsontext import parse
from jaxlm.locate import at_home
from jaxlm.tokenizer import MARK_BEGIN, MARK_END, Tokenizer

DIRECTORY = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class TextTemplate:
    """Plain documents: all of the text is trained, and one eos ends it."""

    columns: Mapping[str, str]
    name: str = "text"

    def render(self, record: Record) -> Rendered:
        return Rendered((Segment((Span(text_field(record, "text", self.columns, self.name), True),), True),))

    def render_prompt(self, record: Record) -> Rendered:
        return Rendered((Segment((Span(text_field(record, "text", self.columns, self.name), False),), False),))

    def response(self, text: str) -> str:
        return text.strip()

    def used(self, record: Record) -> frozenset[str]:
        return frozenset({self.columns.get("text", "text")})


@dataclass(frozen=True)
class PromptTemplate:
    """alpaca-lora's templates; an empty input takes prompt_no_input."""

    columns: Mapping[str, str]
    name: str
    prompt_input: str
    prompt_no_input: str
    response_split: str

    def _prompt(self, record: Record) -> Span:
        instruction = text_field(record, "instruction", self.columns, self.name)
        extra = text_field(record, "input", self.columns, self.name, default="")
        form = self.prompt_input if extra else self.prompt_no_input
        return Span(form.format(instruction=instruction, input=extra), False)

    def render(self, record: Record) -> Rendered:
        prompt = self._prompt(record)
        output = text_field(record, "output", self.columns, self.name)
        return Rendered((Segment((prompt, Span(output, True)), True),), answers=(output,))

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

    def used(self, record: Record) -> frozenset[str]:
        return frozenset(self.columns.get(name, name) for name in ("instruction", "input", "output"))


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
        refuse_without_answer(record, messages, self.columns)
        return self._segments(messages, record)

    def render_prompt(self, record: Record) -> Rendered:
        messages = without_answer(read_messages(record, self.columns, self.name))
        rendered = self._segments(messages, record)
        return Rendered((*rendered.segments[:-1], self._ask(rendered.segments[-1])))

    def response(self, text: str) -> str:
        return text.rsplit(f"{self.assistant}:", 1)[-1].strip()

    def used(self, record: Record) -> frozenset[str]:
        return columns_read(record, self.columns)

    def _ask(self, segment: Segment) -> Segment:
        return Segment((*segment.spans, Span(f"{self.assistant}:", False)), False)

    def _segments(self, messages: list[Message], record: Record) -> Rendered:
        system = self.system
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        segments: list[Segment] = []
        spans = [Span(system + self.separator, False)]
        for number, message in enumerate(messages):
            expected = ("user", "assistant")[number % 2]
            if message.role != expected:
                raise UserError(
                    f"data: {record.name}: in the template {self.name} user and assistant take turns, "
                    f"but the role of message {number + 1} is {message.role}; mend the record or leave it out, or use "
                    "the template chat with a tokenizer whose chat template allows it"
                )
            if expected == "user":
                spans.append(Span(f"{self.user}: {message.content}{self.separator}", False))
            else:
                # The space is trained with the answer's first word: tokenizers make one token of the two.
                spans += [Span(f"{self.assistant}:", False), Span(f" {message.content}", message.trained)]
                segments.append(Segment(tuple(spans), True))
                spans = []
        if spans:
            segments.append(Segment(tuple(spans), False))
        answers = tuple(m.content for m in messages if m.role == "assistant" and m.trained)
        return Rendered(tuple(segments), answers=answers)


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

    def used(self, record: Record) -> frozenset[str]:
        names = (*self.asks_for, *_placeholders(self.answer))
        return frozenset(self.columns.get(name, name) for name in names)

    @property
    def asks_for(self) -> tuple[str, ...]:
        """The columns that the question names, before `columns` renames them."""
        return _placeholders(self.question)

    def _conversation(self, record: Record, answer: list[dict[str, str]]) -> Record:
        question = {"role": "user", "content": self._filled(self.question, record)}
        return Record(record.name, {"messages": [question, *answer]})

    def _filled(self, text: str, record: Record) -> str:
        fields = {name: text_field(record, name, self.columns, self.name) for name in _placeholders(text)}
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
            raise ValueError(f"{{{name}}} is not the name of a column")
        if name is not None:
            names.append(name)
    return tuple(dict.fromkeys(names))


def template_names() -> list[str]:
    """Names that `load_template` knows."""
    return sorted(["text", "chat", *(path.stem for path in DIRECTORY.glob("*.json"))])


def load_template(name: str, tokenizer: Tokenizer | None, columns: Mapping[str, str] | None = None) -> Template:
    """A template by name, or from a user's JSON file (a name ending in .json).

    Args:
        name: see `template_names`.
        tokenizer: its chat template is used by `chat`; None: `chat` is refused.
        columns: the template's field names mapped to column names of the data.

    Raises:
        UserError: unknown name, broken file, or `chat` for a tokenizer without a chat template.
    """
    columns = dict(columns or {})
    template = _load(name, tokenizer, columns)
    known = {"instruction", "input", "output", "text", "messages", "system", "history", "tools"}
    if isinstance(template, TaskTemplate):
        known = {*template.asks_for, *_placeholders(template.answer)}
    elif not isinstance(template, ChatTemplate):
        known -= {"tools"} if isinstance(template, ConversationTemplate) else {"system", "history", "tools"}
    if unknown := set(columns) - known:
        raise UserError(
            f"columns names the field {sorted(unknown)[0]!r}; a template's fields are {', '.join(sorted(known))}"
        )
    return template


def _load(name: str, tokenizer: Tokenizer | None, columns: Mapping[str, str]) -> Template:
    if name == "text":
        return TextTemplate(columns)
    if name == "chat":
        if tokenizer is None:
            raise UserError("template: chat belongs to a tokenizer, and none is here; name another, or text")
        if tokenizer.chat_template is None:
            raise UserError(
                f"template is chat, but the tokenizer of {tokenizer.path} has no chat template; choose another "
                f"({', '.join(template_names())})"
            )
        return ChatTemplate(columns, tokenizer)
    path = at_home(name) if name.endswith(".json") else DIRECTORY / f"{name}.json"
    if not path.is_file():
        raise UserError(f"template {name!r} is unknown; choose {', '.join(template_names())}, or give a file NAME.json")
    try:
        content = parse(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also UnicodeDecodeError
        raise UserError(f"template {path} is not valid JSON: {error}") from None
    return _from_json(content, name, path, columns, tokenizer)


def _from_json(
    content: Any, name: str, path: Path, columns: Mapping[str, str], tokenizer: Tokenizer | None
) -> Template:
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
    fields: Mapping[str, str], name: str, path: Path, columns: Mapping[str, str], tokenizer: Tokenizer | None
) -> TaskTemplate:
    for key in ("question", "answer"):
        try:
            names = _placeholders(fields[key])
        except ValueError as error:
            raise UserError(
                f"template {path}: {key} may contain {{NAME}} for a column, other braces doubled: {error}"
            ) from None
        if not names:
            raise UserError(f"template {path}: {key} must contain the name of a column in braces")
    inner = load_template(fields["frame"], tokenizer)
    if not isinstance(inner, (ConversationTemplate, ChatTemplate)):
        raise UserError(
            f"template {path}: frame {fields['frame']!r} is not a conversation; choose e.g. scimind or chat"
        )
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
    """The template name that `auto` stands for; see `explain_choice`."""
    return explain_choice([record], tokenizer, columns)[0]


def explain_choice(
    records: Sequence[Record], tokenizer: Tokenizer, columns: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """The template name that `auto` stands for, by the columns of a source's first records, and why.

    A question with its answer goes before a rendered text: Alpaca's own files have both, and the text holds the prompt.

    Raises:
        UserError: for columns that no template goes with.
    """
    columns = columns or {}
    named = {
        name: columns.get(name, name) for name in ("text", "instruction", "output", "messages", "system", "history")
    }
    holding = {column for record in records for column, value in record.data.items() if not is_empty(value)}
    # Records may be empty where a template is to say so; then the columns alone decide.
    there = {name for name, column in named.items() if column in holding}
    chats = [name for name in CONVERSATION_COLUMNS if name in holding]
    if not there & {"text", "instruction", "messages"} and not chats:
        holding = {column for record in records for column in record.data}
        there = {name for name, column in named.items() if column in holding}
        chats = [name for name in CONVERSATION_COLUMNS if name in holding]
    chat = "chat" if tokenizer.chat_template is not None else "vicuna_v1.1"
    own = "the tokenizer has a chat template" if chat == "chat" else "the tokenizer has no chat template"
    beside = f"; column {named['text']!r} is not used" if "text" in there else ""
    if "messages" in there or "conversations" in chats:
        column = named["messages"] if "messages" in there else "conversations"
        return chat, f"column {column!r}, and {own}{beside}"
    if "conversation" in chats:
        return "scimind", f"column 'conversation'{beside}"
    if "instruction" in there and ("output" in there or "text" not in there):
        both = f"columns {named['instruction']!r} and {named['output']!r}"
        turns = [named[name] for name in ("history", "system") if name in there]
        if turns:
            return chat, f"{both}, with {' and '.join(map(repr, turns))}, and {own}{beside}"
        return "alpaca", (both if "output" in there else f"column {named['instruction']!r}") + beside
    if "text" in there:
        return "text", f"column {named['text']!r}"
    for name in ("chosen", "completion"):
        column = columns.get(name, name)
        value = next((record.data[column] for record in records if not is_empty(record.data.get(column))), None)
        if value is not None:  # preferences: texts as they stand, or conversations
            return ("text", f"column {column!r}") if isinstance(value, str) else (chat, f"column {column!r}, and {own}")
    raise UserError(
        f"data: {records[0].name}: no template goes by itself with the columns "
        f"{', '.join(map(str, records[0].data)) or 'none'}; set template, and columns if they are "
        "named otherwise, e.g. columns: {instruction: question, output: answer}"
    )
