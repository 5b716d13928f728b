"""Answers that must be JSON, by llguidance: the tokens that a grammar allows next, as bits."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import numpy as np

from jaxlm.errors import UserError
from jaxlm.inference.paged.requests import Constraint
from jaxlm.serve.bodies import ChatBody, NamedTool, Tool
from jaxlm.serve.problems import Problem
from jaxlm.serve.served import Served
from jaxlm.serve.tokens import Spelling
from jaxlm.serve.tools import CLOSE, OPEN, Form

# Models that may write white space for ever do so.
_WHITE = {"whitespace_pattern": r"[ \n]{1,16}"}
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Grammars:
    """Makes grammars for a model's tokens; `constraint` may take a second, and may be called in any thread."""

    def __init__(self, served: Served, spelling: Spelling) -> None:
        self._served, self._spelling = served, spelling
        self._lock = threading.Lock()
        self._tokens: Any = None

    def constraint(self, body: ChatBody, tools: Sequence[Tool], form: Form | None) -> Callable[[], Constraint] | None:
        """What an answer must be; None: anything.

        Raises:
            Problem: a schema that cannot be followed.
        """
        param, grammar = "response_format", None
        wanted = body.response_format
        if wanted is not None and wanted.type != "text":
            if (wanted.type == "json_schema") != (wanted.json_schema is not None):
                raise Problem("response_format: json_schema goes with the type json_schema", param=param)
            schema = {} if wanted.json_schema is None else wanted.json_schema.schema
            grammar = f"start: %json {_limited(schema)}"
        if tools and body.tool_choice != "auto":
            if grammar is not None:
                raise Problem("response_format: it does not go with a tool_choice that demands a call", param=param)
            param, grammar = "tools", _of_calls(body, tools, form)
        if grammar is None:
            return None
        first = self._matcher(grammar, param)
        words = (self._served.vocab_size + 31) // 32
        return lambda: _Follower(first.deep_copy(), words, frozenset(self._served.stop_ids), param)

    def _matcher(self, grammar: str, param: str) -> Any:
        with self._lock:
            if self._tokens is None:
                self._tokens = self._tokenizer()
        matcher = llguidance.LLMatcher(self._tokens, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise Problem(_why(matcher, param), param=param)
        return matcher

    def _tokenizer(self) -> Any:
        served = self._served
        if not served.stop_ids:
            raise Problem(f"response_format: {served.name} has no token that ends an answer", param="response_format")
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(served, self._spelling)),
            n_vocab=served.vocab_size,
            eos_token=sorted(served.stop_ids),
        )


def _limited(schema: dict[str, Any]) -> str:
    return json.dumps({**(schema or {"type": "object"}), "x-guidance": _WHITE}, ensure_ascii=True)


def _of_calls(body: ChatBody, tools: Sequence[Tool], form: Form | None) -> str:
    """A grammar of one call of one of the tools, or of the one that is named."""
    choice = body.tool_choice
    rules, names = [], []
    for number, tool in enumerate(tools):
        name = tool.function.name
        if not _NAME.fullmatch(name):
            raise Problem(f"tools: the name {name!r} must be letters, digits, _, . and -, at most 64", param="tools")
        if isinstance(choice, NamedTool) and name != choice.function.name:
            continue
        key = "arguments" if form == "tagged" else "parameters"
        beginning = json.dumps(f'{{"name": "{name}", "{key}": ')
        rules += [
            f'call{number}: {beginning} json{number} "}}"',
            f"json{number}: %json {_limited(tool.function.parameters)}",
        ]
        names.append(f"call{number}")
    opening, closing = (json.dumps(f"{OPEN}\n"), json.dumps(f"\n{CLOSE}")) if form == "tagged" else ("", "")
    return "\n".join([f"start: {opening} call {closing}", f"call: {' | '.join(names)}", *rules])


class _Tokens:
    """A vocabulary as llguidance asks for it."""

    def __init__(self, served: Served, spelling: Spelling) -> None:
        self.eos_token_id, self.bos_token_id = served.stop_ids[0], served.tokenizer.bos_id
        self.tokens = [spelling.spelled(index) for index in range(served.vocab_size)]
        self.special_token_ids = sorted({*served.tokenizer.special_ids, *served.stop_ids})
        special = frozenset(self.special_token_ids)
        self._ids = {text: index for index, text in enumerate(self.tokens) if text and index not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of what a grammar demands next: the longest first. Others that spell the same stay allowed.

        The tokenizer itself is not asked: it puts a space in front of a text, and this is the engine's thread.
        """
        ids, at = [], 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._ids), 0)
            if not size:
                break  # the vocabulary cannot write it; llguidance sees that
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids


def _why(matcher: Any, param: str) -> str:
    """What is wrong with the grammar of a matcher that has an error."""
    lines = [line for line in matcher.get_error().splitlines() if line.strip()]
    return f"{param}: the schema cannot be followed: {lines[0] if lines else ''}"


class _Follower:
    """One answer's place in a grammar.

    A schema may outgrow the matcher's limits behind any token, e.g. where thousands of properties may come next.
    """

    def __init__(self, matcher: Any, words: int, stop_ids: frozenset[int], param: str) -> None:
        self._matcher, self._words, self._stop_ids, self._param = matcher, words, stop_ids, param

    def allowed(self) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        assert mask.shape == (self._words,), (mask.shape, self._words)
        return mask

    def accept(self, token: int) -> None:
        if token not in self._stop_ids:
            consumed = self._matcher.consume_token(token)
            self._check()
            assert consumed, f"token {token} was not allowed"

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(_why(self._matcher, self._param))
