"""Model configurations: what a `config.json` says, and the shapes of known models.

No JAX is imported here, so that commands which only look at a model start at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.config import MoeRunConfig
from jaxlm.errors import UserError
from jaxlm.jsonfields import read_fields
from jaxlm.jsontext import read_object
from jaxlm.spec import AttentionSpec, DecoderSpec, ExpertsSpec, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec

# HF architecture -> what differs from LLaMA.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}
# Other names that LLaMA's architecture goes by: of the first ports of LLaMA, and of Yi's first release, whose code is
# LLaMA's with other names for two norms (see `jaxlm.weights.names`).
ALIASES = {"LLaMAForCausalLM": "LlamaForCausalLM", "YiForCausalLM": "LlamaForCausalLM"}
# What a key that is not in a `config.json` means, where transformers' configuration class of the architecture says so.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    "mistral": dict(
        num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096, bos_token_id=1, eos_token_id=2
    ),
    "qwen2": dict(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096, max_window_layers=28),
}
DEFAULT_THETA = 10000.0
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with the field names of HF's `rope_parameters`.

    Source: transformers `modeling_rope_utils.py`; llama3 from Meta's LLaMA 3.1 release;
    yarn from arXiv:2309.00071; dynamic NTK and linear scaling as used by LLaMA forks.
    """

    rope_type: str = "default"
    rope_theta: float = DEFAULT_THETA
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> RopeConfig:
        """Reads both the new (`rope_parameters`) and the old (`rope_theta`, `rope_scaling`) form.

        Where both are there, a `rope_scaling` that says something replaces `rope_parameters` as a whole, as in
        transformers: that is how model cards have YaRN switched on.
        """
        for key in ("rope_scaling", "rope_parameters"):
            if config.get(key) and not isinstance(config[key], dict):
                raise UserError(f"config.json: {key} is {config[key]!r}; expected a JSON object")
        check_theta_is_kept(config, DEFAULT_THETA)
        given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        given.setdefault("rope_theta", config.get("rope_theta") or DEFAULT_THETA)
        if config.get("partial_rotary_factor") is not None:
            given.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
        legacy_type = given.pop("type", None)
        given.setdefault("rope_type", legacy_type or "default")
        if given["rope_type"] not in list(ROPE_TYPES):  # a list: the value may be anything, also what has no hash
            raise UserError(
                f"config.json: rope_type {given['rope_type']!r} is not supported; known: {', '.join(ROPE_TYPES)}"
            )
        if given.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise UserError("config.json: partial_rotary_factor other than 1.0 is not supported")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise UserError(f"config.json: unknown rope parameters {', '.join(unknown)}")
        for name, value in given.items():
            if name not in ("rope_type", "truncate") and value is not None and not _is_number(value):
                raise UserError(f"config.json: rope parameter {name} is {value!r}; expected a number")
        if not given["rope_theta"] or given["rope_theta"] <= 0:
            raise UserError(f"config.json: rope_theta is {given['rope_theta']!r}; expected a positive number")
        given["rope_theta"] = float(given["rope_theta"])
        rope = cls(**given)
        if rope.rope_type != "default" and rope.factor is None:
            raise UserError(f"config.json: rope_type {rope.rope_type!r} needs a 'factor'")
        if rope.rope_type == "llama3":
            if rope.original_max_position_embeddings is None:
                original = config.get("max_position_embeddings")
                rope = dataclasses.replace(rope, original_max_position_embeddings=original)
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                if getattr(rope, name) is None:
                    raise UserError(f"config.json: rope_type 'llama3' needs {name!r}")
        return rope

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RopeConfig:
        """Reads what `dataclasses.asdict` gave; refuses what `from_hf` refuses."""
        try:
            cls.from_hf({"rope_parameters": values})
        except UserError as error:
            raise UserError(f"rope: {str(error).removeprefix('config.json: ')}") from None
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def check_theta_is_kept(config: dict[str, Any], default: float) -> None:
    """Refuses a `rope_scaling` that replaces the `rope_parameters` which alone say a `rope_theta` other than `default`.

    Args:
        default: what transformers' configuration class of the architecture takes without one.
    """
    added, new = config.get("rope_scaling"), config.get("rope_parameters")
    if not (isinstance(added, dict) and added and isinstance(new, dict)) or config.get("rope_theta"):
        return
    theta = new.get("rope_theta", default)
    if added.get("rope_theta") is None and theta != default:
        raise UserError(
            f"config.json: rope_scaling replaces rope_parameters, which alone has the rope_theta {theta!r}; "
            f"transformers would go on with {default:g}. Say which is meant: put "
            f'"rope_theta": {json.dumps(theta)} into rope_scaling'
        )


