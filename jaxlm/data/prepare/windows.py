"""Samples of whole sentences, as KnowLM's pretraining cuts documents (pretrain/preprocess.py of zjunlp/KnowLM)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.data.prepare.sentences import Language, Splitter
from jaxlm.tokenizer import Encoding

# Tokens of texts, without bos and eos.
Encoder = Callable[[Sequence[str]], list[Encoding]]


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Cuts documents into samples.

    Args:
        encode: the tokenizer.
        bos: ids in front of a document.
        eos: ids behind it.
        space: the id that SentencePiece puts in front of every text ("▁"); None: the tokenizer has none.
        length: most tokens of a sample.
        whole: whether a document is tokenised as one text; else each sentence by itself, as KnowLM does.
        overlap: see `segments`.
        recut: pieces that are too long even when cut by characters are cut once more, by tokens; KnowLM leaves them to
            its loader, which cuts their ends off.
    """

    encode: Encoder
    bos: tuple[int, ...]
    eos: tuple[int, ...]
    space: int | None
    length: int
    whole: bool = False
    overlap: bool = True
    recut: bool = True

    def samples(self, text: str, split: Splitter, language: Language) -> list[list[int]]:
        """The samples of a document, in order; none of a blank one. bos is in front of the first, eos behind the last.

        Args:
            text: the document.
            split: takes it apart into sentences.
            language: whose rule it is for a sentence that is too long.
        """
        if not text.strip() or text == r"\n":
            return []
        sentences = split(text)
        encoded = self._of_whole(text, sentences) if self.whole else [each.ids for each in self.encode(sentences)]
        last = len(sentences) - 1
        pieces: list[list[int]] = []
        for place, (sentence, ids) in enumerate(zip(sentences, encoded, strict=True)):
            bos, eos = self.bos if place == 0 else (), self.eos if place == last else ()
            tokens = [*bos, *ids, *eos]
            if not tokens:
                continue
            if len(tokens) <= self.length:
                pieces.append(tokens)
            elif language == "chinese" and not self.whole:
                pieces += self._by_characters(sentence, len(tokens), bos, eos)
            else:
                pieces += self._by_tokens(tokens)
        pairs = segments([len(piece) for piece in pieces], self.length, self.overlap)
        return [[index for piece in pieces[begin:end] for index in piece] for begin, end in pairs]

    def _of_whole(self, text: str, sentences: Sequence[str]) -> list[list[int]]:
        """The tokens of each sentence when all of the text is tokenised: a token is where its last character is."""
        encoding = self.encode([text])[0]
        borders = np.cumsum([len(sentence) for sentence in sentences])
        assert borders[-1] == len(text)
        ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], np.int64))
        owners = np.searchsorted(borders, ends)
        cuts = [0, *np.searchsorted(owners, np.arange(1, len(sentences))).tolist(), len(encoding.ids)]
        return [encoding.ids[begin:end] for begin, end in itertools.pairwise(cuts)]

    def _by_tokens(self, ids: list[int]) -> list[list[int]]:
        return [ids[begin : begin + self.length] for begin in range(0, len(ids), self.length)]

    def _by_characters(
        self, sentence: str, num_tokens: int, bos: tuple[int, ...], eos: tuple[int, ...]
    ) -> list[list[int]]:
        """Blocks of equally many characters, each tokenised anew, without the space in front that it has not."""
        num_blocks = -(-num_tokens // self.length)
        if num_tokens % self.length >= 0.8 * self.length:
            num_blocks += 1
        size = -(-len(sentence) // num_blocks)
        blocks = [sentence[at * size : (at + 1) * size] for at in range(num_blocks)]
        pieces = []
        for place, encoding in enumerate(self.encode(blocks)):
            piece = [*(bos if place == 0 else ()), *encoding.ids, *(eos if place == num_blocks - 1 else ())]
            if piece and piece[0] == self.space:
                piece = piece[1:]
            if not piece:
                continue
            pieces += self._by_tokens(piece) if self.recut else [piece]
        return pieces


def segments(lengths: Sequence[int], most: int, overlap: bool = True) -> list[tuple[int, int]]:
    """Runs [begin, end) of neighbours that together have at most `most` tokens.

    Greedy: each run goes as far to the right as it can; with `overlap` it is then filled from the left with what the
    run before it has already. An element that is too long is a run of its own.
    """
    runs = []
    begin = 0
    while begin < len(lengths):
        total, end = lengths[begin], begin + 1
        while end < len(lengths) and total + lengths[end] <= most:
            total += lengths[end]
            end += 1
        first = begin
        while overlap and first > 0 and total + lengths[first - 1] <= most:
            total += lengths[first - 1]
            first -= 1
        runs.append((first, end))
        begin = end
    return runs
