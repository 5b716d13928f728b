"""Information extraction (KnowLM, DeepKE): entities, relations, events and their arguments, by micro F1 over tuples."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import ie
from jaxlm.evaluation.metrics.ie import Extracted
from jaxlm.evaluation.metrics.records import missing_text, written
from jaxlm.evaluation.metrics.tuples import Counts, count, precision_recall_f1, rounded_per_cent
from jaxlm.evaluation.task import Answers, Figure, Generate, Question, Request, Row, Task, mean
from jaxlm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of information extraction.

    Args:
        extract: NER entities, RE relations, EE events with their arguments, EET triggers of events, EEA arguments of
            events; in the newer format also SPO relations asked for with types of their ends, and KG attributes of
            entities.
        language: zh or en: how the older format's texts name their parts.
        match: multiset counts a tuple that stands twice twice; set once.
        as_published: figures as DeepKE's scripts print them, in per cent: for the newer format F1 from rounded
            precision and recall, for the older one without the records that were not answered.
        max_new_tokens: most tokens of an answer.
    """

    extract: Literal["NER", "RE", "SPO", "EE", "EET", "EEA", "KG"] = "RE"
    language: Literal["zh", "en"] = "zh"
    match: Literal["multiset", "set"] = "multiset"
    as_published: bool = False
    max_new_tokens: int = 512


# Resamples of records read the same texts again and again.
_label, _json, _text = (
    functools.lru_cache(maxsize=65536)(parse) for parse in (ie.parse_label, ie.parse_json_answer, ie.parse_text_answer)
)


def is_json(record: Row) -> bool:
    """Whether a record is of the newer format, with a label in JSON."""
    return "label" in record


def check(record: Row, options: Options) -> str | None:
    """What is wrong with a record."""
    if is_json(record):
        problem = missing_text(record, "instruction", "label")
    else:
        problem = missing_text(record, "instruction", "input", "output")
    if problem is None and not is_json(record) and options.extract in ("SPO", "KG"):
        problem = f"has no 'label'; {options.extract} is of the newer format alone"
    if problem is not None:
        return problem
    try:
        right = _reference(record, options)
    except UserError as error:
        return str(error)
    if not right.is_readable:
        return f"the output {record['output'][:60]!r} has none of the shapes of {options.extract}"
    return None


def _reference(record: Row, options: Options) -> Extracted:
    if is_json(record):
        return _label(record["label"], options.extract)
    triples = record.get("kg")
    if options.extract == "RE" and isinstance(triples, list):  # CCKS 2023: [[head, relation, tail], …]
        if not all(isinstance(triple, list) and len(triple) == 3 for triple in triples):
            raise UserError("kg must be a list of [head, relation, tail]")
        return Extracted(tuple(tuple(str(part) for part in triple) for triple in triples))
    return _text(record["output"], record["input"], options.extract, options.language)


def _found(record: Row, text: str, options: Options) -> Extracted:
    if is_json(record):
        return _json(text, options.extract, options.as_published)
    return _text(text, record["input"], options.extract, options.language)


def requests(records: Sequence[Row], options: Options, tokenizer: Tokenizer) -> list[Request]:
    """One answer for each record."""
    settings = Decoding(max_new_tokens=options.max_new_tokens)
    return [
        Generate(
            record=number,
            context=Question(record["instruction"], None if is_json(record) else record["input"] or None),
            settings=settings,
        )
        for number, record in enumerate(records)
    ]


@dataclasses.dataclass(frozen=True)
class _Document:
    """What was extracted from a text, over all records that ask about it, and what is right."""

    source: str
    right: Extracted
    found: Extracted
    is_answered: bool
    is_json: bool


def _documents(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> list[_Document]:
    """Records of the newer format with one source and id ask for parts of one schema: their answers are put together.

    A question that comes again (as in a resample) begins a text of its own.
    """
    grouped: dict[tuple[Any, ...], _Document] = {}
    asked: dict[tuple[Any, ...], int] = {}
    for number, record in enumerate(records):
        source, identity = str(record.get("source", "")), record.get("id") if is_json(record) else None
        key: tuple[Any, ...] = (number,)
        if identity is not None:
            question = (source, str(identity), record["instruction"])
            asked[question] = asked.get(question, 0) + 1
            key = (source, str(identity), asked[question])
        extracted = _found(record, written(answers[number]), options)
        is_answered = bool(answers[number]) and all(answer.error is None for answer in answers[number].values())
        before = grouped.get(key)
        if before is not None:
            extracted = Extracted(before.found.tuples + extracted.tuples, before.found.arguments + extracted.arguments)
            is_answered = is_answered or before.is_answered
        grouped[key] = _Document(source, _reference(record, options), extracted, is_answered, is_json(record))
    return list(grouped.values())


def score(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """Precision, recall and F1 of all texts and of those of each source; the share of answers of another form."""
    documents = _documents(records, answers, options)
    if options.as_published and not is_json(records[0]):
        documents = [document for document in documents if document.is_answered]
    figures = _figures("", documents, options)
    sources = list(dict.fromkeys(document.source for document in documents))
    for source in sources if len(sources) > 1 else []:
        own = [document for document in documents if document.source == source]
        figures |= _figures(f"{source or 'no source'}: ", own, options)
    unreadable = {
        number: float(not _found(record, written(answers[number]), options).is_readable)
        for number, record in enumerate(records)
    }
    return figures | {"unreadable": mean(unreadable, higher_is_better=False)}


def _figures(prefix: str, documents: Sequence[_Document], options: Options) -> dict[str, Figure]:
    groups = {"EE": ("event_", "argument_"), "EEA": ("argument_",)}
    figures = {}
    for group in groups.get(options.extract, ("",)):
        counts = Counts()
        for document in documents:
            right, extracted = document.right, document.found
            pair = (right.arguments, extracted.arguments) if group == "argument_" else (right.tuples, extracted.tuples)
            counts = counts.plus(count(*pair, options.match == "set"))
        if not options.as_published:
            values = precision_recall_f1(counts)
        elif any(document.is_json for document in documents):
            values = rounded_per_cent(counts)
        else:
            values = tuple(100 * value for value in precision_recall_f1(counts))  # type: ignore[assignment]
        for name, value in zip(("precision", "recall", "f1"), values, strict=True):
            figures[f"{prefix}{group}{name}"] = Figure(value, None, len(documents))
    return figures


def files(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, bytes]:
    """Answers of the older format about relations as CCKS 2023 takes them: the record with its output and triples."""
    if options.extract != "RE" or any(is_json(record) for record in records):
        return {}
    lines = []
    for record, parts in zip(records, answers, strict=True):
        text = written(parts)
        triples = _found(record, text, options).tuples
        lines.append(json.dumps({**record, "output": text, "kg": triples}, ensure_ascii=False))
    return {"submission.jsonl": ("\n".join(lines) + "\n").encode()}


def details(records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options) -> str:
    """How it was counted."""
    how = "as multisets" if options.match == "multiset" else "as sets"
    text = f"Tuples are compared {how} and exactly; figures are micro: formed from the sums over all texts."
    return f"{text} `unreadable` is the share of answers of another form; their tuples are none.\n"


TASK = Task(
    name="ie",
    summary="Information extraction of KnowLM and DeepKE: entities, relations, events, by F1 over tuples.",
    expects=(
        "instruction and label, both JSON in a text (IEPile, OneKE), or instruction, input and output, the output in "
        "one of InstructIE's shapes, e.g. '(head,relation,tail)'"
    ),
    requests=requests,
    score=score,
    check=check,
    options=Options,
    key=None,  # records about parts of one schema have one id
    details=details,
    files=files,
)
