"""Structured information (Darwin): 31 values of a solar cell from the text of a paper."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import sii
from jaxlm.evaluation.metrics.records import finished, missing_text, written
from jaxlm.evaluation.task import Answers, Figure, Generate, Prompt, Question, Request, Row, Task, mean
from jaxlm.tokenizer import Tokenizer

GROUPS = ("ie", *(f"ie_{name}" for name in sii.SETS), "ab", "ac", "abc_d")
ABILITIES = ("deduction", "normalisation", "summarisation")
# How Darwin's scripts draw answers.
DRAWN = Decoding(temperature=0.8, top_p=0.75, top_k=40)
_FINISH = "If prediction is finished, add </s> at the end of the output."


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Darwin's structured information.

    Args:
        as_published: ask as sii_test.py does (its own prompt, drawn answers) and count as sii_evaluate.ipynb does, its
            mistakes included; else the model's own template and the most probable tokens, and its mistakes put right.
        max_new_tokens: most tokens of an answer. The script has no such end: it asks again until </s> comes.
    """

    as_published: bool = False
    max_new_tokens: int = 1024


def published_prompt(record: Row) -> str:
    """What sii_test.py asks; no space parts the instruction from what follows."""
    return f"instruction: {record['instruction']}{_FINISH}, input: {record['input']}"


def check(record: Row, options: Options) -> str | None:
    """What is wrong with a record."""
    problem = missing_text(record, "instruction", "input", "output")
    if problem is None:
        try:
            sii.parse_reference(record["output"])
        except UserError as error:
            return str(error)
    return problem


def requests(records: Sequence[Row], options: Options, tokenizer: Tokenizer) -> list[Request]:
    """One answer for each record."""
    settings = dataclasses.replace(DRAWN if options.as_published else Decoding(), max_new_tokens=options.max_new_tokens)
    asked: list[Request] = []
    for number, record in enumerate(records):
        context: Prompt = Question(record["instruction"], record["input"] or None)
        if options.as_published:
            context = published_prompt(record)
        asked.append(Generate(record=number, context=context, settings=settings))
    return asked


class _Scored(NamedTuple):
    groups: dict[str, sii.Scores]
    abilities: dict[str, sii.Hits]
    is_complete: bool


@functools.lru_cache(maxsize=4096)  # resamples of documents score the same ones again and again
def _scored(output: str, text: str, answer: str, as_published: bool) -> _Scored:
    reference, values = sii.parse_reference(output), sii.parse_answer(answer, as_published)
    return _Scored(
        sii.document(reference, values, as_published),
        sii.abilities(reference, values, text, as_published),
        all(key in values for key in sii.KEYS),
    )


def score(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """Extraction, relations and abilities; `complete`: documents with all values, `finished`: that came to an end."""
    collected: dict[str, dict[int, float]] = {f"{group}_{name}": {} for group in GROUPS for name in sii.Scores._fields}
    hits = {name: sii.Hits() for name in ABILITIES}
    whole: dict[int, float] = {}
    ended: dict[int, float] = {}
    for number, record in enumerate(records):
        text = written(answers[number])
        document = _scored(record["output"], record["input"], text, options.as_published)
        for group, scores in document.groups.items():
            for name, value in scores._asdict().items():
                collected[f"{group}_{name}"][number] = value
        for name, found in document.abilities.items():
            hits[name] = sii.Hits(hits[name].found + found.found, hits[name].all + found.all)
        whole[number] = document.is_complete
        if any(answer.finishes for answer in answers[number].values()):
            ended[number] = finished(answers[number])
    figures = {name: mean(values) for name, values in collected.items()}
    if options.as_published:
        figures = {name: dataclasses.replace(figure, value=round(figure.value, 4)) for name, figure in figures.items()}
    for name, counted in hits.items():
        figures[name] = Figure(counted.found / counted.all if counted.all else float("nan"), None, counted.all)
    figures["complete"] = mean(whole)
    return figures | ({"finished": mean(ended)} if ended else {})


def details(records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options) -> str:
    """What the groups are, and what was counted how."""
    lines = [
        "`ie`: all 31 values; `ie_a`: materials, `ie_b`: the cell, `ie_c`: procedures, `ie_d`: stability. `ab`, `ac`, "
        "`abc_d`: combinations of words of such values. Figures are means over documents.",
        "",
    ]
    if options.as_published:
        dropped = len(records) - figures["ie_f1"].n
        lines.append(f"As published; documents left out because a value is missing: {dropped}.")
    else:
        lines.append("The notebook's mistakes are put right; `--options.as_published true` has them as they are.")
    return "\n".join(lines) + "\n"


TASK = Task(
    name="sii",
    summary="Darwin's structured information: 31 values of a solar cell from a text, and their relations.",
    expects="instruction, input and output, the output with 31 lines 'Substrate_stack_sequence: …' to 'Module: …'",
    requests=requests,
    score=score,
    check=check,
    options=Options,
    details=details,
)
