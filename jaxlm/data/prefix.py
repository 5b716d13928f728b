"""Rows for a model whose prompts see themselves as a whole (ChatGLM-6B): nothing of a prompt may be learned."""

from __future__ import annotations

import numpy as np

from jaxlm.data.tokens import Tokens
from jaxlm.errors import UserError
from jaxlm.spec import PrefixSpec
from jaxlm.tokenizer import Tokenizer

_AT_A_TIME = 1 << 22  # tokens


def check_prefix(prefix: PrefixSpec | None, examples: Tokens | None, tokenizer: Tokenizer, packing: str) -> None:
    """Refuses targets in front of the token that an answer begins with: the model would see what it is to predict.

    Args:
        prefix: the model's; None: it has none, and nothing is refused.
        examples: what is trained or scored.
        tokenizer: for the message.
        packing: `DataConfig.packing_mode`.

    Raises:
        UserError: for such a target, or rows that are cut from a running text.
    """
    if prefix is None or examples is None:
        return
    start = tokenizer.token(prefix.start_id) if prefix.start_id < tokenizer.vocab_size else str(prefix.start_id)
    if packing == "group_texts":
        raise UserError(
            f"data.packing: group_texts cuts rows from a running text, and each needs a {start} for this model; set it "
            "to true or false"
        )
    number = _first_seen(prefix.start_id, examples)
    if number is None:
        return
    raise UserError(
        f"data: record {examples.record[number] + 1} (of all that are read) has tokens to learn in front of {start}, "
        "which this model sees while it reads them. Use its own tokenizer (tokenizer.path: null), data.add_bos: null "
        "and train_on_inputs: false; a document must fit a row (sequence_length, or too_long: truncate)"
    )


def _first_seen(start_id: int, examples: Tokens) -> int | None:
    """The first example with a target in front of the token; some of a store are looked at at a time."""
    offsets = examples.offsets
    first = 0
    while first < len(examples):
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _AT_A_TIME, side="right")) - 1)
        part = slice(offsets[first], offsets[last])
        begun = np.cumsum(examples.input_ids[part] == start_id)
        begins = offsets[first:last] - offsets[first]
        before = np.concatenate([[0], begun])[begins]
        seen = examples.loss_mask[part] & (begun == np.repeat(before, np.diff(offsets[first : last + 1])))
        if seen.any():
            return first + int(np.searchsorted(begins, np.flatnonzero(seen)[0], side="right")) - 1
        first = last
    return None
