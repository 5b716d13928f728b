"""Mol-Instructions (zjunlp): molecules, proteins and biomedical texts, by the figures of its evaluation scripts.

Facts: `evaluation/` of zjunlp/Mol-Instructions. With `as_published`, answers that are not molecules are left out before
anything is counted, as the scripts do it; else they count as wrong. ROUGE is that of
`rouge-score`, which the scripts use for proteins and captions; for open questions they use the package `rouge`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxlm.config import Decoding
from jaxlm.evaluation.lpm24 import hf_tokens, word_tokens
from jaxlm.evaluation.metrics import molecules, regression, text
from jaxlm.evaluation.metrics.bert_score import bert_scorer
from jaxlm.evaluation.metrics.records import missing_text, written
from jaxlm.evaluation.metrics.tuples import count, precision_recall_f1
from jaxlm.evaluation.task import Answers, Figure, Generate, Question, Request, Row, Task, mean
from jaxlm.evaluation.tasks.lpm24 import molecule_figures, text_figures
from jaxlm.locate import ReadPath
from jaxlm.tokenizer import Tokenizer

Kind = Literal["molecule", "caption", "property", "protein", "entities", "pairs", "choice", "verdict", "open"]
# Words in metadata.task -> the kind; the first that fits.
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("description guided", "molecule"),
    ("forward reaction", "molecule"),
    ("retrosynthesis", "molecule"),
    ("reagent", "molecule"),
    ("molecular description", "caption"),
    ("property", "property"),
    ("protein interaction", "pairs"),
    ("disease interaction", "pairs"),
    ("entity recognition", "entities"),
    ("multi choice", "choice"),
    ("true or false", "verdict"),
    ("open question", "open"),
    ("protein function", "protein"),
    ("general function", "protein"),
    ("functional description", "protein"),
    ("catalytic", "protein"),
    ("domain", "protein"),
)
VERDICTS = ("yes", "no", "maybe")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Mol-Instructions.

    Args:
        kind: what the answers are: molecule (SELFIES), caption of a molecule, property (a number), protein (a text
            about one), entities (parted by ", "), pairs (in parentheses), choice (a letter), verdict (yes, no or
            maybe), open (a text). auto: as the record's metadata.task says.
        as_published: leave answers that are not molecules out, before anything is counted.
        metric_tokenizer: directory of the Hugging Face tokenizer whose pieces captions' BLEU counts (SciBERT's); null:
            words and signs.
        nltk_data: directory with NLTK's corpora/wordnet, for METEOR of captions; null: no METEOR.
        bert_model: directory of a Hugging Face encoder (there roberta-large), for BERTScore of open questions; null:
            no BERTScore.
        bert_layer: whose states BERTScore compares; 17 of roberta-large, 10 of roberta-base, 9 of bert-base-uncased.
        max_new_tokens: most tokens of an answer.
    """

    kind: Literal[
        "auto", "molecule", "caption", "property", "protein", "entities", "pairs", "choice", "verdict", "open"
    ] = "auto"
    as_published: bool = False
    metric_tokenizer: ReadPath | None = None
    nltk_data: ReadPath | None = None
    bert_model: ReadPath | None = None
    bert_layer: int = 17
    max_new_tokens: int = 512


def kind_of(record: Row, options: Options) -> Kind | None:
    """What a record's answer is; None when nothing says so."""
    if options.kind != "auto":
        return options.kind
    metadata = record.get("metadata")
    task = metadata.get("task") if isinstance(metadata, Mapping) else record.get("task")
    plain = str(task or "").lower().replace("_", " ").replace("-", " ").replace("/", " ")
    return next((kind for words, kind in _KINDS if words in plain), None)


def check(record: Row, options: Options) -> str | None:
    """What is wrong with a record."""
    problem = missing_text(record, "instruction", "output")
    if problem is not None:
        return problem
    if not isinstance(record.get("input", ""), str):
        return missing_text(record, "input")
    kind, output = kind_of(record, options), record["output"]
    if kind is None:
        return "metadata.task names no task with a measure; name the kind of the answers with --options.kind"
    if kind == "molecule" and _smiles(output) is None:
        return f"the output {output[:60]!r} is not a molecule in SELFIES"
    if kind == "property" and regression.first_number(output) is None:
        return f"the output {output[:60]!r} has no number"
    if kind == "choice" and right_choice(output) is None:
        return f"the output {output[:60]!r} has no letter in parentheses"
    if kind == "verdict" and verdict(output) not in VERDICTS:
        return f"the output {output[:60]!r} does not begin with {', '.join(VERDICTS)} and a comma"
    return None


