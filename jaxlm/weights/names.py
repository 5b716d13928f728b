"""The names and layouts of a model's tensors in files, from the rows of its family (see `models.families.base.Row`).

Everything that names or shapes a tensor is derived from these rows: the leaves and their shapes, transposes, the number
of parameters, which dims of a linear layer are inputs, PEFT's names and factor shapes, coverage. A test holds the rows
of every family to what its module declares. Rotary dims are in HF's rotate-half order, so h is not permuted.
A format with other names for the same layouts hands in its own (`stored_entries`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxlm.errors import UserError
from jaxlm.models.adapters import AdaptedLinear, linears_of
from jaxlm.models.families import family_of
from jaxlm.models.families.base import Row
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import ENCODER, DecoderSpec, LayerSpec, Stack
from jaxlm.weights.transpose import transposed

Shape = tuple[int, ...]

PEFT_PREFIX = "base_model.model."

# Buffers that old transformers versions stored beside the weights; they are recomputed from the configuration.
BUFFERS = r"(.*\.)?rotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias"


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
        """Number of leading dimensions of `view` that come last in the leaf: 0 when nothing moves.

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


@dataclass(frozen=True)
class Entry:
    """One tensor of the other format: its name, the leaf, and the index in the leaf's stack; None where nothing is."""

    name: str
    path: str
    layer: int | None
    layout: Layout


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


