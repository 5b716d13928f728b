"""Questions whose answer is a number: right within a tolerance (SciBench's 5 %, arXiv:2307.10635)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from jaxlm.errors import UserError
from jaxlm.evaluation.prompting import QuestionOptions, check_examples, field, written_answers
from jaxlm.evaluation.task import Answers, Figure, Request, Row, Task, mean
from jaxlm.evaluation.tasks.qa import written
from jaxlm.tokenizer import Tokenizer

QUESTION = ("question", "problem_text", "problem", "Question", "input")
ANSWER = ("answer_number", "answer", "Answer", "target")
GROUP = ("source", "subject", "category")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_POWER = r"(?:\s*(?:\\times|\\cdot|×|x|\*)\s*10\s*\^?\s*(?:\{\s*([-+−]?\d+)\s*\}|\(\s*([-+−]?\d+)\s*\)|([-+−]?\d+)))"
_FRACTION = rf"\\[dt]?frac\s*\{{\s*({_DIGITS})\s*\}}\s*\{{\s*({_DIGITS})\s*\}}"
# A minus between digits or behind a letter is a range or a hyphen, not a sign.
NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+−]\s*)?(?:{_FRACTION}|(?P<digits>{_DIGITS})(?:[eE](?P<e>[-+]?\d+)|{_POWER})?)"
)
_BOXED = re.compile(r"\\boxed\s*\{")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(QuestionOptions):
    """How questions are asked, and when an answer is right.

    Args:
        tolerance: largest difference, as a share of the right number; of 0 too, where it is the difference itself.
    """

    tolerance: float = 0.05
    max_new_tokens: int = 256


def check_options(options: Options) -> None:
    """Raises UserError for what cannot be meant."""
    if not 0 <= options.tolerance < 1:
        raise UserError(f"options.tolerance: {options.tolerance:g} must be 0 or more, and below 1: 0.05 is 5 %")
    check_examples(options.examples, options.shots)


def numbers_in(text: str) -> list[float]:
    """The numbers of a text: 1,234.5, -3e-4, 2.5 × 10^{-3}, \\frac{1}{2}, 45 % (which is 45)."""
    found = []
    for match in NUMBER.finditer(text):
        parts = match.groups()
        sign = -1.0 if (match["sign"] or "").strip() in ("-", "−") else 1.0
        if match["digits"] is None:
            above, below = (float(part.replace(",", "")) for part in parts[1:3])
            if below:
                found.append(sign * above / below)
            continue
        power = match["e"] or next((each for each in parts[5:8] if each), "0")
        found.append(sign * float(f"{match['digits'].replace(',', '')}e{power.replace('−', '-')}"))
    return found


def answer_in(text: str) -> float | None:
    """The number that a text answers with: the last of its last \\boxed{…}, else its last one."""
    boxes = list(_BOXED.finditer(text))
    if boxes:
        inside = _braced(text, boxes[-1].end())
        found = numbers_in(inside)
        if found:
            return found[-1]
    found = numbers_in(text)
    return found[-1] if found else None


def _braced(text: str, at: int) -> str:
    """What stands from a place to the brace that closes there."""
    depth = 1
    for end in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[at:end]
    return text[at:]


def right_number(record: Row) -> float | None:
    """The right answer; None where it is not a number."""
    value = field(record, ANSWER)
    if isinstance(value, bool):
        return None
    number = float(value) if isinstance(value, (int, float)) else answer_in(str(value)) if value is not None else None
    return number if number is not None and math.isfinite(number) else None


def check(record: Row, options: Options) -> str | None:
    """What is wrong with a record."""
    question = field(record, QUESTION)
    if not isinstance(question, str) or not question.strip():
        return f"has no text in {', '.join(QUESTION)}"
    if right_number(record) is None:
        return f"has no number in {', '.join(ANSWER)}"
    return None


def _asked(record: Row, options: Options) -> str:
    unit = record.get("unit")
    text = str(field(record, QUESTION)).strip()
    # SciBench's problems name a unit, which may hold a power of ten.
    named = f" (in {str(unit).strip()})" if isinstance(unit, str) and unit.strip() else ""
    return f"{options.question}{text}{named}\n{options.cue}"


def requests(records: Sequence[Row], options: Options, tokenizer: Tokenizer) -> list[Request]:
    """An answer to each question, written greedily; it ends at an empty line."""
    return written_answers(
        records,
        options,
        ask=lambda record: _asked(record, options),
        solve=lambda record: str(field(record, ("solution", "rationale", *ANSWER))),
        check=lambda record: check(record, options),
        group=GROUP,
        end="\n\n",
    )


def is_right(answer: float | None, right: float, tolerance: float) -> bool:
    """Whether a number is near enough: by a share of the larger of both, as `math.isclose` has it."""
    if answer is None:
        return False
    return math.isclose(answer, right, rel_tol=tolerance, abs_tol=tolerance if right == 0 else 0.0)


def score(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """acc: share of right answers; answered: share of answers with a number."""
    values = [answer_in(written(each)) for each in answers]
    hits = {
        number: float(is_right(value, right_number(record) or 0.0, options.tolerance))
        for number, (value, record) in enumerate(zip(values, records, strict=True))
    }
    return {
        "acc": mean(hits),
        "answered": mean({number: float(value is not None) for number, value in enumerate(values)}),
    }


def details(records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options) -> str:
    """Accuracy by source or subject."""
    hits = figures["acc"].values
    groups: dict[str, dict[int, float]] = {}
    for number, record in enumerate(records):
        name = field(record, GROUP)
        if name is not None:
            groups.setdefault(str(name), {})[number] = hits[number]
    if not groups:
        return ""
    rows = [f"| {name} | {mean(values).value:.4f} | {len(values):,} |" for name, values in sorted(groups.items())]
    return "\n".join(["| subject | acc | n |", "|---|---:|---:|", *rows])


TASK = Task(
    name="numbers",
    summary="Questions whose answer is a number: right within a tolerance (SciBench's 5 %).",
    expects="a question (or problem_text) and a number as answer (or answer_number)",
    requests=requests,
    score=score,
    check=check,
    options=Options,
    check_options=check_options,
    details=details,
)
