"""Text of tokens that are being written."""

from __future__ import annotations

import pytest

from jaxlm.inference.text import TextStream, answer_text, cut_at_stop
from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("the crust of the earth is made of rock and more rock\n" * 40)
    train_sentencepiece([folder / "text.txt"], 290, folder / "model")
    return load_tokenizer(folder / "model")


def test_no_half_character_at_any_length(tokenizer: Tokenizer) -> None:
    """Characters that the vocabulary lacks are spelled in bytes, a token each."""
    text = "rock 花岗岩 🌍 é"
    ids = tokenizer.encode(text).ids
    assert len(ids) > len(text), "the text should need bytes"
    for length in range(len(ids) + 1):
        part = answer_text(tokenizer, [], ids[:length])
        assert text.startswith(part)
    assert answer_text(tokenizer, [], ids) == text


def test_a_space_before_the_answer_is_kept(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the crust of the earth").ids
    for cut in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        assert prompt + answer_text(tokenizer, ids[:cut], ids[cut:]) == "the crust of the earth"


def test_a_stream_shows_everything_once(tokenizer: Tokenizer) -> None:
    text = "the rock 花岗岩 of the earth"
    prompt = tokenizer.encode("more").ids
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer, prompt, ["rocky", "岗?"])
    shown = []
    for length in range(1, len(ids) + 1):
        new, stopped = stream.update(ids[:length], length == len(ids))
        shown.append(new)
        assert not stopped
    assert "".join(shown).strip() == text
    assert sum(bool(new) for new in shown) > 5


@pytest.mark.parametrize("stop", ["of the", "f", "crust", "\n"])
def test_a_stream_never_shows_a_stop_text(tokenizer: Tokenizer, stop: str) -> None:
    text = "the crust of the earth\nis made of rock"
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer, tokenizer.encode("rock").ids, [stop, "never"])
    whole = answer_text(tokenizer, tokenizer.encode("rock").ids, ids)
    shown = ""
    for length in range(1, len(ids) + 1):
        new, stopped = stream.update(ids[:length], length == len(ids))
        shown += new
        if stopped:
            break
    assert stopped and shown == whole[: whole.index(stop)]


def test_the_first_stop_text_counts() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == ("one ", True)
    assert cut_at_stop("one two three", ["four"]) == ("one two three", False)
    assert cut_at_stop("one", []) == ("one", False)
