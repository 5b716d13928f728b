"""From what a user asks to the tokens that a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.data.chat import ChatTemplate
from jaxlm.data.encoding import prompt_ids
from jaxlm.data.messages import read_messages
from jaxlm.data.records import Record
from jaxlm.data.rendering import Template
from jaxlm.data.templates import ConversationTemplate, TaskTemplate, load_template
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

# A record may hold its question under one of these names, if the template's own column is not there.
QUESTIONS = ("prompt", "question")


class Prompter:
    """Prompts by one template.

    Args:
        template: a template name or JSON file (see `data.templates`).
        tokenizer: the model's.
        columns: the template's field names mapped to those of the records.
        add_bos: begin with bos unless the template does; None: if the tokenizer itself does.
        system: system message of a conversation.
        add_eos: earlier answers of a conversation end with eos; None: if the tokenizer has one.
        for_encoder: an encoder reads the prompts, which end with eos.

    Raises:
        UserError: for an unknown template, or a system message that the template has no place for.
    """

    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        columns: Mapping[str, str] | None = None,
        add_bos: bool | None = None,
        system: str | None = None,
        add_eos: bool | None = None,
        for_encoder: bool = False,
    ) -> None:
        self._columns = dict(columns or {})
        self._template: Template = load_template(template, tokenizer, self._columns)
        self.tokenizer = tokenizer
        self._bos_because = tokenizer.adds_why if add_bos is None else "as in training, or by add_bos"
        self._add_bos = tokenizer.adds_bos if add_bos is None else add_bos
        self._add_eos, self._for_encoder = add_eos, for_encoder
        self._asks_for = self._template.asks_for if isinstance(self._template, TaskTemplate) else ()
        self.takes_turns = isinstance(self._template, (ChatTemplate, ConversationTemplate))
        self.system: str | None = None
        self.set_system(system)

    @property
    def beginning(self) -> str:
        """What a prompt begins with (or ends, to open the answer), and what says so; for a start-up line."""
        if isinstance(self._template, ChatTemplate):
            return "bos as the template writes it"
        opening = "".join(map(self.tokenizer.token, self.tokenizer.opening))
        if self._add_bos and self.tokenizer.opens_answers:
            return f"{opening} behind it ({self._bos_because})"
        return f"{f'bos {opening}' if self._add_bos else 'no bos'} first ({self._bos_because})"

    @property
    def name(self) -> str:
        """The template's."""
        return self._template.name

    @property
    def adds_bos(self) -> bool:
        """Whether bos stands in front of what is asked, unless the template writes it."""
        return self._add_bos

    @property
    def is_text(self) -> bool:
        """The prompt is continued as it stands."""
        return self._template.name == "text"

    def set_system(self, text: str | None) -> None:
        """Changes the system message."""
        if text is not None and not self.takes_turns:
            raise UserError(
                f"system: the template {self._template.name} has no place for a system message; "
                "use one for conversations, e.g. --template chat"
            )
        self.system = text

    def question(self, text: str, extra: str | None = None, name: str = "the prompt") -> list[int]:
        """Tokens of a single question; `extra` goes where the template has a place for an input.

        Raises:
            UserError: for an empty question, or an input that the template would not show.
        """
        if not text.strip():
            raise UserError(f"{name} is empty: there is nothing to answer")
        if self.takes_turns and extra is None:
            return self.turns([{"role": "user", "content": text}], name)
        # Whatever the template reads, it finds the question.
        fields: dict[str, Any] = {"instruction": text, "text": text, **dict.fromkeys(self._asks_for, text)}
        if extra is not None:
            if self.is_text:
                raise UserError("input: the template text has no place for it; put all of it into the prompt")
            fields["input"] = extra
        return self._ids(Record(name, {self._columns.get(key, key): value for key, value in fields.items()}))

    def turns(self, messages: Sequence[Mapping[str, str]], name: str = "the conversation") -> list[int]:
        """Tokens of a conversation that ends with a question: [{"role", "content"}, ...]."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self._ids(Record(name, {self._columns.get("messages", "messages"): [*first, *messages]}))

    def record(self, record: Record) -> list[int]:
        """Tokens of a record of a file, up to where its answer begins."""
        conversation = ("instruction", "messages", "conversations", "conversation")
        fields = self._asks_for or (("text",) if self.is_text else conversation)
        known = {self._columns.get(field, field) for field in fields}
        if not known & record.data.keys():
            for key in QUESTIONS:
                if isinstance(record.data.get(key), str):
                    return self.question(record.data[key], record.data.get("input") or None, record.name)
        if self.takes_turns and self.system is not None:
            raise UserError(f"{record.name}: system: the records' own messages are used; put the system message there")
        self._check_question(record)
        return self._ids(record)

    def _check_question(self, record: Record) -> None:
        """Refuses a record that asks nothing."""
        if self.takes_turns:
            tools = isinstance(self._template, ChatTemplate)
            messages = read_messages(record, self._columns, self._template.name, tools)
            # What a tool answered asks for the next turn as well as a question does.
            asked = [message.content for message in messages if message.role in ("user", "tool")]
            text = asked[-1] if asked else ""
        else:
            field = "text" if self.is_text else (*self._asks_for, "instruction")[0]
            column = self._columns.get(field, field)
            if column not in record.data:
                names = ", ".join(map(repr, record.data)) or "none"
                raise UserError(
                    f"{record.name} has no column {column!r}, which the template {self._template.name} asks by; it has "
                    f"{names}; set columns: {{{field}: NAME}}, or another template"
                )
            text = str(record.data[column] or "")
        if not text.strip():
            raise UserError(f"{record.name} is empty: there is nothing to answer")

    def _ids(self, record: Record) -> list[int]:
        return prompt_ids(self._template, record, self.tokenizer, self._add_bos, self._add_eos, self._for_encoder)
