"""A tokenizer as T5's, made by transformers of a Unigram model, and a small random model beside it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

WORDS = [
    *("rock", "sand", "clay", "lava", "iron", "zinc", "salt", "acid", "base", "atom", "ion", "gas", "heat", "cold"),
    *("deep", "soft", "hard", "melt", "form", "flow"),
]
EXTRA_IDS = 10


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of a few words."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 12))) for _ in range(count)]


def records(count: int) -> list[dict[str, str]]:
    """Questions and answers in Alpaca's columns."""
    questions, answers = texts(count, 1), texts(count, 2)
    pairs = zip(questions, answers, strict=True)
    return [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]


def write_spiece(directory: Path) -> None:
    """spiece.model and tokenizer_config.json, which is all that T5's first checkpoints have."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory.mkdir(parents=True, exist_ok=True)
    corpus = directory.parent / f"{directory.name}-corpus.txt"
    corpus.write_text("\n".join(texts(200, 3)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "spiece"),
        vocab_size=46,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (directory / "spiece.vocab").unlink()
    roles = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": EXTRA_IDS, **roles}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_tokenizer(directory: Path) -> Any:
    """tokenizer.json as transformers makes it of `write_spiece`'s; returns transformers' tokenizer."""
    transformers = pytest.importorskip("transformers")
    write_spiece(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "spiece.model").unlink()
    return tokenizer


def write_model(directory: Path) -> Any:
    """A model directory with a tokenizer; returns transformers' tokenizer and model."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = write_tokenizer(directory)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    return tokenizer, model
