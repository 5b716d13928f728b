"""Bodies of requests: frozen dataclasses whose fields are OpenAI's, with those that vLLM adds.

A field that is not here is refused by name, since nothing would be done with it. null stands for a field left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeVar

from jaxlm.fields import Reader, alternatives, field_types, is_required, shown
from jaxlm.jsonfields import described, is_of
from jaxlm.serve.problems import Problem

T = TypeVar("T")

Bias = dict[str, float]
Effort = Literal["auto", "none", "required"]


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """include_usage: a last piece counts the tokens."""

    include_usage: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What completions and chats have in common.

    Args:
        seed: null: another one each time.
        top_k: -1 and 0 are off.
        stop: at most four texts; the answer ends before them.
        stop_token_ids: token ids that end an answer, beside the model's own.
        ignore_eos: go on behind tokens that end an answer.
        num_beams: beam search (temperature 0).
        user: who asks, as OpenAI has it; kept nowhere.
    """

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    logit_bias: Bias = dataclasses.field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionBody(Sampling):
    """`/v1/completions`.

    Args:
        prompt: a text, texts, token ids or lists of token ids; a text is continued as it stands.
        max_tokens: 0 with echo: the prompt alone is scored.
        best_of: draw this number, and give the n that the server's reward model prefers; as n: nothing is chosen.
        add_special_tokens: begin texts with bos where the tokenizer does so.
    """

    prompt: Any
    max_tokens: int = 16
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


@dataclasses.dataclass(frozen=True)
class Called:
    """A function that was called; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call in an earlier turn."""

    id: str
    function: Called
    type: Literal["function"] = "function"


@dataclasses.dataclass(frozen=True)
class TextPart:
    """A part of a message; models here read text."""

    type: Literal["text"]
    text: str


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn.

    Args:
        input: beside OpenAI's: what goes with a question where the model's template has a place for it (Alpaca's).
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    input: str | None = None

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that a model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool."""

    function: Function
    type: Literal["function"] = "function"


@dataclasses.dataclass(frozen=True)
class NamedFunction:
    """A function by its name."""

    name: str


@dataclasses.dataclass(frozen=True)
class NamedTool:
    """The tool that must be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


@dataclasses.dataclass(frozen=True)
class Schema:
    """A JSON schema; `schema` absent: any object."""

    name: str
    schema: dict[str, Any] = dataclasses.field(default_factory=dict)
    description: str | None = None
    strict: bool = True


@dataclasses.dataclass(frozen=True)
class ResponseFormat:
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatBody(Sampling):
    """`/v1/chat/completions`.

    Args:
        max_tokens: older name of max_completion_tokens; null for both: up to the model's context.
        parallel_tool_calls: false is refused: the model decides.
    """

    messages: tuple[Message, ...]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: tuple[Tool, ...] = ()
    tool_choice: Effort | NamedTool = "auto"
    parallel_tool_calls: Literal[True] = True
    response_format: ResponseFormat | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingsBody:
    """`/v1/embeddings`; input: as a completion's prompt."""

    input: Any
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeBody:
    """`/tokenize`: a text, or a conversation in the model's template."""

    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    model: str | None = None
    add_special_tokens: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetokenizeBody:
    """`/detokenize`."""

    tokens: tuple[int, ...]
    model: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """KnowLM's `parameters`, with the defaults of its server."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 16
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowLMBody:
    """KnowLM's `POST /generate`."""

    instruction: str
    input: str | None = None
    parameters: Parameters = dataclasses.field(default_factory=Parameters)


def read_body(data: bytes, cls: type[T]) -> T:
    """The dataclass `cls` of a body.

    Raises:
        Problem: it is not JSON, or a field is missing, unknown or of another type.
    """
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Problem("the body holds half of a Unicode character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise Problem(f"the body is not valid JSON: {error or 'nested too deeply'}") from None
    if not isinstance(values, dict):
        raise Problem(f"the body is {shown(values)}; expected an object")
    return typing.cast(T, _BodyReader().section(values, cls, ""))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


class _BodyReader(Reader):
    """No conversions; `key` is empty for the root."""

    def section(self, values: Mapping[str, Any], cls: type, key: str) -> Any:
        prefix, kinds = f"{key}." if key else "", field_types(cls)
        given = {name: value for name, value in values.items() if value is not None}
        for name in given:
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(kinds)}"
                name = f"{prefix}{name}"
                raise Problem(f"{shown(name)} is not a field that this server computes; {hint}", param=name[:80])
        for field in dataclasses.fields(cls):
            if is_required(field) and field.name not in given:
                raise Problem(f"{prefix}{field.name} is missing", param=f"{prefix}{field.name}")
        return cls(**{name: self.value(value, kinds[name], f"{prefix}{name}") for name, value in given.items()})

    def leaf(self, value: Any, kind: Any, key: str) -> Any:
        members = alternatives(kind)
        if any(is_of(value, member) for member in members):
            return value
        raise Problem(f"{key}: {shown(value)} must be {described(kind)}", param=key)
