"""T5's SentencePiece model, spiece.model, as its first checkpoints have it: without a tokenizer.json beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.tokenizer.backends import SentencePiece, read_sentencepiece
from jaxlm.tokenizer.settings import AddedToken, Settings

FILE = "spiece.model"
CLASSES = ("T5Tokenizer", "MT5Tokenizer", "")
EXTRA_IDS = 100  # what T5Tokenizer adds where nothing else is said


class Spiece(SentencePiece):
    """The pieces of the file, and behind them the sentinels <extra_id_99> … <extra_id_0>; eos ends a text.

    Source: transformers' `T5Tokenizer`.

    Args:
        path: the spiece.model.
        added: tokens that settings files add.
        settings: what they say.

    Raises:
        UserError: they name another class of tokenizer, which cuts texts by rules of its own.
    """

    rule = "T5's rule for spiece.model"

    def __init__(self, path: Path, added: Sequence[AddedToken], settings: Settings) -> None:
        if settings.tokenizer_class not in CLASSES:
            load = "from transformers import AutoTokenizer as T; "
            once = f"{load}T.from_pretrained('{path.parent}').save_pretrained('{path.parent}')"
            raise UserError(
                f"{path}: tokenizer_class is {settings.tokenizer_class!r}; of a {FILE} only T5Tokenizer's is read. "
                f'Make a tokenizer.json of it once: python -c "{once}"'
            )
        known = {token.content for token in added}
        count, first = _extra_ids(path.parent, settings), _size(path)
        sentinels = [AddedToken(f"<extra_id_{count - 1 - k}>", first + k, True) for k in range(count)]
        super().__init__(
            path, [*added, *(token for token in sentinels if token.content not in known)], settings.special, True
        )
        self.opening, self.closing = (), () if self.eos is None else (self.eos,)
        pad = self.model.pad_id()
        self.pad = pad if pad >= 0 else None

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        # A word behind a sentinel keeps its space, which SentencePiece would take for one at the beginning of a text.
        tokens = (self.token(index) for index in ids if not (skip_special and index in self.special_ids))
        return "".join(tokens).replace("\u2581", " ").removeprefix(" ")


def _size(path: Path) -> int:
    return int(read_sentencepiece(path).vocab_size())


def _extra_ids(directory: Path, settings: Settings) -> int:
    """Number of sentinels: as tokenizer_config.json says, else those that it lists."""
    file = directory / "tokenizer_config.json"
    said = read_object(file).get("extra_ids") if file.is_file() else None
    if type(said) is int and said >= 0:
        return said
    if said is not None:
        raise UserError(f"{file}: extra_ids is {said!r}; expected a number of tokens")
    listed = sum(re.fullmatch(r"<extra_id_\d+>", token) is not None for token in settings.special)
    return listed or EXTRA_IDS