def _is_number(value: Any) -> bool:
    # Bounded, because an integer of JSON may be too large to become a float.
    return type(value) in (int, float) and -1e300 < value < 1e300


def _check_values(config: dict[str, Any]) -> None:
    """Refuses values of a `config.json` that are of another kind than their keys, by name."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
    for key in sizes + optional:
        value = config.get(key)
        if (value is not None or key in sizes) and (type(value) is not int or not 0 < value < 1 << 31):
            raise UserError(f"config.json: {key} is {value!r}; expected a positive whole number")
    for key in ("rms_norm_eps", "initializer_range"):
        if key in config and not (_is_number(config[key]) and config[key] > 0):
            raise UserError(f"config.json: {key} is {config[key]!r}; expected a positive number")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if any(item is not None and type(item) is not int for item in ids):
            raise UserError(f"config.json: {key} is {value!r}; expected a token id")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key) is not None and type(config[key]) is not bool:
            raise UserError(f"config.json: {key} is {config[key]!r}; expected true or false")


def _architecture(config: dict[str, Any]) -> str:
    """The key of ARCHITECTURES that a `config.json` means."""
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named else None
    if found is None:
        by_type = {kind.lower(): name for name, kind in ARCHITECTURES.items()} | {"yi": "LlamaForCausalLM"}
        found = by_type.get(str(config.get("model_type")).lower())
    known = found if isinstance(found, str) else ""
    known = ALIASES.get(known, known)
    if known not in ARCHITECTURES:
        raise UserError(
            f"config.json: architecture {found or config.get('model_type')!r} is not supported; "
            f"supported: {', '.join([*ARCHITECTURES, *ALIASES, 'MixtralForCausalLM'])}"
        )
    if ARCHITECTURES[known] not in _DEFAULTS:
        raise _unfinished(known)
    return known


def usual_names(config: dict[str, Any]) -> dict[str, Any]:
    """A readable `config.json` with the architecture under its usual name: what is written of a model that had another.

    The code that came with it (`auto_map`) is not what is written.
    """
    architecture = _architecture(config)
    usual = {"architectures": [architecture], "model_type": ARCHITECTURES[architecture]}
    if all(not config.get(key) or config[key] == value for key, value in usual.items()):
        return config
    return {key: value for key, value in config.items() if key != "auto_map"} | usual


def _unfinished(architecture: str) -> UserError:
    return UserError(
        f"config.json: architecture {architecture!r}: jaxlm knows its name, but not how to read and write its keys; "
        "LlamaConfig.from_hf and to_hf in jaxlm/models/shapes.py must learn them first"
    )


def _window(kind: str, config: dict[str, Any]) -> int | None:
    """The sliding window of all layers; `config` has the defaults of its kind."""
    window = config.get("sliding_window")
    if kind != "qwen2":
        return window if kind == "mistral" else None
    # Qwen2 writes a window into every config and switches it on separately, for the layers from some layer on.
    if not config.get("use_sliding_window", False) or window is None:
        return None
    layers, first, types = config["num_hidden_layers"], config.get("max_window_layers"), config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            raise UserError(f"config.json: layer_types is {types!r}; expected a list of names, one of each layer")
        slide = {kind == "sliding_attention" for kind in types}
        what = "layer_types"
    else:
        if type(first) is not int:
            raise UserError(f"config.json: max_window_layers is {first!r}; expected a whole number")
        slide = {layer >= first for layer in range(layers)}
        what = f"max_window_layers {first} of {layers}"
    if len(slide) > 1:
        raise UserError(
            f"config.json: a sliding window on a part of the layers ({what}) is not supported; where rows are shorter "
            f"than the window, {window}, it changes nothing: set use_sliding_window to false"
        )
    return window if slide == {True} else None


ROUTERS = ("activation", "activation_released", "learned", "modality")
LAYOUTS = ("dense", "mixtral")
TEXT = "text"  # the modality of every token that belongs to no other


@dataclass(frozen=True)
class MoeConfig:
    """The feed-forward layer as E experts: contiguous blocks of its F neurons, F / E each.

    Args:
        experts: E.
        router: which experts a token uses. activation: those whose neurons' activations sum highest (SciMind's design);
            activation_released: as SciMind's code computes it, see `nn.experts`; learned: by a trained linear router;
            modality: a fixed set for each modality.
        modalities: names by modality id; the first is text.
        ranges: token ids [start, stop) of each modality but text, in the order of `modalities`.
        top_k: experts that a token uses, by modality id.
        shared: router modality: the first so many experts serve every modality.
        layout: the Hugging Face layout that the model came in, and goes out in unless another is asked for: 'dense'
            (with the experts in files beside it) or 'mixtral'. It changes nothing that is computed.
    """

    experts: int
    router: str
    modalities: tuple[str, ...] = (TEXT,)
    ranges: tuple[tuple[int, int], ...] = ()
    top_k: tuple[int, ...] = ()
    shared: int = 0
    layout: str = dataclasses.field(default="dense", compare=False)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"moe.layout: {self.layout!r} is not one of {', '.join(LAYOUTS)}")
        if self.experts < 1:
            raise UserError(f"moe.experts: {self.experts} must be at least 1")
        if self.router not in ROUTERS:
            raise UserError(f"moe.router: {self.router!r} is not one of {', '.join(ROUTERS)}")
        if self.modalities[:1] != (TEXT,) or len(set(self.modalities)) != len(self.modalities):
            raise UserError(f"moe.modalities: {list(self.modalities)}: names must differ, and the first is {TEXT!r}")
        if len(self.ranges) != len(self.modalities) - 1:
            raise UserError(
                f"moe.ranges: {len(self.ranges)} ranges of tokens for {len(self.modalities) - 1} modalities"
            )
        for name, (start, stop) in zip(self.modalities[1:], self.ranges, strict=True):
            if not 0 <= start < stop:
                raise UserError(f"moe.ranges: {name}: tokens {start} to {stop} are no range")
        ordered = sorted(self.ranges)
        for (_, stop), (start, _) in itertools.pairwise(ordered):
            if start < stop:
                raise UserError(f"moe.ranges: {ordered}: two modalities share tokens")
        if len(self.top_k) != len(self.modalities):
            raise UserError(f"moe.top_k: {len(self.top_k)} numbers for the modalities {', '.join(self.modalities)}")
        for name, k in zip(self.modalities, self.top_k, strict=True):
            if not 1 <= k <= self.experts:
                raise UserError(
                    f"moe.top_k: {name}: {k}; there are {self.experts} experts, so it is 1 to {self.experts}"
                )
        if not 0 <= self.shared <= min(self.top_k):
            raise UserError(f"moe.shared: {self.shared}; every modality uses them, so at most {min(self.top_k)}")

    @property
    def most(self) -> int:
        """The largest k."""
        return max(self.top_k)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoeConfig:
        """Reads what `dataclasses.asdict` gave, through JSON."""
        lists = {"modalities": tuple(values["modalities"]), "top_k": tuple(values["top_k"])}
        return cls(**{**values, **lists, "ranges": tuple((start, stop) for start, stop in values["ranges"])})


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA-family decoder. Names follow the field; D, F, L, H, K, h, V as in the docs."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # h
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02
    architecture: str = "LlamaForCausalLM"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in (*sizes, "max_position_embeddings", "sliding_window", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            # No layers at all are a way to count what lies outside of them.
            if (value is not None and not 0 <= value < 1 << 31) or (value == 0 and name != "num_layers"):
                raise UserError(f"config: {name} is {value!r}; expected a positive number")
        if self.moe is not None and self.intermediate_size % self.moe.experts:
            raise UserError(
                f"moe.experts: {self.moe.experts} does not divide the {self.intermediate_size} neurons of the "
                "feed-forward layer; experts are of equal size"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"config: num_attention_heads {self.num_heads} is no multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"config: head_dim {self.head_dim} must be even for rotary embeddings")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """Reads a HF `config.json` (old or new spelling) of a supported architecture.

        Raises UserError for an unsupported architecture, activation or RoPE type.
        """
        architecture = _architecture(config)
        kind = ARCHITECTURES[architecture]
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UserError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; only 'silu' is")
        missing = [
            key
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            if config.get(key) is None
        ]
        if missing:
            raise UserError(f"config.json: missing: {', '.join(missing)}")
        config = _DEFAULTS[kind] | config
        _check_values(config)
        num_heads = config["num_attention_heads"]
        attention_bias = bool(config.get("attention_bias", False)) if kind == "llama" else False
        eos = config.get("eos_token_id")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            max_position_embeddings=config.get("max_position_embeddings") or _DEFAULTS[kind]["max_position_embeddings"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or kind == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) if kind == "llama" else False,
            sliding_window=_window(kind, config),
            initializer_range=config.get("initializer_range", 0.02),
            architecture=architecture,
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=config.get("pad_token_id"),
        )

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The `config.json` of this model, readable by old and new transformers; of a model of experts: its dense form.

        Args:
            dtype: what the weights are stored in, e.g. 'bfloat16'.

        Raises:
            UserError: when the architecture has no key for something that the model has.
        """
        config = self._hf_keys(dtype)
        again = LlamaConfig.from_hf(config)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name != "moe" and getattr(again, item.name) != value:
                raise UserError(
                    f"config.json: {self.architecture} has no place for {item.name} {value!r}: whoever reads it would "
                    f"take {getattr(again, item.name)!r}"
                )
        return config

    def _hf_keys(self, dtype: str) -> dict[str, Any]:
        rope = self.rope.to_hf()
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": ARCHITECTURES[self.architecture],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.rms_norm_eps,
            "use_cache": True,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rope_parameters": rope,
            # The two old keys, for transformers 4 and everything built on it.
            "rope_theta": self.rope.rope_theta,
            "rope_scaling": None
            if self.rope.rope_type == "default"
            else {k: v for k, v in rope.items() if k != "rope_theta"},
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": dtype,
            "dtype": dtype,
        }
        kind = ARCHITECTURES[self.architecture]
        if kind == "llama":
            config |= {"attention_bias": self.o_bias, "mlp_bias": self.mlp_bias}
        elif kind == "mistral":
            config |= {"sliding_window": self.sliding_window}
        elif kind != "qwen2":
            raise _unfinished(self.architecture)
        else:
            config |= {
                "use_sliding_window": self.sliding_window is not None,
                "sliding_window": self.sliding_window,
                "max_window_layers": 0 if self.sliding_window is not None else self.num_layers,
            }
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        if self.moe is not None and self.moe.layout == "dense":
            del values["moe"]["layout"]  # as before there was another: what is recorded, and hashed, stays the same
        return values

    @classmethod
    def from_dict(cls, values: Any, where: str = "model") -> LlamaConfig:
        """Reads what `to_dict` gave, through JSON.

        Args:
            where: the file and the section, for errors.

        Raises:
            UserError: when a field is unknown, missing, of another type, or no model can have it.
        """
        found = read_fields(cls, values, where)
        if found.get("architecture", "LlamaForCausalLM") not in ARCHITECTURES:
            raise UserError(f"{where}.architecture is {found['architecture']!r}; known: {', '.join(ARCHITECTURES)}")
        try:
            if "rope" in found:
                found["rope"] = RopeConfig.from_dict(found["rope"])
            if found.get("moe") is not None:
                found["moe"] = MoeConfig(**read_fields(MoeConfig, found["moe"], f"{where}.moe"))
            return cls(**found)
        except UserError as error:
            text = str(error)
            raise error if text.startswith(where) else UserError(f"{where}: {text}") from None

    @property
    def spec(self) -> DecoderSpec:
        """The same decoder in the words of `jaxlm.spec`, which replaces this class."""
        attention = AttentionSpec(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            rope=RopeSpec(**dataclasses.asdict(self.rope)),
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            window=self.sliding_window,
        )
        experts = None
        if self.moe is not None:
            named = {item.name: getattr(self.moe, item.name) for item in dataclasses.fields(self.moe)}
            experts = ExpertsSpec(num_experts=named.pop("experts"), **named)
        feed_forward = FeedForwardSpec(self.intermediate_size, bias=self.mlp_bias, experts=experts)
        return DecoderSpec(
            family=ARCHITECTURES[self.architecture],
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            period=(LayerSpec(attention, feed_forward),),
            norm=NormSpec(self.rms_norm_eps),
            tied_head=self.tie_word_embeddings,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
        )

    @property
    def learned_router(self) -> bool:
        """Whether each layer has a trained router."""
        return self.moe is not None and self.moe.router == "learned"

    @property
    def max_length(self) -> int:
        """Longest row the positions are made for, in tokens: RoPE scaling stretches max_position_embeddings."""
        rope, length = self.rope, self.max_position_embeddings
        if rope.rope_type in ("linear", "dynamic"):
            return int(length * (rope.factor or 1.0))
        if rope.rope_type == "yarn":
            return max(length, int((rope.factor or 1.0) * (rope.original_max_position_embeddings or length)))
        return length

    def num_params(self) -> int:
        """Parameters of the dense model, in units."""
        d, h = self.hidden_size, self.head_dim
        q, kv = self.num_heads * h, self.num_kv_heads * h
        attention = d * q + 2 * d * kv + q * d
        attention += (q + 2 * kv) * self.qkv_bias + d * self.o_bias
        mlp = 3 * d * self.intermediate_size + (2 * self.intermediate_size + d) * self.mlp_bias
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * d) + embeddings + d


