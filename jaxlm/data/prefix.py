"""Rows for a model whose prompts see themselves as a whole (ChatGLM-6B): nothing of a prompt may be learned."""

from __future__ import annotations

import numpy as np

from jaxlm.data.tokens import Tokens
from jaxlm.errors import UserError
from jaxlm.spec import PrefixSpec
from jaxlm.tokenizer import Tokenizer

_STRETCH = 1 << 14  # examples that are looked at together


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
    """The first example with a target in front of the token; a stretch at a time, as stores are larger than memory."""
    for first in range(0, len(examples), _STRETCH):
        offsets = np.asarray(examples.offsets[first : first + _STRETCH + 1])
        begin, end = int(offsets[0]), int(offsets[-1])
        begun = np.cumsum(examples.input_ids[begin:end] == start_id)
        before = np.concatenate([[0], begun])[offsets[:-1] - begin]
        seen = examples.loss_mask[begin:end] & (begun == np.repeat(before, np.diff(offsets)))
        examples.release()
        if seen.any():
            return first + int(np.searchsorted(offsets, begin + np.flatnonzero(seen)[0], side="right")) - 1
    return None
