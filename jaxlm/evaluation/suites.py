"""The suites of jaxlm as tasks of lm-evaluation-harness: what the task files in `lm_eval/` call.

A task file names its suite, its data file and its template in `metadata`. The harness asks the model; what the answers
are worth is counted here by the suite's own scorer, so that the figures are those of `jaxlm evaluate --task SUITE`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import datasets

from jaxlm.data.records import Record
from jaxlm.data.templates import load_template
from jaxlm.errors import UserError
from jaxlm.evaluation.job import check_options, read_job, read_options
from jaxlm.evaluation.metrics import geobench
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Answer, Answers, Figure, Generate, Question, Row
from jaxlm.evaluation.tasks.geobench import prompts
from jaxlm.inference.text import BROKEN
from jaxlm.locate import on_disk
from jaxlm.tokenizer import Tokenizer

# Every question twice: the labels behind a space (for LLaMA's tokenizer the tokens of K2's tables), and as they stand.
FORMS = ("spaced", "plain")
# What may be given in place of a task file's metadata.
METADATA = ("data", "template", "ending", "options")
# Those that ask in words with a template of ours, and count without people or further models.
ASKED_IN_WORDS = (
    "geobench_subjective",
    "ie",
    "lpm24_captions",
    "lpm24_molecules",
    "matbench",
    "mdp",
    "molinstructions",
    "sii",
)
# Options that a task file cannot mean: the harness decides how is asked, and counts record by record.
_ELSEWHERE = {
    "as_published": "use `jaxlm evaluate --task {suite} --options.as_published true`",
    "fcd": "use `jaxlm evaluate --task {suite} --options.fcd true`",
    "max_new_tokens": "give generation_kwargs in the task file, or --options.gen_kwargs '{{max_gen_toks: N}}'",
}
# What the harness calls a document: a record with its prompt.
Doc = Mapping[str, Any]


def read(
    suite: str,
    data: str,
    template: str | None = None,
    ending: str | None = None,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> dict[str, datasets.Dataset]:
    """The documents of a task file, from its `metadata`.

    Args:
        suite: the task of `jaxlm evaluate`.
        data: its file.
        template: a template of jaxlm for a single question, by name or as a JSON file; text: the question and its input
            as they stand, for the harness to put into the tokenizer's chat template. None: alpaca.
        ending: GeoBench, instead of a template: "wa" or "woa", see its suite. None: wa.
        options: the suite's own, as with --options.
        others: further keys of metadata (version), which are not looked at.

    Returns:
        {"test": documents}; each has `prompt`, and `choices` where answers are compared by their probability.

    Raises:
        UserError: for a file of another suite, a record or an option that cannot be meant.
    """
    texts = {"data": data, "template": template, "ending": ending}
    strange = next((name for name, value in texts.items() if not isinstance(value, str | None)), None)
    if strange is not None:
        raise UserError(f"metadata.{strange}: expected a text, found {texts[strange]!r}")
    if not isinstance(options, Mapping | None):
        raise UserError(f"metadata.options: expected {{NAME: VALUE}}, found {options!r}")
    given = dict(options or {})
    if suite not in ("geobench", *ASKED_IN_WORDS):
        known = ", ".join(("geobench", *ASKED_IN_WORDS))
        raise UserError(f"metadata.suite: {suite!r} cannot be asked by lm_eval; there are {known}")
    useless = "template" if suite == "geobench" else "ending"
    if texts[useless] is not None:
        raise UserError(f"metadata.{useless}: has no meaning for {suite}; leave it out")
    task = get_task(suite)
    check_options([task], given)
    for name, way_out in _ELSEWHERE.items():
        if given.get(name):
            raise UserError(f"options.{name}: is not for the harness; {way_out.format(suite=suite)}")
    job = read_job(task, on_disk(data, "data", "data"), given)
    common = {"suite": suite, "options": json.dumps(given)}
    asked = (
        _choices(job.records, job.options, ending or "wa")
        if suite == "geobench"
        else _questions(job, template or "alpaca")
    )
    docs = [{**common, "record": json.dumps(job.records[number]), **fields} for number, fields in asked]
    if not docs:
        raise UserError(f"data: {data} has no question that counts")
    return {"test": datasets.Dataset.from_list(docs)}


def _choices(records: Sequence[Row], options: Any, ending: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """GeoBench's questions that count, by number of the record."""
    if ending not in geobench.PROMPTS:
        raise UserError(f"metadata.ending: {ending!r} must be one of {', '.join(geobench.PROMPTS)}")
    for number, question, texts in prompts(records, options):
        choices = [f" {label}" for label in question.labels] + list(question.labels)
        yield (
            number,
            {
                "prompt": texts[ending],
                "choices": choices,
                "target": question.answer,
                "part": f"{ending}:{'+'.join(FORMS)}",
            },
        )


def _questions(job: Any, template: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """What is asked in words, by number of the record."""
    frame = None if template == "text" else load_template(template, None)
    # Suites that ask in words look at no tokenizer.
    for request in job.task.requests(job.records, job.options, cast(Tokenizer, None)):
        if not isinstance(request, Generate):
            continue
        assert isinstance(request.context, Question)
        text, extra = request.context.text, request.context.input
        if frame is None:
            prompt = f"{text}\n\n{extra}" if extra else text  # as conversations have it
        else:
            fields = {"instruction": text} | ({} if extra is None else {"input": extra})
            prompt = frame.render_prompt(Record(job.names[request.record], fields)).text()
        yield request.record, {"prompt": prompt}


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A document with its answer.

    Attributes:
        options, record: as JSON.
    """

    suite: str
    options: str
    record: str
    answers: Answers


@dataclasses.dataclass(frozen=True)
class Together:
    """A document's part in a figure that is taken over all of them, as BLEU is."""

    metric: str
    case: Case

    def __str__(self) -> str:
        return "counted with all records"


def score_text(doc: Doc, results: Sequence[str]) -> dict[str, float | Together]:
    """`process_results` of what the model writes; half a character at its end is left out, as it is by jaxlm itself."""
    return _values(doc, {"answer": Answer(texts=(results[0].rstrip(BROKEN).strip(),))})


def score_choices(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, float | Together]:
    """`process_results` of the log-likelihoods of `choices`.

    A line break between the prompt and its label, which the harness counts with the label, changes no figure: it is
    equally probable for all of them.
    """
    return _values(doc, {doc["part"]: Answer(log_probs=tuple(float(value) for value, _ in results))})


def _values(doc: Doc, answers: Answers) -> dict[str, float | Together]:
    """The document's value in each mean that it counts for, and its part in other figures."""
    case = Case(doc["suite"], doc["options"], doc["record"], answers)
    return {
        name: figure.values[0] if figure.values else Together(name, case)
        for name, figure in _figures((case,)).items()
        if figure.n
    }


def together(parts: Sequence[Together]) -> float:
    """`aggregation` of a figure that is not a mean over records."""
    return _figures_of_all(tuple(part.case for part in parts))[parts[0].metric].value


@functools.lru_cache(maxsize=1)  # the harness asks for one figure of the same documents after the other
def _figures_of_all(cases: tuple[Case, ...]) -> dict[str, Figure]:
    return _figures(cases)


def _figures(cases: Sequence[Case]) -> dict[str, Figure]:
    task, options = get_task(cases[0].suite), _options(cases[0].suite, cases[0].options)
    return task.score([json.loads(case.record) for case in cases], [case.answers for case in cases], options)


@functools.lru_cache(maxsize=8)
def _options(suite: str, text: str) -> Any:
    return read_options(get_task(suite), json.loads(text))
