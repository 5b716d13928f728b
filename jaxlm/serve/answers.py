"""Answers as they come from the engine, as text: nothing is shown that a stop text or half a character could undo."""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import functools
import logging
from collections.abc import AsyncIterator, Sequence

from jaxlm.errors import UserError
from jaxlm.inference.paged.requests import AnswerFailed, EngineThread, Finish, Piece, Query, QueueFull, TokenLogprob
from jaxlm.inference.text import TextStream
from jaxlm.serve.metrics import Metrics
from jaxlm.serve.problems import Problem, of_user_error
from jaxlm.tokenizer import Tokenizer

RETRY_SECONDS = 1
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one answer has more than before.

    Args:
        query: which of the queries.
        sample: which of its answers.
        text: new text.
        tokens: new tokens whose log-probabilities were asked for, each with the place in the text where it begins.
        prompt: of the prompt's tokens; with a query's first piece.
        finish: why the answer ends; None: it goes on.
        num_tokens: tokens of the answer so far, a stop id that ended it among them.
        cached: as `Piece.cached`.
    """

    query: int
    sample: int
    text: str = ""
    tokens: tuple[tuple[TokenLogprob, int], ...] = ()
    prompt: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    num_tokens: int = 0
    cached: int = 0


class _Answer:
    """One answer: its tokens, its text, and what was handed on of both."""

    def __init__(self, tokenizer: Tokenizer, query: Query, continues: bool) -> None:
        self.stream = TextStream(tokenizer, query.prompt if continues else (), query.options.stop)
        self.ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._handed = 0
        self.done = False

    def take(self, number: int, piece: Piece) -> Delta:
        """What a piece adds."""
        self.ids += piece.ids
        self._logprobs += piece.logprobs  # also of a stop id behind the text
        text, stopped = self.stream.update(self.ids, last=piece.finish is not None)
        finish: Finish | None = "stop" if stopped else piece.finish
        self.done = finish is not None
        ends = self.stream.ends
        begins = [0, *ends]
        if stopped:
            # A token that is cut by the stop text is shown in part; one behind it, not at all.
            certain = bisect.bisect_left(begins, len(self.stream.text), hi=len(ends))
        else:
            certain = len(begins) if self.done else bisect.bisect_right(ends, self.stream.shown)
        new = slice(self._handed, certain)
        tokens = tuple(zip(self._logprobs[new], begins[new], strict=False))
        self._handed = max(self._handed, certain)
        count = len(begins) if piece.finish == "stop" and not stopped else len(ends)
        return Delta(number, piece.sample, text, tokens, piece.prompt, finish, count, piece.cached)


class Asked:
    """Queries that the engine has, and their answers; `close` takes back those that still go on.

    Args:
        most: seconds that the answers may take.
        continues: a text goes on where its prompt ends, with the space that its first word may have in front; False:
            it is a turn of its own, which tokenizers like LLaMA's begin without that space.

    Raises:
        Problem: the engine refuses one of them (then it has none), or has no place for it now.
    """

    def __init__(
        self,
        engine: EngineThread,
        tokenizer: Tokenizer,
        queries: Sequence[Query],
        metrics: Metrics,
        most: float,
        continues: bool,
    ) -> None:
        self._engine, self._metrics, self._most = engine, metrics, most
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._answers = [
            [_Answer(tokenizer, query, continues) for _ in range(query.options.samples)] for query in queries
        ]
        self._started = self._loop.time()
        self._tickets: list[int] = []
        try:
            for number, query in enumerate(queries):
                self._tickets.append(engine.submit(query, functools.partial(self._deliver, number)))
        except UserError as error:
            self.close()
            raise of_user_error(error) from None
        except QueueFull:
            self.close()
            wait = {"Retry-After": str(RETRY_SECONDS)}
            raise Problem(
                "too many requests wait already; try again later", 429, code="queue_full", headers=wait
            ) from None
        except Exception as error:  # the one that has ended the engine
            metrics.failed = f"{type(error).__name__}: {error}"
            raise

    def _deliver(self, number: int, piece: Piece | Exception) -> None:
        if not self._loop.is_closed():  # as after a second Ctrl-C
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))

    def ids(self, query: int, sample: int) -> Sequence[int]:
        """Tokens of an answer so far, without a stop id that ended it."""
        return self._answers[query][sample].ids

    def close(self) -> None:
        """Takes back what is not answered."""
        for number, ticket in enumerate(self._tickets):
            if not all(answer.done for answer in self._answers[number]):
                self._engine.cancel(ticket)
        self._tickets = []

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answers, piece by piece.

        Raises:
            Problem: they take longer than a request may, one of them cannot be written to its end, or the engine has
                ended.
        """
        missing = sum(map(len, self._answers))
        clocks = [[self._metrics.clock(self._started) for _ in answers] for answers in self._answers]
        while missing:
            try:
                async with asyncio.timeout_at(self._started + self._most):
                    number, piece = await self._pieces.get()
            except TimeoutError:
                raise Problem(
                    f"the answer takes longer than {self._most:g} s (--timeout_s)", 504, code="timeout"
                ) from None
            if isinstance(piece, UserError):
                raise of_user_error(piece) from None
            if isinstance(piece, AnswerFailed):
                _LOG.error("an answer could not be written", exc_info=piece)
                raise Problem("the answer could not be written; see the server's log", 500) from None
            if isinstance(piece, Exception):
                if self._metrics.failed is None:  # all who are waiting are told
                    _LOG.error("the engine has ended", exc_info=piece)
                self._metrics.failed = f"{type(piece).__name__}: {piece}"
                raise Problem("the engine has ended because of an error; see the server's log", 500) from None
            answer = self._answers[number][piece.sample]
            if answer.done:
                continue  # what the engine had begun when a stop text was met
            delta = answer.take(number, piece)
            clocks[number][piece.sample].step(self._loop.time(), len(piece.ids), delta.finish)
            if answer.done:
                missing -= 1
                if piece.finish is None:
                    self._engine.cancel(self._tickets[number], piece.sample)
            yield delta
