"""Perplexity of texts: figures per token, byte and character, from the log-likelihood of each text.

There are no requests: texts are read as training reads them, and scored in packed rows (`evaluation.perplexity`).

Standard errors are by text. Each figure is a ratio of sums over texts, sum(a) / sum(b) = r, and its standard error is
that of a ratio estimator, sqrt(n / (n - 1) * sum((a - r b)^2)) / sum(b) for n texts (Cochran, Sampling Techniques,
1977, section 6.4): texts count as drawn independently, tokens of one text do not. That of exp(loss) is exp(loss) times
that of the loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.evaluation.task import Answers, Figure, Request, Row, Task
from jaxlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import matplotlib.figure

PART = "text"  # of a record's answers
_COLUMNS = ("log_probs", "num_tokens", "num_correct", "num_bytes", "num_characters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is scored, as decided from words of the command line and the model.

    Args:
        sequence_length: tokens of a row.
        stride: new tokens of each further window of a longer text.
        train_on_inputs: prompts are scored too.
        add_eos: for each source, whether the end of a text is scored.
    """

    sequence_length: int = 0
    stride: int = 0
    train_on_inputs: bool = False
    add_eos: tuple[bool, ...] = ()


def requests(records: Sequence[Row], options: Options, tokenizer: Tokenizer) -> list[Request]:
    """Never called: see above."""
    raise AssertionError("texts are scored in rows")


def check(record: Row, options: Options) -> str | None:
    """Nothing: records are checked when they become texts."""
    return None


def _table(answers: Sequence[Answers]) -> NDArray[np.float64]:
    """[texts, columns]: log-likelihood, tokens, right tokens, bytes, characters; of texts with something to score."""
    rows = [[getattr(each[PART], name)[0] for name in _COLUMNS] for each in answers]
    table = np.array(rows, np.float64).reshape(-1, len(_COLUMNS))
    return table[table[:, 1] > 0]


def ratio(above: NDArray[np.float64], below: NDArray[np.float64], higher_is_better: bool | None = False) -> Figure:
    """sum(above) / sum(below) over texts, with its standard error (see above); NaN where nothing is below."""
    total = below.sum()
    if not total:
        return Figure(math.nan, None, 0, {}, higher_is_better)
    value, count = above.sum() / total, len(below)
    stderr = None
    if count > 1:
        stderr = float(np.sqrt(count / (count - 1) * np.square(above - value * below).sum()) / total)
    return Figure(float(value), stderr, count, {}, higher_is_better)


def score(records: Sequence[Row], answers: Sequence[Answers], options: Options) -> dict[str, Figure]:
    """loss (nats per token), perplexity, accuracy of the most probable token, and bits per token, byte, character."""
    log_likelihood, tokens, correct, size, characters = _table(answers).T
    loss, bits = ratio(-log_likelihood, tokens), -log_likelihood / math.log(2)
    perplexity = math.exp(min(loss.value, 700.0)) if loss.n else math.nan
    stderr = None if loss.stderr is None else perplexity * loss.stderr
    return {
        "loss": loss,
        "perplexity": Figure(perplexity, stderr, loss.n, {}, False),
        "accuracy": ratio(correct, tokens, True),
        "bits_per_token": ratio(bits, tokens),
        "bits_per_byte": ratio(bits, size),
        "bits_per_character": ratio(bits, characters),
    }


def details(records: Sequence[Row], answers: Sequence[Answers], figures: Mapping[str, Figure], options: Options) -> str:
    """The figures of each source, where there are several."""
    sources: dict[str, list[Answers]] = {}
    for record, each in zip(records, answers, strict=True):
        sources.setdefault(str(record["source"]), []).append(each)
    if len(sources) < 2:
        return ""
    rows = []
    for name, own in sources.items():
        part = score([], own, options)
        values = [part[key].value for key in ("loss", "perplexity", "bits_per_byte")]
        rows.append(f"| {name} | {' | '.join(f'{value:.4f}' for value in values)} | {part['loss'].n:,} |")
    return "\n".join(["| source | loss | perplexity | bits_per_byte | n |", "|---|---:|---:|---:|---:|", *rows])


def plot(
    canvas: matplotlib.figure.Figure,
    records: Sequence[Row],
    answers: Sequence[Answers],
    figures: Mapping[str, Figure],
    options: Any,
) -> None:
    """How the loss is spread over texts."""
    table = _table(answers)
    axes = canvas.subplots()
    axes.hist(-table[:, 0] / table[:, 1], bins=min(50, max(5, len(table) // 4)), color="#4477aa")
    axes.axvline(figures["loss"].value, color="#222222", linewidth=1)
    axes.set_xlabel("loss per token of a text (line: of all tokens)")
    axes.set_ylabel("texts")


TASK = Task(
    name="perplexity",
    summary="How well a model predicts texts: per token, byte and character.",
    expects="a text, or an instruction with its answer",
    requests=requests,
    score=score,
    check=check,
    options=Options,
    key=None,
    details=details,
    plot=plot,
)
