"""The job: requests, their replies in a file that survives a kill, and the instructions that follow from the replies.

Everything but the replies is a function of the settings and the number of a request, and replies count in the order of
their numbers, whichever came first. So a run that was killed and goes on writes the bytes of one that was not, as far
as the endpoint answers the same request with the same text; and other filters are tried without a request.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from jaxlm.config.instructions import InstructionsConfig
from jaxlm.data.prepare.instructions.endpoint import Reply
from jaxlm.data.prepare.instructions.filters import Likeness, Rules
from jaxlm.data.prepare.instructions.tasks import (
    REQUEST,
    Task,
    choose,
    make_prompt,
    parse_reply,
    read_seed_tasks,
    stop_texts,
)
from jaxlm.errors import UserError

MARK = "jaxlm instructions"  # in the first line of the file of replies
REPLIES = "replies.jsonl"
NEAREST = "like one that is there"
FORM = "not of the form"
EXAMPLES = 3  # shown of what each rule took


class Asking(Protocol):
    """What answers prompts."""

    def ask(self, prompt: str, seed: int) -> Coroutine[Any, Any, Reply]:
        """The reply to a prompt; the same seed should give the same reply."""


@dataclasses.dataclass
class Round:
    """Instructions as they follow from replies, in the order of their requests.

    Attributes:
        kept: the new tasks, each with its likeness to the nearest instruction that was there, and that instruction.
        dropped: by rule how many were left out; `samples` holds the first of each.
        replies, tokens_in, tokens_out: of the replies so far.
        fruitless: replies since the last that brought something new.
    """

    config: InstructionsConfig
    seeds: list[Task]

    def __post_init__(self) -> None:
        self.likeness = Likeness(task.instruction for task in self.seeds)
        own = {} if self.config.undoable is None else {"undoable": self.config.undoable}
        self.rules = Rules(self.config.min_words, self.config.max_words, **own)
        self.kept: list[tuple[Task, float, str]] = []
        self.dropped: collections.Counter[str] = collections.Counter()
        self.samples: dict[str, list[str]] = {}
        self.replies = self.tokens_in = self.tokens_out = self.fruitless = 0

    @property
    def is_full(self) -> bool:
        """Whether as many as wanted are there."""
        return len(self.kept) >= self.config.count

    @property
    def is_barren(self) -> bool:
        """Whether nothing new has come for too long."""
        return self.fruitless >= self.config.patience

    def take(self, reply: Reply) -> None:
        """Keeps what is new in the next reply."""
        before = len(self.kept)
        self.replies += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        for task in parse_reply(reply.text, self.config.examples + 1, reply.is_cut):
            if not self.is_full:
                self._take(task)
        self.fruitless = 0 if len(self.kept) > before else self.fruitless + 1

    def _take(self, task: Task | None) -> None:
        rule = FORM if task is None else "no instruction" if not task.instruction else self.rules.broken_by(task)
        if rule is None and task is not None:
            scores = self.likeness.to_all(task.instruction)
            place = int(scores.argmax())
            if scores[place] <= self.config.max_similarity:
                self.kept.append((task, float(scores[place]), self.likeness.instructions[place]))
                self.likeness.add(task.instruction)
                return
            rule = NEAREST
        assert rule is not None
        self.dropped[rule] += 1
        if task is not None and len(self.samples.setdefault(rule, [])) < EXAMPLES:
            self.samples[rule].append(task.instruction)


class Replies:
    """The file of replies: a line of settings, then a line for each reply, in the order in which they came.

    Args:
        path: of the file.
        settings: what decides the replies; a run with other settings must not go on with it.

    Attributes:
        of: replies by the number of their request.

    Raises:
        UserError: the file was begun with other settings, or is another file.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.of: dict[int, Reply] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a line that was being written at a kill is written again
        lines: list[Any]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            self.of = {line["request"]: Reply(**line["reply"]) for line in lines[1:]}
            before = lines[0][MARK] if lines else settings
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: is not a file of replies; move it away, or name another --output_dir") from None
        if before != settings:
            other = [name for name in settings if before.get(name) != settings[name]]
            changes = ", ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in other)
            raise UserError(
                f"{path}: begun with other settings: {changes}; name another --output_dir, or set them back"
            )
        self._file = path.open("r+b" if content else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not lines:
            self._write({MARK: settings})

    def add(self, number: int, reply: Reply) -> None:
        """Keeps a reply for good."""
        self._write({"request": number, "reply": dataclasses.asdict(reply)})
        self.of[number] = reply

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Gives the file up."""
        self._file.close()


def request_text(config: InstructionsConfig) -> str:
    """What stands in front of the examples.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    if config.prompt is None:
        return REQUEST
    try:
        return Path(config.prompt).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"prompt: {config.prompt}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"prompt: {config.prompt} is not UTF-8; convert it, e.g. with iconv") from None


def settings_of(config: InstructionsConfig, seeds: list[Task], model: str) -> dict[str, Any]:
    """What decides the replies, as JSON has it."""
    text = json.dumps([dataclasses.astuple(task) for task in seeds] + [request_text(config)])
    names = ("chat", "examples", "tasks", "max_tokens", "temperature", "top_p", "fields", "seed")
    values = {"model": model, "seed_tasks and prompt (sha256)": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return values | {name: getattr(config, name) for name in names}


def request_fields(config: InstructionsConfig) -> dict[str, Any]:
    """The fields of every request."""
    fields = {
        "max_tokens": config.max_tokens, "temperature": config.temperature, "top_p": config.top_p,
        "stop": stop_texts(config.tasks),
    }  # fmt: skip
    return {name: value for name, value in (fields | config.fields).items() if value is not None}


def seeds_of(config: InstructionsConfig) -> list[Task]:
    """The seed tasks.

    Raises:
        UserError: as `read_seed_tasks`, or there are fewer than a prompt shows.
    """
    seeds = read_seed_tasks(config.seed_tasks)
    if len(seeds) < config.examples:
        raise UserError(
            f"seed_tasks: {config.seed_tasks} holds {len(seeds)} tasks; a prompt shows {config.examples} (--examples)"
        )
    return seeds


async def run_round(
    config: InstructionsConfig,
    seeds: list[Task],
    endpoint: Asking,
    replies: Replies,
    progress: Callable[[Round], None],
) -> Round:
    """Asks until enough is there, or nothing new comes; replies that are in the file are not asked for again.

    Raises:
        UserError: of the endpoint; the replies that had come are in the file.
    """
    result, request = Round(config, seeds), request_text(config)
    under_way: dict[asyncio.Task[Reply], int] = {}
    following = 0  # the number of the next request

    def take_what_came() -> None:
        while result.replies in replies.of and not (result.is_full or result.is_barren):
            result.take(replies.of[result.replies])
            progress(result)

    def send() -> None:
        nonlocal following
        while len(under_way) < config.at_once:
            number, following = following, following + 1
            if number not in replies.of:
                examples = choose(seeds, config.examples, config.seed, number)
                prompt = make_prompt(examples, config.tasks, request)
                # A seed of 31 bits, which every endpoint takes.
                digest = hashlib.sha256(f"{config.seed} {number}".encode()).digest()
                asked = endpoint.ask(prompt, int.from_bytes(digest[:4], "big") >> 1)
                under_way[asyncio.ensure_future(asked)] = number

    async def wait(until: str) -> None:
        done, _ = await asyncio.wait(under_way, return_when=until)
        failures = []
        for task in sorted(done, key=lambda task: under_way[task]):
            number = under_way.pop(task)
            if (error := task.exception()) is None:
                replies.add(number, task.result())
            else:
                failures.append(error)
        if failures:
            raise failures[0]

    try:
        take_what_came()
        while not (result.is_full or result.is_barren):
            send()
            await wait(asyncio.FIRST_COMPLETED)
            take_what_came()
        if under_way:  # they are paid for, and spared when more is wanted
            await wait(asyncio.ALL_COMPLETED)
    finally:
        for task in under_way:
            task.cancel()
    return result
