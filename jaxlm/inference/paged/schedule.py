"""Which texts a step reads and continues: rows and pages for queries, first come, first served.

Each row in progress is given a token by every step; beside them a step reads a bounded number of tokens of prompts, so
that a long prompt does not stop the others. When pages run out, the youngest text goes back to the queue; its pages
stay in the tree as long as nobody needs them, and it goes on as if nothing had been.

A step is dispatched before the one before it is read: a text may have a token that only the device knows.

Guesses (see `lookup`) stand in rows that no text has, behind the text's newest token. The step chooses a token behind
each of them, as it would if it were the text's own; those behind guesses that were right are the text's next ones, and
what the others left in the pages is written over. So every token is chosen from the same numbers, in the same way, as
without guesses. A text whose guesses are under way waits, since only the host knows how far it has come.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.inference.paged.constraints import everything
from jaxlm.inference.paged.lookup import Lookup
from jaxlm.inference.paged.pages import Node, Pages
from jaxlm.inference.paged.requests import Constraint, Deliver, Finish, Piece, Query, TokenLogprob
from jaxlm.inference.paged.step import Plan, Scores

# Q and C of a step that reads no prompt.
NO_PIECES = (0, 1)


@dataclasses.dataclass(eq=False)
class Text:
    """One answer to a query.

    Attributes:
        order: of its coming.
        adapter: what its tokens choose, and the number of the adapter, which keys and values belong to; 0, 0: the base.
        tokens: prompt and answer, as far as the host knows.
        limit: most tokens of both.
        is_cut: the limit is the end of the context.
        known: tokens whose keys and values are in pages, or will be behind the steps that were dispatched.
        pending: tokens that were chosen on the device and not read yet.
        reading: the prompt is being read (or, behind a retreat, the whole text).
        nodes, own: its pages: those of the tree, then those that it has for itself.
        cached: tokens of the prompt that were there already.
        scores: of the prompt's tokens, so far.
        lookup: what guesses its next tokens; None: nothing does.
        guesses: (row, token), guesses that are under way.
        reach: how many are worth it next: more where more were right.
    """

    ticket: int
    sample: int
    query: Query
    deliver: Deliver
    order: int
    adapter: tuple[int, int]
    limit: int
    is_cut: bool
    stop_ids: frozenset[int]
    leader: Text | None
    constraint: Constraint | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    known: int = 0
    pending: int = 0
    reading: bool = True
    row: int = -1
    nodes: list[Node] = dataclasses.field(default_factory=list)
    own: list[int] = dataclasses.field(default_factory=list)
    cached: int | None = None
    scores: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish: Finish | None = None
    lookup: Lookup | None = None
    guesses: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    reach: int = 3

    @property
    def start(self) -> int:
        return len(self.query.prompt)

    @property
    def length(self) -> int:
        """Tokens of the text, those that only the device knows included."""
        return len(self.tokens) + self.pending

    @property
    def pages(self) -> list[int]:
        return [*(node.page for node in self.nodes), *self.own]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the programs are compiled for.

    Args:
        rows: R.
        pages: M.
        slots: tokens of a page.
        table: P.
        chunks: (Q, C) of the programs that read prompts.
        overhead: what a step costs beside its prompts, as the number of their tokens that costs as much.
        guesses: most tokens that are guessed of a text in a step; 0: programs have no place for guesses.
    """

    rows: int
    pages: int
    slots: int
    table: int
    chunks: tuple[tuple[int, int], ...]
    overhead: int
    guesses: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was dispatched, and whom it serves.

    Attributes:
        given: the texts that are given a token.
        read: (text, chunk, the first token's place, number of tokens); a text may have several chunks.
    """

    plan: Plan
    given: tuple[Text, ...]
    read: tuple[tuple[Text, int, int, int], ...]


class Scheduler:
    """See the module. It knows texts and pages, and no device.

    Args:
        taken: called when a text has taken a row.
        ended: called when a text has ended.
    """

    def __init__(
        self, shape: Shape, vocab_size: int, taken: Callable[[Text], None], ended: Callable[[Text], None]
    ) -> None:
        self.shape, self.pages = shape, Pages(shape.pages, shape.slots)
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []  # the oldest first
        self._taken, self._ended, self._vocab_size = taken, ended, vocab_size
        self._rows = list(range(shape.rows))  # a heap: a step of the first few rows costs less than one of all
        self._tables = np.zeros((shape.rows, shape.table), np.int32)
        self.counts = dict.fromkeys(
            (
                "prefix_queries", "prefix_hits", "prompt_tokens", "generation_tokens", "retracted", "guessed",
                "accepted",
            ),
            0,
        )  # fmt: skip

    def add(self, text: Text) -> None:
        text.tokens = list(text.query.prompt)
        self.waiting.append(text)

    def cancel(self, ticket: int, sample: int | None) -> None:
        """Ends a query's answers, or one of them."""
        for text in [*self.waiting, *self.running]:
            if text.ticket == ticket and sample in (None, text.sample):
                self._end(text, "cancelled")
                text.deliver(Piece(text.sample, finish="cancelled"))

    def plan(self) -> Step | None:
        """The next step; None: there is none before the last one was read."""
        self._admit()
        given, (sizes, read) = self._ready(), self._pieces()
        self._guess(given)
        while not self._reserve(given, read):
            if any(text.guesses for text in given):  # they are worth nobody's pages
                for text in given:
                    text.guesses = []
                continue
            victim = self.running[-1]
            if victim.pending:
                return None
            self._retract(victim)
            given, (sizes, read) = self._ready(), self._pieces()
        return self._step(given, sizes, read) if given or read else None

    def _admit(self) -> None:
        for text in list(self.waiting):
            if not self._rows:
                return
            leader = text.leader
            if leader is not None and leader.reading and leader.finish is None:
                continue  # the prompt is there when its first answer has read it
            scored = text.query.prompt_logprobs is not None and text.sample == 0
            unread = scored and len(text.scores) < text.start  # scores are of what is read
            nodes = [] if unread else self.pages.find(text.adapter[1], text.tokens[:-1])
            promised = sum(self._missing(other) for other in self.running)
            needed = len(text.tokens) // self.shape.slots + 1 - len(nodes)
            if needed + promised > self.pages.available:
                self.pages.release(nodes)
                return
            self.waiting.remove(text)
            text.nodes, text.known, text.reading = nodes, len(nodes) * self.shape.slots, True
            if text.cached is None:
                text.cached = text.known
                self.counts["prefix_queries"] += text.start
                self.counts["prefix_hits"] += text.cached
                self.counts["prompt_tokens"] += text.start
            text.row = heapq.heappop(self._rows)
            self.running.append(text)
            self.running.sort(key=lambda text: text.order)
            self._taken(text)

    def _missing(self, text: Text) -> int:
        """Pages that a text needs for what it is known to hold and the next token."""
        return max(0, text.length // self.shape.slots + 1 - len(text.nodes) - len(text.own))

    def _ready(self) -> list[Text]:
        """Texts that can be given a token."""
        return [
            text
            for text in self.running
            if not text.reading and text.length < text.limit and not (text.pending and self._waits(text))
        ]

    def _waits(self, text: Text) -> bool:
        """Whether a text goes on only when its last token was read: a constraint or a guess depends on it."""
        expects = text.lookup is not None and bool(self._rows) and bool(text.lookup.guess(1))
        return text.constraint is not None or bool(text.guesses) or expects

    def _guess(self, given: list[Text]) -> None:
        """Puts guesses of the texts' next tokens into rows that no text has, the oldest text's first."""
        rows = sorted(self._rows)
        for text in given:
            most = min(self.shape.guesses, text.reach, len(rows), text.limit - text.length - 1)
            if text.lookup is not None and not text.pending:
                text.guesses = [(rows.pop(0), token) for token in text.lookup.guess(most)]

    def _pieces(self) -> tuple[tuple[int, int], list[tuple[Text, int, int]]]:
        """Q and C, and at most Q pieces of at most C tokens that are read: (text, the first token's place, how many).

        A text may have several: each sees the keys and values of all, which are written before any are read.
        """
        reading = [text for text in self.running if text.reading]
        if not reading:
            return NO_PIECES, []
        number, length = best_chunk(self.shape, [len(text.tokens) - text.known for text in reading])
        pieces = [
            (text, start, min(length, len(text.tokens) - start))
            for text in reading
            for start in range(text.known, len(text.tokens), length)
        ]
        return (number, length), pieces[:number]

    def _reserve(self, given: list[Text], read: list[tuple[Text, int, int]]) -> bool:
        """Pages for the new tokens; whether there are enough."""
        needs = {text: text.length + len(text.guesses) for text in given}
        needs |= {text: start + count for text, start, count in read}
        for text in sorted(needs, key=lambda text: text.order):
            while len(text.nodes) + len(text.own) < -(-needs[text] // self.shape.slots):
                page = self.pages.take()
                if page is None:
                    return False
                text.own.append(page)
        return True

    def _step(self, given: list[Text], sizes: tuple[int, int], read: list[tuple[Text, int, int]]) -> Step | None:
        shape, tables, (number, length) = self.shape, self._tables, sizes
        places, picks, numbers, adapters = (np.full(shape.rows, value, np.int32) for value in (-1, -1, 0, 0))
        chunks, targets = (np.zeros((number, length), np.int32) for _ in range(2))
        rows, starts, lengths = (np.zeros(number, np.int32) for _ in range(3))
        constrained = np.zeros(shape.rows, bool)
        allowed = everything(shape.rows, self._vocab_size)
        for text in [*given, *(text for text, *_ in read)]:
            pages = text.pages
            tables[text.row, : len(pages)], adapters[text.row] = pages, text.adapter[0]
        newest, owners = np.full(shape.rows, -1, np.int32), np.arange(shape.rows, dtype=np.int32)
        for text in given:
            newest[text.row] = -1 if text.pending else text.tokens[-1]
            for ahead, row in enumerate([text.row, *(row for row, _ in text.guesses)]):
                places[row], picks[row], numbers[row] = text.length - 1 + ahead, row, text.length - text.start + ahead
                tables[row], adapters[row], owners[row] = tables[text.row], text.adapter[0], text.row
            for row, token in text.guesses:
                newest[row] = token
        wants_prompt, noted = False, []
        for index, (text, start, count) in enumerate(read):
            rows[index], starts[index], lengths[index] = text.row, start, count
            new = text.tokens[start : start + count + 1]
            chunks[index, :count] = new[:count]
            targets[index, : len(new) - 1] = new[1:]
            wants_prompt |= text.query.prompt_logprobs is not None and text.sample == 0
            noted.append((text, index, start, count))
            if start + count == len(text.tokens):
                picks[text.row] = shape.rows + index * length + count - 1
        chosen = [text for text in self.running if picks[text.row] >= 0]
        for text in chosen:
            numbers[text.row] = text.length - text.start
            if text.constraint is not None:
                try:
                    words = text.constraint.allowed()
                except UserError as error:
                    self._end(text, "cancelled")
                    text.deliver(error)
                    return self.plan()
                if not words.any():
                    self._end(text, "stop")  # nothing may follow
                    text.deliver(Piece(text.sample, cached=text.cached or 0, finish="stop"))
                    return self.plan()
                if not constrained.any():
                    allowed = allowed.copy()
                allowed[text.row], constrained[text.row] = words, True
        plan = Plan(
            tables.copy(), places, picks, numbers, chunks, rows, starts, lengths, targets, np.bool_(wants_prompt),
            constrained, allowed, adapters, *((newest, owners) if shape.guesses else ()),
        )  # fmt: skip
        for text in given:
            text.known += 1
        for text, _, count in read:
            text.known += count
            text.reading = text.known < len(text.tokens)
            self._share(text)
        for text in chosen:
            text.pending += 1
        return Step(plan, tuple(chosen), tuple(noted))

    def read(self, step: Step, tokens: np.ndarray, best: Any, behind: Any) -> None:
        """Gives the texts of a step what came of it.

        Args:
            tokens: [R].
            best, behind: `Scores` of them [R] and of the targets [Q, C], in NumPy arrays; None where nobody asked.
        """
        for text, chunk, start, count in step.read:
            if behind is not None and text.query.prompt_logprobs is not None and text.sample == 0:
                text.scores = text.scores or [TokenLogprob(text.tokens[0], None)]
                for place in range(len(text.scores), min(start + count + 1, text.start)):
                    at = chunk, place - 1 - start
                    text.scores.append(_scored(text.tokens[place], behind, at, text.query.prompt_logprobs))
        for text in step.given:
            text.pending -= 1
            guesses, text.guesses = text.guesses, []
            guessed, row = len(guesses), text.row
            while text.finish is None:
                token = int(tokens[row])
                scores: tuple[TokenLogprob, ...] = ()
                if text.query.logprobs is not None:
                    scores = (_scored(token, best, (row,), text.query.logprobs),)
                self._append(text, token, scores)
                if text.finish is not None or not guesses or guesses[0][1] != token:
                    break
                row, _ = guesses.pop(0)
                text.known += 1
            if guessed:
                right = guessed - len(guesses)
                text.reach = 2 * right + 1
                self.counts["guessed"] += guessed
                self.counts["accepted"] += right

    def _append(self, text: Text, token: int, scores: tuple[TokenLogprob, ...]) -> None:
        """Gives a text its next token."""
        first = len(text.tokens) == text.start
        text.tokens.append(token)
        self.counts["generation_tokens"] += 1
        if text.constraint is not None and token not in text.stop_ids:
            try:
                text.constraint.accept(token)
            except UserError as error:
                self._end(text, "cancelled")
                text.deliver(error)
                return
        finish: Finish | None = None
        if token in text.stop_ids:
            finish = "stop"
        elif len(text.tokens) == text.limit:
            finish = "context" if text.is_cut else "length"
        prompt = tuple(text.scores) if first and text.scores else None
        if finish is not None:
            self._end(text, finish)
        ids = () if finish == "stop" else (token,)
        text.deliver(Piece(text.sample, ids, scores, prompt, text.cached or 0 if first else 0, finish))

    def _end(self, text: Text, finish: Finish) -> None:
        text.finish = finish
        self._ended(text)
        if text in self.waiting:
            self.waiting.remove(text)
        else:
            self._leave(text)

    def _retract(self, text: Text) -> None:
        """Back to the queue; what it computed may be found again."""
        self._leave(text)
        self.waiting.appendleft(text)
        self.counts["retracted"] += 1

    def _leave(self, text: Text) -> None:
        self._share(text)
        self.pages.release(text.nodes)
        for page in text.own:
            self.pages.give_back(page)
        text.nodes, text.own, text.known, text.guesses = [], [], 0, []
        heapq.heappush(self._rows, text.row)
        self.running.remove(text)

    def _share(self, text: Text) -> None:
        """Puts pages that are full, and whose tokens the host knows, into the tree."""
        slots = self.shape.slots
        whole = min(text.known, len(text.tokens)) // slots
        while len(text.nodes) < whole:
            start = len(text.nodes) * slots
            above = text.nodes[-1] if text.nodes else None
            node = self.pages.add(text.adapter[1], above, text.tokens[start : start + slots], text.own.pop(0))
            text.nodes.append(node)

    def texts(self) -> Iterator[Text]:
        """All that are not at their end."""
        yield from (*self.waiting, *self.running)


def best_chunk(shape: Shape, left: Sequence[int]) -> tuple[int, int]:
    """Q and C that read the most for what the step costs, padding included; of several that read more, in fewer pieces.

    Args:
        left: tokens that are still to be read, of each text in turn.
    """

    def gain(sizes: tuple[int, int]) -> tuple[float, int, int]:
        number, length = sizes
        pieces = [min(length, each - start) for each in left for start in range(0, each, length)]
        tokens = sum(pieces[:number])
        return tokens / (shape.overhead + number * length), tokens, -number

    return max(shape.chunks, key=gain)


def _scored(token: int, scores: Scores, at: tuple[int, ...], count: int) -> TokenLogprob:
    top = zip(scores.top_ids[at][:count].tolist(), scores.top[at][:count].tolist(), strict=True)
    return TokenLogprob(token, float(scores.chosen[at]), tuple(top))
