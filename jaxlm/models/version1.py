"""Models as versions up to November 2026 wrote them down: the flat fields of model.json's version 1.

Checkpoints of then are read through this, and fingerprints of then worked out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsonfields import build
from jaxlm.spec import TEXT, DecoderSpec, ExpertsSpec, RopeSpec, differences, uniform_decoder

# Families by the name of their architecture, which version 1 recorded.
FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}

_ROPE = RopeSpec()


@dataclass(frozen=True)
class ExpertsFields:
    """`ExpertsSpec`; also the section `moe` of a folder `jaxlm_experts`."""

    experts: int
    router: str
    modalities: tuple[str, ...] = (TEXT,)
    ranges: tuple[tuple[int, int], ...] = ()
    top_k: tuple[int, ...] = ()
    shared: int = 0
    layout: str = "dense"
    weights: str = "k_times"

    @classmethod
    def of(cls, experts: ExpertsSpec) -> ExpertsFields:
        """The fields of a division into experts."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "experts"]
        return cls(experts.num_experts, **{name: getattr(experts, name) for name in names})

    def spec(self) -> ExpertsSpec:
        """The division that they describe."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ExpertsSpec(values.pop("experts"), **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what came later is left out where it says what was."""
        values = dataclasses.asdict(self)
        later = {"layout": "dense", "weights": "k_times"}
        return {key: value for key, value in values.items() if key not in later or value != later[key]}


@dataclass(frozen=True)
class ModelFields:
    """A decoder of LLaMA's kind, with the defaults that a missing field had."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope: RopeSpec = _ROPE
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
    moe: ExpertsFields | None = None

    @classmethod
    def of(cls, spec: DecoderSpec) -> ModelFields | None:
        """The fields of a decoder; None when version 1 had none for something in it."""
        architectures = {family: name for name, family in FAMILIES.items()}
        if len(set(spec.period)) > 1 or spec.family not in architectures:
            return None
        attention, feed_forward = spec.attention, spec.feed_forward
        if attention.rope is None:
            return None
        fields = cls(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            intermediate_size=feed_forward.size,
            num_layers=spec.num_layers,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            max_position_embeddings=spec.max_position_embeddings,
            rms_norm_eps=spec.norm.eps,
            rope=attention.rope,
            tie_word_embeddings=spec.tied_head,
            qkv_bias=attention.qkv_bias,
            o_bias=attention.o_bias,
            mlp_bias=feed_forward.bias,
            sliding_window=attention.window,
            initializer_range=spec.initializer_range,
            architecture=architectures[spec.family],
            bos_token_id=spec.bos_token_id,
            eos_token_id=spec.eos_token_id,
            pad_token_id=spec.pad_token_id,
            moe=None if spec.experts is None else ExpertsFields.of(spec.experts),
        )
        return None if any(differences(fields.spec(), spec)) else fields

    def spec(self) -> DecoderSpec:
        """The decoder that they describe."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        architecture, moe = values.pop("architecture"), values.pop("moe")
        return uniform_decoder(
            FAMILIES[architecture],
            norm_eps=values.pop("rms_norm_eps"),
            tied_head=values.pop("tie_word_embeddings"),
            window=values.pop("sliding_window"),
            experts=None if moe is None else moe.spec(),
            **values,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as they were recorded, and hashed."""
        values = dataclasses.asdict(self)
        return values if self.moe is None else values | {"moe": self.moe.to_dict()}


def recorded(spec: DecoderSpec) -> dict[str, Any]:
    """What version 1 recorded of a decoder that it had words for."""
    fields = ModelFields.of(spec)
    assert fields is not None, spec
    return fields.to_dict()


def read_model(values: Any, where: str) -> DecoderSpec:
    """The decoder in model.json of version 1; UserError as `DecoderSpec.from_dict`."""
    fields = build(ModelFields, values, where)
    if fields.architecture not in FAMILIES:
        raise UserError(f"{where}.architecture is {fields.architecture!r}; known: {', '.join(FAMILIES)}")
    try:
        return fields.spec()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
