"""Mistral 7B (arXiv:2310.06825): LLaMA with a sliding window on every layer."""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder
from jaxlm.models.families.layer_types import read_windows
from jaxlm.models.families.rows import LLAMA_ROWS
from jaxlm.spec import DecoderSpec, uniform_decoder


def _read(config: dict[str, Any]) -> DecoderSpec:
    types, window = config.get("layer_types"), config["sliding_window"]
    if types is not None and set(read_windows(config, [])) != {window}:
        raise UserError(
            f"config.json: layer_types is {types!r}, which transformers does not read with this architecture, and "
            f"sliding_window {window!r}, which it would have in all layers; the architecture MinistralForCausalLM has "
            "windows by layer"
        )
    return read_decoder("mistral", config, attention=dict(window=config["sliding_window"]))


def _write(spec: DecoderSpec) -> dict[str, Any]:
    return {"sliding_window": spec.attention.window}


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults=dict(
        num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096, bos_token_id=1, eos_token_id=2
    ),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    refused={
        "Mistral3ForConditionalGeneration": "it sees images too; save its text model by itself, with transformers: "
        "m = Mistral3ForConditionalGeneration.from_pretrained(MODEL); t = MistralForCausalLM(m.config.text_config); "
        "t.model = m.model.language_model; t.lm_head = m.lm_head; t.save_pretrained(TEXT_MODEL)"
    },
    # Mistral's model card.
    shapes={
        "mistral-7b": uniform_decoder(
            "mistral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            window=4096,
            max_position_embeddings=32768,
            bos_token_id=1,
            eos_token_id=2,
        )
    },
)
