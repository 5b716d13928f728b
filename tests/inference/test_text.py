"""Text of tokens that are being written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

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


WORDS = "the crust of the earth is made of rock and more rock: 花岗岩, é 🌍\n"


@pytest.fixture(scope="module")
def kinds(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """SentencePiece with bytes for what it lacks, the same as a tokenizer.json, and pieces of bytes (GPT-2's)."""
    folder = tmp_path_factory.mktemp("bytes")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, show_progress=False)
    trained.train_from_iterator([WORDS] * 20, trainer)
    trained.save(str(folder / "tokenizer.json"))
    vocabulary = {tokenizer.token(index): index for index in range(tokenizer.vocab_size)}
    fallback = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    replace, strip = tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Strip(" ", 1, 0)
    steps = [replace, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), strip]
    fallback.decoder = tokenizers.decoders.Sequence(steps)
    other = tmp_path_factory.mktemp("fallback")
    fallback.save(str(other / "tokenizer.json"))
    return [tokenizer, load_tokenizer(Path(other)), load_tokenizer(Path(folder))]


def streamed(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], stops: Sequence[str], cuts: set[int]
) -> str:
    """What is shown when the tokens come in pieces that end at `cuts`; no more come behind a stop text."""
    stream = TextStream(tokenizer, prompt, stops)
    shown = ""
    for end in sorted({*(cut for cut in cuts if cut < len(ids)), len(ids)}):
        new, stopped = stream.update(ids[:end], end == len(ids))
        shown += new
        if stopped:
            break
    assert shown == stream.text and stream.ends == sorted(stream.ends)
    return shown


LETTERS = st.text(st.sampled_from("the rock花岗🌍é\n :"), max_size=25)
STOPS = st.lists(st.text(st.sampled_from("the rock花岗🌍é\n :"), min_size=1, max_size=4), max_size=4)


@given(kind=st.integers(0, 2), text=LETTERS, stops=STOPS, cuts=st.sets(st.integers(0, 60)), prompt=LETTERS)
def test_a_stream_is_the_answer_in_pieces(
    kinds: list[Tokenizer], kind: int, text: str, stops: list[str], cuts: set[int], prompt: str
) -> None:
    """Whatever the stop texts, the characters in bytes, and the pieces; the answer is decoded as a whole for that."""
    tokenizer = kinds[kind]
    # The tokenizer.json has no merges, and decodes what SentencePiece encodes.
    before, ids = ([*kinds[0 if kind < 2 else 2].encode(part).ids] for part in (prompt, text))
    wanted = ""
    for count in range(len(ids) + 1):
        wanted, stopped = cut_at_stop(answer_text(tokenizer, before, ids[:count]), stops)
        if stopped:
            break
    assert streamed(tokenizer, before, ids, stops, cuts) == wanted


@given(kind=st.integers(0, 2), data=st.data(), stops=STOPS)
def test_pieces_change_nothing_in_any_tokens(
    kinds: list[Tokenizer], kind: int, data: st.DataObject, stops: list[str]
) -> None:
    """Models write bytes that are no characters, too."""
    tokenizer = kinds[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cuts = data.draw(st.sets(st.integers(0, 30)))
    shown = streamed(tokenizer, ids[:3], ids, stops, cuts)
    assert (
        shown
        == streamed(tokenizer, ids[:3], ids, stops, set(range(31)))
        == streamed(tokenizer, ids[:3], ids, stops, set())
    )
    assert not any(stop in shown for stop in stops)
