"""One table of parameter names: the path in jaxlm, the names in Hugging Face, Meta and MindSpore, and the layouts.

A layout is written in the project's letters (D model, H query heads, K key/value heads, h head dim, F feed-forward,
V vocabulary, E experts). Parentheses join dimensions that the other format stores as one: HF keeps `q_proj` as a matrix
`(H h) D`, jaxlm as `D H h`. Everything else (shapes, transposes, PEFT's names and factor shapes, coverage) is derived
from these rows. Rotary dimensions are in HF's rotate-half order in jaxlm, HF and MindSpore, so h is not permuted; Meta
keeps the two numbers of a pair beside each other, which `rotary` marks. MindSpore's layouts are HF's, and so are Meta's
once its shards are joined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxlm.errors import UserError
from jaxlm.models.shapes import LlamaConfig
from jaxlm.nn.lora import LINEARS, SAVEABLE, LoraSpec, module_parent

Shape = tuple[int, ...]

# Rows turned at a time when a matrix is transposed.
STRIP_ROWS = 64

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Rule:
    """One row: `path` holds the leaf (stacked over layers under 'layers/'); names have '{}' for the layer.

    Args:
        meta: Meta's name; None where Meta's models have no such tensor.
        only: field of LlamaConfig that switches the tensor on; '!' negates.
        meta_split: dimensions of the stored tensor that Meta's model-parallel shards may split; () means every shard
            holds it whole. Two: LLaMA 1 and 2 split the first one named, LLaMA 3 the second.
        rotary: whether Meta stores the rows of each head in another order (pairs beside each other instead of halves).
    """

    path: str
    hf: str
    meta: str | None
    mindspore: str
    dims: str
    hf_dims: str
    only: str = ""
    meta_split: tuple[int, ...] = ()
    rotary: bool = False

    def name(self, form: str) -> str | None:
        """The tensor's name in 'hf', 'meta' or 'mindspore'."""
        return {"hf": self.hf, "meta": self.meta, "mindspore": self.mindspore}[form]


def _linear(name: str, other: str, dims: str, hf_dims: str, bias: str, split: int) -> list[Rule]:
    # `other` is what both Meta and MindSpore call the layer.
    parent = module_parent(name)
    path, hf, ms = f"layers/{parent}/{name}", f"model.layers.{{}}.{parent}.{name}", f"model.layers.{{}}.{other}"
    out, hf_out = dims.split(" ", 1)[1], hf_dims.rsplit(" ", 1)[0]
    if name == "o_proj":
        out, hf_out = "D", "D"
    meta, rotary = f"layers.{{}}.{other}.weight", name in ("q_proj", "k_proj")
    return [
        Rule(f"{path}/kernel", f"{hf}.weight", meta, f"{ms}.weight", dims, hf_dims, "", (split,), rotary),
        Rule(f"{path}/bias", f"{hf}.bias", None, f"{ms}.bias", out, hf_out, bias, (), rotary),
    ]


def _norm(name: str, other: str) -> Rule:
    names = f"model.layers.{{}}.{name}.weight", f"layers.{{}}.{other}.weight", f"model.layers.{{}}.{other}.weight"
    return Rule(f"layers/{name}/scale", *names, "D", "D")


RULES: tuple[Rule, ...] = (
    Rule(
        "embed_tokens/embedding",
        "model.embed_tokens.weight",
        "tok_embeddings.weight",
        "model.tok_embeddings.embedding_weight",
        "V D",
        "V D",
        meta_split=(1, 0),
    ),
    _norm("input_layernorm", "attention_norm"),
    *_linear("q_proj", "attention.wq", "D H h", "(H h) D", "qkv_bias", 0),
    *_linear("k_proj", "attention.wk", "D K h", "(K h) D", "qkv_bias", 0),
    *_linear("v_proj", "attention.wv", "D K h", "(K h) D", "qkv_bias", 0),
    *_linear("o_proj", "attention.wo", "H h D", "D (H h)", "o_bias", 1),
    _norm("post_attention_layernorm", "ffn_norm"),
    *_linear("gate_proj", "feed_forward.w1", "D F", "F D", "mlp_bias", 0),
    *_linear("up_proj", "feed_forward.w3", "D F", "F D", "mlp_bias", 0),
    *_linear("down_proj", "feed_forward.w2", "F D", "D F", "mlp_bias", 1),
    # The linear router of a layer divided into experts; the name outside jaxlm is our own.
    Rule(
        "layers/mlp/router",
        "model.layers.{}.mlp.router.weight",
        None,
        "model.layers.{}.feed_forward.router.weight",
        "D E",
        "E D",
        only="learned_router",
    ),
    Rule("norm/scale", "model.norm.weight", "norm.weight", "model.norm_out.weight", "D", "D"),
    Rule(
        "lm_head/kernel",
        "lm_head.weight",
        "output.weight",
        "lm_head.weight",
        "V D",
        "V D",
        only="!tie_word_embeddings",
        meta_split=(0,),
    ),
)

