"""Numbers that Darwin predicts: properties of solar cells (`mdp`), and Matbench's (`matbench`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.evaluation.metrics import regression
from jaxlm.evaluation.metrics.records import missing_text, written
from jaxlm.evaluation.metrics.regression import Pair
from jaxlm.evaluation.task import Answers, Figure, Generate, Prompt, Question, Request, Row, Task, mean
from jaxlm.evaluation.tasks.sii import DRAWN

if TYPE_CHECKING:
    import matplotlib.figure


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Darwin's numbers.

    Args:
        as_published: ask and count as Darwin's scripts do; else with the model's own template, the most probable
            tokens, and numbers by their names.
        max_new_tokens: most tokens of an answer.
    """

    as_published: bool = False
    max_new_tokens: int = 250


def _ask(records: Sequence[Row], options: Options, published_prompt: Callable[[Row], str]) -> list[Request]:
    """One answer for each record."""
    settings = dataclasses.replace(DRAWN if options.as_published else Decoding(), max_new_tokens=options.max_new_tokens)
    requests: list[Request] = []
    for number, record in enumerate(records):
        context: Prompt = Question(record["instruction"], record.get("input") or None)
        if options.as_published:
            context = published_prompt(record)
        requests.append(Generate(record=number, context=context, settings=settings))
    return requests


def _errors(name: str, pairs: Mapping[int, Pair]) -> dict[str, Figure]:
    """Mean absolute error, root mean squared error and R2 of numbers by record."""
    values = list(pairs.values())
    nothing = math.nan
    absolute = {number: abs(pair.answer - pair.given) for number, pair in pairs.items()}
    return {
        f"{name}mae": mean(absolute, higher_is_better=False),
        f"{name}rmse": Figure(
            regression.rmse(values) if values else nothing, None, len(values), higher_is_better=False
        ),
        f"{name}r2": Figure(regression.r2(values) if values else nothing, None, len(values)),
    }


# --- devices ----------------------------------------------------------------------------------------------------------


def device_prompt(record: Row) -> str:
    """What regression_test.py asks."""
    return f"instruction: {record['instruction']}, input: {record['input']}"


def _check_device(record: Row, options: Options) -> str | None:
    problem = missing_text(record, "instruction", "input", "output")
    if problem is None:
        try:
            regression.reference_values(record["output"])
        except UserError as error:
            return str(error)
    return problem


def _pairs(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, dict[int, Pair]]:
    pairs: dict[str, dict[int, Pair]] = {name: {} for name in regression.PROPERTIES}
    for number, record in enumerate(records):
        given = written(answers[number])
        for name, pair in (regression.device_pairs(record["output"], given, options.as_published) or {}).items():
            pairs[name][number] = pair
    return pairs


def _score_devices(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """Errors of Voc, Jsc and PCE, and the share of them that a number was given for."""
    figures: dict[str, Figure] = {}
    references = [regression.reference_values(record["output"]) for record in records]
    for name, pairs in _pairs(records, answers, options).items():
        figures |= _errors(f"{name.lower()}_", pairs)
        asked = [number for number, values in enumerate(references) if name in values]
        figures[f"{name.lower()}_answered"] = mean({number: float(number in pairs) for number in asked})
    return figures


def _details_devices(
    records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options
) -> str:
    lines = ["| | mean of the right numbers | their variance |", "|---|---|---|"]
    for name, pairs in _pairs(records, answers, options).items():
        values = [pair.answer for pair in pairs.values()]
        if values:
            average = sum(values) / len(values)
            variance = sum((value - average) ** 2 for value in values) / len(values)
            lines.append(f"| {name} | {average:.4g} | {variance:.4g} |")
    return "\n".join(lines) + "\n\nErrors are taken over the numbers that were given; `answered` is their share.\n"


def _plot_devices(
    figure: matplotlib.figure.Figure,
    records: Sequence[Row],
    answers: Sequence[Answers],
    figures: Mapping[str, Figure],
    options: Options,
) -> None:
    """Darwin's three panels: predicted over measured, in its ranges, which grow where numbers lie outside."""
    figure.set_size_inches(10.5, 3.5)
    for place, (name, pairs) in enumerate(_pairs(records, answers, options).items(), 1):
        title, limits = regression.PROPERTIES[name]
        axes = figure.add_subplot(1, 3, place)
        numbers = [limits[0], limits[1], *(value for pair in pairs.values() for value in pair)]
        low, high = min(numbers), max(numbers)
        if pairs:  # without clipping, markers that are none would leave no room for the axes
            points = zip(*pairs.values(), strict=True)
            axes.plot(*points, "o", clip_on=False)
        axes.plot([low, high], [low, high], color="green", linewidth=1.0, linestyle="--")
        axes.set(xlim=(low, high), ylim=(low, high), xlabel=f"Experimental {title}", ylabel=f"Predicted {title}")


# --- Matbench ---------------------------------------------------------------------------------------------------------


def matbench_prompt(record: Row) -> str:
    """The prompt of evaluate_matbench.py: alpaca's, with four spaces in front of every line but the first."""
    paired, given = "", ""
    if record.get("input"):
        paired = ", paired with an input that provides further context"
        given = f"    ### Input:\n    {record['input']}\n"
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n    ### Instruction:\n    {record['instruction']}\n{given}    ### Response:"
    )


