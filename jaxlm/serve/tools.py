"""Calls of tools: which form a model's chat template teaches, and the calls in what it writes."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Sequence
from typing import Any, Literal

from jaxlm.jsontext import parse_at
from jaxlm.serve.bodies import ChatBody, NamedTool, Tool
from jaxlm.serve.problems import Problem
from jaxlm.serve.served import Served

# tagged: <tool_call>{"name", "arguments"}</tool_call>, as Hermes and Qwen write; bare: an answer that is
# {"name", "parameters"}, as LLaMA 3 writes.
Form = Literal["tagged", "bare"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"


def offered(body: ChatBody) -> Sequence[Tool]:
    """The tools that an answer may call.

    Raises:
        Problem: the choice does not fit the tools.
    """
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise Problem("tools: two of them have the same name", param="tools")
    if not body.tools and body.tool_choice != "auto" and body.tool_choice != "none":
        raise Problem("tool_choice: there are no tools; give tools too", param="tool_choice")
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
        name = body.tool_choice.function.name
        raise Problem(f"tool_choice: {name!r} is not one of the tools {', '.join(names)}", param="tool_choice")
    if body.tool_choice == "auto" and any(tool.function.strict for tool in body.tools):
        raise Problem(
            "tools: strict holds where a call is certain; set tool_choice to required or to a tool, or strict to false",
            param="tools",
        )
    return () if body.tool_choice == "none" else body.tools


def call_form(served: Served, body: ChatBody) -> Form:
    """How the model's chat template lets it call.

    Raises:
        Problem: it shows no tools, or calls in a form that is not known here.
    """
    template = served.tokenizer.chat_template or ""
    prompter = served.prompter(served.adapter(body.model))
    if prompter.name != "chat" or "tools" not in template:
        raise Problem(f"tools: the template {prompter.name} of {served.name} has no place for them", param="tools")
    if OPEN in template and served.tokenizer.id_of(OPEN) not in served.tokenizer.special_ids:
        return "tagged"
    if '"parameters"' in template or '"parameters\\"' in template:
        return "bare"
    raise Problem(
        f"tools: the chat template of {served.name} lets it call in a form that is not read here; there are "
        f'{OPEN}{{"name", "arguments"}}{CLOSE} (Hermes, Qwen) and {{"name", "parameters"}} (LLaMA 3)',
        param="tools",
    )


@dataclasses.dataclass
class CallReader:
    """Takes the calls out of an answer's text.

    Args:
        form: None: there are none.
        tools: what can be called; what looks like a call of anything else stays text.
    """

    form: Form | None
    tools: Sequence[Tool]
    _held: str = ""
    _is_bare: bool | None = None
    # White space around calls is the template's, not the model's words: kept back where nothing is said yet.
    _quiet: Literal["begins", "called", ""] = "begins"

    def read(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """What is said, and the calls that are complete, behind new text.

        Args:
            last: nothing follows.
        """
        if self.form is None:
            return text, []
        self._held += text
        return self._tagged(last) if self.form == "tagged" else self._bare(last)

    def _tagged(self, last: bool) -> tuple[str, list[dict[str, Any]]]:
        said, calls = "", list[dict[str, Any]]()
        while True:
            before, mark, behind = self._held.partition(OPEN)
            inside, closed, rest = behind.partition(CLOSE)
            if not mark:
                sizes = (size for size in range(1, len(OPEN)) if before.endswith(OPEN[:size]))
                size = 0 if last else max(sizes, default=0)
                before, rest = before[: len(before) - size], before[len(before) - size :]
                if self._quiet and not before.strip() and not (last and self._quiet == "begins"):
                    before, rest = "", "" if last else before + rest
            elif self._quiet and not before.strip():
                before = ""
            said += before
            self._quiet = "" if before else self._quiet
            if not mark or not (closed or last):
                self._held = OPEN + behind if mark else rest
                return said, calls
            self._held = rest
            call = self._call(inside, "arguments")
            if call is None:
                said, self._quiet = said + OPEN + inside + closed, ""
            else:
                calls.append(call)
                self._quiet = "called"

    def _bare(self, last: bool) -> tuple[str, list[dict[str, Any]]]:
        start = self._held.lstrip()
        if self._is_bare is None and start:
            self._is_bare = start.startswith("{")
        if self._is_bare and not last:
            return "", []
        said, self._held = self._held, ""
        calls = []
        while self._is_bare and start:
            try:
                _, end = parse_at(start, 0)
            except ValueError:
                return said, []
            call = self._call(start[:end], "parameters")
            if call is None:
                return said, []
            calls.append(call)
            start = start[end:].lstrip(" ;\n")
        return ("", calls) if calls else (said, [])

    def _call(self, text: str, key: str) -> dict[str, Any] | None:
        """OpenAI's object for a call; None for what is not one."""
        try:
            value, end = parse_at(text.strip(), 0)
        except ValueError:
            return None
        whole = isinstance(value, dict) and end == len(text.strip())
        if not whole or value.get("name") not in [tool.function.name for tool in self.tools]:
            return None
        arguments = value.get(key, value.get("arguments", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": value["name"], "arguments": written}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