# MindSpore's linear layers that hold several of ours below each other: name, parts, in this order.
MINDSPORE_JOINED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model.layers.{}.attention.w_qkv", ("q_proj", "k_proj", "v_proj")),
    ("model.layers.{}.feed_forward.w_gate_hidden", ("gate_proj", "up_proj")),
)

# Buffers that old transformers versions stored beside the weights; they are recomputed from the configuration.
BUFFERS = r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias"


@dataclass(frozen=True)
class Layout:
    """How a stored tensor becomes (one layer of) a leaf: reshape to `view`, then transpose by `perm`."""

    stored: Shape
    view: Shape
    perm: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        """Shape on the jaxlm side, without the layer dimension."""
        return tuple(self.view[i] for i in self.perm)

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(int(i) for i in np.argsort(self.perm))

    @property
    def split(self) -> int:
        """How many leading dimensions of `view` come last in the leaf: 0 when nothing moves.

        Every layout here exchanges two groups of dimensions (inputs and outputs), so it is the transpose of a matrix.
        """
        first = self.perm[0] if self.perm else 0
        assert self.perm == (*range(first, len(self.perm)), *range(first)), self.perm
        return first

    @property
    def row_unit(self) -> int:
        """Stored rows in one step along the first dimension of `view`: h where heads lie below each other."""
        return self.stored[0] // max(1, self.view[0]) if self.view else 1

    def to_stored(self, leaf: np.ndarray) -> np.ndarray:
        """A contiguous leaf of `shape` in the other format's layout, contiguous."""
        rows = math.prod(self.view[: self.split])
        if self.split == 0 or leaf.size == 0:
            return leaf.reshape(self.stored)
        return transposed(leaf.reshape(-1, rows)).reshape(self.stored)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """The transpose of a matrix, contiguous: in strips that stay in the cache, three times as fast as numpy's copy."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, matrix.shape[0], STRIP_ROWS):
        out[:, start : start + STRIP_ROWS] = matrix[start : start + STRIP_ROWS].T
    return out


@dataclass(frozen=True)
class Entry:
    """One tensor of the other format: its name, and the leaf and layer it belongs to."""

    name: str
    path: str
    layer: int | None
    layout: Layout


def dim_sizes(config: LlamaConfig) -> dict[str, int]:
    """Letter -> size."""
    return {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim,
        "V": config.vocab_size,
        "E": config.moe.experts if config.moe else 1,
    }


def make_layout(dims: str, stored_dims: str, sizes: Mapping[str, int]) -> Layout:
    """The layout for `dims` ('D H h') stored as `stored_dims` ('(H h) D')."""
    groups = stored_dims.replace("(", " ( ").replace(")", " ) ").split()
    view: list[str] = []
    stored: list[int] = []
    joined: int | None = None
    for token in groups:
        if token == "(":
            joined = 1
        elif token == ")":
            assert joined is not None
            stored.append(joined)
            joined = None
        else:
            view.append(token)
            if joined is None:
                stored.append(sizes[token])
            else:
                joined *= sizes[token]
    perm = tuple(view.index(letter) for letter in dims.split())
    return Layout(tuple(stored), tuple(sizes[letter] for letter in view), perm)


def _active(rule: Rule, config: LlamaConfig) -> bool:
    if not rule.only:
        return True
    wanted = not rule.only.startswith("!")
    return bool(getattr(config, rule.only.lstrip("!"))) == wanted


def stored_entries(config: LlamaConfig, form: str) -> list[Entry]:
    """Every tensor of the model by its name in `form` ('hf', 'meta', 'mindspore'), all laid out as HF does.

    In HF's order: embedding, layer by layer, final norm, head.

    Raises:
        UserError: when the form has no name for one of the model's tensors.
    """
    sizes = dim_sizes(config)
    rules = [(rule, make_layout(rule.dims, rule.hf_dims, sizes)) for rule in RULES if _active(rule, config)]
    named = []
    for rule, layout in rules:
        name = rule.name(form)
        if name is None:
            raise UserError(f"the model has {rule.hf.format(0)!r}, for which Meta's format has no place")
        named.append((rule, name, layout))
    stacked = [item for item in named if item[0].path.startswith("layers/")]
    entries: list[Entry] = []
    layers_done = False
    for rule, name, layout in named:
        if not rule.path.startswith("layers/"):
            entries.append(Entry(name, rule.path, None, layout))
        elif not layers_done:
            layers_done = True
            for layer in range(config.num_layers):
                entries += [Entry(name.format(layer), r.path, layer, lay) for r, name, lay in stacked]
    return entries


def hf_entries(config: LlamaConfig) -> list[Entry]:
    """Every tensor of the HF model, in HF's order."""
    return stored_entries(config, "hf")


