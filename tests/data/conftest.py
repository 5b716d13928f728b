"""Tokenizers for the data tests: small ones made here, and the real LLaMA one where it is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

SAMPLES = Path(__file__).parents[2] / "../shared/data"

WORDS = [
    *("granite", "basalt", "quartz", "feldspar", "the", "a", "of", "rock", "is", "in", "melt", "cools"),
    *("slowly", "under", "pressure", "what", "why", "how"),
]
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


def corpus() -> list[str]:
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for i in range(3, 15)) for k in range(1, 60)]
    return [*lines, "### Instruction:", "### Response:", "Below is an instruction.", "USER: ASSISTANT:", "石英 和 长石"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece, as LLaMA's: read from the .model file."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    train_sentencepiece([directory / "corpus.txt"], 400, directory / "out")
    return load_tokenizer(directory / "out" / "tokenizer.model")


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with a chat template, as LLaMA 3's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("bytelevel")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|eot_id|>", "<|start|>", "<|end|>", "<|eos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(corpus(), trainer)
    model.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|eot_id|>"}, "chat_template": LLAMA3_CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def samples() -> Path:
    if not SAMPLES.is_dir():
        pytest.skip("the real samples are not at hand")
    return SAMPLES


@pytest.fixture(scope="session")
def llama(samples: Path) -> Tokenizer:
    return load_tokenizer(samples / "llama_tokenizer.model")
