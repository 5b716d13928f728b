"""Text of tokens that are being written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

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
    parts = [answer_text(tokenizer, [], ids[:length]) for length in range(len(ids) + 1)]
    assert all(text.startswith(part) for part in parts) and sorted(parts, key=len) == parts
    assert {*parts} >= {text[:length] for length in (5, 6, 7, 8, 10, 12)}, "a character more at a time"
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
    """A tokenizer.json with bytes for what it lacks, the same by SentencePiece, and pieces of bytes (GPT-2's)."""
    folder = tmp_path_factory.mktemp("bytes")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, show_progress=False)
    trained.train_from_iterator([WORDS] * 20, trainer)
    trained.save(str(folder / "tokenizer.json"))
    pieces = tmp_path_factory.mktemp("pieces")
    shutil.copy(tokenizer.path / "tokenizer.model", pieces)
    kinds = [tokenizer, load_tokenizer(pieces), load_tokenizer(folder)]
    assert [len(kind.run_bytes) for kind in kinds] == [256, 0, 0]
    return kinds


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
    before, ids = ([*tokenizer.encode(part).ids] for part in (prompt, text))
    wanted = ""
    for count in range(len(ids) + 1):
        wanted, stopped = cut_at_stop(answer_text(tokenizer, before, ids[:count]), stops)
        if stopped:
            break
    assert streamed(tokenizer, before, ids, stops, cuts) == wanted


@given(kind=st.integers(0, 2), data=st.data(), prompt=LETTERS, stops=STOPS)
def test_pieces_change_nothing_in_any_tokens(
    kinds: list[Tokenizer], kind: int, data: st.DataObject, prompt: str, stops: list[str]
) -> None:
    """Models write bytes that are no characters, too, beside some that are."""
    tokenizer = kinds[kind]
    before = tokenizer.encode(prompt).ids
    tokens = st.integers(0, tokenizer.vocab_size - 1).map(lambda index: [index])
    parts = data.draw(st.lists(st.one_of(tokens, LETTERS.map(lambda text: tokenizer.encode(text).ids)), max_size=12))
    ids = [index for part in parts for index in part]
    cuts = data.draw(st.sets(st.integers(0, 60)))
    shown = streamed(tokenizer, before, ids, stops, cuts)
    assert shown == streamed(tokenizer, before, ids, stops, set(range(len(ids))))
    assert shown == streamed(tokenizer, before, ids, stops, set())
    assert not any(stop in shown for stop in stops)
    assert streamed(tokenizer, before, ids, [], cuts) == answer_text(tokenizer, before, ids)


def test_an_answer_goes_on_from_characters_in_bytes(kinds: list[Tokenizer]) -> None:
    """However many bytes the prompt ends with: those of a part of a character would make the answer's none, too."""
    for tokenizer in kinds:
        for count in range(1, 9):
            prompt, ids = (tokenizer.encode(text).ids for text in (f"rock é{'岗' * count}", "岩石"))
            ids = [index for index in ids if tokenizer.token(index) not in ("▁",)]
            assert answer_text(tokenizer, prompt, ids) == streamed(tokenizer, prompt, ids, [], set()) == "岩石"


def test_a_stop_text_in_bytes_ends_an_answer_at_once(tokenizer: Tokenizer) -> None:
    """LLaMA's line end is one: nobody waits for the token behind it."""
    byte = {value: index for index, value in tokenizer.run_bytes.items()}
    ids = [*tokenizer.encode("rock").ids, byte[ord("\n")]]
    stream = TextStream(tokenizer, [], ["\n"])
    assert stream.update(ids, False) == ("rock", True)
    stream = TextStream(tokenizer, [], ["crust"])
    assert stream.update(ids, False) == ("rock", False)  # a byte may follow that makes the line end U+FFFD
    assert stream.update([*ids, byte[0xFF]], True) == ("", False)


def test_a_long_row_of_broken_bytes_is_not_read_anew_each_time(
    kinds: list[Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokenizer in kinds:
        word = tokenizer.encode("the").ids
        broken = next(
            index for index in range(tokenizer.vocab_size) if tokenizer.decode([index, index]) == "\ufffd" * 2
        )
        ids, counts = [*word, *[broken] * 500, *word], list[int]()
        original = type(tokenizer).decode

        def decode(self: Tokenizer, ids: Sequence[int], *args: bool, **kwargs: bool) -> str:
            counts.append(len(ids))  # noqa: B023
            return original(self, ids, *args, **kwargs)  # noqa: B023

        with monkeypatch.context() as patched:
            patched.setattr(type(tokenizer), "decode", decode)
            shown = streamed(tokenizer, [], ids, [], set(range(len(ids))))
        assert shown.count("\ufffd") == 500 and sum(counts) < 20 * len(ids)
