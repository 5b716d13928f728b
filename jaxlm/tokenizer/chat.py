"""Chat templates: Jinja out of a downloaded file, in a sandbox."""

from __future__ import annotations

import functools
import json
from typing import Any

from jaxlm.errors import UserError

# Unicode noncharacters: no text holds them, so they can mark places in a rendered chat.
MARK_BEGIN, MARK_END = "\ufdd0", "\ufdd1"


class ChatError(UserError):
    """A chat template does not take a conversation; which one, whoever reads records says."""


@functools.cache
def compile_chat_template(source: str) -> Any:
    """The Jinja template of a chat template, in a sandbox with what Hugging Face offers to templates.

    A chat template is code out of a downloaded file: the immutable sandbox keeps it from touching anything.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.ext import loopcontrols as loop_controls
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  (the attribute that Jinja reads)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{MARK_BEGIN}{caller()}{MARK_END}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        # Jinja's own filter escapes HTML, which would put \u003c into prompts.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loop_controls]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
