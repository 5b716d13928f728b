"""A tokenizer of another model is refused or warned of, by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.inference.fit import check_tokenizer
from jaxlm.models.families import SHAPES
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import Tokenizer, load_tokenizer


def made(directory: Path, words: list[str], bos: str = "<s>", eos: str = "</s>") -> Tokenizer:
    import tokenizers

    directory.mkdir()
    vocabulary = {word: index for index, word in enumerate(["<unk>", bos, eos, *words])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    model.add_special_tokens([bos, eos])
    model.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(f'{{"bos_token": "{bos}", "eos_token": "{eos}"}}')
    return load_tokenizer(directory)


WORDS = [f"w{number}" for number in range(60)]
CONFIG: DecoderSpec = dataclasses.replace(SHAPES["llama-7b"], vocab_size=64)


def test_the_models_own_tokenizer_and_a_copy_pass(tmp_path: Path) -> None:
    own, copy = made(tmp_path / "own", WORDS), made(tmp_path / "copy", WORDS)
    assert check_tokenizer(own, CONFIG, None, "") == []
    assert check_tokenizer(copy, CONFIG, own, "tokenizer") == []
    assert check_tokenizer(copy, CONFIG, None, "tokenizer") == []
    assert check_tokenizer(made(tmp_path / "fewer", WORDS[:40]), CONFIG, own, "tokenizer") == []


def test_more_tokens_than_rows_are_refused_or_warned_of(tmp_path: Path) -> None:
    large, own = made(tmp_path / "large", [*WORDS, "x", "y"]), made(tmp_path / "own", WORDS)
    for beside in (own, None):
        with pytest.raises(UserError, match=r"large has 65 tokens, the model's embedding 64 rows"):
            check_tokenizer(large, CONFIG, beside, "tokenizer")
    # Beside the model itself a token that was never given a row does no harm as long as nobody writes it.
    (problem,) = check_tokenizer(large, CONFIG, None, "")
    assert "65 tokens" in problem and "refused" in problem


def test_other_tokens_under_the_same_ids_are_refused_or_warned_of(tmp_path: Path) -> None:
    own, other = made(tmp_path / "own", WORDS), made(tmp_path / "other", [f"v{number}" for number in range(60)])
    with pytest.raises(UserError, match=r"other is the tokenizer of another model: token \d+ is 'v\d+' there"):
        check_tokenizer(other, CONFIG, own, "tokenizer")
    (problem,) = check_tokenizer(made(tmp_path / "near", [*WORDS[:-1], "new"]), CONFIG, own, "tokenizer")
    assert "token 62 is 'new' there and 'w59'" in problem


def test_other_special_ids_are_warned_of(tmp_path: Path) -> None:
    """Without a tokenizer to compare with: both ids are other ones than the configuration's."""
    config = dataclasses.replace(CONFIG, bos_token_id=5, eos_token_id=(6, 7))
    (problem,) = check_tokenizer(made(tmp_path / "t", WORDS), config, None, "tokenizer")
    assert "bos is 1" in problem and "eos is 2" in problem and "6 or 7" in problem
    assert check_tokenizer(made(tmp_path / "u", WORDS), dataclasses.replace(config, eos_token_id=2), None, "") == []