def _row_sizes(spec: DecoderSpec, layer: LayerSpec) -> dict[str, int]:
    """Letter -> size, of one layer and of what lies outside of them."""
    sizes = {"D": spec.hidden_size, "V": spec.vocab_size, "W": spec.embedding_dims}
    if spec.learned_positions is not None:
        sizes["N"] = spec.learned_positions.num_rows
    if layer.attention.relative_bias is not None:
        sizes["U"] = layer.attention.relative_bias.num_buckets
    attention, feed_forward = layer.attention, layer.feed_forward
    sizes |= {"H": attention.num_heads, "K": attention.num_kv_heads, "h": attention.head_dim}
    sizes |= {"G": attention.num_heads // attention.num_kv_heads, "F": feed_forward.size}
    sizes |= {"Q": sizes["H"] * sizes["h"], "M": sizes["K"] * sizes["h"]}
    sizes["E"] = 1 if feed_forward.experts is None else feed_forward.experts.num_experts
    return sizes


@dataclass(frozen=True)
class Leaf:
    """One leaf of a model: its row, and the layers that it stacks.

    Args:
        path: of the leaf, e.g. 'layers/self_attn/q_proj/kernel'.
        layers: numbers of the layers stacked, in order; None outside of the layers.
        layout: of each layer's tensor in HF's files.
    """

    row: Row
    path: str
    layers: range | None
    layout: Layout

    @property
    def shape(self) -> Shape:
        """The stack first."""
        return self.layout.shape if self.layers is None else (len(self.layers), *self.layout.shape)


def model_leaves(spec: DecoderSpec) -> Iterator[Leaf]:
    """Every leaf of a model, in the order of its family's rows and, in a row, of `spec.stacks`."""
    for row in family_of(spec).rows:
        part = spec.part(row.in_encoder)
        if row.in_layer:
            for stack in part.stacks:
                if row.when(spec, stack.layer):
                    layout = make_layout(row.dims, row.hf_dims, _row_sizes(spec, stack.layer))
                    yield Leaf(row, stack.leaf(row.path), stack.numbers, layout)
        elif row.when(spec, part.period[0]):
            yield Leaf(row, row.path, None, make_layout(row.dims, row.hf_dims, _row_sizes(spec, part.period[0])))


def stored_entries(spec: DecoderSpec, names: Mapping[str, str] | None, owner: str) -> list[Entry]:
    """Every tensor of the model by its name in a format whose layouts are HF's.

    In HF's order: what comes before the layers, layer by layer, what comes after them.

    Args:
        names: `Row.path` -> the name, with '{}' for the number of the layer; None: Hugging Face's names.
        owner: whose format it is, for the error: "Meta's".

    Raises:
        UserError: when the format has no name for one of the model's tensors.
    """
    # What lies outside of the layers, and in its place the layers of the decoder, or of the encoder, by number.
    blocks: dict[str, dict[int, list[Entry]]] = {}
    for leaf in model_leaves(spec):
        name = leaf.row.hf if names is None else names.get(leaf.row.path)
        if name is None:
            raise UserError(f"the model has {leaf.row.hf.format(0)!r}, for which {owner} format has no place")
        if leaf.layers is None:
            blocks[leaf.path] = {0: [Entry(name, leaf.path, None, leaf.layout)]}
            continue
        by_number = blocks.setdefault(f"{ENCODER if leaf.row.in_encoder else ''}layers", {})
        for index, number in enumerate(leaf.layers):
            by_number.setdefault(number, []).append(Entry(name.format(number), leaf.path, index, leaf.layout))
    return [entry for block in blocks.values() for number in sorted(block) for entry in block[number]]


def hf_entries(spec: DecoderSpec) -> list[Entry]:
    """Every tensor of the HF model, in HF's order."""
    return stored_entries(spec, None, "Hugging Face's")


@dataclass(frozen=True)
class FusedEntry:
    """One stored tensor that holds the tensors of several entries, in `repeats` groups of rows of each in turn.

    Args:
        parts: the entries, by the names that they would have by themselves.
        rows: number of rows of each in one group.
    """

    name: str
    parts: tuple[Entry, ...]
    rows: tuple[int, ...]
    repeats: int

    @property
    def stored(self) -> Shape:
        """The tensor's shape."""
        return (self.repeats * sum(self.rows), *self.parts[0].layout.stored[1:])


def _fused_rows(dims: str, sizes: Mapping[str, int]) -> tuple[int, tuple[int, ...]]:
    """(repeats, rows of each part) of the first group of `dims`: 'H h + K h', '(H (1 + 1 + 1) h)'."""

    def product(text: str) -> int:
        return math.prod(int(word) if word.isdigit() else sizes[word] for word in text.split())

    match = re.match(r"\(([^()]*)\(([^()]*)\)([^()]*)\)|\(([^()]*)\)", dims)
    assert match, dims
    outer, terms, inner = (match[1], match[2], match[3]) if match[2] else ("", match[4], "")
    return product(outer), tuple(product(term) * product(inner) for term in terms.split("+"))


def fused_entries(spec: DecoderSpec) -> list[FusedEntry]:
    """The tensors of the HF model that hold several leaves, layer by layer."""
    by_place = {(leaf.row.path, number): leaf for leaf in model_leaves(spec) for number in leaf.layers or ()}
    entries = []
    for number, fused in itertools.product(range(spec.num_layers), family_of(spec).fused):
        leaves = [by_place[path, number] for path in fused.paths if (path, number) in by_place]
        if len(leaves) == len(fused.paths):
            repeats, rows = _fused_rows(fused.dims, _row_sizes(spec, spec.layer(number)))
            parts = (
                Entry(leaf.row.hf.format(number), leaf.path, leaf.layers.index(number), leaf.layout)
                for leaf in leaves
                if leaf.layers is not None
            )
            entries.append(FusedEntry(fused.hf.format(number), tuple(parts), rows, repeats))
    return entries


def leaf_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """Path -> shape of every parameter of the model, layers stacked first.

    From the rows, and not from `jax.eval_shape` of the module, so that commands that only look at files start at once;
    a test holds the two to each other.
    """
    return {leaf.path: leaf.shape for leaf in model_leaves(spec)}


def num_params(spec: DecoderSpec) -> int:
    """Number of parameters, matrices of routers included."""
    return sum(num_elements(shape) for shape in leaf_shapes(spec).values())


def tensor_name(spec: DecoderSpec, path: str, index: int | None) -> str:
    """A tensor for messages: in Hugging Face's names, which most files have, and in jaxlm's.

    Args:
        index: in the leaf's stack.
    """
    # An array of a kernel in fewer bits is named after the kernel.
    paths = path, path.rpartition("/")[0]
    leaf = next((leaf for leaf in model_leaves(spec) if leaf.path in paths), None)
    if leaf is None:
        return path if index is None else f"{path}, layer {index}"
    if leaf.layers is None or index is None:
        return f"{leaf.row.hf} ({leaf.path})"
    return f"{leaf.row.hf.format(leaf.layers[index])} ({leaf.path}, layer {leaf.layers[index]})"


def _linear_letters(row: Row) -> tuple[str, str]:
    """The input and output letters of a linear layer: ('D', 'H h') for q_proj. A stored matrix is [outputs, inputs]."""
    outputs, inputs = re.findall(r"\([^)]*\)|\S+", row.hf_dims)
    return inputs.strip("()"), outputs.strip("()")


def num_input_dims(spec: DecoderSpec, linear: str) -> int:
    """Number of leading dims of a linear layer's kernel (without the stack) that are contracted: 2 for o_proj."""
    return len(_linear_letters(family_of(spec).linears[linear])[0].split())


def adapter_leaves(spec: DecoderSpec, specs: Mapping[str, LoraSpec]) -> Iterator[Leaf]:
    """The adapter leaves of `specs`, layouts of the largest rank; without modules saved in full.

    Linear layers that are stored as one share their first factor, under their common name.
    """
    for linear in linears_of(spec).values():
        if linear.name in specs:
            for stack in spec.part(linear.rows[0].in_encoder).stacks:
                if set(stack.numbers) <= set(linear.layers):
                    yield from _factor_leaves(spec, linear, stack, specs[linear.name].rank, specs[linear.name].dora)


def _factor_leaves(spec: DecoderSpec, linear: AdaptedLinear, stack: Stack, rank: int, dora: bool) -> Iterator[Leaf]:
    """The adapter leaves of one linear layer, of one stack; what belongs to a part has the name of that by itself."""
    sizes = _row_sizes(spec, stack.layer) | {"R": rank}

    def leaf(path: str, module: str, name: str, dims: str, stored_dims: str) -> Leaf:
        row = Row(path, f"{PEFT_PREFIX}{module}.{name}", dims, stored_dims)
        return Leaf(row, stack.leaf(path), stack.numbers, make_layout(dims, stored_dims, sizes))

    inputs, _ = _linear_letters(linear.rows[0])
    yield leaf(f"{linear.path}/lora_A", linear.hf_module, "lora_A.weight", f"{inputs} R", f"R ({inputs})")
    for row in linear.rows:
        (_, outputs), path = _linear_letters(row), row.path.removesuffix("/kernel")
        yield leaf(f"{path}/lora_B", row.hf_module, "lora_B.weight", f"R {outputs}", f"({outputs}) R")
    for row in linear.rows if dora else ():
        (_, outputs), path = _linear_letters(row), row.path.removesuffix("/kernel")
        yield leaf(f"{path}/magnitude", row.hf_module, "lora_magnitude_vector", outputs, f"({outputs})")


def adapter_shapes(spec: DecoderSpec, specs: Mapping[str, LoraSpec]) -> dict[str, Shape]:
    """Path -> shape of the adapter leaves of `specs` (without modules saved in full)."""
    return {leaf.path: leaf.shape for leaf in adapter_leaves(spec, specs)}


def adapted_layers(
    spec: DecoderSpec, specs: Mapping[str, LoraSpec]
) -> Iterator[tuple[AdaptedLinear, int, Stack, list[Entry]]]:
    """(linear layer, number of the layer, its stack, entries of its factors) of all that carry an adapter, in order.

    Layouts have the layer's own rank, which may be below the stacked one.
    """
    for linear in linears_of(spec).values():
        part = spec.part(linear.rows[0].in_encoder)
        stacks = {number: stack for stack in part.stacks for number in stack.numbers}
        for number in linear.layers if linear.name in specs else ():
            own, stack = specs[linear.name], stacks[number]
            if own.ranks[number] > 0:
                leaves = _factor_leaves(spec, linear, stack, own.ranks[number], own.dora)
                index = stack.numbers.index(number)
                entries = [Entry(leaf.row.hf.format(number), leaf.path, index, leaf.layout) for leaf in leaves]
                yield linear, number, stack, entries


def peft_entries(spec: DecoderSpec, specs: Mapping[str, LoraSpec]) -> list[Entry]:
    """Every factor of a PEFT adapter; parts of one that is stored as one under names of their own."""
    return [entry for *_, entries in adapted_layers(spec, specs) for entry in entries]


def fused_factors(spec: DecoderSpec, specs: Mapping[str, LoraSpec]) -> list[FusedEntry]:
    """The tensors of a PEFT adapter that hold entries of `peft_entries`: second factors, and DoRA's magnitudes."""
    result = []
    for linear, number, stack, (_, *entries) in adapted_layers(spec, specs):
        if linear.fused is None:
            continue
        repeats, rows = _fused_rows(linear.fused.dims, _row_sizes(spec, stack.layer))
        for start in range(0, len(entries), len(rows)):
            parts = tuple(entries[start : start + len(rows)])
            factor = parts[0].name.removeprefix(PEFT_PREFIX + linear.rows[0].hf_module.format(number))
            name = f"{PEFT_PREFIX}{linear.hf_module.format(number)}{factor}"
            result.append(FusedEntry(name, parts, rows, repeats))
    return result


def outside_layout(spec: DecoderSpec, row: Row) -> Layout:
    """The layout of a tensor outside of the layers."""
    return make_layout(row.dims, row.hf_dims, _row_sizes(spec, spec.part(row.in_encoder).period[0]))


def grows(row: Row) -> bool:
    """Whether a tensor has rows of tokens, whose number an adapter that saves it may change."""
    return row.dims.startswith("V")


def num_elements(shape: Shape) -> int:
    return math.prod(shape)