def _llama(layers: int, d: int, f: int, heads: int, kv: int | None = None, **more: Any) -> LlamaConfig:
    values: dict[str, Any] = dict(vocab_size=32000, head_dim=d // heads, rms_norm_eps=1e-5) | more
    return LlamaConfig(
        hidden_size=d, intermediate_size=f, num_layers=layers, num_heads=heads, num_kv_heads=kv or heads, **values
    )


_LLAMA3: dict[str, Any] = dict(
    vocab_size=128256,
    max_position_embeddings=8192,
    rope=RopeConfig(rope_theta=500000.0),
    bos_token_id=128000,
    eos_token_id=128001,
)


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


_LLAMA31 = _LLAMA3 | dict(max_position_embeddings=131072, rope=_llama3_rope(8.0))
_LLAMA32 = _LLAMA3 | dict(max_position_embeddings=131072, rope=_llama3_rope(32.0), tie_word_embeddings=True)
_QWEN2: dict[str, Any] = dict(
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    rms_norm_eps=1e-6,
    rope=RopeConfig(rope_theta=1e6),
    bos_token_id=151643,
    eos_token_id=151643,
)

# Published shapes (Meta, Mistral and Qwen model cards).
SHAPES: dict[str, LlamaConfig] = {
    "llama-7b": _llama(32, 4096, 11008, 32, rms_norm_eps=1e-6),
    "llama-13b": _llama(40, 5120, 13824, 40, rms_norm_eps=1e-6),
    "llama-33b": _llama(60, 6656, 17920, 52, rms_norm_eps=1e-6),
    "llama-65b": _llama(80, 8192, 22016, 64),
    "llama-2-7b": _llama(32, 4096, 11008, 32, max_position_embeddings=4096),
    "llama-2-13b": _llama(40, 5120, 13824, 40, max_position_embeddings=4096),
    "llama-2-70b": _llama(80, 8192, 28672, 64, 8, max_position_embeddings=4096),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8, **_LLAMA3),
    "llama-3-70b": _llama(80, 8192, 28672, 64, 8, **_LLAMA3),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 8, **_LLAMA31),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64, 8, **_LLAMA31),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 8, **_LLAMA32),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 8, **_LLAMA32),
    "mistral-7b": _llama(
        32, 4096, 14336, 32, 8, architecture="MistralForCausalLM", sliding_window=4096, max_position_embeddings=32768
    ),
    "qwen2-0.5b": _llama(
        24,
        896,
        4864,
        14,
        2,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        **_QWEN2,
    ),
    "qwen2-7b": _llama(28, 3584, 18944, 28, 4, vocab_size=152064, max_position_embeddings=131072, **_QWEN2),
}


