"""One table of parameter names: the path in jaxlm, the name in Hugging Face, and the layout of both.

A layout is written in the project's letters (D model, H query heads, K key/value heads, h head dim, F feed-forward,
V vocabulary). Parentheses join dimensions that the other format stores as one: HF keeps `q_proj` as a matrix
`(H h) D`, jaxlm as `D H h`. Everything else (shapes, transposes, PEFT's names and factor shapes, coverage) is derived
from these rows. Rotary dimensions are in HF's rotate-half order on both sides, so no permutation of h is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxlm.models.lora import LINEARS, SAVEABLE, LoraSpec, module_parent
from jaxlm.models.shapes import LlamaConfig

Shape = tuple[int, ...]

# Rows turned at a time when a matrix is transposed.
STRIP_ROWS = 64

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Rule:
    """One row: `path` holds the leaf (stacked over layers under 'layers/'), `hf` its name with '{}' for the layer."""

    path: str
    hf: str
    dims: str
    hf_dims: str
    only: str = ""  # field of LlamaConfig that switches the tensor on; '!' negates


def _linear(name: str, dims: str, hf_dims: str, bias: str) -> list[Rule]:
    parent = module_parent(name)
    path, hf = f"layers/{parent}/{name}", f"model.layers.{{}}.{parent}.{name}"
    out, hf_out = dims.split(" ", 1)[1], hf_dims.rsplit(" ", 1)[0]
    if name == "o_proj":
        out, hf_out = "D", "D"
    return [
        Rule(f"{path}/kernel", f"{hf}.weight", dims, hf_dims),
        Rule(f"{path}/bias", f"{hf}.bias", out, hf_out, only=bias),
    ]


RULES: tuple[Rule, ...] = (
    Rule("embed_tokens/embedding", "model.embed_tokens.weight", "V D", "V D"),
    Rule("layers/input_layernorm/scale", "model.layers.{}.input_layernorm.weight", "D", "D"),
    *_linear("q_proj", "D H h", "(H h) D", "qkv_bias"),
    *_linear("k_proj", "D K h", "(K h) D", "qkv_bias"),
    *_linear("v_proj", "D K h", "(K h) D", "qkv_bias"),
    *_linear("o_proj", "H h D", "D (H h)", "o_bias"),
    Rule("layers/post_attention_layernorm/scale", "model.layers.{}.post_attention_layernorm.weight", "D", "D"),
    *_linear("gate_proj", "D F", "F D", "mlp_bias"),
    *_linear("up_proj", "D F", "F D", "mlp_bias"),
    *_linear("down_proj", "F D", "D F", "mlp_bias"),
    Rule("norm/scale", "model.norm.weight", "D", "D"),
    Rule("lm_head/kernel", "lm_head.weight", "V D", "V D", only="!tie_word_embeddings"),
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
        matrix = leaf.reshape(-1, rows)
        out = np.empty(matrix.shape[::-1], leaf.dtype)
        # In strips, each of which stays in the cache: three times as fast as numpy's transposed copy.
        for start in range(0, matrix.shape[0], STRIP_ROWS):
            out[:, start : start + STRIP_ROWS] = matrix[start : start + STRIP_ROWS].T
        return out.reshape(self.stored)


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


def hf_entries(config: LlamaConfig) -> list[Entry]:
    """Every tensor of the HF model, in HF's order: embedding, layer by layer, final norm, head."""
    sizes = dim_sizes(config)
    rules = [(rule, make_layout(rule.dims, rule.hf_dims, sizes)) for rule in RULES if _active(rule, config)]
    stacked = [(rule, layout) for rule, layout in rules if rule.path.startswith("layers/")]
    entries: list[Entry] = []
    layers_done = False
    for rule, layout in rules:
        if not rule.path.startswith("layers/"):
            entries.append(Entry(rule.hf, rule.path, None, layout))
        elif not layers_done:
            layers_done = True
            for layer in range(config.num_layers):
                entries += [Entry(r.hf.format(layer), r.path, layer, lay) for r, lay in stacked]
    return entries


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
