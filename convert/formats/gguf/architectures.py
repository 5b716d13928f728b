"""What GGUF calls models and their tensors, and the keys that describe a decoder, out and in.

A file says what llama.cpp computes: each architecture has code of its own there, and keys for what varies. `write_keys`
says what can be said, and `check_keys` reads it back: what a decoder has beyond that is refused by name, so a file
never computes something else than the model that it was made of.

Sources: gguf 0.19 `constants.py`; llama.cpp `src/models/*.cpp`, `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.mixtral import mixtral_spec
from jaxlm.errors import UserError
from jaxlm.models.families import FAMILIES, family_of, read_config
from jaxlm.spec import DecoderSpec, LayerSpec, RopeSpec, differences

# Module, as the rows of families have it -> its tensors' name.
MODULES: dict[str, str] = {
    "embed_tokens": "token_embd",
    "embed_norm": "token_embd_norm",
    "input_layernorm": "blk.{}.attn_norm",
    "self_attn/q_proj": "blk.{}.attn_q",
    "self_attn/k_proj": "blk.{}.attn_k",
    "self_attn/v_proj": "blk.{}.attn_v",
    "self_attn/o_proj": "blk.{}.attn_output",
    "self_attn/q_norm": "blk.{}.attn_q_norm",
    "self_attn/k_norm": "blk.{}.attn_k_norm",
    "attention_output_norm": "blk.{}.post_attention_norm",
    "post_attention_layernorm": "blk.{}.ffn_norm",
    "mlp/gate_proj": "blk.{}.ffn_gate",
    "mlp/up_proj": "blk.{}.ffn_up",
    "mlp/down_proj": "blk.{}.ffn_down",
    "feed_forward_output_norm": "blk.{}.post_ffw_norm",
    "norm": "output_norm",
    "lm_head": "output",
}
ROUTER = "blk.{}.ffn_gate_inp.weight"
# Tensors that are keys: they follow from the positions.
LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
ROPE_TENSORS = (LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS)
# A key of jaxlm's own: the numbers behind LLAMA3_FACTORS, in the words of config.json. Others pass over it.
LLAMA3_KEY = "jaxlm.rope_parameters"

_QKV = ("blk.{}.attn_qkv", ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"))
_GATE_UP = ("blk.{}.ffn_up", ("mlp/gate_proj", "mlp/up_proj"))


class Keys:
    """The keys of a file, below its architecture.

    Args:
        where: the file, for errors.
        values: all keys by their full names.
    """

    def __init__(self, where: Path, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values
        self.architecture = self.text("general.architecture")

    def text(self, name: str) -> str:
        """A text that must be there, by its full name."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise UserError(f"{self.where}: {name} is {value!r}; expected a text; copy the file again")
        return value

    def number(self, name: str, default: float | None = None) -> Any:
        """A number, by its name below the architecture; float32 as the shortest decimal number that means it."""
        value = self.values.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise UserError(f"{self.where}: the key {self.architecture}.{name} is missing")
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # one number for each layer, all the same
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(
                f"{self.where}: {self.architecture}.{name} is {value!r}; expected one number for all layers"
            )
        return value if isinstance(value, int) else float(str(np.float32(value)))

    def has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.values

    def get(self, name: str) -> Any:
        """Any value, by its name below the architecture; None without it."""
        return self.values.get(f"{self.architecture}.{name}")


@dataclass(frozen=True)
class FileShape:
    """What tensors say about a decoder.

    Args:
        vocab_size: number of rows of the embedding.
        tied_head: there is no output matrix.
        qkv_bias, o_bias, mlp_bias: whether linear layers have a bias.
        rope_factors: the contents of ROPE_TENSORS that are there.
    """

    vocab_size: int
    tied_head: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope_factors: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """An architecture of GGUF.

    Args:
        name: its name there.
        family: the family that a file is read as.
        families: those that are written as it.
        read: what config.json has beside the usual keys.
        write: keys, below the architecture, beside the usual ones.
        interleaved: dims 2 i and 2 i + 1 of a head turn together.
        fused: modules that are one tensor: its name, and the parts in order.
    """

    name: str
    family: str
    families: tuple[str, ...]
    read: Callable[[Keys, FileShape], dict[str, Any]] = lambda keys, shape: {}
    write: Callable[[DecoderSpec], dict[str, Any]] = lambda spec: {}
    interleaved: bool = False
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()