def _check_matbench(record: Row, options: Options) -> str | None:
    problem = missing_text(record, "instruction", "output")
    if problem is None and not isinstance(record.get("input", ""), str):
        problem = missing_text(record, "input")
    if problem is None and _reference(record) is None and not _is_distractor(record):
        problem = f"the output {record['output'][:60]!r} neither is a number nor begins with Yes or No"
    return problem


def _is_distractor(record: Row) -> bool:
    """Darwin's files mix in words ("asparagus is not a composition and …"), which have no verdict."""
    return "is not a composition" in record["output"]


def _reference(record: Row) -> float | bool | None:
    verdict = regression.yes_or_no(record["output"])
    if verdict is not None:
        return verdict
    try:
        value = float(record["output"])
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _given(record: Row, text: str, options: Options) -> float | bool | None:
    """The answer as a number or a verdict, as the record asks for; None when it is neither."""
    if isinstance(_reference(record), bool) or _is_distractor(record):
        return regression.yes_or_no(text, options.as_published)
    return regression.published_number(text) if options.as_published else regression.first_number(text)


def _score_matbench(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """Errors of numbers, and accuracy and F1 of verdicts; as published, verdicts that are none are left out.

    Words that are not compositions are not counted.
    """
    pairs: dict[int, Pair] = {}
    verdicts: dict[int, tuple[bool, bool | None]] = {}
    answered: dict[int, float] = {}
    for number, record in enumerate(records):
        right, given = _reference(record), _given(record, written(answers[number]), options)
        if right is None:
            continue
        answered[number] = float(given is not None)
        if isinstance(right, bool):
            if given is not None or not options.as_published:
                verdicts[number] = right, None if given is None else bool(given)
        elif given is not None:
            pairs[number] = Pair(right, float(given))
    figures: dict[str, Figure] = {}
    references = [_reference(record) for record in records]
    if any(isinstance(right, float) for right in references):
        figures |= _errors("", pairs)
    if any(isinstance(right, bool) for right in references):
        figures["accuracy"] = mean({number: float(right is given) for number, (right, given) in verdicts.items()})
        hits = sum(right and given is True for right, given in verdicts.values())
        wrong = sum(right is not given and (right or given is True) for right, given in verdicts.values())
        figures["f1"] = Figure(2 * hits / (2 * hits + wrong) if hits + wrong else math.nan, None, len(verdicts))
    return figures | {"answered": mean(answered)}


def _details_matbench(
    records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options
) -> str:
    return f"Words that are not compositions, mixed in by Darwin and not counted: {sum(map(_is_distractor, records))}\n"


def _files_matbench(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, bytes]:
    """The script's own output, {input, output} with numbers and truth values; answers that are none are left out."""
    lines = [
        {"input": record.get("input", ""), "output": given}
        for record, parts in zip(records, answers, strict=True)
        if (given := _given(record, written(parts), options)) is not None
    ]
    return {"matbench.json": (json.dumps(lines, ensure_ascii=False) + "\n").encode()}


TASKS = {
    task.name: task
    for task in (
        Task(
            name="mdp",
            summary="Darwin's device properties: errors of Voc, Jsc and PCE of solar cells.",
            expects="instruction, input and output, the output with lines 'JV default Voc: 1.05', Jsc, FF and PCE",
            requests=lambda records, options, tokenizer: _ask(records, options, device_prompt),
            score=_score_devices,
            check=_check_device,
            options=Options,
            details=_details_devices,
            plot=_plot_devices,
        ),
        Task(
            name="matbench",
            summary="Darwin's Matbench files: a number, or Yes or No, for a composition.",
            expects="instruction, input and output, the output a number (steels, gaps) or Yes or No (glass, metals)",
            requests=lambda records, options, tokenizer: _ask(records, options, matbench_prompt),
            score=_score_matbench,
            check=_check_matbench,
            options=Options,
            details=_details_matbench,
            files=_files_matbench,
        ),
    )
}
