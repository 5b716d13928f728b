"""What a record holds: its text fields, and its conversation."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxlm.data.records import Record
from jaxlm.errors import UserError
from jaxlm.jsontext import parse

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
# What a tool answered; only a chat template has a place for it.
TOOL_ROLES = {"tool": "tool", "function": "tool", "observation": "tool"}
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
# Keys of a message that are read here: names of its role, of its text, and whether it is trained.
ROLE_KEYS, TEXT_KEYS, WEIGHT_KEYS = ("role", "from"), ("content", "value"), ("weight", "train", "training")
# What str() writes as a person would.
_WRITTEN_OUT = (int, float, decimal.Decimal, datetime.date, datetime.time)


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Args:
        role: system, user, assistant or tool.
        content: its text.
        trained: an assistant's message is trained.
        extra: what else it holds (tool_calls, name, ...), for chat templates.
    """

    role: str
    content: str
    trained: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, NaN, no or blank text, an empty list or object."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip()) or (value != 0 and not value)


def text_field(record: Record, name: str, columns: Mapping[str, str], template: str, default: str | None = None) -> str:
    """A text field of the record; numbers and dates are written out.

    Args:
        record: the record.
        name: the template's name of the field.
        columns: the template's field names mapped to those of the record.
        template: for messages.
        default: stands for null, and for an absent column that `columns` does not name.

    Raises:
        UserError: for a field that is missing, null without a default, or not a text.
    """
    column = columns.get(name, name)
    if column not in record.data and (default is None or name in columns):
        raise UserError(
            f"data: {record.name} has no column {column!r}, which the template {template} needs; columns found: "
            f"{', '.join(map(str, record.data)) or 'none'}. Choose another template, or name the column: "
            f"columns: {{{name}: NAME}}"
        )
    value = record.data.get(column)
    if value is None:
        if default is not None:
            return default
        raise UserError(
            f"data: {record.name}: its column {column!r} is null, and the template {template} needs a text there; "
            "fill it in, or leave the record out"
        )
    return written_out(record, value, f"column {column!r}", f"; another column: columns: {{{name}: NAME}}")


def written_out(record: Record, value: Any, where: str, way_out: str = "") -> str:
    """A value as text.

    Raises:
        UserError: for what is neither text nor number nor date.
    """
    if isinstance(value, str):
        return checked(record, value)
    if isinstance(value, bool) or not isinstance(value, _WRITTEN_OUT) or not _finite(value):
        kind = repr(value) if isinstance(value, (bool, float)) else "null" if value is None else _kind(value)
        raise UserError(f"data: {record.name} has {kind} in {where}, where a text is needed; write it out{way_out}")
    return str(value)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _finite(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, (float, decimal.Decimal)) else True