def rule_for(path: str) -> Rule:
    """The row of a leaf."""
    return next(rule for rule in RULES if rule.path == path)


def tensor_name(path: str, layer: int | None) -> str:
    """A tensor for messages: in Hugging Face's names, which most files have, and in jaxlm's."""
    own = path if layer is None else f"{path}, layer {layer}"
    rule = next((rule for rule in RULES if rule.path == path), None)
    return own if rule is None else f"{rule.hf.format(layer)} ({own})"


def leaf_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Path -> shape of every parameter of the model, layers stacked first."""
    sizes = dim_sizes(config)
    shapes = {}
    for rule in RULES:
        if _active(rule, config):
            shape = make_layout(rule.dims, rule.hf_dims, sizes).shape
            shapes[rule.path] = (config.num_layers, *shape) if rule.path.startswith("layers/") else shape
    return shapes


def linear_dims(linear: str) -> tuple[str, str]:
    """The input and output letters of a linear layer: ('D', 'H h') for q_proj."""
    rule = next(rule for rule in RULES if rule.path.endswith(f"/{linear}/kernel"))
    letters = rule.dims.split()
    split = 2 if linear == "o_proj" else 1
    return " ".join(letters[:split]), " ".join(letters[split:])


def linear_path(linear: str) -> str:
    """'layers/self_attn/q_proj'."""
    return f"layers/{module_parent(linear)}/{linear}"


def linear_module(linear: str, layer: int) -> str:
    """HF's module name: 'model.layers.0.self_attn.q_proj'."""
    return f"model.layers.{layer}.{module_parent(linear)}.{linear}"


def adapter_shapes(config: LlamaConfig, specs: Mapping[str, LoraSpec]) -> dict[str, Shape]:
    """Path -> shape of the adapter leaves of `specs` (without modules saved in full)."""
    sizes = dim_sizes(config)
    shapes: dict[str, Shape] = {}
    for linear, spec in specs.items():
        inputs, outputs = (tuple(sizes[letter] for letter in dims.split()) for dims in linear_dims(linear))
        path = linear_path(linear)
        shapes[f"{path}/lora_A"] = (config.num_layers, *inputs, spec.rank)
        shapes[f"{path}/lora_B"] = (config.num_layers, spec.rank, *outputs)
        if spec.dora:
            shapes[f"{path}/magnitude"] = (config.num_layers, *outputs)
    return shapes


def peft_entries(config: LlamaConfig, specs: Mapping[str, LoraSpec]) -> list[Entry]:
    """Every factor of a PEFT adapter. Layouts have the layer's own rank, which may be below the stacked one."""
    sizes = dim_sizes(config)
    entries = []
    for linear in LINEARS:
        if linear not in specs:
            continue
        spec = specs[linear]
        inputs, outputs = linear_dims(linear)
        path = linear_path(linear)
        for layer, rank in enumerate(spec.ranks):
            if rank == 0:
                continue
            with_rank = sizes | {"R": rank}
            stem = f"{PEFT_PREFIX}{linear_module(linear, layer)}"
            factors = [
                (f"{stem}.lora_A.weight", "lora_A", f"{inputs} R", f"R ({inputs})"),
                (f"{stem}.lora_B.weight", "lora_B", f"R {outputs}", f"({outputs}) R"),
            ]
            if spec.dora:
                factors.append((f"{stem}.lora_magnitude_vector", "magnitude", outputs, f"({outputs})"))
            for name, factor, dims, stored_dims in factors:
                entries.append(Entry(name, f"{path}/{factor}", layer, make_layout(dims, stored_dims, with_rank)))
    return entries


def saved_module_name(module: str) -> str:
    """HF's tensor name of a module saved in full: 'embed_tokens' -> 'model.embed_tokens.weight'."""
    return next(rule.hf for rule in RULES if rule.path == SAVEABLE[module])


def num_elements(shape: Shape) -> int:
    return math.prod(shape)
