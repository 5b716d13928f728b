"""LPM-24 (ACL L+M 2024 shared task): a caption for a molecule, and a molecule for a caption."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxlm.config import Decoding, SourceConfig
from jaxlm.data.records import read_records
from jaxlm.errors import UserError
from jaxlm.evaluation.lpm24 import ORDERS, hf_tokens, word_tokens
from jaxlm.evaluation.metrics import molecules, properties, text
from jaxlm.evaluation.metrics.records import written
from jaxlm.evaluation.pairs import read_rows
from jaxlm.evaluation.task import Answers, Figure, Generate, Question, Request, Row, Task, mean
from jaxlm.locate import ReadPath
from jaxlm.tokenizer import Tokenizer

MOLECULE = ("molecule", "SMILES", "smiles")
CAPTION = ("caption", "description")
GROUND_TRUTH = "ground truth"  # the right answer in the shared task's own tables
Tokens = Callable[[str], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """Options of captions.

    Args:
        question: what is asked; {molecule} is the SMILES.
        metric_tokenizer: directory of the Hugging Face tokenizer whose pieces are counted (LPM-24: SciBERT's); null:
            words and signs.
        nltk_data: directory with NLTK's corpora/wordnet, for METEOR; null: no METEOR.
        properties: LPM-24's nested_props.json, for figures of the properties that captions name; null: none.
        combinations: LPM-24's train_withheld_combos.txt, for figures of pairs of properties; null: none.
        max_new_tokens: most tokens of an answer.
    """

    question: str = "Please describe the molecule below:\n<smiles>{molecule}</smiles>"
    metric_tokenizer: ReadPath | None = None
    nltk_data: ReadPath | None = None
    properties: ReadPath | None = None
    combinations: ReadPath | None = None
    max_new_tokens: int = 512


@dataclasses.dataclass(frozen=True)
class MoleculeOptions:
    """Options of molecules.

    Args:
        question: what is asked; {caption} is the description.
        morgan_radius: radius of Morgan fingerprints.
        fcd: the Fréchet ChemNet distance of all molecules too; needs the package fcd, and some seconds.
        max_new_tokens: most tokens of an answer.
    """

    question: str = "Please generate a SMILES chemical formula that matches the description below:\n{caption}"
    morgan_radius: int = 2
    fcd: bool = False
    max_new_tokens: int = 512


def _read(path: Path, options: object) -> list[Row]:
    """The records; .txt is the shared task's table."""
    if path.suffix.lower() in (".txt", ".tsv"):
        return list(read_rows(path, "data"))
    return [record.data for record in read_records(SourceConfig(path=str(path)))]


def field(record: Row, names: Sequence[str]) -> str | None:
    """The first text under one of these names."""
    return next((record[name] for name in names if isinstance(record.get(name), str)), None)


def _pair(record: Row, asked: Sequence[str], answered: Sequence[str]) -> tuple[str, str]:
    """What is asked about, and the right answer."""
    question, answer = field(record, asked), field(record, (*answered, GROUND_TRUTH))
    assert question is not None and answer is not None
    return question, answer


def _missing(record: Row, asked: Sequence[str], answered: Sequence[str]) -> str | None:
    for names in (asked, (*answered, GROUND_TRUTH)):
        if field(record, names) is None:
            return f"has no text in {', '.join(names)}; columns found: {', '.join(map(str, record)) or 'none'}"
    return None


def tagged(answer: str) -> str:
    """What stands between the first tags of an answer, if there are any; else the answer."""
    match = re.search(r"<(\w+)>(.*?)</\1>", answer, re.DOTALL)
    return (match.group(2) if match else answer).strip()


def _check_question(question: str, name: str) -> None:
    if f"{{{name}}}" not in question:
        raise UserError(f"options.question: {question!r} has no {{{name}}}, where the {name} stands")


def text_figures(
    references: Sequence[str], answers: Sequence[str], tokens: Tokens, nltk_data: Path | None
) -> dict[str, Figure]:
    """Corpus BLEU-2 and BLEU-4, ROUGE-1, -2 and -L, and METEOR where WordNet is at hand."""
    cut = [tokens(reference) for reference in references], [tokens(answer) for answer in answers]
    figures = {name: Figure(text.corpus_bleu(*cut, weights), None, len(answers)) for name, weights in ORDERS.items()}
    scores = [text.rouge(*pair) for pair in zip(references, answers, strict=True)]
    figures |= {name: mean(dict(enumerate(score[name] for score in scores))) for name in text.ROUGE}
    if nltk_data is not None:
        figures["meteor"] = mean(dict(enumerate(text.meteor(*pair, nltk_data) for pair in zip(*cut, strict=True))))
    return figures


def molecule_figures(references: Sequence[str], answers: Sequence[str], morgan_radius: int = 2) -> dict[str, Figure]:
    """Figures of SMILES, as `lpm24.molecule_metrics` defines them: one that is not a molecule has similarity 0."""
    pairs = list(zip(references, answers, strict=True))
    alike = {number: molecules.compare(*pair, morgan_radius) for number, pair in enumerate(pairs)}
    figures = {
        "exact": mean({number: each.exact for number, each in alike.items()}),
        "bleu": Figure(
            text.corpus_bleu([list(each) for each in references], [list(each) for each in answers], ORDERS["bleu_4"]),
            None,
            len(pairs),
        ),
        "levenshtein": mean({number: each.levenshtein for number, each in alike.items()}, higher_is_better=False),
        "validity": mean({number: each.validity for number, each in alike.items()}),
    }
    for name in molecules.SIMILARITIES:
        values = {number: getattr(each, name) for number, each in alike.items()}
        figures[name] = mean(values)
    valid = [each.canonical for each in alike.values() if each.canonical is not None]
    figures["unique"] = Figure(len(set(valid)) / len(valid) if valid else 0.0, None, len(valid))
    return figures


# --- captions ---------------------------------------------------------------------------------------------------------


def _check_caption(record: Row, options: CaptionOptions) -> str | None:
    return _missing(record, MOLECULE, CAPTION)


def _check_caption_options(options: CaptionOptions) -> None:
    _check_question(options.question, "molecule")
    _tokens(options)
    if options.nltk_data is not None:
        text.meteor(["a"], ["a"], Path(options.nltk_data))
    if options.properties is not None:
        properties.read_properties(Path(options.properties))
    if options.combinations is not None:
        properties.read_combinations(Path(options.combinations))


def _tokens(options: CaptionOptions) -> Tokens:
    return word_tokens if options.metric_tokenizer is None else hf_tokens(options.metric_tokenizer)


def _request_captions(records: Sequence[Row], options: CaptionOptions, tokenizer: Tokenizer) -> list[Request]:
    settings = Decoding(max_new_tokens=options.max_new_tokens)
    return [
        Generate(
            record=number,
            context=Question(options.question.replace("{molecule}", _pair(record, MOLECULE, CAPTION)[0])),
            settings=settings,
        )
        for number, record in enumerate(records)
    ]


def _score_captions(records: Sequence[Row], answers: Sequence[Answers], options: CaptionOptions) -> dict[str, Figure]:
    """Likeness of texts; with files of LPM-24 figures of properties and of pairs of them."""
    references = [_pair(record, MOLECULE, CAPTION)[1] for record in records]
    given = [written(parts) for parts in answers]
    tokens = _tokens(options)
    nltk_data = None if options.nltk_data is None else Path(options.nltk_data)
    figures = text_figures(references, given, tokens, nltk_data)
    named: dict[str, float] = {}
    if options.properties is not None:
        paths = properties.read_properties(Path(options.properties))
        values = properties.property_figures(references, given, paths, tokens)
        named |= {f"property_{name}": value for name, value in values.items()}
    if options.combinations is not None:
        pairs = properties.read_combinations(Path(options.combinations))
        values = properties.combination_figures(references, given, pairs, tokens)
        named |= {f"combination_{name}": value for name, value in values.items()}
    return figures | {name: Figure(value, None, len(records)) for name, value in named.items()}


def _details_captions(
    records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: CaptionOptions
) -> str:
    by = options.metric_tokenizer or "words and signs (LPM-24 counts SciBERT's pieces: --options.metric_tokenizer)"
    lines = [f"- Tokens of BLEU, METEOR and properties: {by}"]
    if options.nltk_data is None:
        lines.append("- METEOR needs WordNet: --options.nltk_data DIRECTORY")
    if options.properties is None:
        lines.append("- Properties need LPM-24's nested_props.json: --options.properties FILE")
    return "\n".join(lines) + "\n"


# --- molecules --------------------------------------------------------------------------------------------------------


def _check_molecule(record: Row, options: MoleculeOptions) -> str | None:
    problem = _missing(record, CAPTION, MOLECULE)
    if problem is None and molecules.read_smiles(smiles := _pair(record, CAPTION, MOLECULE)[1]) is None:
        problem = f"{smiles!r} is not a SMILES that RDKit can read"
    return problem


def _check_molecule_options(options: MoleculeOptions) -> None:
    _check_question(options.question, "caption")
    if options.morgan_radius < 0:
        raise UserError(f"options.morgan_radius: {options.morgan_radius} must be at least 0")


def _request_molecules(records: Sequence[Row], options: MoleculeOptions, tokenizer: Tokenizer) -> list[Request]:
    settings = Decoding(max_new_tokens=options.max_new_tokens)
    return [
        Generate(
            record=number,
            context=Question(options.question.replace("{caption}", _pair(record, CAPTION, MOLECULE)[0])),
            settings=settings,
        )
        for number, record in enumerate(records)
    ]


def _score_molecules(records: Sequence[Row], answers: Sequence[Answers], options: MoleculeOptions) -> dict[str, Figure]:
    """Likeness of molecules; an answer that is not a molecule has similarity 0."""
    references = [_pair(record, CAPTION, MOLECULE)[1] for record in records]
    given = [tagged(written(parts)) for parts in answers]
    figures = molecule_figures(references, given, options.morgan_radius)
    if options.fcd:
        valid = [smiles for answer in given if (smiles := molecules.canonical(answer)) is not None]
        wanted = [smiles for each in references if (smiles := molecules.canonical(each)) is not None]
        distance = molecules.frechet_distance(wanted, valid) if min(len(valid), len(wanted)) > 1 else float("nan")
        # Less is better; None, so that comparing models does not compute it on many resamples.
        figures["fcd"] = Figure(distance, None, len(valid), higher_is_better=None)
    return figures


TASKS = {
    task.name: task
    for task in (
        Task(
            name="lpm24_captions",
            summary="LPM-24: captions of molecules; BLEU, ROUGE, METEOR, and the properties that they name.",
            expects="a molecule (molecule or SMILES) and its caption (caption or 'ground truth')",
            requests=_request_captions,
            score=_score_captions,
            check=_check_caption,
            read=_read,
            options=CaptionOptions,
            check_options=_check_caption_options,
            details=_details_captions,
        ),
        Task(
            name="lpm24_molecules",
            summary="LPM-24: molecules for captions; exact, BLEU, Levenshtein, validity, fingerprints, FCD.",
            expects="a caption (caption or description) and a molecule in SMILES (molecule, SMILES or 'ground truth')",
            requests=_request_molecules,
            score=_score_molecules,
            check=_check_molecule,
            read=_read,
            options=MoleculeOptions,
            check_options=_check_molecule_options,
        ),
    )
}