def checked(record: Record, text: str) -> str:
    """The text, unless it holds half of a character: JSON can say "\\ud83d", and no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"data: {record.name} holds an incomplete Unicode character (a lone surrogate) "
            f"after {text[max(0, error.start - 20) : error.start]!r}; repair or remove the record"
        ) from None
    return text


def messages_column(record: Record, columns: Mapping[str, str]) -> str | None:
    """The column that holds the conversation, or None when there is none."""
    return columns.get("messages") or next((c for c in CONVERSATION_COLUMNS if record.data.get(c) is not None), None)


def read_messages(record: Record, columns: Mapping[str, str], template: str, tools: bool = False) -> list[Message]:
    """The conversation of a record.

    Read from `messages` (role, content), `conversations` or SciMind's `conversation` (from, value), or from Alpaca's
    columns: instruction and input, with an empty line between, are the question; `history`, a list of [question,
    answer], comes before. A column `system` is the system message. An assistant's message with `weight: 0` or
    `train: false` is not trained.

    Args:
        record: the record.
        columns: the template's field names mapped to those of the record.
        template: for messages to the user.
        tools: take also what tools answer, and messages that call them.

    Raises:
        UserError: for what is not a conversation.
    """
    name = messages_column(record, columns)
    if name is None and columns.get("instruction", "instruction") in record.data:
        messages = _from_alpaca(record, columns, template)
    else:
        turns = record.data.get(name) if name else None
        if isinstance(turns, str) and turns.lstrip().startswith("["):  # as CSV has it
            with contextlib.suppress(ValueError):
                turns = parse(turns)
        if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)) or not turns:
            _refuse_column(record, columns, turns)
            raise UserError(
                f"data: {record.name}: the template {template} needs a list of messages in one of the columns "
                f"{', '.join(CONVERSATION_COLUMNS)}; columns found: {', '.join(map(str, record.data)) or 'none'}. "
                "Choose another template, or name the column: columns: {messages: NAME}"
            )
        messages = [_message(record, number, turn, template, tools) for number, turn in enumerate(turns, 1)]
    return _with_system(record, columns, template, messages)


def _refuse_column(record: Record, columns: Mapping[str, str], turns: Any) -> None:
    """Raises UserError when the column of the conversation is there, but holds none."""
    names = (columns["messages"],) if "messages" in columns else CONVERSATION_COLUMNS
    column = next((name for name in names if name in record.data), None)
    if column is None:
        return
    if is_empty(turns):
        state = "is null" if turns is None else "is empty"
        raise UserError(
            f"data: {record.name}: its column {column!r} {state}, so there is nothing to learn from it; fill it in, or "
            "leave the record out"
        )
    raise UserError(
        f"data: {record.name}: its column {column!r} must be a list of messages, "
        f'[{{"role": "user", "content": …}}, …], or that as JSON text; found {turns!r:.60}'
    )


def _with_system(record: Record, columns: Mapping[str, str], template: str, messages: list[Message]) -> list[Message]:
    column = columns.get("system", "system")
    if "system" not in columns and is_empty(record.data.get(column)):
        return messages
    system = text_field(record, "system", columns, template, default="")
    if not system.strip():
        return messages
    if messages[0].role != "system":
        return [Message("system", system), *messages]
    if messages[0].content.strip() != system.strip():
        raise UserError(
            f"data: {record.name}: the column {column!r} and the first message are two different system messages; "
            "take one of them out"
        )
    return messages


def _from_alpaca(record: Record, columns: Mapping[str, str], template: str) -> list[Message]:
    messages: list[Message] = []
    column = columns.get("history", "history")
    history = record.data.get(column)
    if not is_empty(history):
        if not isinstance(history, Sequence) or isinstance(history, str):
            raise UserError(f"data: {record.name}: column {column!r} must be a list of [question, answer]")
        for number, pair in enumerate(history, 1):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise UserError(
                    f"data: {record.name}: entry {number} of column {column!r} must be [question, answer], found "
                    f"{pair!r:.60}"
                )
            if all(map(is_empty, pair)):  # as some exports fill up what is not there
                continue
            texts = [written_out(record, item, f"entry {number} of column {column!r}") for item in pair]
            messages += [Message("user", texts[0]), Message("assistant", texts[1])]
    question = text_field(record, "instruction", columns, template)
    extra = text_field(record, "input", columns, template, default="")
    messages.append(Message("user", question + (f"\n\n{extra}" if extra else "")))
    output = columns.get("output", "output")
    answer = record.data.get(output)
    if answer is not None:
        messages.append(Message("assistant", written_out(record, answer, f"column {output!r}")))
    return messages


def _message(record: Record, number: int, turn: Any, template: str, tools: bool) -> Message:
    roles = {**ROLES, **TOOL_ROLES} if tools else ROLES
    fields = turn if isinstance(turn, Mapping) else {}
    if tools:
        fields = _with_calls(record, number, fields)
    role = next((fields[key] for key in ROLE_KEYS if fields.get(key) is not None), None)
    content = next((fields[key] for key in TEXT_KEYS if fields.get(key) is not None), None)
    calls = not is_empty(fields.get("tool_calls"))
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = _joined_parts(record, number, content)
    if not isinstance(role, str) or role not in roles or not (isinstance(content, str) or (calls and content is None)):
        raise UserError(
            f"data: {record.name}: message {number} must have a role ({', '.join(roles)}) and a text content, "
            f"found role {role!r} and content of type {type(content).__name__}"
        )
    if calls and not tools and not (content or "").strip():
        raise UserError(
            f"data: {record.name}: message {number} has no text but tool_calls, which the template {template} cannot "
            "write; use the template chat with a tokenizer whose chat template shows them"
        )
    known = {*ROLE_KEYS, *TEXT_KEYS, *WEIGHT_KEYS}
    extra = {key: value for key, value in fields.items() if key not in known and not is_empty(value)}
    if content is None:
        extra["content"] = None  # templates tell it from an empty text
    trained = all(_flag(record, number, key, fields[key]) for key in WEIGHT_KEYS if fields.get(key) is not None)
    return Message(roles[role], checked(record, content or ""), trained, extra)


def _with_calls(record: Record, number: int, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message in which older ways to write a tool call have become `tool_calls`.

    These are ShareGPT's role function_call, whose value is JSON, and OpenAI's first key function_call.
    """
    called: Any = None
    message = dict(fields)
    if any(fields.get(key) == "function_call" for key in ROLE_KEYS):
        text = next((fields[key] for key in TEXT_KEYS if isinstance(fields.get(key), str)), "")
        try:
            called = parse(text)
        except ValueError:
            called = text
        message = {key: value for key, value in fields.items() if key not in (*ROLE_KEYS, *TEXT_KEYS)} | {"role": "gpt"}
    elif not is_empty(fields.get("function_call")):
        called = message.pop("function_call")
    else:
        return fields
    calls = called if isinstance(called, list) else [called]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(
            f'data: {record.name}: message {number} must call a function as {{"name": …, "arguments": …}}, found '
            f"{called!r:.60}"
        )
    return message | {"tool_calls": [{"type": "function", "function": dict(call)} for call in calls]}


