"""Requests of a task to a model: what is read, in which batches, and the answers.

Batches are planned over all requests before the first is asked, whatever has been answered already. So a run that was
killed and started again computes each batch in the same shape, and ends with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.evaluation import likelihood
from jaxlm.evaluation.journal import Answered
from jaxlm.evaluation.likelihood import Choices
from jaxlm.evaluation.task import Answer, Answers, Generate, LogLikelihood, NextToken, Prompt, Question, Request
from jaxlm.inference.answering import complete
from jaxlm.inference.generator import Generator
from jaxlm.inference.options import check_decoding, check_stop_ids
from jaxlm.inference.prompts import Prompter
from jaxlm.modalities import TextError
from jaxlm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Writing:
    """A prompt to be continued.

    Attributes:
        prompt: token ids.
        settings: how.
        strip: take white space off both ends of the texts.
    """

    prompt: tuple[int, ...]
    settings: Decoding
    strip: bool


# What is fed for a request; a text says why nothing can be.
Fed = Choices | Writing | str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Requests as token ids, in batches.

    Attributes:
        fed: by number of the request.
        batches: numbers of requests that are asked together.
        batch_size: requests of a batch at most.
    """

    fed: list[Fed]
    batches: list[list[int]]
    batch_size: int


def context_ids(prompter: Prompter, context: Prompt, name: str = "the prompt") -> list[int]:
    """Token ids of what a model reads.

    Raises:
        UserError: for a question that is empty, or that has parts which the model's template has no place for.
    """
    if isinstance(context, tuple):
        return list(context)
    if isinstance(context, Question):
        return _question_ids(prompter, context, name)
    tokenizer = prompter.tokenizer
    ids = tokenizer.encode(context).ids
    return [*ids, *opening(prompter)] if tokenizer.opens_answers else [*opening(prompter), *ids]


def opening(prompter: Prompter) -> list[int]:
    """What stands in front of a text that is read as it stands."""
    return list(prompter.tokenizer.opening) if prompter.adds_bos else []


def _question_ids(prompter: Prompter, question: Question, name: str) -> list[int]:
    if question.system is None and not question.turns:
        return prompter.question(question.text, question.input, name)
    if not prompter.takes_turns:
        given = "earlier turns" if question.turns else "a system message"
        raise UserError(
            f"{name}: the template {prompter.name} has no place for {given}; use one for conversations, e.g. "
            "--template chat, or ask without examples"
        )
    if question.input is not None:
        raise UserError(f"{name}: a conversation has no place for an input; put it into the question")
    messages = [] if question.system is None else [{"role": "system", "content": question.system}]
    for asked, answered in question.turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return prompter.turns([*messages, {"role": "user", "content": question.text}], name)


