"""Documents to samples, against what KnowLM's own functions gave."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.data.prepare.sentences import is_cjk, split_chinese, split_english, splitter
from jaxlm.data.prepare.windows import Cutter, segments
from jaxlm.tokenizer import Encoding, Tokenizer

SHARED = Path(__file__).parents[3] / "../shared/data"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    file = SHARED / "golden/golden_knowlm.json"
    if not file.is_file():
        pytest.skip("the golden numbers of KnowLM are not at hand")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def test_sentences_are_knowlms(golden: dict[str, Any]) -> None:
    for case in golden["chinese_split"]:
        assert split_chinese(case["text"], True, released=True) == case["keep_newlines"], case
        assert split_chinese(case["text"], False, released=True) == case["without"], case


def test_the_corrected_delimiters_are_those_that_end_a_sentence() -> None:
    assert split_chinese("a;(;b", True, released=False) == ["a;", "(;", "b"]
    assert split_chinese("第一;n", True, released=False) == ["第一;", "n"]
    assert split_chinese("句一。\n句二", True, released=False) == ["句一。\n", "句二"]
    assert split_chinese("甲。\\n乙", True, released=False) == ["甲。", "\\n乙"]


def test_runs_are_knowlms(golden: dict[str, Any]) -> None:
    for case in golden["greedy"]:
        assert segments(case["lengths"], case["max"]) == [tuple(run) for run in case["segments"]], case


def fake_encode(texts: Sequence[str]) -> list[Encoding]:
    return [Encoding([29871, *map(ord, text)], []) for text in texts]


def test_samples_are_knowlms_to_the_token(golden: dict[str, Any]) -> None:
    for case in golden["encode_fake_tokenizer"]["cases"]:
        cutter = Cutter(fake_encode, (1,), (2,), 29871, case["seq_length"], recut=False)
        split = splitter("chinese", True, "released")
        language = case["language_rule_for_long_sentences"]
        assert cutter.samples(case["text"], split, language) == case["samples"], case


def test_the_golden_store_is_met_to_the_token() -> None:
    """The samples of KnowLM's own store, tokenised by SentencePiece."""
    from jaxlm.tokenizer import load_tokenizer

    folder = SHARED / "golden/knowlm_mmap"
    if not folder.is_dir():
        pytest.skip("KnowLM's golden store is not at hand")
    tokenizer = load_tokenizer(folder / "sp.model")
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None

    def encode(texts: Sequence[str]) -> list[Encoding]:
        return tokenizer.encode_batch(texts, special_tokens=False)

    index = (folder / "g.idx").read_bytes()
    lengths = np.frombuffer(index[len(index) * 8 // 10 :], "<u2").tolist()
    tokens = np.frombuffer((folder / "g.bin").read_bytes(), "<u2").tolist()
    samples: list[list[int]] = []
    for line in (folder / "g.txt").read_text(encoding="utf-8").splitlines():
        cutter = Cutter(encode, (tokenizer.bos_id,), (tokenizer.eos_id,), tokenizer.id_of("▁"), LENGTH, recut=False)
        samples += cutter.samples(json.loads(line)["text"], splitter("chinese", True, "released"), "chinese")
    samples = [sample for sample in samples if len(sample) > 20]
    assert [len(sample) for sample in samples] == lengths
    assert [index for sample in samples for index in sample] == tokens


LENGTH = 40  # seq_length that the golden store was made with


def test_without_overlap_every_sentence_stands_once() -> None:
    lengths = [4, 4, 4, 4, 4]
    assert segments(lengths, 10) == [(0, 2), (2, 4), (3, 5)]
    assert segments(lengths, 10, overlap=False) == [(0, 2), (2, 4), (4, 5)]


def test_no_sample_is_too_long_and_no_token_is_lost() -> None:
    """Characters that are several tokens each, which blocks of characters alone would not keep to the length."""

    def bytes_of(texts: Sequence[str]) -> list[Encoding]:
        return [Encoding([3 + byte for byte in text.encode()], []) for text in texts]

    text = "aaaaaaaa" + "石" * 30 + "。短。"
    cutter = Cutter(bytes_of, (), (), None, 10, overlap=False)
    samples = cutter.samples(text, splitter("chinese", True, "corrected"), "chinese")
    assert max(map(len, samples)) <= 10
    assert bytes(index - 3 for sample in samples for index in sample).decode() == text


def test_english_sentences_are_the_text() -> None:
    pytest.importorskip("nupunkt")
    text = "Dr. Smith measured 3.5 wt.% SiO2 in Fig. 3. Is it hard?  Yes.\n\nIt is."
    sentences = split_english(text, keep=True)
    assert "".join(sentences) == text
    assert sentences[0].startswith("Dr. Smith measured 3.5 wt.% SiO2") and len(sentences) >= 3
    assert "".join(split_english("  ", keep=True)) == "  "


def test_a_sentence_of_code_is_a_line() -> None:
    assert splitter("code", True, "corrected")("a = 1\n\nb = 2") == ["a = 1\n", "\n", "b = 2"]


def test_which_texts_are_in_chinese_characters() -> None:
    assert is_cjk("石英是一种矿物 SiO2。") and is_cjk("ひらがな") and is_cjk("한국어")
    assert not is_cjk("Quartz (石英) is a mineral.") and not is_cjk("123") and not is_cjk("")


@pytest.mark.parametrize("length", [8, 12, 40])
@pytest.mark.parametrize("language", ["chinese", "english", "code"])
def test_a_document_tokenised_whole_is_cut_without_a_change(tokenizer: Tokenizer, length: int, language: Any) -> None:
    """Samples that do not overlap are the document's own tokens, and begin where sentences do when they fit."""
    if language == "english":
        pytest.importorskip("nupunkt")
    text = (
        "What is granite? The rock cools slowly.  Quartz!\nWhy is it\n\n石英 和 长石。 石英和长石；长石？ how of melt. "
        * 3
    )

    def encode(texts: Sequence[str]) -> list[Encoding]:
        return tokenizer.encode_batch(texts, special_tokens=False)

    cutter = Cutter(encode, (1,), (2,), None, length, whole=True, overlap=False)
    samples = cutter.samples(text, splitter(language, True, "corrected"), language)
    assert [index for sample in samples for index in sample] == [1, *tokenizer.encode(text, False).ids, 2]
    assert len(samples) > 1 and max(map(len, samples)) <= length
    overlapping = dataclasses.replace(cutter, overlap=True).samples(
        text, splitter(language, True, "corrected"), language
    )
    assert len(overlapping) == len(samples) and sum(map(len, overlapping)) >= sum(map(len, samples))


def test_tokens_belong_to_the_sentence_where_they_end() -> None:
    """A token that begins with the white space between two sentences opens the second."""
    encoding = Encoding([5, 6, 7, 8], [(0, 0), (0, 2), (2, 5), (5, 6)])
    cutter = Cutter(lambda texts: [encoding], (), (), None, 2, whole=True, overlap=False)
    assert cutter.samples("A. BC.", lambda text: ["A. ", "BC."], "english") == [[5, 6], [7, 8]]
