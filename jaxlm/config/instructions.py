"""Instructions that a model writes after seed tasks (Self-Instruct)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxlm.errors import UserError
from jaxlm.locate import ReadPath, WrittenPath


@dataclass(frozen=True, kw_only=True)
class InstructionsConfig:
    """How instructions are made.

    Args:
        seed_tasks: tasks to begin with, with instruction, input and output, or in Self-Instruct's form: a .json,
            .jsonl, .csv or .parquet file.
        output_dir: folder for what is written.
        count: how many instructions are wanted.
        url: an endpoint that talks like OpenAI's; that of `jaxlm serve` unless another is given.
        model: a name that the endpoint knows; empty: the first that it lists.
        chat: send prompts as a user's message, for endpoints without /completions.
        key: environment variable with the endpoint's key.
        examples: seed tasks in a prompt.
        tasks: number of the last task that a prompt asks for, examples included.
        prompt: a text file that stands in front of the examples, in place of the own one; {number} and {no_input} are
            filled in.
        max_tokens: most tokens of a reply.
        temperature: of the replies.
        top_p: of the replies.
        fields: more fields of a request, as the endpoint knows them, e.g. {top_k: 40}; null takes one away.
        max_similarity: largest ROUGE-L to a seed task's or a kept instruction.
        min_words: shortest instruction.
        max_words: longest instruction.
        undoable: words that an instruction must not hold; null: Alpaca's list.
        at_once: requests under way together.
        retries: how often a failed request is sent again.
        timeout: seconds for a reply.
        patience: ends after so many replies in a row without anything new.
        seed: another one draws other examples, and is sent along.
    """

    seed_tasks: ReadPath
    output_dir: WrittenPath
    count: int = 1000
    url: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    chat: bool = False
    key: str = "OPENAI_API_KEY"
    examples: int = 3
    tasks: int = 20
    prompt: ReadPath | None = None
    max_tokens: int = 3072
    temperature: float = 1.0
    top_p: float = 1.0
    fields: dict[str, Any] = field(default_factory=dict)
    max_similarity: float = 0.7
    min_words: int = 4
    max_words: int = 150
    undoable: tuple[str, ...] | None = None
    at_once: int = 8
    retries: int = 5
    timeout: float = 600.0
    patience: int = 50
    seed: int = 0


def check(config: InstructionsConfig) -> None:
    """Raises UserError for a value that is out of range, by its key."""
    for name in ("count", "examples", "max_tokens", "at_once", "patience", "min_words"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: {getattr(config, name)} must be at least 1")
    if config.tasks <= config.examples:
        raise UserError(f"tasks: {config.tasks} must be more than examples ({config.examples}), which are among them")
    if not 0 < config.max_similarity <= 1:
        raise UserError(f"max_similarity: {config.max_similarity} must be above 0 and at most 1")
    if config.max_words < config.min_words:
        raise UserError(f"max_words: {config.max_words} is below min_words ({config.min_words})")
    for name in ("temperature", "retries"):
        if getattr(config, name) < 0:
            raise UserError(f"{name}: {getattr(config, name)} must be 0 or more")
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p: {config.top_p} must be above 0 and at most 1")
    if config.timeout <= 0:
        raise UserError(f"timeout: {config.timeout} must be above 0")
