"""Small models of every architecture that GGUF files are written of, with tokenizers, as Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from convert.conversion import write
from jaxlm.models.families import read_config
from jaxlm.spec import DecoderSpec
from jaxlm.weights.leaves import Index, LeafInfo
from jaxlm.weights.names import leaf_shapes

VOCAB = 384
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
)
_LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
_LONG = [1.0 + pair for pair in range(8)]


def _config(architecture: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": kind} | SIZES | more


def _baichuan(**more: Any) -> dict[str, Any]:
    config = _config("BaichuanForCausalLM", "baichuan", hidden_size=32, intermediate_size=32, **more)
    return {key: value for key, value in config.items() if key != "num_key_value_heads"}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _config("LlamaForCausalLM", "llama"),
    "llama3": _config(
        "LlamaForCausalLM", "llama", rope_scaling=_LLAMA3 | dict(original_max_position_embeddings=32), head_dim=32
    ),
    "llama-biases": _config("LlamaForCausalLM", "llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-linear": _config("LlamaForCausalLM", "llama", rope_scaling=dict(type="linear", factor=2.0)),
    "llama-yarn": _config(
        "LlamaForCausalLM",
        "llama",
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "mistral": _config("MistralForCausalLM", "mistral", head_dim=24, sliding_window=None),
    "mixtral": _config(
        "MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen2": _config("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True),
    "qwen3": _config("Qwen3ForCausalLM", "qwen3", head_dim=24),
    "qwen3_moe": _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
    ),
    "gemma": _config("GemmaForCausalLM", "gemma", head_dim=24),
    "gemma2": _config("Gemma2ForCausalLM", "gemma2", head_dim=24, query_pre_attn_scalar=24, sliding_window=8),
    "gemma3": _config(
        "Gemma3ForCausalLM", "gemma3_text", num_hidden_layers=7, head_dim=24, query_pre_attn_scalar=24, sliding_window=8
    ),
    "phi3": _config("Phi3ForCausalLM", "phi3", pad_token_id=2, sliding_window=None),
    "phi3-longrope": _config(
        "Phi3ForCausalLM",
        "phi3",
        original_max_position_embeddings=16,
        rope_scaling=dict(type="longrope", long_factor=_LONG, short_factor=[1.0] * 8),
    ),
    "bloom": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "olmo2": _config("Olmo2ForCausalLM", "olmo2"),
    "granite": _config(
        "GraniteForCausalLM",
        "granite",
        embedding_multiplier=1.5,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=0.7,
    ),
    "glm": _config("GlmForCausalLM", "glm", head_dim=16),
    "glm4": _config("Glm4ForCausalLM", "glm4", head_dim=16),
    "chatglm": {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "padded_vocab_size": VOCAB,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_layers": 3,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 16,
        "add_qkv_bias": True,
        "seq_length": 128,
        "eos_token_id": 2,
    },
    "internlm2": _config("InternLM2ForCausalLM", "internlm2", bias=False),
    "internlm3": _config("InternLM3ForCausalLM", "internlm3", head_dim=24),
    "baichuan2": _baichuan(num_hidden_layers=32, z_loss_weight=0),
    "baichuan-13b": _baichuan(num_hidden_layers=40, max_position_embeddings=None, model_max_length=128),
    "smollm3": _config("SmolLM3ForCausalLM", "smollm3", num_hidden_layers=5),
}
# What is read back as another architecture that computes the same.
READ_AS = {"mistral": "llama", "internlm3": "llama", "chatglm": "glm"}
_MIXTRAL = "mixtral"


class RandomSource:
    """A model of random numbers, as if it had been read from files."""

    partition = None

    def __init__(self, spec: DecoderSpec, tokenizer: Path | None = None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.config, self.path, self.hf_config = spec, Path("random"), None
        self.tokenizer_dir = tokenizer or Path("random")
        self.tokenizer_files = [] if tokenizer is None else sorted(tokenizer.iterdir())
        self.prompt_files: list[Path] = []
        self.arrays = {path: _random(rng, path, shape) for path, shape in leaf_shapes(spec).items()}
        self.leaves = {path: LeafInfo(array.shape, array.dtype) for path, array in self.arrays.items()}

    def read(self, path: str, index: Index) -> np.ndarray:
        return self.arrays[path][index].copy()


def _random(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    scale = 1.0 if "norm" in path and path.endswith("scale") else 0.0
    return (rng.normal(0, 0.15, shape) + scale).astype(np.float32)


def spec_of(name: str) -> DecoderSpec:
    """The decoder of a model."""
    if name == _MIXTRAL:
        from convert.formats.mixtral import mixtral_spec

        return mixtral_spec(Path("config.json"), CONFIGS[name])
    return read_config(CONFIGS[name])


def save_model(name: str, directory: Path, tokenizer: Path) -> None:
    """A model with a tokenizer, as a Hugging Face directory."""
    write("hf", RandomSource(spec_of(name), tokenizer), directory)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def corpus() -> list[str]:
    """Texts in several alphabets."""
    words = [
        "the",
        "granite",
        "rock",
        "of",
        "a",
        "marine",
        "basin",
        "was",
        "dated",
        "by",
        "zircon",
        "grains,",
        "3.14",
        "Ma",
        "ago;",
        "it",
        "isn't",
        "young",
    ]
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, size)) for size in rng.integers(3, 14, 300)]
    return [
        *lines,
        "SiO2 and Fe2O3 in 12.5 %",
        "花岗岩是一种岩石",
        "Gneiß, Émile über façade",
        "a  b   c\nd\n\ne\t f",
    ] * 2


TEXTS = [
    "the granite rock",
    " two  spaces and\nlines\n\n",
    "It isn't 12345 years, it's 1,000.5!",
    "花岗岩 and émile \U0001f98a",
    "x" * 30,
    "",
    "the <end> of <mark> it",
]


def save_sentencepiece(directory: Path, **settings: Any) -> None:
    """A SentencePiece model that merges pieces, with bytes, and two tokens beside it."""
    import sentencepiece

    directory.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(directory / "tokenizer"),
        **(
            dict(
                model_type="bpe",
                vocab_size=VOCAB - 8,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                minloglevel=2,
            )
            | settings
        ),
    )
    (directory / "tokenizer.vocab").unlink()
    added = {str(VOCAB - 8): ("<end>", True), str(VOCAB - 7): ("<mark>", False)}
    content = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}",
        "added_tokens_decoder": {
            index: {"content": token, "special": special} for index, (token, special) in added.items()
        },
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, VOCAB - 8]}))


def save_byte_level(directory: Path, pre: str, texts: Iterable[str] | None = None) -> None:
    """A byte-level tokenizer.json that cuts words as llama.cpp's code of that name does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors, trainers

    from convert.formats.gguf.pretokenizers import as_json

    rules = as_json(pre)
    empty = Tokenizer(models.BPE(ignore_merges=rules["ignore_merges"]))
    content = json.loads(empty.to_str()) | {key: rules[key] for key in ("normalizer", "pre_tokenizer")}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = __import__("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True, normalized=False) for token in ("<pad>", "<s>", "</s>", "<end>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 3, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts or corpus(), trainer)
    tokenizer.add_tokens([AddedToken("<mark>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings["pad_token"] = "<pad>"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