def _smiles(answer: str) -> str | None:
    """SMILES without stereochemistry of an answer in SELFIES, which its last bracket ends; None for no molecule."""
    smiles = molecules.from_selfies(_selfies(answer))
    return None if smiles is None else molecules.canonical(smiles, with_stereo=False)


def _selfies(answer: str) -> str:
    before, bracket, _ = answer.strip().rpartition("]")
    return (before + bracket).strip()


def entities(answer: str) -> set[str]:
    """Entities, parted by ", "."""
    return set(answer.strip().lower().split(", "))


def pairs(answer: str) -> set[str]:
    """Everything in parentheses."""
    return set(re.findall(r"\(.*?\)", answer.lower()))


def right_choice(output: str) -> str | None:
    """The letter in the first parentheses of a right answer."""
    match = re.search(r"\(([^)]*)\)", output)
    return match.group(1) if match else None


def chosen(answer: str) -> str:
    """The letter that an answer names: the first of A to D in or beside parentheses, or alone; else its first sign."""
    for letter in "ABCD":
        if f"({letter}" in answer or f"{letter})" in answer or f" {letter} " in answer:
            return letter
    return answer.strip()[:1]


def verdict(answer: str) -> str:
    """What stands before the first comma, in small letters."""
    return answer.split(",")[0].strip().lower()


def requests(records: Sequence[Row], options: Options, tokenizer: Tokenizer) -> list[Request]:
    """One answer for each record."""
    settings = Decoding(max_new_tokens=options.max_new_tokens)
    return [
        Generate(record=number, context=Question(record["instruction"], record.get("input") or None), settings=settings)
        for number, record in enumerate(records)
    ]


def check_options(options: Options) -> None:
    """Raises UserError for a tokenizer, or data of NLTK, that are not there."""
    if options.metric_tokenizer is not None:
        hf_tokens(options.metric_tokenizer)
    if options.nltk_data is not None:
        text.meteor(["a"], ["a"], Path(options.nltk_data))
    if options.bert_model is not None:
        bert_scorer(options.bert_model, options.bert_layer)