def load_shape(name: str) -> LlamaConfig:
    """A known shape by name (`llama-2-7b`), or the HF-style `config.json` at a path."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if path.suffix == ".json" or path.exists():
        return LlamaConfig.from_hf(read_object(path))
    raise UserError(
        f"model.shape: {name!r} is neither a known shape ({', '.join(SHAPES)}) nor a JSON file like HF's config.json"
    )


def resolve_moe(
    shape: LlamaConfig, run: MoeRunConfig | None, fresh: bool, ranges: Mapping[str, tuple[int, int]] | None = None
) -> LlamaConfig:
    """The shape with what a run says of experts.

    Args:
        run: the section `moe`; what is not given stays as it is.
        fresh: the model is new; otherwise its weights decide whether there are experts and a learned router.
        ranges: the tokenizer's modalities, which a new model has unless the run says otherwise.

    Raises:
        UserError: for a dense model, another number of experts, or numbers that do not fit each other.
    """
    if run is None:
        return shape
    old = shape.moe
    if old is None and not fresh:
        raise UserError("moe: the model's feed-forward layer is not divided into experts; `convert moefy` does that")
    if old is not None and run.experts not in (None, old.experts):
        raise UserError(f"moe.experts: {run.experts}, but the model has {old.experts}; leave it out")
    experts = run.experts or (old.experts if old else None)
    if experts is None:
        raise UserError("moe.experts: say into how many experts the feed-forward layer is divided")
    router = run.router or (old.router if old else "learned")
    if old is not None and router == "learned" != old.router:
        raise UserError(f"moe.router: the model has no trained router (it is {old.router}), so it cannot be 'learned'")
    if run.ranges:
        ranges = run.ranges
    else:
        ranges = dict(zip(old.modalities[1:], old.ranges, strict=True)) if old else dict(ranges or {})
    top_k = dict(zip(old.modalities, old.top_k, strict=True)) if old and not run.top_k else dict(run.top_k)
    names = (TEXT, *ranges)
    for name in top_k.keys() - set(names):
        raise UserError(f"moe.top_k: {name!r} is no modality of this model; it has {', '.join(names)} (moe.ranges)")
    for name in names:
        if name not in top_k:
            raise UserError(f"moe.top_k: say how many experts tokens of the modality {name!r} use: {{{name}: K}}")
    shared = run.shared if run.shared is not None else (old.shared if old else 0)
    for name, (_, stop) in ranges.items():
        if stop > shape.vocab_size:
            raise UserError(f"moe.ranges: {name} ends at token {stop}, the model has {shape.vocab_size}")
    pairs = tuple((start, stop) for start, stop in ranges.values())
    layout = old.layout if old else "dense"
    moe = MoeConfig(experts, router, names, pairs, tuple(top_k[name] for name in names), shared, layout)
    return dataclasses.replace(shape, moe=moe)