def _joined_parts(record: Record, number: int, parts: Sequence[Any]) -> str:
    """The text of a content in parts, as today's interfaces write it: [{"type": "text", "text": …}]."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"data: {record.name}: message {number} has a part of type {kind!r}; only text is trained")
        texts.append(text)
    return "".join(texts)


def _flag(record: Record, number: int, key: str, value: Any) -> bool:
    if value not in (0, 1):
        raise UserError(
            f"data: {record.name}: {key} of message {number} is {value!r}; it must be 1 (or true: trained) or 0 (or "
            "false: not trained)"
        )
    return bool(value)


def read_tools(record: Record, columns: Mapping[str, str]) -> list[Any] | None:
    """The column `tools`: descriptions of tools, as a list or as JSON text.

    Raises:
        UserError: for anything else.
    """
    column = columns.get("tools", "tools")
    value = record.data.get(column)
    if is_empty(value):
        return None
    if isinstance(value, str):
        try:
            value = parse(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise UserError(f"data: {record.name}: column {column!r} must hold a list of tools, or one as JSON text")
    return value or None


def columns_read(record: Record, columns: Mapping[str, str]) -> frozenset[str]:
    """The columns and keys of messages that `read_messages` reads, as `Template.used` says them."""
    column = messages_column(record, columns)
    used = {columns.get("system", "system")}
    if column is None:
        return frozenset(used | {columns.get(name, name) for name in ("instruction", "input", "output", "history")})
    keys = [*ROLE_KEYS, *TEXT_KEYS, *WEIGHT_KEYS]
    return frozenset(used | {column} | {f"{column}[].{key}" for key in keys})


def without_answer(messages: list[Message]) -> list[Message]:
    """All but the answer at the end."""
    return messages[:-1] if messages[-1].role == "assistant" else messages


def refuse_without_answer(record: Record, messages: list[Message], columns: Mapping[str, str]) -> None:
    """Raises UserError for a conversation in which the assistant says nothing."""
    if any(message.role == "assistant" for message in messages):
        return
    output = columns.get("output", "output")
    if messages_column(record, columns) is None and output in record.data:
        raise UserError(
            f"data: {record.name}: its column {output!r} is null, so there is nothing to learn from it; fill it in, or "
            "leave the record out"
        )
    raise UserError(f"data: {record.name} has no message of the assistant, so there is nothing to learn from it")


def unused(record: Record, used: frozenset[str]) -> list[str]:
    """What holds something in the record and is not in `used`: columns, and keys of messages as `messages[].name`."""
    names = [name for name, value in record.data.items() if name not in used and not is_empty(value)]
    for name in used & record.data.keys():
        turns = record.data[name]
        if isinstance(turns, list) and turns and f"{name}[].{ROLE_KEYS[0]}" in used:
            keys = {key for turn in turns if isinstance(turn, Mapping) for key, v in turn.items() if not is_empty(v)}
            names += [f"{name}[].{key}" for key in sorted(keys) if f"{name}[].{key}" not in used]
    return [str(name) for name in names]
