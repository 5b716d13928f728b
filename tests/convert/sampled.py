"""A tokenizer of words w3 ... w36 for the models of tests.convert.tiny, and data written in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 37
SALT = (30, 37)  # ids of a second modality


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def text(ids: np.ndarray) -> str:
    return " ".join(f"w{number}" for number in ids)


def write_sample(file: Path, records: int, stop: int = VOCAB, seed: int = 0) -> Path:
    """Texts of random words with ids below `stop`."""
    rng = np.random.default_rng(seed)
    rows = [{"text": text(rng.integers(3, stop, rng.integers(5, 30)))} for _ in range(records)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file
