"""T5 (arXiv:1910.10683), T5 1.1 and Flan-T5: an encoder and a decoder, with distances in buckets and no 1 / √d."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxlm.errors import UserError
from jaxlm.models.families.base import Family, Row
from jaxlm.models.families.common import ACTIVATION_WORDS, read_activation, read_decoder, read_flag
from jaxlm.models.families.rows import make_rows
from jaxlm.spec import (
    AttentionSpec,
    DecoderSpec,
    EncoderSpec,
    FeedForwardSpec,
    LayerSpec,
    RelativeBiasSpec,
)

# Distances beyond the last bucket are alike, so rows may have any length; memory ends sooner than this.
LONGEST = 1 << 15


def read(family: str, config: dict[str, Any], scales: bool = True) -> DecoderSpec:
    """The model that a `config.json` describes.

    Args:
        scales: whether the architecture knows `scale_decoder_outputs`. Without that key transformers takes it from
            `tie_word_embeddings`; which head there is, the tensors decide.
    """
    if not read_flag(config, "is_encoder_decoder", True) or read_flag(config, "is_decoder"):
        raise UserError("config.json: is_encoder_decoder false is not supported; only a model of both is")
    tied = read_flag(config, "tie_word_embeddings", True)
    scaled = scales and read_flag(config, "scale_decoder_outputs", tied)
    word = config["feed_forward_proj"]
    kind, _, name = word.rpartition("-") if isinstance(word, str) else ("?", "", "")
    if kind not in ("", "gated"):
        raise UserError(f"config.json: feed_forward_proj is {word!r}; expected an activation, or 'gated-' and one")
    derived = "gelu_new" if word == "gated-gelu" else name
    feed_forward: dict[str, Any] = dict(
        activation=read_activation({"dense_act_fn": derived} | config, "dense_act_fn"),
        gated=read_flag(config, "is_gated_act", kind == "gated"),
    )
    heads = config["num_attention_heads"]
    plain = AttentionSpec(heads, heads, config["head_dim"], rope=None, scale=1.0, causal=False)
    for key in ("relative_attention_num_buckets", "relative_attention_max_distance", "num_decoder_layers"):
        value = config.get(key)
        if value is not None and type(value) is not int:
            raise UserError(f"config.json: {key} is {value!r}; expected a whole number")
    bias = RelativeBiasSpec(config["relative_attention_num_buckets"], config["relative_attention_max_distance"])
    own = dataclasses.replace(plain, relative_bias=bias)
    start = config.get("decoder_start_token_id")
    start = config["pad_token_id"] if start is None else start
    if type(start) is not int:
        raise UserError(f"config.json: decoder_start_token_id is {start!r}; expected a token id")
    layers = config["num_hidden_layers"]
    reading = LayerSpec(own, FeedForwardSpec(config["intermediate_size"], **feed_forward))
    return read_decoder(
        family,
        config,
        attention=dict(rope=None, scale=1.0, relative_bias=bias),
        feed_forward=feed_forward,
        layer=dict(cross_attention=plain),
        num_layers=config["num_decoder_layers"] or layers,
        tied_head=tied,
        logits_scale=config["hidden_size"] ** -0.5 if scaled else None,
        encoder=EncoderSpec(layers, (reading,), start),
    )


def write(spec: DecoderSpec, scales: bool = True) -> dict[str, Any]:
    """The keys that `read` reads."""
    encoder, feed_forward, bias = spec.encoder, spec.feed_forward, spec.relative_bias
    assert encoder is not None and bias is not None
    word = ACTIVATION_WORDS[feed_forward.activation][0].replace("gelu_pytorch_tanh", "gelu_new")
    # 'gated-gelu' is what the published models have; transformers takes it for gelu_new.
    usual = f"gated-{word.removesuffix('_new')}" if feed_forward.gated else word
    return {
        "is_encoder_decoder": True,
        "num_hidden_layers": encoder.num_layers,
        "num_decoder_layers": spec.num_layers,
        "feed_forward_proj": usual,
        "dense_act_fn": word,
        "is_gated_act": feed_forward.gated,
        "relative_attention_num_buckets": bias.num_buckets,
        "relative_attention_max_distance": bias.max_distance,
        "decoder_start_token_id": encoder.start_token_id,
    } | ({"scale_decoder_outputs": spec.logits_scale is not None} if scales else {})


def _attention(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/{name}_proj": f"{theirs}.{name}" for name in "qkvo"}


def _rows() -> tuple[Row, ...]:
    encoder, decoder = "encoder.block.{}.layer", "decoder.block.{}.layer"
    bias = "{}.block.0.layer.0.SelfAttention.relative_attention_bias"
    names = {
        "embed_tokens": "shared",
        **_attention("encoder/self_attn", f"{encoder}.0.SelfAttention"),
        "encoder/relative_bias": bias.format("encoder"),
        "encoder/input_layernorm": f"{encoder}.0.layer_norm",
        **_feed_forward("encoder/", f"{encoder}.1"),
        "encoder/norm": "encoder.final_layer_norm",
        **_attention("self_attn", f"{decoder}.0.SelfAttention"),
        "relative_bias": bias.format("decoder"),
        "input_layernorm": f"{decoder}.0.layer_norm",
        **_attention("cross_attn", f"{decoder}.1.EncDecAttention"),
        "cross_attention_layernorm": f"{decoder}.1.layer_norm",
        **_feed_forward("", f"{decoder}.2"),
        "norm": "decoder.final_layer_norm",
        "lm_head": "lm_head",
    }
    return tuple(each for row in make_rows(names) for each in _by_gate(row))


def _feed_forward(ours: str, theirs: str) -> dict[str, str]:
    linears = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    rows = {f"{ours}mlp/{name}_proj": f"{theirs}.DenseReluDense.{word}" for name, word in linears.items()}
    return rows | {f"{ours}post_attention_layernorm": f"{theirs}.layer_norm"}


def _by_gate(row: Row) -> list[Row]:
    """Without a gate, wi_1 is called wi."""
    if ".wi_1." not in row.hf:
        return [row]

    def when(gated: bool) -> Callable[[DecoderSpec, LayerSpec], bool]:
        return lambda spec, layer: row.when(spec, layer) and layer.feed_forward.gated is gated

    plain = dataclasses.replace(row, hf=row.hf.replace(".wi_1.", ".wi."), when=when(False))
    return [dataclasses.replace(row, when=when(True)), plain]


KEYS = dict(
    hidden_size="d_model",
    intermediate_size="d_ff",
    num_hidden_layers="num_layers",
    num_attention_heads="num_heads",
    head_dim="d_kv",
    rms_norm_eps="layer_norm_epsilon",
    num_key_value_heads="",
    hidden_act="",
    max_position_embeddings="",
    attention_dropout="",
)
DEFAULTS: dict[str, Any] = dict(
    hidden_size=512,
    head_dim=64,
    num_decoder_layers=None,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    rms_norm_eps=1e-6,
    max_position_embeddings=LONGEST,
    pad_token_id=0,
    eos_token_id=1,
)
ROWS = _rows()
COPIES = {f"{part}.embed_tokens.weight": "shared.weight" for part in ("encoder", "decoder")}
# In T5 1.0's first files.
UNUSED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


def shape(family: str, vocab_size: int, layers: int, d: int, f: int, heads: int, head_dim: int = 64) -> DecoderSpec:
    """A published model whose feed-forward layers have a gate."""
    sizes = dict(hidden_size=d, num_hidden_layers=layers, intermediate_size=f, num_attention_heads=heads)
    more = dict(head_dim=head_dim, vocab_size=vocab_size, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return read(family, DEFAULTS | sizes | more)


FAMILY = Family(
    name="t5",
    architecture="T5ForConditionalGeneration",
    defaults=DEFAULTS | dict(num_hidden_layers=6, num_attention_heads=8, feed_forward_proj="relu"),
    read=partial(read, "t5"),
    write=write,
    rows=ROWS,
    aliases=("T5WithLMHeadModel",),
    keys=KEYS,
    head_by_tensors=True,
    copies=COPIES,
    unused=UNUSED,
    # Flan-T5's model cards (arXiv:2210.11416).
    shapes={
        "flan-t5-small": shape("t5", 32128, 8, 512, 1024, 6),
        "flan-t5-base": shape("t5", 32128, 12, 768, 2048, 12),
        "flan-t5-large": shape("t5", 32128, 24, 1024, 2816, 16),
        "flan-t5-xl": shape("t5", 32128, 24, 2048, 5120, 32),
        "flan-t5-xxl": shape("t5", 32128, 24, 4096, 10240, 64),
    },
)
