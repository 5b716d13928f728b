"""The table of segments gives the ids and offsets of the libraries themselves."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm.tokenizer.segments
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from jaxlm.tokenizer.segments import cutting_pattern
from tests.data.conftest import corpus

SAMPLES = Path(__file__).parents[1] / "../shared/data"
CHARACTERS = "abc the granite of  ▁▁ \n\t0123<>/s石英和长石é🌋ñ\u0301\u200bÀЖ한日ーカ(){}.,;:'\"_-#$%ﬁ½\x00\x7f"
PREPENDED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def texts() -> list[str]:
    random = np.random.default_rng(0)
    drawn = ["".join(random.choice(list(CHARACTERS), size)) for size in random.integers(0, 40, 300)]
    anywhere = [chr(code) for code in [*random.integers(1, 0x300, 200), *random.integers(0x3000, 0x9FFF, 200)]]
    drawn += ["".join(random.choice([*anywhere, " "], size)) for size in random.integers(1, 30, 200)]
    return [*drawn, *corpus(), "", " ", "  ", "▁", "<s>", "a</s> b", "the granite" + " rock" * 40, "x" * 100]


@pytest.fixture(scope="module", params=["model", "metaspace", "prepend"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A merging tokenizer that has bytes for unknown characters: as a SentencePiece model, and as tokenizer.json."""
    import sentencepiece

    directory = tmp_path_factory.mktemp(request.param)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    if request.param == "model":
        return load_tokenizer(directory / "tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocabulary = {model.id_to_piece(index): index for index in range(model.vocab_size())}
    pairs = [
        (vocabulary[piece], left, right)
        for piece in vocabulary
        for left, right in ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if left in vocabulary and right in vocabulary and not piece.startswith("<")
    ]
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": PREPENDED,
        "pre_tokenizer": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for _, left, right in sorted(pairs)],
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": "<unk>",
        },
    }
    for index, token in enumerate(("<unk>", "<s>", "</s>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": index, "content": token, "special": True, **flags})
    if request.param == "metaspace":
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    (directory / "json").mkdir()
    (directory / "json/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(directory / "json")


def compare(tokenizer: Tokenizer, given: list[str]) -> None:
    assert tokenizer._backend._segments is not None  # type: ignore[attr-defined]
    for special in (None, True, False):
        for continued in (None, [number % 2 == 0 for number in range(len(given))]):
            wanted = tokenizer.encode_batch(given, special, continued)
            with_places = tokenizer.encode_arrays(given, special, continued)
            alone = tokenizer.encode_arrays(given, special, continued, [False] * len(given))
            for text, one, two, three in zip(given, wanted, with_places, alone, strict=True):
                assert one.ids == two.ids.tolist() == three.ids.tolist(), text
                assert two.begin is not None and two.end is not None
                assert [*map(tuple, one.offsets)] == [*zip(two.begin.tolist(), two.end.tolist(), strict=True)], text
                assert two.ids.dtype == three.ids.dtype == np.int32


def test_segments_give_what_whole_texts_give(tokenizer: Tokenizer) -> None:
    compare(tokenizer, texts())


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_stand_between_fragments(tokenizer: Tokenizer, tmp_path: Path, legacy: bool) -> None:
    if tokenizer.path.suffix != ".model":
        pytest.skip("a tokenizer.json has its added tokens within")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    added = {"[PAD]": 500, "<extra one>": 501, "<extra": 502}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    settings = {"legacy": legacy, "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    other = load_tokenizer(tmp_path)
    assert other.encode("a<extra one>").ids[-1] == 501
    given = ["[PAD]", "a[PAD]b <extra one>  c", "<extra></s>[PAD][PAD] the", *texts()[::3]]
    compare(other, [*given, *(text[: len(text) // 2] + "<extra one>" + text[len(text) // 2 :] for text in given)])


def test_a_full_table_forgets_and_gives_the_same(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxlm.tokenizer.segments, "_MOST_SEGMENTS", 5)
    fresh = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301  (as worker processes get it)
    compare(fresh, texts()[::7])
    assert len(fresh._backend._segments._ids) <= 5


def test_llamas_own_model_is_cut(tmp_path: Path) -> None:
    if not SAMPLES.is_dir():
        pytest.skip("the real samples are not at hand")
    real = [line for line in (SAMPLES / "knowlm_dataset1.txt").read_text(encoding="utf-8").split("\n") if line][:60]
    compare(load_tokenizer(SAMPLES / "llama_tokenizer.model"), [*texts(), *real])


def test_where_texts_are_cut() -> None:
    pattern = cutting_pattern(["▁the", "th", "石", "▁▁", "1", "e", "▁"])
    assert pattern is not None
    assert pattern.findall(" the  the石石 1 et") == [" the", "  the", "石", "石", " ", "1", " et"]
    assert cutting_pattern(["a▁b", "th"]) is None and cutting_pattern(["a", "▁"]) is None


@pytest.mark.parametrize(
    "change", [{"byte_fallback": False}, {"normalization_rule_name": "nmt_nfkc"}, {"model_type": "unigram"}]
)
def test_models_that_cannot_be_cut_are_not(tmp_path: Path, change: dict[str, Any]) -> None:
    import sentencepiece

    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    } | change
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(tmp_path / "tokenizer"), **options
    )
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer._backend._segments is None  # type: ignore[attr-defined]
    given = texts()[::5]
    for one, two in zip(tokenizer.encode_batch(given), tokenizer.encode_arrays(given), strict=True):
        assert one.ids == two.ids.tolist()