def _biases(keys: Keys, shape: FileShape) -> dict[str, Any]:
    return {"attention_bias": shape.qkv_bias or shape.o_bias, "mlp_bias": shape.mlp_bias}


def _no_bias(keys: Keys, shape: FileShape) -> dict[str, Any]:
    # llama.cpp has a place for those of q, k and v here, but not for that of o, which config.json's key means too.
    return {"attention_bias": False}


# --- windows ----------------------------------------------------------------------------------------------------------


def _read_windows(keys: Keys, period: int) -> dict[str, Any]:
    """`sliding_window` and `layer_types`: every `period`-th layer sees all, or as a list says."""
    window, layers = keys.get("attention.sliding_window"), keys.number("block_count")
    pattern = keys.get("attention.sliding_window_pattern") or period
    slides = pattern if isinstance(pattern, list) else [(layer + 1) % pattern > 0 for layer in range(layers)]
    if not window:
        slides = [False] * layers
    return {
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
    }


def _write_windows(spec: DecoderSpec) -> dict[str, Any]:
    windows = [layer.attention.window for layer in spec.layers()]
    if not any(windows):
        return {}
    return {
        "attention.sliding_window": next(window for window in windows if window),
        "attention.sliding_window_pattern": [window is not None for window in windows],
    }


# --- families ---------------------------------------------------------------------------------------------------------


def _read_moe(keys: Keys, shape: FileShape) -> dict[str, Any]:
    return {
        "num_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "moe_intermediate_size": keys.number("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _write_moe(spec: DecoderSpec) -> dict[str, Any]:
    moe, size = spec.experts, max(layer.feed_forward.size for layer in spec.layers())
    if moe is None:
        raise UserError("a qwen3_moe model without experts has no form in GGUF")
    return {"expert_feed_forward_length": size // moe.num_experts}


def _scale_of_width(keys: Keys, layers: int) -> float:
    """What llama.cpp multiplies Gemma's scores with: by the head dim, in the largest model by D over the heads."""
    heads, width = keys.number("attention.head_count"), keys.number("embedding_length")
    return width / heads if keys.number("block_count") == layers else keys.number("attention.key_length", width / heads)


def _read_gemma2(keys: Keys, shape: FileShape) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _scale_of_width(keys, 46),
        "hidden_activation": "gelu_pytorch_tanh",
        **_no_bias(keys, shape),
        **_read_windows(keys, 2),
    }


def _write_gemma2(spec: DecoderSpec) -> dict[str, Any]:
    caps = {
        "attn_logit_softcapping": spec.period[0].attention.soft_cap,
        "final_logit_softcapping": spec.logits_soft_cap,
    }
    return {key: value for key, value in caps.items() if value is not None} | _write_windows(spec)


def _read_gemma3(keys: Keys, shape: FileShape) -> dict[str, Any]:
    full = read_rope(keys, shape)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 1e4)}
    return {
        "query_pre_attn_scalar": _scale_of_width(keys, 62),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        **_no_bias(keys, shape),
        **_read_windows(keys, 6),
    }


def _write_gemma3(spec: DecoderSpec) -> dict[str, Any]:
    near = next((layer.attention.rope for layer in spec.layers() if layer.attention.window is not None), None)
    keys = _write_windows(spec)
    if near is not None:
        keys["rope.freq_base_swa"] = near.rope_theta
    if spec.logits_soft_cap is not None:
        keys["final_logit_softcapping"] = spec.logits_soft_cap
    return keys


def _read_granite(keys: Keys, shape: FileShape) -> dict[str, Any]:
    width = keys.number("embedding_length") / keys.number("attention.head_count")
    return {
        "attention_multiplier": keys.number("attention.scale", 0.0)
        or keys.number("attention.key_length", width) ** -0.5,
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.number("logit_scale"),
        **_biases(keys, shape),
    }


def _write_granite(spec: DecoderSpec) -> dict[str, Any]:
    layer = spec.uniform_layer
    scale = layer.attention.scale
    return {
        "attention.scale": layer.attention.head_dim**-0.5 if scale is None else scale,
        "embedding_scale": spec.embedding_scale or 1.0,
        "residual_scale": layer.residual_scale or 1.0,
        "logit_scale": 1.0 / (spec.logits_scale or 1.0),
    }


