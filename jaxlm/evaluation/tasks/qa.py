"""Questions that are answered in words: exact match and F1 of words, SQuAD's (arXiv:1606.05250).

Both compare texts in small letters, without punctuation, articles (a, an, the) and double spaces. Of several right
answers the nearest counts. Chinese, Japanese and Korean signs are words of their own.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.evaluation.prompting import QuestionOptions, check_examples, field, written_answers
from jaxlm.evaluation.task import Answers, Figure, Request, Row, Task, mean
from jaxlm.tokenizer import Tokenizer

QUESTION = ("question", "Question", "query", "instruction", "input")
ANSWER = ("answers", "answer", "Answer", "aliases", "target", "output")
CONTEXT = ("context", "passage", "support")
GROUP = ("subject", "category")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SIGNS = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_PUNCTUATION = frozenset(string.punctuation + "，。！？；：、“”‘’（）《》【】")


def right_answers(record: Row) -> list[str]:
    """The right answers of a record; empty where it has none."""
    value = field(record, ANSWER)
    if isinstance(value, Mapping):  # SQuAD's {"text": […]}, TriviaQA's {"value": …, "aliases": […]}
        value = [value[key] for key in ("text", "value", "aliases") if key in value]
    values = value if isinstance(value, (list, tuple)) else [value]
    flat = [inner for each in values for inner in (each if isinstance(each, (list, tuple)) else [each])]
    return [str(each) for each in flat if isinstance(each, (str, int, float)) and str(each).strip()]


def check(record: Row, options: Any) -> str | None:
    """What is wrong with a record."""
    question = field(record, QUESTION)
    if not isinstance(question, str) or not question.strip():
        return f"has no text in {', '.join(QUESTION)}"
    if not right_answers(record):
        return f"has no right answer in {', '.join(ANSWER)}"
    return None


def asked(record: Row, question: str, cue: str) -> str:
    """A question as text, behind the text that it is about, with its cue."""
    context = field(record, CONTEXT)
    before = f"{context}\n\n" if isinstance(context, str) and context.strip() else ""
    return f"{before}{question}{str(field(record, QUESTION)).strip()}\n{cue}"


def requests(records: Sequence[Row], options: QuestionOptions, tokenizer: Tokenizer) -> list[Request]:
    """An answer to each question, written greedily; it ends at a line break."""
    return written_answers(
        records,
        options,
        ask=lambda record: asked(record, options.question, options.cue),
        solve=lambda record: right_answers(record)[0],
        check=lambda record: check(record, options),
        group=GROUP,
        end="\n",
    )


def normalised(text: str) -> str:
    """A text as it is compared."""
    lowered = "".join(sign for sign in text.lower() if sign not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def words(text: str) -> list[str]:
    """The words of a text as they are compared."""
    return _SIGNS.sub(r" \1 ", normalised(text)).split()


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it stands there."""
    mine, theirs = words(prediction), words(reference)
    if not mine or not theirs:
        return float(mine == theirs)
    common = sum((collections.Counter(mine) & collections.Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs))


def written(answers: Answers) -> str:
    """The text of an answer; empty where there is none."""
    answer = answers.get("answer")
    return answer.texts[0] if answer is not None and answer.texts else ""


def score(records: Sequence[Row], answers: Sequence[Answers], options: Any) -> dict[str, Figure]:
    """exact: share of answers that are equal to a right one; f1: mean of the best F1."""
    texts = [written(each) for each in answers]
    pairs = list(zip(texts, map(right_answers, records), strict=True))
    exact = [float(any(normalised(text) == normalised(each) for each in right)) for text, right in pairs]
    best = [max(f1(text, each) for each in right) for text, right in pairs]
    return {"exact": mean(dict(enumerate(exact))), "f1": mean(dict(enumerate(best)))}


TASK = Task(
    name="qa",
    summary="Questions answered in words: exact match and F1 of words (SQuAD's).",
    expects="a question and an answer (a text, or a list of right ones); a context, if there is one",
    requests=requests,
    score=score,
    check=check,
    options=QuestionOptions,
    check_options=lambda options: check_examples(options.examples, options.shots),
)
