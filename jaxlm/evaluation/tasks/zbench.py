"""Z-Bench (LLM4Academic): Chinese questions whose answers people rate; the table comes back with a column of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.evaluation.judge import Judge
from jaxlm.evaluation.metrics import zbench
from jaxlm.evaluation.metrics.records import written
from jaxlm.evaluation.task import Answers, Figure, Generate, Prompt, Question, Request, Row, Task, mean
from jaxlm.locate import WrittenPath
from jaxlm.tokenizer import Tokenizer

_FIELDS = ("prompt", "reference", "type", "ratings", "cells", "end", "header", "header_end")
# jaxlm's own words.
_JUDGE = (
    "下面有一个问题、一个参考回答和一个系统的回答。请判断系统的回答是否正确。只回答“正确”或“错误”。\n\n"
    "问题：\n{prompt}\n\n参考回答：\n{reference}\n\n系统的回答：\n{answer}\n"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Z-Bench.

    Args:
        name: header of the column of answers; that of their rating, left empty for people, is the same with 答案评分.
        judge: endpoint that talks like OpenAI's, e.g. http://localhost:8000/v1, whose model rates the answers in a
            further column. Its ratings are not Z-Bench's.
        judge_model: name of the model there.
        judge_verdicts: file that keeps the verdicts (.jsonl), so that none is asked for twice.
        as_published: ask as LLM4Academic's evaluate.py does, with eight spaces in front of lines of its prompt and four
            beams.
        max_new_tokens: most tokens of an answer.
    """

    name: str = "jaxlm"
    judge: str | None = None
    judge_model: str | None = None
    judge_verdicts: WrittenPath | None = None
    as_published: bool = False
    max_new_tokens: int = 128


def read(path: Path, options: Options) -> list[Row]:
    """The questions of a table, with their lines as they stand."""
    lines = zbench.read_lines(path)
    header = lines[0] if lines else zbench.Line((), "")
    names, places = [name.strip() for name in header.values()], zbench.layout(path, header.values())
    if len(lines) < 2:
        raise UserError(f"data: {path} holds no question")
    records: list[Row] = []
    for number, line in enumerate(lines[1:], 2):
        values = line.values()
        if len(values) != len(names):
            raise UserError(
                f"data: {path}: row {number} has {len(values)} cells, the header {len(names)}; correct the row"
            )
        record: dict[str, Any] = {
            "prompt": values[places.question],
            "reference": values[places.reference],
            "type": values[places.kind],
            "ratings": {
                name.removesuffix(zbench.RATING).removesuffix("答案").strip(): values[at]
                for at, name in enumerate(names)
                if name.endswith(zbench.RATING)
            },
            "cells": line.cells,
            "end": line.end,
            "header": header.cells,
            "header_end": header.end,
        }
        records.append(record | ({"id": values[0]} if places.has_number and values[0] else {}))
    return records


def check(record: Row, options: Options) -> str | None:
    """What is wrong with a record."""
    missing = next((name for name in _FIELDS if name not in record), None)
    if missing is not None:
        return f"has no {missing!r}"
    return None if record["prompt"].strip() else "has an empty question"


