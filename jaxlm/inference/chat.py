"""A conversation in the terminal: answers appear as they are written, settings change while it runs."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import yaml

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.engine import Answer, Engine
from jaxlm.inference.generator import Generator, Session
from jaxlm.inference.options import check_decoding
from jaxlm.inference.prompts import Prompter
from jaxlm.inference.text import TextStream, answer_text, cut_at_stop

HELP = """/reset              forget the conversation
/set KEY VALUE      change a setting, e.g. /set temperature 0.7
/show               the settings
/system TEXT        system message (begins a new conversation); without TEXT none
/exit               leave (also exit, quit and Ctrl-D); Ctrl-C ends an answer
A line that ends in \\ goes on in the next."""
# Typed alone on a line these end a conversation, as they do in every other shell.
LEAVE = ("/exit", "/quit", "exit", "quit", "exit()", "quit()")
# Few tokens between two looks, so that text flows.
FLUSH = 4


def stream_answer(session: Session, prompter: Prompter, options: Decoding, show: Callable[[str], None]) -> Answer:
    """Runs a session of one prompt, showing its first answer piece by piece; returns it."""
    stream = TextStream(prompter.tokenizer, session.beginnings[0], options.stop)
    strip = not prompter.is_text
    shown = ""
    answer: Answer | None = None

    def update(last: bool) -> bool:
        nonlocal shown, answer
        answer = session.answers()[0][0]
        new, stopped = stream.update(answer.ids, last)
        if strip and not shown:
            new = new.lstrip()
        shown += new
        show(new)
        return stopped

    for _ in session.steps():
        if options.num_beams > 1:
            continue  # the best beam is known at the end
        if update(False):
            session.stop(0)
    update(True)
    assert answer is not None
    return answer


class Chat:
    """A conversation.

    Args:
        read: returns the next line that is typed; raises EOFError at the end.
        show: writes text as it comes, without a line end.
        say: writes a line about the conversation, not of it.
    """

    def __init__(
        self,
        generator: Generator,
        prompter: Prompter,
        options: Decoding,
        read: Callable[[], str],
        show: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        check_single(options)
        self._generator, self._prompter, self._options = generator, prompter, options
        self._read, self._show, self._say = read, show, say
        self._forget()
        self._turn = 0

    def _forget(self) -> None:
        self._messages: list[dict[str, str]] = []
        self._engine = self._new_engine()

    def _new_engine(self) -> Engine:
        """One row, which keeps the conversation, so that only what is new in the next prompt is read."""
        return Engine(self._generator, 1, keep=True)

    def run(self) -> None:
        """Until /exit (or one of LEAVE) or the end of the input."""
        leaving = False
        while True:
            try:
                line = self._read()
                while line.endswith("\\"):
                    line = f"{line[:-1]}\n{self._read()}"
            except EOFError:
                self._show("\n")
                return
            except KeyboardInterrupt:  # pressed a moment after the answer had ended, it must not end all
                if leaving:
                    return
                leaving = True
                self._show("\n")
                self._say("Ctrl-C again or Ctrl-D leaves")
                continue
            leaving = False
            if line.strip().lower() in LEAVE:
                return
            try:
                if line.startswith("/"):
                    self._command(*line[1:].strip().partition(" ")[::2])
                elif line.strip():
                    self._answer(line)
            except UserError as error:
                self._say(str(error))

    def _answer(self, question: str) -> None:
        turn = {"role": "user", "content": question}
        if self._prompter.takes_turns:
            ids = self._prompter.turns([*self._messages, turn])
        else:
            ids = self._prompter.question(question)
        try:
            self._generator.check_prompt(ids, "the conversation")
        except UserError as error:
            hint = "; /reset begins a new one" if self._messages else ""
            raise UserError(f"{error}{hint}") from None
        session = self._generator.start([ids], self._options, [self._turn], FLUSH, engine=self._engine)
        try:
            answer = stream_answer(session, self._prompter, self._options, self._show)
        except KeyboardInterrupt:
            # The state of what the devices hold of it is unknown; the conversation goes on without it.
            self._engine = self._new_engine()
            self._show("\n")
            self._say("stopped; this turn is not part of the conversation")
            return
        self._show("\n")
        if answer.finish != "stop":
            limit = "max_new_tokens" if answer.finish == "length" else "the model's context"
            self._say(f"the answer ends here because of {limit}")
        self._turn += 1
        if self._prompter.takes_turns:
            text = cut_at_stop(
                answer_text(self._prompter.tokenizer, self._generator.beginning(ids), answer.ids), self._options.stop
            )[0]
            self._messages += [turn, {"role": "assistant", "content": text.strip()}]

    def _command(self, name: str, rest: str) -> None:
        rest = rest.strip()
        if name == "help":
            self._say(HELP)
        elif name == "reset":
            self._forget()
            self._say("a new conversation")
        elif name == "show":
            values = dataclasses.asdict(self._options)
            self._say("\n".join(f"{key} {value}" for key, value in values.items()))
        elif name == "system":
            self._prompter.set_system(rest or None)
            self._forget()
            self._say("a new conversation")
        elif name == "set":
            self._options = with_setting(self._options, *rest.partition(" ")[::2])
            self._say(f"{rest.partition(' ')[0]} {getattr(self._options, rest.partition(' ')[0])}")
        else:
            self._say(f"/{name} is unknown\n{HELP}")


def with_setting(options: Decoding, key: str, value: str) -> Decoding:
    """The options with one changed, as `/set KEY VALUE` says.

    Raises:
        UserError: for an unknown key, or a value of another kind or out of range.
    """
    hints = typing.get_type_hints(Decoding)
    if key not in hints:
        raise UserError(f"/set: {key!r} is none of {', '.join(hints)}")
    try:
        # A text is taken as it stands: YAML would see a comment in ###.
        is_text = hints[key] == tuple[str, ...] and not value.startswith("[")
        parsed: Any = value if is_text else float(value) if hints[key] is float else yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        parsed = None
    kind = hints[key]
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        values = parsed if isinstance(parsed, list) else [] if parsed in (None, "") else [parsed]
        fits = all(type(item) is inner for item in values)
        parsed = tuple(values)
    elif kind in (int, float):
        fits = type(parsed) is kind
    else:  # early_stopping
        fits = isinstance(parsed, bool) or parsed == "never"
    if not fits:
        raise UserError(f"/set: {key} cannot be {value!r}; it is {getattr(options, key)!r}")
    changed = dataclasses.replace(options, **{key: parsed})
    check_decoding(changed)
    check_single(changed)
    return changed


def check_single(options: Decoding) -> None:
    """Raises UserError when there would be several answers to a turn."""
    if options.samples != 1:
        raise UserError(f"samples: {options.samples} answers to a turn; a conversation goes on with one")