def _read_partial(keys: Keys, shape: FileShape) -> dict[str, Any]:
    head_dim = keys.number(
        "attention.key_length", keys.number("embedding_length") / keys.number("attention.head_count")
    )
    part = keys.number("rope.dimension_count", head_dim) / head_dim
    # The inverse of the rounding in `read_partial_rope`.
    return {"partial_rotary_factor": part, "rope_parameters": read_rope(keys, shape) | {"partial_rotary_factor": part}}


def _read_phi3(keys: Keys, shape: FileShape) -> dict[str, Any]:
    # Its windows are read and switched off by llama.cpp.
    original = keys.get("rope.scaling.original_context_length")
    length = keys.number("context_length")
    return {
        "sliding_window": None,
        "original_max_position_embeddings": original or length,
        **_read_partial(keys, shape),
    }


def _write_phi3(spec: DecoderSpec) -> dict[str, Any]:
    # 0 is for models whose pre-tokenizer is Phi-4's; without the key older versions of llama.cpp refuse the file.
    return {
        "attention.sliding_window": spec.attention.window or 0,
        "rope.scaling.original_context_length": spec.attention.rotary.original_max_position_embeddings
        or spec.max_position_embeddings,
    }


def _read_glm(keys: Keys, shape: FileShape) -> dict[str, Any]:
    return {"attention_bias": shape.qkv_bias, **_read_partial(keys, shape)}


def _read_bloom(keys: Keys, shape: FileShape) -> dict[str, Any]:
    return {"seq_length": keys.number("context_length"), "rope_parameters": None}


def _read_baichuan(keys: Keys, shape: FileShape) -> dict[str, Any]:
    layers, length = keys.number("block_count"), keys.number("context_length")
    if layers not in (32, 40):
        raise UserError(
            f"{keys.where}: llama.cpp knows Baichuan's positions by the number of layers, 32 (rotary) and 40 (ALiBi), "
            f"and has none for {layers}"
        )
    alibi = layers == 40
    second = {"z_loss_weight": 0} if shape.vocab_size == 125696 else {}
    return second | {"max_position_embeddings": None if alibi else length, "model_max_length": length}


def _read_smollm3(keys: Keys, shape: FileShape) -> dict[str, Any]:
    turns = [int((layer + 1) % 4 > 0) for layer in range(keys.number("block_count"))]
    return {"no_rope_layers": turns, "use_sliding_window": False, "layer_types": None, **_biases(keys, shape)}


ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture("llama", "llama", ("llama", "mistral", "internlm3"), _biases, interleaved=True),
        Architecture("qwen2", "qwen2", ("qwen2",)),
        Architecture("qwen3", "qwen3", ("qwen3",), _no_bias),
        Architecture("qwen3moe", "qwen3_moe", ("qwen3_moe",), _read_moe, _write_moe),
        Architecture("gemma", "gemma", ("gemma",), _no_bias),
        Architecture("gemma2", "gemma2", ("gemma2",), _read_gemma2, _write_gemma2),
        Architecture("gemma3", "gemma3_text", ("gemma3_text",), _read_gemma3, _write_gemma3),
        Architecture("phi3", "phi3", ("phi3",), _read_phi3, _write_phi3, fused=(_QKV, _GATE_UP)),
        Architecture("bloom", "bloom", ("bloom",), _read_bloom, fused=(_QKV,)),
        Architecture("olmo2", "olmo2", ("olmo2",), _no_bias),
        Architecture("granite", "granite", ("granite",), _read_granite, _write_granite, interleaved=True),
        Architecture("chatglm", "glm", ("glm", "chatglm"), _read_glm, interleaved=True, fused=(_GATE_UP,)),
        Architecture("glm4", "glm4", ("glm4",), _read_glm, interleaved=True, fused=(_GATE_UP,)),
        Architecture("internlm2", "internlm2", ("internlm2",), _no_bias, interleaved=True),
        Architecture("baichuan", "baichuan", ("baichuan",), _read_baichuan, interleaved=True),
        Architecture("smollm3", "smollm3", ("smollm3",), _read_smollm3, interleaved=True),
    )
}


