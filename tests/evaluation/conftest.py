"""A tiny model with a tokenizer, made once for the tests that ask a model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.e2e.conftest import SHAPE, WORDS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two layers with random weights, as a Hugging Face directory; its tokenizer knows WORDS and bytes."""
    pytest.importorskip("torch")
    from jaxlm.tokenizer import train_sentencepiece
    from tests.models.small import hf_model

    folder = tmp_path_factory.mktemp("tiny") / "tiny-hf"
    names = ("architectures", "model_type")
    shape = {key: value for key, value in SHAPE.items() if key not in names} | {"max_position_embeddings": 256}
    model = hf_model("llama", **shape)
    model.save_pretrained(folder)
    rng = random.Random(0)
    corpus = folder / "corpus.txt"
    lines = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 30))) for _ in range(120)]
    corpus.write_text("\n".join([*lines, "Question Answer A B C D . : ?"] * 2) + "\n")
    train_sentencepiece([corpus], 320, folder)
    corpus.unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
        )
    )
    return folder
