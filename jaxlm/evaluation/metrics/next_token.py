"""Choosing among options by the probability of the next token: ids of labels, choice, entropy, the random line.

This is how K2 scores GeoBench (`evaluation/post_process.py` of davendw49/k2): one forward pass, a softmax over the
vocabulary at the last position, and of it the probabilities of the labels' tokens ("A", "B", …; "True", "False").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from jaxlm.errors import UserError


def label_ids(encode: Callable[[str], Sequence[int]], labels: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The token of each label, in the two forms that a tokenizer may have for it.

    `k2` is the token of the label as a text of its own, which K2's tables list: for LLaMA "▁A", 319. `plain` is the
    token of the label at the beginning of a line, which is what stands in K2's four examples: for LLaMA "A", 29909.
    For byte-level tokenizers (GPT-2, NeoX, Galactica) both are the same token.

    Args:
        encode: ids of a text, without bos and eos.
        labels: the labels of all options.

    Returns:
        form -> ids, one for each label: its first token, where it has several. A form in which two labels begin with
        the same token is left out.

    Raises:
        UserError: when no form is left.
    """
    line = list(encode(".\n"))
    forms: dict[str, tuple[int, ...]] = {}
    for name in ("k2", "plain"):
        ids = []
        for label in labels:
            tokens = list(encode(label if name == "k2" else ".\n" + label))
            if name == "plain":
                tokens = tokens[len(line) :] if tokens[: len(line)] == line else []
            ids += tokens[:1]
        if len(ids) == len(labels) == len(set(ids)):
            forms[name] = tuple(ids)
    if not forms:
        raise UserError(
            f"tokenizer: {', '.join(labels)} do not begin with tokens of their own, so that their probabilities cannot "
            "be compared; choose a task that compares whole answers, e.g. multiple_choice"
        )
    return forms


def with_max(probabilities: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The probability of each option by form, and as `max` the larger one of the forms."""
    return {**probabilities, "max": [max(pair) for pair in zip(*probabilities.values(), strict=True)]}


def choose(probabilities: Sequence[float], name: str = "a question") -> int:
    """The option of the largest probability; the first one of several.

    Args:
        probabilities: of the options.
        name: of the question, for messages.

    Raises:
        UserError: for a probability that is not a number.
    """
    if any(math.isnan(value) for value in probabilities):
        raise UserError(
            f"{name}: the model gives probabilities that are not numbers (NaN); check its weights, or use "
            "--model.dtype float32"
        )
    return max(range(len(probabilities)), key=lambda option: (probabilities[option], -option))


def shares(probabilities: Sequence[float]) -> list[float]:
    """Probabilities that add up to 1 over the options; equal ones where all are 0."""
    total = sum(probabilities)
    return [value / total if total > 0 else 1 / len(probabilities) for value in probabilities]


def entropy(probabilities: Sequence[float]) -> float:
    """Entropy of the `shares`, in bits: 0 when one option has it all, log2 of their number when all are equal."""
    return -sum(share * math.log2(share) for share in shares(probabilities) if share > 0) + 0.0