def architecture_for(where: Path, spec: DecoderSpec) -> Architecture:
    """The architecture that a decoder is written as.

    Raises:
        UserError: there is none.
    """
    for architecture in ARCHITECTURES.values():
        if spec.family in architecture.families:
            return architecture
    known = ", ".join(family for each in ARCHITECTURES.values() for family in each.families)
    raise UserError(f"{where}: {family_of(spec).architecture} is not written as GGUF; known are {known}")


# --- positions --------------------------------------------------------------------------------------------------------


def llama3_factors(rope: RopeSpec, dims: int) -> tuple[float, ...]:
    """What LLaMA 3.1's scaling divides each of the dims / 2 frequencies by (Meta's `apply_scaling`)."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and rope.original_max_position_embeddings
    low, high, length = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    factors = []
    for pair in range(dims // 2):
        turns = length * rope.rope_theta ** (-2 * pair / dims) / (2 * math.pi)  # over the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - share) / rope.factor + share))
    return tuple(factors)


def _attention_factor(rope: RopeSpec, length: int) -> float:
    """The factor on cos and sin."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "yarn":
        assert rope.factor
        return 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
    if rope.rope_type != "longrope":
        return 1.0
    original = rope.original_max_position_embeddings
    assert original
    stretch = rope.factor or length / original
    return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))


def write_rope(spec: DecoderSpec) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    """(keys below the architecture, tensors by name) of the positions of layers that see everything."""
    layers = [layer.attention for layer in spec.layers() if layer.attention.rope is not None]
    if not layers:
        return {}, {}
    attention = next((each for each in layers if each.window is None), layers[0])
    rope, dims = attention.rotary, attention.rotary_dim or attention.head_dim
    keys: dict[str, Any] = {"rope.dimension_count": dims, "rope.freq_base": float(rope.rope_theta)}
    if rope.rope_type == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}, {}
    if rope.rope_type == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_max_position_embeddings
            or spec.max_position_embeddings,
            "rope.scaling.yarn_beta_fast": rope.beta_fast or 32.0,
            "rope.scaling.yarn_beta_slow": rope.beta_slow or 1.0,
        }
        return keys, {}
    if rope.rope_type == "llama3":
        numbers = {name: value for name, value in dataclasses.asdict(rope).items() if value is not None}
        return keys | {LLAMA3_KEY: json.dumps(numbers)}, {LLAMA3_FACTORS: llama3_factors(rope, dims)}
    if rope.rope_type == "longrope":
        assert rope.long_factor and rope.short_factor
        keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
            "rope.scaling.attn_factor": _attention_factor(rope, spec.max_position_embeddings),
        }
        return keys, {LONG_FACTORS: rope.long_factor, SHORT_FACTORS: rope.short_factor}
    return keys, {}