def published_prompt(question: str) -> str:
    """LLM4Academic's prompt: alpaca's, in an indented text, whose spaces are a part of it."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"        ### Instruction:\n        {question}\n\n        ### Response:"
    )


def requests(records: Sequence[Row], options: Options, tokenizer: Tokenizer) -> list[Request]:
    """One answer for each question."""
    settings = Decoding(max_new_tokens=options.max_new_tokens, num_beams=4 if options.as_published else 1)
    asked: list[Request] = []
    for number, record in enumerate(records):
        context: Prompt = Question(record["prompt"])
        if options.as_published:
            context = published_prompt(record["prompt"])
        asked.append(Generate(record=number, context=context, settings=settings))
    return asked


def check_options(options: Options) -> None:
    """Raises UserError for a judge without a model or a file."""
    _judge(options)


def _judge(options: Options) -> Judge | None:
    if options.judge is None:
        return None
    if options.judge_model is None or options.judge_verdicts is None:
        missing = "judge_model" if options.judge_model is None else "judge_verdicts"
        raise UserError(
            f"options.{missing}: name the judge's model (judge_model) and a file for its verdicts (judge_verdicts)"
        )
    return Judge(options.judge, options.judge_model, Path(options.judge_verdicts))


def _judged(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> list[bool | None] | None:
    """The judge's verdicts; an empty answer is wrong, and not asked about."""
    judge = _judge(options)
    if judge is None:
        return None
    texts = [written(parts).strip() for parts in answers]
    pairs = [(record, text) for record, text in zip(records, texts, strict=True) if text]
    prompts = [
        _JUDGE.format(prompt=record["prompt"], reference=record["reference"] or "（无）", answer=text)
        for record, text in pairs
    ]
    verdicts = iter(judge.ask(prompts))
    return [zbench.verdict(next(verdicts)) if text else False for text in texts]


def score(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """Shares of answers rated as right: by people, for every rated column of the table, and by the judge."""
    figures: dict[str, Figure] = {}
    for system in dict.fromkeys(system for record in records for system in record["ratings"]):
        verdicts = {number: zbench.verdict(record["ratings"].get(system, "")) for number, record in enumerate(records)}
        rated = {number: float(verdict) for number, verdict in verdicts.items() if verdict is not None}
        if rated:
            figures[f"people: {system}"] = mean(rated)
    judged = _judged(records, answers, options)
    if judged is not None:
        given = {number: float(verdict) for number, verdict in enumerate(judged) if verdict is not None}
        figures[f"judge {options.judge_model}: {options.name}"] = mean(given)
    figures["answered"] = mean({number: float(bool(written(parts).strip())) for number, parts in enumerate(answers)})
    return figures


def files(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, bytes]:
    """The table with the columns of answers and of their ratings; where an answer is as before, so is its rating."""
    header = zbench.Line(tuple(records[0]["header"]), records[0]["header_end"])
    names = [name.strip() for name in header.values()]
    lines = [zbench.Line(tuple(record["cells"]), record["end"]) for record in records]
    texts = [written(parts).strip() for parts in answers]
    rating = f"{options.name} 答案{zbench.RATING}"
    ratings = [""] * len(lines)
    if options.name in names and rating in names:
        before, rated = names.index(options.name), names.index(rating)
        ratings = [
            line.values()[rated] if line.values()[before] == text else ""
            for line, text in zip(lines, texts, strict=True)
        ]
    columns = [(rating, ratings), (options.name, texts)]
    judged = _judged(records, answers, options)
    if judged is not None:
        shown = {True: zbench.RIGHT, False: zbench.WRONG, None: ""}
        # Not a column of ratings by its name: it does not end with 评分.
        columns.append((f"{options.name} 评分：{options.judge_model}（非 Z-Bench）", [shown[each] for each in judged]))
    own = zbench.layout(Path("zbench.csv"), header.values()).own
    return {"zbench.csv": zbench.with_columns(header, lines, columns, own)}


def details(records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options) -> str:
    """Where ratings come from."""
    text = (
        f"Z-Bench is rated by people: zbench.csv has the answers in the column {options.name!r}; fill in its rating, "
        f"{zbench.RIGHT} or {zbench.WRONG}, and score again with that file as --data and this run's predictions.jsonl "
        "as --predictions."
    )
    if options.judge is not None:
        text += f" The judge's ratings ({options.judge_model}) are not Z-Bench's, and cannot be compared with them."
    return text + "\n"


TASK = Task(
    name="zbench",
    summary="Z-Bench: Chinese questions, rated by people; the same table with a column of ours.",
    expects="a CSV file of Z-Bench, with columns 编号, Prompt, …, 参考回答, 任务类型, or Prompt, 任务类型, 参考回答",
    requests=requests,
    score=score,
    check=check,
    options=Options,
    check_options=check_options,
    read=read,
    details=details,
    files=files,
)
