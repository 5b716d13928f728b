"""Texts to sentences, without a download.

Chinese by KnowLM's rule (pretrain/preprocess.py of zjunlp/KnowLM), English by nupunkt, code by lines.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Literal

from jaxlm.errors import UserError

Language = Literal["english", "chinese", "code"]
Splitter = Callable[[str], list[str]]

_DELIMITERS = ";!?；？。！\n"
_PATTERN = re.compile(f"([{_DELIMITERS}])")
# KnowLM asks whether a piece stands in the text of its pattern, so that the pattern's own signs count too.
_RELEASED = r"([;!?；？。！\n])" + "\n"

# Han, kana, hangul, and the signs of full width between them.
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f]")


def is_cjk(text: str) -> bool:
    """Whether at least a third of a text's letters are Chinese, Japanese or Korean characters."""
    if text.isascii():
        return False
    sample = text[:20_000]
    letters = sum(map(str.isalpha, sample))
    return 3 * len(CJK.findall(sample)) >= max(letters, 1)


def splitter(language: Language, keep_newlines: bool, delimiters: str) -> Splitter:
    """The function that takes a text apart.

    Args:
        language: whose rule.
        keep_newlines: whether the sentences together are the text; else what divides them is lost.
        delimiters: for Chinese, "corrected" or "released": see `split_chinese`.
    """
    if language == "code":
        return lambda text: text.splitlines(keepends=keep_newlines)
    if language == "english":
        return lambda text: split_english(text, keep_newlines)
    return lambda text: split_chinese(text, keep_newlines, delimiters == "released")


def split_chinese(text: str, keep: bool, released: bool) -> list[str]:
    """Sentences by KnowLM's rule.

    A piece that is empty or a single delimiter belongs to the sentence before it.

    Args:
        text: the text.
        keep: whether delimiters stay; else they are lost, and empty sentences stay.
        released: also glue a piece that is one of ( ) [ ] \\ n, or the two characters \\n, as the released code does.
    """
    pieces = _PATTERN.split(text)
    if not keep:
        return pieces[::2]
    glued = _RELEASED if released else _DELIMITERS
    sentences = pieces[:1]
    for piece in pieces[1:]:
        if not piece or (len(piece) == 1 and piece in glued) or (released and piece == r"\n"):
            sentences[-1] += piece
        else:
            sentences.append(piece)
    return sentences


def split_english(text: str, keep: bool) -> list[str]:
    """Sentences by Punkt, with the model that nupunkt brings along.

    Args:
        text: the text.
        keep: whether white space between sentences stays, at the end of the sentence before it.

    Raises:
        UserError: nupunkt is not installed.
    """
    try:
        import nupunkt  # optional: only English is split by it
    except ImportError:
        raise UserError(
            "split: English sentences are found by nupunkt, which is not installed; pip install 'jaxlm[prepare]', or "
            "give the source language: code (a sentence is a line)"
        ) from None
    if not keep:
        return [text[begin:end] for begin, end in nupunkt.sent_spans(text)]
    begins = [begin for begin, _ in nupunkt.sent_spans(text)]
    cuts = [0, *begins[1:], len(text)] if begins else [0, len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts) if end > begin]