def pair_ids(
    tokenizer: Tokenizer, before: Sequence[int], context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a text, cut where its continuation begins, as lm-evaluation-harness cuts it.

    The context has the tokens that it has by itself, and the continuation those of both together behind as many. White
    space at the end of the context belongs to the continuation.

    Args:
        before: what stands in front of texts.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    alone, whole = tokenizer.encode_batch([stripped, stripped + continuation])
    return [*before, *alone.ids], whole.ids[len(alone.ids) :]


def make_plan(
    requests: Sequence[Request], generator: Generator, prompter: Prompter, batch_size: int, names: Sequence[str]
) -> Plan:
    """Makes tokens of requests, and batches.

    Args:
        names: of the records, for messages.

    Raises:
        UserError: for settings of generation that cannot be meant. What is wrong with a single prompt becomes its
            answer's error.
    """
    for settings in {request.settings for request in requests if isinstance(request, Generate)}:
        check_decoding(settings)
        check_stop_ids(settings, generator.decoder.spec.vocab_size)
    fed: list[Fed] = []
    for request in requests:
        name = names[request.record]
        try:
            if isinstance(request, Generate):
                ids = context_ids(prompter, request.context, name)
                generator.check_prompt(ids, name)
                strip = isinstance(request.context, Question) and not prompter.is_text
                fed.append(Writing(tuple(ids), request.settings, strip))
            else:
                choices = _choices(request, generator, prompter, name)
                likelihood.check(generator, choices)
                fed.append(choices)
        except TextError as error:
            fed.append(f"{name}: {error}")
        except UserError as error:
            text = str(error)
            fed.append(text if text.startswith(name) else f"{name}: {text}")
    return Plan(fed, _batches(fed, batch_size), batch_size)


def _choices(request: Request, generator: Generator, prompter: Prompter, name: str) -> Choices:
    """The context of a request with what may follow it."""
    tokenizer, has_encoder = prompter.tokenizer, generator.decoder.spec.encoder is not None
    if isinstance(request, NextToken):
        ids = context_ids(prompter, request.context, name)
        return Choices(tuple(ids), tuple((index,) for index in request.ids))
    if not isinstance(request, LogLikelihood):
        raise AssertionError(f"a request of the kind {type(request).__name__}")
    if isinstance(request.context, str) and not (has_encoder or tokenizer.opens_answers):
        # An empty context: what stands in front of every text is what the continuation follows.
        before = opening(prompter) or ([] if request.context else list(tokenizer.opening))
        pairs = [pair_ids(tokenizer, before, request.context, text) for text in request.continuations]
        return Choices(tuple(pairs[0][0]) if pairs else (), tuple(tuple(ids) for _, ids in pairs))
    ids = context_ids(prompter, request.context, name)
    if has_encoder and isinstance(request.context, str) and tokenizer.adds_eos and tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    continued = [not has_encoder] * len(request.continuations)
    encoded = tokenizer.encode_batch(list(request.continuations), None, continued)
    return Choices(tuple(ids), tuple(tuple(each.ids) for each in encoded))


def _batches(fed: Sequence[Fed], batch_size: int) -> list[list[int]]:
    """Requests of one kind and of like length together, the longest first."""
    kinds: dict[object, list[int]] = {}
    for number, each in enumerate(fed):
        if isinstance(each, Writing):
            kinds.setdefault((each.settings, each.strip), []).append(number)
        elif isinstance(each, Choices):
            kinds.setdefault("choices", []).append(number)
    batches = []
    for numbers in kinds.values():
        ordered = sorted(numbers, key=lambda number: (*_size(fed[number]), number))
        batches += [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return batches


def _size(fed: Fed) -> tuple[int, int]:
    if isinstance(fed, Writing):
        return -len(fed.prompt), 0
    assert isinstance(fed, Choices)
    return -len(fed.context), -max(map(len, fed.continuations))


# (plan, numbers of requests) -> what is written for them.
Writer = Callable[[Plan, Sequence[int]], dict[int, Answer]]


def ask(
    plan: Plan,
    generator: Generator,
    tokenizer: Tokenizer,
    answered: Answered,
    advance: Callable[[int], None],
    write: Writer | None = None,
) -> None:
    """Asks what has no answer yet.

    Args:
        advance: called with the number of requests done.
        write: what writes; None: the generator.
    """
    errors = {
        number: Answer(error=each)
        for number, each in enumerate(plan.fed)
        if isinstance(each, str) and number not in answered.answers
    }
    if errors:
        answered.add(errors)
        advance(len(errors))
    for batch in plan.batches:
        missing = [number for number in batch if number not in answered.answers]
        if missing:
            answers = _answer_batch(plan, batch, generator, tokenizer, write)
            answered.add({number: answers[number] for number in missing})
            advance(len(missing))


def _answer_batch(
    plan: Plan, batch: Sequence[int], generator: Generator, tokenizer: Tokenizer, write: Writer | None
) -> dict[int, Answer]:
    first = plan.fed[batch[0]]
    if isinstance(first, Writing):
        return _written(plan, batch, first, generator, tokenizer) if write is None else write(plan, batch)
    asked = [each for number in batch if isinstance(each := plan.fed[number], Choices)]
    answers = {}
    scored = likelihood.scores(generator, asked, plan.batch_size)
    for number, choices, found in zip(batch, asked, scored, strict=True):
        answers[number] = Answer(found.log_probs, found.is_greedy, tuple(map(len, choices.continuations)))
    return answers


def _written(
    plan: Plan, batch: Sequence[int], first: Writing, generator: Generator, tokenizer: Tokenizer
) -> dict[int, Answer]:
    prompts = {number: each.prompt for number in batch if isinstance(each := plan.fed[number], Writing)}
    answers: dict[int, Answer] = {}
    # A last batch that is not full computes in its own shape, whatever was asked before it.
    for part in complete(generator, tokenizer, prompts, first.settings, plan.batch_size, first.strip):
        for number, completions in part.items():
            texts, finishes = (tuple(each.text for each in completions), tuple(each.finish for each in completions))
            answers[number] = Answer(texts=texts, finishes=finishes)
    return answers


def by_record(records: int, requests: Sequence[Request], answers: Mapping[int, Answer]) -> list[Answers]:
    """The answers of each record by part, of answers by number of their request."""
    parts: list[dict[str, Answer]] = [{} for _ in range(records)]
    for number, request in enumerate(requests):
        parts[request.record][request.part] = answers[number]
    return list(parts)


def first_fed(plan: Plan, tokenizer: Tokenizer) -> dict[str, object] | None:
    """The first request that can be asked as the model is fed it: ids, and what they stand for."""
    for number, each in enumerate(plan.fed):
        if isinstance(each, Writing):
            return {"request": number, "ids": list(each.prompt), "text": tokenizer.decode(each.prompt, False)}
        if isinstance(each, Choices):
            return {"request": number, **_fed_choices(each, tokenizer)}
    return None


def _fed_choices(choices: Choices, tokenizer: Tokenizer) -> dict[str, object]:
    continuations = [{"ids": list(ids), "text": tokenizer.decode(ids, False)} for ids in choices.continuations]
    text = tokenizer.decode(choices.context, False)
    return {"ids": list(choices.context), "text": text, "continuations": continuations}


def check_requests(requests: Sequence[Request], records: int) -> None:
    """Asserts what a task promises: each request is of a record that there is, and no part of a record is asked twice.

    Args:
        records: their number.
    """
    keys = [(request.record, request.part) for request in requests]
    assert len(set(keys)) == len(keys), "a part of a record is asked twice"
    assert all(0 <= record < records for record, _ in keys), "a request is of no record"
