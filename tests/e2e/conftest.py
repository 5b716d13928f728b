"""A tiny model directory, data and configuration, made once for the tests that run whole commands."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = [
    "rock",
    "sand",
    "clay",
    "lava",
    "iron",
    "zinc",
    "salt",
    "acid",
    "base",
    "atom",
    "ion",
    "gas",
    "heat",
    "cold",
    "deep",
    "soft",
    "hard",
    "melt",
    "form",
    "flow",
]
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with corpus.txt, records.json, shape.json and tokenizer/."""
    from jaxlm.tokenizer import train_sentencepiece

    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    (folder / "corpus.txt").write_text("\n".join(sentence(rng.randint(5, 30)) for _ in range(120)) + "\n")
    records = [{"instruction": sentence(4), "input": "", "output": sentence(rng.randint(2, 12))} for _ in range(90)]
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    train_sentencepiece([folder / "corpus.txt"], 320, folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def base_config(inputs: Path) -> dict[str, Any]:
    """Six steps of full fine-tuning a fresh model, rows packed, accumulation where there are fewer than 8 devices."""
    return {
        "model": {"shape": str(inputs / "shape.json"), "dtype": "float32", "remat": "none"},
        "tokenizer": {"path": str(inputs / "tokenizer")},
        "data": {
            "train": [{"path": str(inputs / "records.json"), "template": "alpaca_short"}],
            "validation": 10,
            "sequence_length": 64,
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "train": {
            "steps": 6,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "eval_every": 3,
            "save_every": 3,
            "compilation_cache": "none",
        },
        "mesh": {"data": -1, "fsdp": 1},
    }


def write_config(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """Writes `config` with some sections changed; returns the file."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] |= value
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(merged))
    return file
