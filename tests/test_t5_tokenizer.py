"""T5's tokenizer, from tokenizer.json and from spiece.model, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.errors import UserError
from jaxlm.tokenizer import load_tokenizer
from tests.t5 import EXTRA_IDS, write_spiece, write_tokenizer

TEXTS = [
    "rock sand  clay",
    " iron\n\nzinc\tsalt ",
    "rock <extra_id_0> sand <extra_id_9>, clay",
    "<extra_id_3>deep",
    "unknown Ünïcode 石英",
    "",
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("t5") / "fast")


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("t5") / "slow"
    write_spiece(directory)
    return directory


@pytest.mark.parametrize("kind", ["tokenizer.json", "spiece.model"])
def test_ids_and_texts_are_those_of_transformers(kind: str, theirs: Any, spiece: Path) -> None:
    tokenizer = load_tokenizer(theirs.name_or_path if kind == "tokenizer.json" else spiece)
    assert tokenizer.vocab_size == len(theirs) == 46 + EXTRA_IDS
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (None, 1, 0, 2)
    assert tokenizer.adds_eos and not tokenizer.adds_bos
    assert tokenizer.id_of("<extra_id_0>") == 46 + EXTRA_IDS - 1
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert [*ids, 1] == theirs(text).input_ids, text
        assert tokenizer.decode(ids).strip() == theirs.decode(ids, skip_special_tokens=True).strip()


def test_what_spiece_model_does_not_say(tmp_path: Path, spiece: Path) -> None:
    """Without settings there are a hundred sentinels; mT5's say that there are none; other classes are refused."""
    (tmp_path / "spiece.model").write_bytes((spiece / "spiece.model").read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == 146
    assert load_tokenizer(tmp_path / "spiece.model").eos_id == 1
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "MT5Tokenizer", "extra_ids": 0}))
    assert load_tokenizer(tmp_path).vocab_size == 46
    config.write_text(json.dumps({"additional_special_tokens": [f"<extra_id_{n}>" for n in range(5)]}))
    assert load_tokenizer(tmp_path).vocab_size == 51
    config.write_text(json.dumps({"tokenizer_class": "XLNetTokenizer"}))
    with pytest.raises(UserError, match="tokenizer_class is 'XLNetTokenizer'"):
        load_tokenizer(tmp_path)
    config.write_text(json.dumps({"extra_ids": "many"}))
    with pytest.raises(UserError, match="extra_ids is 'many'"):
        load_tokenizer(tmp_path)