def score(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """The figures of each kind of answer that the records have."""
    measures = {
        "molecule": _score_molecules,
        "caption": _score_captions,
        "property": _score_numbers,
        "protein": _score_proteins,
        "entities": _score_entities,
        "pairs": _score_pairs,
        "choice": _score_choices,
        "verdict": _score_verdicts,
        "open": _score_open,
    }
    kinds = [kind_of(record, options) for record in records]
    figures: dict[str, Figure] = {}
    for kind, measure in measures.items():
        numbers = [number for number, each in enumerate(kinds) if each == kind]
        if not numbers:
            continue
        outputs = [(records[number]["output"], written(answers[number])) for number in numbers]
        for name, figure in measure(outputs, options).items():
            # Values by the number of the record among all.
            own = {numbers[at]: value for at, value in figure.values.items()}
            figures[f"{kind}_{name}"] = dataclasses.replace(figure, values=own)
    return figures


Outputs = Sequence[tuple[str, str]]


def _score_molecules(outputs: Outputs, options: Options) -> dict[str, Figure]:
    """exact, levenshtein, validity and similarities of SMILES; bleu of the SELFIES, sign by sign."""
    read = [(_smiles(right) or "", _smiles(answer) or "") for right, answer in outputs]
    counted = [at for at, (_, given) in enumerate(read) if given or not options.as_published]
    if not counted:
        return {"validity": Figure(0.0, None, 0)}
    figures = molecule_figures([read[at][0] for at in counted], [read[at][1] for at in counted])
    selfies = [([*_selfies(outputs[at][0])], [*_selfies(outputs[at][1])]) for at in counted]
    bleu = text.corpus_bleu([pair[0] for pair in selfies], [pair[1] for pair in selfies], (0.25,) * 4)
    figures["bleu"] = Figure(bleu, None, len(counted))
    return {
        name: dataclasses.replace(figure, values={counted[at]: value for at, value in figure.values.items()})
        for name, figure in figures.items()
    }


def _score_captions(outputs: Outputs, options: Options) -> dict[str, Figure]:
    """Captions end with their last full stop, as in the scripts."""
    answers = [before + stop if stop else rest for before, stop, rest in (out.rpartition(".") for _, out in outputs)]
    tokens = word_tokens if options.metric_tokenizer is None else hf_tokens(options.metric_tokenizer)
    nltk_data = None if options.nltk_data is None else Path(options.nltk_data)
    return text_figures([right for right, _ in outputs], answers, tokens, nltk_data)


def _score_numbers(outputs: Outputs, options: Options) -> dict[str, Figure]:
    errors: dict[int, float] = {}
    answered: dict[int, float] = {}
    for at, (right, answer) in enumerate(outputs):
        given, wanted = regression.first_number(answer), regression.first_number(right)
        answered[at] = float(given is not None)
        if given is not None and wanted is not None:
            errors[at] = abs(given - wanted)
    return {"mae": mean(errors, higher_is_better=False), "answered": mean(answered)}


def _score_proteins(outputs: Outputs, options: Options) -> dict[str, Figure]:
    scores = [text.rouge(right, answer) for right, answer in outputs]
    return {name: mean(dict(enumerate(each[name] for each in scores))) for name in text.ROUGE}


def _macro_f1(sets: Sequence[tuple[set[str], set[str]]]) -> dict[str, Figure]:
    values = [precision_recall_f1(count(right, given, as_sets=True))[2] for right, given in sets]
    return {"f1": mean(dict(enumerate(values)))}


def _score_entities(outputs: Outputs, options: Options) -> dict[str, Figure]:
    return _macro_f1([(entities(right), entities(answer)) for right, answer in outputs])


def _score_pairs(outputs: Outputs, options: Options) -> dict[str, Figure]:
    return _macro_f1([(pairs(right), pairs(answer)) for right, answer in outputs])


def _score_choices(outputs: Outputs, options: Options) -> dict[str, Figure]:
    hits = [float(right_choice(right) == chosen(answer)) for right, answer in outputs]
    return {"accuracy": mean(dict(enumerate(hits)))}


def _score_verdicts(outputs: Outputs, options: Options) -> dict[str, Figure]:
    """Accuracy, and the mean of the F1 of yes, no and maybe."""
    said = [(verdict(right), verdict(answer)) for right, answer in outputs]
    f1 = []
    for each in VERDICTS:
        both = sum(right == answer == each for right, answer in said)
        total = sum(right == each for right, _ in said) + sum(answer == each for _, answer in said)
        f1.append(2 * both / total if total else 0.0)
    return {
        "accuracy": mean({at: float(right == answer) for at, (right, answer) in enumerate(said)}),
        "macro_f1": Figure(math.fsum(f1) / len(f1), None, len(said)),
    }


def _score_open(outputs: Outputs, options: Options) -> dict[str, Figure]:
    """Mean BLEU-4 of words in small letters, ROUGE-1, and the F1 of BERTScore where there is a model for it."""
    bleu = [text.sentence_bleu(right.lower().split(), answer.lower().split()) for right, answer in outputs]
    rouge = [text.rouge(right, answer)["rouge_1"] for right, answer in outputs]
    figures = {"bleu": mean(dict(enumerate(bleu))), "rouge_1": mean(dict(enumerate(rouge)))}
    if options.bert_model is not None:
        likeness = bert_scorer(options.bert_model, options.bert_layer)
        figures["bert_score"] = mean({at: likeness(*pair)[2] for at, pair in enumerate(outputs)})
    return figures


TASK = Task(
    name="molinstructions",
    summary="Mol-Instructions: molecules, proteins and biomedical texts, by its scripts' figures.",
    expects="instruction, input, output and metadata {task}, or the kind of the answers as --options.kind",
    requests=requests,
    score=score,
    check=check,
    options=Options,
    check_options=check_options,
)