def read_rope(keys: Keys, shape: FileShape) -> dict[str, Any]:
    """`rope_parameters` of config.json.

    Raises:
        UserError: the frequencies are scaled in a way that config.json has no words for.
    """
    kind = keys.get("rope.scaling.type") or "none"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(keys.number("rope.freq_base", 10000.0))}
    factors = shape.rope_factors
    if LLAMA3_FACTORS in factors:
        return _read_llama3(keys, rope, factors[LLAMA3_FACTORS])
    if LONG_FACTORS in factors and SHORT_FACTORS in factors:
        original = keys.number("rope.scaling.original_context_length")
        return rope | {
            "rope_type": "longrope",
            "long_factor": list(factors[LONG_FACTORS]),
            "short_factor": list(factors[SHORT_FACTORS]),
            "original_max_position_embeddings": original,
            "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
        }
    if kind == "none":
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": float(keys.number("rope.scaling.factor"))}
    if (
        kind != "yarn"
        or keys.number("rope.scaling.attn_factor", 1.0) != 1.0
        or keys.has("rope.scaling.yarn_log_multiplier")
    ):
        raise UserError(f"{keys.where}: rope.scaling of type {kind!r} is not read with these keys")
    original = keys.get("rope.scaling.original_context_length") or keys.number("context_length")
    return rope | {
        "rope_type": "yarn",
        "factor": float(keys.number("rope.scaling.factor")),
        "original_max_position_embeddings": original,
        "beta_fast": float(keys.number("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(keys.number("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _read_llama3(keys: Keys, rope: dict[str, Any], factors: tuple[float, ...]) -> dict[str, Any]:
    """The numbers behind the factors: those that jaxlm wrote beside them, or the published ones; both are tried."""
    candidates = []
    if LLAMA3_KEY in keys.values:
        candidates.append(json.loads(keys.text(LLAMA3_KEY)))
    published = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    candidates.append(rope | {"rope_type": "llama3", "factor": float(str(np.float32(max(factors)))), **published})
    for candidate in candidates:
        expected = llama3_factors(RopeSpec(**candidate), 2 * len(factors))
        if np.allclose(expected, factors, rtol=1e-5):
            return dict(candidate)
    raise UserError(
        f"{keys.where}: {LLAMA3_FACTORS} are not the factors of LLaMA 3.1 (low 1, high 4, 8192 positions), and nothing "
        "says what they are"
    )


# --- a decoder as keys, and back --------------------------------------------------------------------------------------


def write_keys(spec: DecoderSpec, architecture: Architecture) -> dict[str, Any]:
    """Every key of a decoder, by its full name; whole numbers, floats, texts, truth values and lists of one kind."""
    layer, moe = spec.period[0], spec.experts
    attention, plain = layer.attention, as_computed(spec)
    eps = "layer_norm_rms_epsilon" if spec.norm.kind == "rms" else "layer_norm_epsilon"
    size = layer.feed_forward.size
    keys: dict[str, Any] = {
        "block_count": spec.num_layers,
        "context_length": plain.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": size // moe.num_experts if moe is not None else size,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": attention.num_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        f"attention.{eps}": spec.norm.eps,
        "vocab_size": spec.vocab_size,
    }
    if moe is not None:
        keys |= {"expert_count": moe.num_experts, "expert_used_count": moe.max_top_k}
    keys |= write_rope(spec)[0] | architecture.write(spec)
    return {name if name == LLAMA3_KEY else f"{architecture.name}.{name}": value for name, value in keys.items()}


def read_spec(keys: Keys, shape: FileShape) -> DecoderSpec:
    """The decoder that a file describes.

    Raises:
        UserError: its architecture is not known, a key is missing, or a value has no form here.
    """
    architecture = ARCHITECTURES.get(keys.architecture)
    if architecture is None:
        raise UserError(
            f"{keys.where}: general.architecture is {keys.architecture!r}, which is not read; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    family = FAMILIES[architecture.family]
    heads, width = keys.number("attention.head_count"), keys.number("embedding_length")
    eps = "layer_norm_epsilon" if keys.has("attention.layer_norm_epsilon") else "layer_norm_rms_epsilon"
    usual: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": width,
        "intermediate_size": keys.number("feed_forward_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": keys.number("attention.key_length", width // heads),
        "max_position_embeddings": keys.number("context_length"),
        "rms_norm_eps": keys.number(f"attention.{eps}"),
        "rope_parameters": read_rope(keys, shape),
        "tie_word_embeddings": shape.tied_head,
        **{
            f"{name}_token_id": keys.values.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in _TOKENS.items()
        },
    }
    if keys.number("expert_count", 0) and architecture.name == "llama":
        moe = {
            "num_local_experts": keys.number("expert_count"),
            "num_experts_per_tok": keys.number("expert_used_count"),
        }
        kept = {key: value for key, value in usual.items() if value is not None}
        return mixtral_spec(keys.where, kept | moe | {"sliding_window": None})
    usual |= architecture.read(keys, shape)
    named = {family.keys.get(key, key) or key: value for key, value in usual.items()}
    config = {"architectures": [family.architecture], "model_type": family.model_type or family.name, **named}
    try:
        return read_config(config)
    except UserError as error:
        raise UserError(f"{keys.where}: {str(error).removeprefix('config.json: ')}") from None


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def check_keys(where: Path, spec: DecoderSpec, architecture: Architecture) -> None:
    """Refuses a decoder of which a file would say something else, by the names of what differs."""
    keys = Keys(where, {"general.architecture": architecture.name, **write_keys(spec, architecture)})
    attention, feed_forward = spec.period[0].attention, spec.period[0].feed_forward
    shape = FileShape(
        spec.vocab_size,
        spec.tied_head,
        attention.qkv_bias,
        attention.o_bias,
        feed_forward.bias,
        write_rope(spec)[1],
    )
    back = read_spec(keys, shape)
    other = [
        f"{name} is {ours!r}, llama.cpp computes {theirs!r}"
        for name, ours, theirs in differences(_compared(spec), _compared(back))
        if not _close(ours, theirs)
    ]
    if other:
        raise UserError(
            f"{where}: GGUF's architecture {architecture.name!r} has no place for what this {spec.family} model "
            f"computes: {'; '.join(other[:4])}"
        )


def _close(first: Any, second: Any) -> bool:
    """Whether two numbers are one to float32, which the keys are stored in."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_close, first, second))
    numbers = all(type(value) in (int, float) for value in (first, second))
    return math.isclose(first, second, rel_tol=2e-7) if numbers else first == second


def as_computed(spec: DecoderSpec) -> DecoderSpec:
    """The decoder up to the longest text that llama.cpp computes alike: what makes no difference there is left out.

    Dynamic scaling begins behind max_position_embeddings. Windows that all layers share are not computed in the
    architectures of such models (Mistral 7B, Phi-3), and make no difference up to their length.
    """
    windows = {layer.attention.window for layer in spec.layers()}
    if len(windows) == 1 and None not in windows:
        (window,) = windows
        spec = replace(spec, max_position_embeddings=min(window or 0, spec.max_position_embeddings))
        spec = spec.with_attention(window=None)
    return spec.with_layers(lambda layer: _layer_as_computed(layer, spec.max_position_embeddings))


def _layer_as_computed(layer: LayerSpec, length: int) -> LayerSpec:
    rope = layer.attention.rope
    if rope is None:
        return layer
    if rope.rope_type == "dynamic":
        rope = RopeSpec(rope_theta=rope.rope_theta)
    return replace(layer, attention=replace(layer.attention, rope=rope))


def _compared(spec: DecoderSpec) -> DecoderSpec:
    """What two decoders that compute the same have in common: without names and words that mean the default."""
    length, spec = spec.max_position_embeddings, as_computed(spec)

    def usual(layer: LayerSpec) -> LayerSpec:
        attention = layer.attention
        rope, experts = attention.rope, layer.feed_forward.experts
        if rope is not None and rope.rope_type in ("yarn", "longrope"):
            rope = replace(rope, attention_factor=_attention_factor(rope, length), truncate=rope.truncate is not False)
            if rope.rope_type == "yarn":
                original = rope.original_max_position_embeddings or length
                rope = replace(rope, beta_fast=rope.beta_fast or 32.0, beta_slow=rope.beta_slow or 1.0)
                rope = replace(rope, original_max_position_embeddings=original)
            else:
                rope = replace(rope, factor=None)
        scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
        rotary = None if attention.rotary_dim == attention.head_dim else attention.rotary_dim
        attention = replace(attention, rope=rope, scale=scale, rotary_dim=rotary)
        if experts is not None and experts.weights == "k_times":
            experts = replace(experts, weights="normalised")  # k is multiplied into down_proj
        return replace(layer, attention=attention, feed_forward=replace(layer.feed_forward, experts=experts))

    spec = spec.with_layers(usual)
    names: dict[str, Any] = dict(family="", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return replace(spec, **names, initializer_range=0.02, normed_head=False)


def notes_on(spec: DecoderSpec) -> Iterator[str]:
    """What the user of a file should know, in words."""
    layers = list(spec.layers())
    windows = {layer.attention.window for layer in layers}
    length = as_computed(spec).max_position_embeddings
    if length < spec.max_position_embeddings:
        yield (
            f"llama.cpp computes no window in this architecture: context_length is {length}, the window, up to which "
            f"it makes no difference (max_position_embeddings is {spec.max_position_embeddings}, windows {windows})"
        )
    ropes = {layer.attention.rope for layer in layers if layer.attention.rope is not None}
    if long := next((rope for rope in ropes if rope.rope_type == "longrope"), None):
        original = long.original_max_position_embeddings
        yield (
            f"llama.cpp chooses between longrope's factors by the size of the context, not of the text: with more than "
            f"-c {original} it takes the long ones for short texts too"
        )
    if any(rope.rope_type == "dynamic" for rope in ropes):
        yield f"llama.cpp does not stretch positions dynamically: it computes the same up to {length} tokens"
