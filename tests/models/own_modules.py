"""PyTorch modules of families that transformers does not have, written from descriptions of what their code computes.

They have the families' own names and fused layers, and the interface of transformers' models as far as tests need it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from jaxlm.models.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402


def below(rows: Any, sizes: list[int], h: int) -> tuple[Any, ...]:
    """q, k and v [..., heads, h] of rows that have them one after the other."""
    return tuple(part.unflatten(-1, (-1, h)) for part in rows.split([size * h for size in sizes], dim=-1))


def by_group(rows: Any, sizes: list[int], h: int) -> tuple[Any, ...]:
    """The same of rows that have, for each kv head, its query heads, its key and its value."""
    heads, groups, _ = sizes
    rows = rows.unflatten(-1, (groups, heads // groups + 2, h))
    return rows[..., :-2, :].flatten(-3, -2), rows[..., -2, :], rows[..., -1, :]


def halves(x: Any, theta: float) -> Any:
    """x [B, T, heads, h] turned by its places, first half against second half."""
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def neighbours_of_the_first_half(x: Any, theta: float) -> Any:
    """Only the first half of each head turned, its dims 2 i and 2 i + 1 against each other."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(0, half, 2) / half)
    first, second = x[..., 0:half:2], x[..., 1:half:2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., half:]], dim=-1)


@dataclasses.dataclass
class Description:
    """What a family's code computes, and what it calls its parts: names below a layer begin with a dot."""

    vocab: int
    width: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    layer: str
    embed: str
    norm: str
    head: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    o: str
    gate_up: tuple[str, ...]
    down: str
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    theta: float = 1e4
    split: Callable[..., tuple[Any, ...]] = below
    turn: Callable[[Any, float], Any] | None = halves  # None: ALiBi
    unit_head: bool = False


def describe(family: str, config: Any) -> Description:
    """The description of a model by its config.json."""
    if family == "chatglm":
        return Description(
            config.padded_vocab_size,
            config.hidden_size,
            config.ffn_hidden_size,
            config.num_layers,
            config.num_attention_heads,
            config.multi_query_group_num,
            config.kv_channels,
            config.layernorm_epsilon,
            layer="transformer.encoder.layers.",
            embed="transformer.embedding.word_embeddings",
            norm="transformer.encoder.final_layernorm",
            head="transformer.output_layer",
            norms=(".input_layernorm", ".post_attention_layernorm"),
            qkv=(".self_attention.query_key_value",),
            o=".self_attention.dense",
            gate_up=(".mlp.dense_h_to_4h",),
            down=".mlp.dense_4h_to_h",
            qkv_bias=config.add_qkv_bias,
            theta=1e4 * config.rope_ratio,
            turn=neighbours_of_the_first_half,
        )
    heads = config.num_attention_heads
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = (*sizes, kv_heads, head_dim, getattr(config, "rms_norm_eps", 1e-5 if family == "internlm3" else 1e-6))
    if family == "internlm2":
        return Description(
            *shared,
            layer="model.layers.",
            embed="model.tok_embeddings",
            norm="model.norm",
            head="output",
            norms=(".attention_norm", ".ffn_norm"),
            qkv=(".attention.wqkv",),
            o=".attention.wo",
            gate_up=(".feed_forward.w1", ".feed_forward.w3"),
            down=".feed_forward.w2",
            qkv_bias=config.bias,
            o_bias=config.bias,
            split=by_group,
        )
    names: dict[str, Any] = dict(
        layer="model.layers.",
        embed="model.embed_tokens",
        norm="model.norm",
        head="lm_head",
        norms=(".input_layernorm", ".post_attention_layernorm"),
        o=".self_attn.o_proj",
        gate_up=(".mlp.gate_proj", ".mlp.up_proj"),
        down=".mlp.down_proj",
    )
    if family == "internlm3":
        others = getattr(config, "bias", False)
        biases = dict(qkv_bias=getattr(config, "qkv_bias", False), o_bias=others, mlp_bias=others)
        return Description(*shared, qkv=tuple(f".self_attn.{n}_proj" for n in "qkv"), **biases, **names)
    assert family == "baichuan", family
    alibi = getattr(config, "max_position_embeddings", None) is None
    unit_head = getattr(config, "z_loss_weight", None) is not None
    return Description(
        *shared, qkv=(".self_attn.W_pack",), turn=None if alibi else halves, unit_head=unit_head, **names
    )


class OwnModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A decoder with norms by the root mean square, a gated feed-forward layer and the parts of a `Description`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.d = d = describe(config.model_type, config)
        h = d.head_dim
        self._put(d.embed, torch.nn.Embedding(d.vocab, d.width))
        rows = [(d.heads + 2 * d.kv_heads) * h] if len(d.qkv) == 1 else [d.heads * h, d.kv_heads * h, d.kv_heads * h]
        for number in range(d.layers):
            at = f"{d.layer}{number}"
            for name in d.norms:
                self._put(at + name, torch.nn.RMSNorm(d.width, d.eps))
            for name, size in zip(d.qkv, rows, strict=True):
                self._put(at + name, torch.nn.Linear(d.width, size, d.qkv_bias))
            self._put(at + d.o, torch.nn.Linear(d.heads * h, d.width, d.o_bias))
            for name in d.gate_up:
                self._put(at + name, torch.nn.Linear(d.width, 2 * d.neurons // len(d.gate_up), d.mlp_bias))
            self._put(at + d.down, torch.nn.Linear(d.neurons, d.width, d.mlp_bias))
        self._put(d.norm, torch.nn.RMSNorm(d.width, d.eps))
        self._put(d.head, torch.nn.Linear(d.width, d.vocab, bias=False))
        self.post_init()
        self.generation_config.use_cache = False  # each token from the whole text

    def _put(self, name: str, module: Any) -> None:
        *parents, last = name.split(".")
        at: Any = self
        for parent in parents:
            if parent not in dict(at.named_children()):
                at.add_module(parent, torch.nn.Module())
            at = dict(at.named_children())[parent]
        at.add_module(last, module)

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data.normal_(0.0, 0.02)

    def get_input_embeddings(self) -> Any:
        return self.get_submodule(self.d.embed)

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return dict(input_ids=input_ids)

    def forward(self, input_ids: Any, **_: Any) -> Any:
        """Logits of whole texts [B, T]."""
        d = self.d
        part = self.get_submodule
        x = part(d.embed)(input_ids)
        length = input_ids.shape[1]
        places = torch.arange(length)
        future = torch.ones(length, length).triu(1).bool()
        for number in range(d.layers):
            at = f"{d.layer}{number}"
            inner = part(at + d.norms[0])(x)
            rows = torch.cat([part(at + name)(inner) for name in d.qkv], dim=-1)
            q, k, v = d.split(rows, [d.heads, d.kv_heads, d.kv_heads], d.head_dim)
            if d.turn is not None:
                q, k = d.turn(q, d.theta), d.turn(k, d.theta)
            k, v = (y.repeat_interleave(d.heads // d.kv_heads, dim=2) for y in (k, v))
            scores = torch.einsum("bqnh,bknh->bnqk", q, k) / d.head_dim**0.5
            if d.turn is None:
                slopes = torch.tensor([2 ** (-8 * (head + 1) / d.heads) for head in range(d.heads)])
                scores = scores - slopes[:, None, None] * (places[:, None] - places[None])
            seen = scores.masked_fill(future, -torch.inf).softmax(-1)
            x = x + part(at + d.o)(torch.einsum("bnqk,bknh->bqnh", seen, v).flatten(-2))
            inner = part(at + d.norms[1])(x)
            gate, up = torch.cat([part(at + name)(inner) for name in d.gate_up], dim=-1).chunk(2, dim=-1)
            x = x + part(at + d.down)(torch.nn.functional.silu(gate) * up)
        x, head = part(d.norm)(x), part(d.head)
        if d.unit_head:
            return CausalLMOutput(logits=x @ torch.nn.functional.normalize(head.weight).T)
        return CausalLMOutput(logits=head(x))


class FirstChatGLM(OwnModel):
    """ChatGLM-6B: texts whose tokens in front of the answer see each other, positions in two dimensions."""

    def __init__(self, config: Any) -> None:
        transformers.PreTrainedModel.__init__(self, config)
        d, f = config.hidden_size, config.inner_hidden_size
        self.d = argparse.Namespace(embed="transformer.word_embeddings")
        self._put("transformer.word_embeddings", torch.nn.Embedding(config.vocab_size, d))
        for number in range(config.num_layers):
            at = f"transformer.layers.{number}"
            self._put(f"{at}.input_layernorm", torch.nn.LayerNorm(d))
            self._put(f"{at}.attention.query_key_value", torch.nn.Linear(d, 3 * d))
            self._put(f"{at}.attention.dense", torch.nn.Linear(d, d))
            self._put(f"{at}.post_attention_layernorm", torch.nn.LayerNorm(d))
            self._put(f"{at}.mlp.dense_h_to_4h", torch.nn.Linear(d, f))
            self._put(f"{at}.mlp.dense_4h_to_h", torch.nn.Linear(f, d))
        self._put("transformer.final_layernorm", torch.nn.LayerNorm(d))
        self._put("lm_head", torch.nn.Linear(d, config.vocab_size, bias=False))
        self.post_init()
        self.generation_config.use_cache = False

    def forward(self, input_ids: Any, **_: Any) -> Any:
        """Logits of whole texts [B, T]."""
        return CausalLMOutput(logits=torch.stack([self._logits(ids) for ids in input_ids]))

    def _logits(self, ids: Any) -> Any:
        part, c, text, length = self.get_submodule, self.config, ids.tolist(), len(ids)
        start = text.index(c.bos_token_id) if c.bos_token_id in text else length
        positions, answer = torch.arange(length), torch.zeros(length, dtype=torch.long)
        answer[start:] = torch.arange(length - start) + 1
        for token in (c.mask_token_id, c.gmask_token_id):  # the second counts where both are there
            if token in text[: start + 1]:
                positions[start:] = text.index(token)
        hidden = torch.arange(length)[None] > torch.arange(length)[:, None]
        hidden[:, :start] = False
        x, heads, scale = part(self.d.embed)(ids), c.num_attention_heads, (2 * c.num_layers) ** 0.5
        for number in range(c.num_layers):
            at = f"transformer.layers.{number}"
            seen = part(f"{at}.input_layernorm")(x)
            q, k, v = part(f"{at}.attention.query_key_value")(seen).unflatten(-1, (heads, -1)).chunk(3, dim=-1)
            q, k = (
                torch.cat(
                    [in_16_bits(a, by) for a, by in zip(y.chunk(2, dim=-1), (positions, answer), strict=True)], -1
                )
                for y in (q, k)
            )
            # A layer divides by its number, for the sake of 16 bits, and multiplies with it in 32.
            scores = torch.einsum("qnh,knh->nqk", q / (q.shape[-1] ** 0.5 * (number + 1)), k)
            weights = (scores.masked_fill(hidden, -10000.0) * (number + 1)).softmax(-1)
            x = seen * scale + part(f"{at}.attention.dense")(torch.einsum("nqk,knh->qnh", weights, v).flatten(-2))
            seen = part(f"{at}.post_attention_layernorm")(x)
            inner = torch.nn.functional.gelu(part(f"{at}.mlp.dense_h_to_4h")(seen), approximate="tanh")
            x = seen * scale + part(f"{at}.mlp.dense_4h_to_h")(inner)
        return part("lm_head")(part("transformer.final_layernorm")(x))


def in_16_bits(x: Any, positions: Any) -> Any:
    """x [T, heads, h], first half against second half, turned by frequencies that are rounded to 16 bits."""
    frequencies = (1 / 10000 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])).half().float()
    angles = (positions[:, None] * frequencies)[:, None]
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def own_config(family: str, values: dict[str, Any]) -> Any:
    """The configuration of a module, whose class has the family's name."""
    cls = _config_class(family)
    given = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    return cls(**{"tie_word_embeddings": False} | given)


def own_class(family: str, architecture: str) -> Any:
    """The module's class, with the name that the family's code gives it."""
    base = FirstChatGLM if family == "chatglm_6b" else OwnModel
    return type(architecture, (base,), {"config_class": _config_class(family)})


def _config_class(family: str) -> Any:
    model_type = FAMILIES[family].model_type or family
    return type(f"{family}Config", (transformers.PretrainedConfig,), {"model_type": model_type})
