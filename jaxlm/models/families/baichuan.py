"""Baichuan 1 and 2 (arXiv:2309.10305): LLaMA with q, k and v as one. 13B has ALiBi; the head of 2 is normalised.

config.json does not say so: the code that comes with each size and version does. What tells them apart is which key
gives the number of positions (`model_max_length` alone: ALiBi), and `z_loss_weight`, which Baichuan 2 has.
"""

from __future__ import annotations

from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family
from jaxlm.models.families.common import read_decoder
from jaxlm.models.families.rows import LLAMA_ROWS, make_fused
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder

_WIDTH_13B = 5120  # by which other programs know that a model has ALiBi
_VOCAB_2 = 125696  # and that it is Baichuan 2


def _read(config: dict[str, Any]) -> DecoderSpec:
    length, without_rope = config.get("max_position_embeddings"), config.get("model_max_length")
    alibi = length is None
    if alibi and type(without_rope) is not int:
        raise UserError(
            "config.json: it has neither max_position_embeddings, as Baichuan-7B (rotary positions), nor "
            "model_max_length, as Baichuan-13B (ALiBi); add the one of this model"
        )
    if not alibi and config["hidden_size"] == _WIDTH_13B:
        raise UserError(
            f"config.json: max_position_embeddings is {length}, which says rotary positions, but a hidden_size of "
            f"{_WIDTH_13B} is that of Baichuan-13B, which has ALiBi; leave model_max_length alone in config.json"
        )
    if config.get("z_loss_weight"):
        raise UserError(f"config.json: z_loss_weight is {config['z_loss_weight']!r}; only 0 is trained with")
    second = config.get("z_loss_weight") is not None or config["vocab_size"] == _VOCAB_2
    positions: dict[str, Any] = dict(rope=None if alibi else RopeSpec(), alibi=alibi)
    usual = config | {"max_position_embeddings": without_rope if alibi else length}
    return read_decoder("baichuan", usual, attention=positions, normed_head=second)


def _write(spec: DecoderSpec) -> dict[str, Any]:
    length = spec.max_position_embeddings
    more = {"z_loss_weight": 0} if spec.normed_head else {}
    # A null says nothing.
    return more | {"max_position_embeddings": None if spec.attention.alibi else length, "model_max_length": length}


def _shape(second: bool, alibi: bool, layers: int, d: int, f: int, heads: int) -> DecoderSpec:
    spec = uniform_decoder(
        "baichuan",
        vocab_size=_VOCAB_2 if second else 64000,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        norm_eps=1e-6,
        max_position_embeddings=4096,
        normed_head=second,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return spec.with_attention(rope=None, alibi=True) if alibi else spec


FAMILY = Family(
    name="baichuan",
    architecture="BaichuanForCausalLM",
    defaults=dict(rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    read=_read,
    write=_write,
    rows=LLAMA_ROWS,
    fused=make_fused(
        "model.layers.{}.self_attn.W_pack",
        "H h + K h + K h",
        ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    ),
    aliases=("BaiChuanForCausalLM",),
    keys={"num_key_value_heads": "", "head_dim": "", "rope_parameters": "", "rope_theta": "", "rope_scaling": ""},
    in_transformers=False,
    # Baichuan's model cards.
    shapes={
        "baichuan-7b": _shape(False, False, 32, 4096, 11008, 32),
        "baichuan-13b": _shape(False, True, 40, 5120, 13696, 40),
        "baichuan2-7b": _shape(True, False, 32, 4096, 11008, 32),
        "baichuan2-13b": _shape(True, True, 40, 5120, 13696, 40),
    },
)
