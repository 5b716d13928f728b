"""A batch as text, to see before training what is trained and what is not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Beside the colour, so that a log file or a monochrome terminal shows the same.
OPEN, CLOSE = "⟦", "⟧"
STYLE = "bold green"
# The texts of a document, by data.records.
TEXTS: dict[str, tuple[str, ...]] = {
    "answers": (),
    "pairs": ("chosen", "rejected"),
    "labelled": ("answer", "with the answer of another prompt", "(the answer is not wanted)"),
}


def preview(
    batch: Mapping[str, NDArray[Any]],
    tokenizer: Tokenizer,
    console: Console,
    shown: int = 0,
    most: int | None = None,
    texts: Sequence[str] = (),
) -> int:
    """Prints the rows of a batch as text: ⟦what is trained⟧ stands in brackets and in colour.

    Args:
        batch: input_ids, loss_mask and segment_ids of shape [A, B, T] or [B, T]; encoder_ids and encoder_segment_ids
            where an encoder reads something, which stands before each document.
        tokenizer: turns ids into text; special tokens are written out.
        console: where to print.
        shown: rows of earlier batches that were printed.
        most: stop at this number of rows, those counted; None: print all. Then rows that are only padding are left out.
        texts: names of the texts that each document holds, see `data.preferences`; empty: it is one text.

    Returns:
        The number of rows of this batch that were printed.
    """
    fields = ["input_ids", "loss_mask", "segment_ids"]
    with_encoder = "encoder_ids" in batch
    if with_encoder:
        fields += ["encoder_ids", "encoder_segment_ids"]
    arrays = [np.asarray(batch[name]) for name in fields]
    rows = zip(*(array.reshape(-1, array.shape[-1]) for array in arrays), strict=True)
    if shown == 0:
        console.print(f"{OPEN}trained{CLOSE} and not trained", style="dim", highlight=False)
    number = shown
    for row_ids, row_mask, row_segments, *source in rows:
        used = row_segments > 0
        if most is not None and not used.any():
            continue
        if number == most:
            break
        number += 1
        documents = int(row_segments.max())
        console.rule(
            f"row {number}: {documents} document{'s' * (documents != 1)}, {int(used.sum())} tokens, "
            f"{int(row_mask.sum())} trained, {int((~used).sum())} padding",
            align="left",
        )
        for segment in range(1, documents + 1):
            in_segment = row_segments == segment
            if documents > 1:
                console.print(f"-- document {segment} ({int(in_segment.sum())} tokens)", style="dim", highlight=False)
            if with_encoder:
                read = source[0][source[1] == segment]
                console.print(f"the encoder reads ({len(read)} tokens):", style="dim", highlight=False)
                console.print(_document(read, np.zeros(len(read), bool), tokenizer), soft_wrap=True)
                console.print("the decoder writes:", style="dim", highlight=False)
            ids, mask = row_ids[in_segment], row_mask[in_segment]
            ends = (np.flatnonzero(mask[:-1] & ~mask[1:]) + 1).tolist() if texts else []
            for number_of_text, (begin, end) in enumerate(itertools.pairwise([0, *ends, len(ids)])):
                if texts:
                    console.print(f"{texts[number_of_text]}:", style="dim", highlight=False)
                console.print(_document(ids[begin:end], mask[begin:end], tokenizer), soft_wrap=True)
    return number - shown


def _document(ids: NDArray[Any], mask: NDArray[Any], tokenizer: Tokenizer) -> Text:
    from rich.text import Text

    text = Text()
    shown = 0
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    for begin, end in itertools.pairwise(borders):
        # A piece decoded alone would lose its leading space, so decode from the start and take what is new.
        whole = tokenizer.decode(ids[:end].tolist(), skip_special=False, open_end=end < len(ids))
        part, shown = whole[shown:], len(whole)
        if mask[begin]:
            text.append(f"{OPEN}{part}{CLOSE}", style=STYLE)
        else:
            text.append(part)
    return text
