"""The tensors of a GGUF file, from the leaves of a decoder: their names, shapes, and what is done to their rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.formats.gguf.architectures import MODULES, ROUTER, Architecture
from jaxlm.models.families import family_of
from jaxlm.spec import DecoderSpec
from jaxlm.weights.experts import ExpertsEntry, expert_tensors
from jaxlm.weights.leaves import ParamSource, stored_blocks
from jaxlm.weights.names import Entry, Shape, model_leaves, stored_entries
from jaxlm.weights.tensors import JoinedRows, Tensor, WrappedTensor

_SUFFIXES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_NORMALISED = 1e-12  # the least length that a row of Baichuan 2's head is divided by, as its code has it


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file.

    Args:
        name: its name there.
        parts: what it holds, one below the other.
        heads: number of heads whose rows are put in the order of neighbours; 0 for rows as they are.
        offset: what is added to the numbers: llama.cpp multiplies with a norm's scale alone.
        experts: E of [E, rows, columns]; 0 for a matrix.
        side_by_side: whether the experts are columns of the matrix of all.
        factor: what experts' matrices are multiplied with.
        normalised: whether rows are divided by their length.
        is_matrix: whether it may be packed: norms, biases and routers stay float32.
        is_head: whether it is the output matrix, or the embedding that is also that.
    """

    name: str
    parts: tuple[Entry, ...]
    heads: int = 0
    offset: float = 0.0
    experts: int = 0
    side_by_side: bool = False
    factor: int = 1
    normalised: bool = False
    is_matrix: bool = True
    is_head: bool = False

    @property
    def shape(self) -> Shape:
        """Its shape, in numpy's order of dims (the file has the last one first)."""
        rows = sum(part.layout.stored[0] for part in self.parts)
        rest = self.parts[0].layout.stored[1:]
        if not self.experts:
            return (rows, *rest)
        (columns,) = rest
        if self.side_by_side:
            return (self.experts, rows, columns // self.experts)
        return (self.experts, rows // self.experts, columns)


def file_tensors(spec: DecoderSpec, architecture: Architecture) -> list[FileTensor]:
    """The tensors of a decoder in the order of a file: what comes before the layers, layer by layer, what comes after.

    Raises:
        UserError: GGUF has no name for one.
    """
    names = {row.path: _name(row.path) for row in family_of(spec).rows if _name(row.path)}
    numbers = {leaf.path: leaf.layers for leaf in model_leaves(spec)}
    rows = {leaf.path: leaf.row.path for leaf in model_leaves(spec)}
    fused = {part: (name, parts) for name, parts in architecture.fused for part in parts}
    tensors: list[FileTensor] = []
    gathered: dict[str, list[Entry]] = {}
    for entry in stored_entries(spec, names, "GGUF's"):
        layers = numbers[entry.path]
        number = None if layers is None or entry.layer is None else layers[entry.layer]
        module, _, leaf = rows[entry.path].rpartition("/")
        if module in fused:
            whole, modules = fused[module]
            name = f"{whole}.{_SUFFIXES[leaf]}".format(number)
            parts = gathered.setdefault(name, [])
            parts.append(entry)
            present = [each for each in modules if f"{each}/{leaf}" in rows.values()]
            if len(parts) == len(present):
                tensors.append(FileTensor(name, tuple(parts), is_matrix=leaf == "kernel"))
            continue
        tensors.append(_tensor(spec, architecture, entry, rows[entry.path], number))
    return tensors


def _name(path: str) -> str:
    """The name of a row's tensor, with '{}' for the number of the layer; empty where GGUF has none."""
    if path == "mlp/router":
        return ROUTER
    module, _, leaf = path.rpartition("/")
    return f"{MODULES[module]}.{_SUFFIXES[leaf]}" if module in MODULES else ""


def _tensor(spec: DecoderSpec, architecture: Architecture, entry: Entry, path: str, number: int | None) -> FileTensor:
    """The tensor of one entry.

    Args:
        path: of its row.
        number: of its layer.
    """
    module, _, leaf = path.rpartition("/")
    fields: dict[str, Any] = {"is_matrix": leaf in ("kernel", "embedding") and path != "mlp/router"}
    if number is not None:
        layer = spec.layer(number)
        attention, experts = layer.attention, layer.feed_forward.experts
        turned = architecture.interleaved and not attention.rotary_interleaved and attention.rope is not None
        if turned and module in ("self_attn/q_proj", "self_attn/k_proj"):
            fields["heads"] = attention.num_heads if module.endswith("q_proj") else attention.num_kv_heads
        if leaf == "scale" and module in ("self_attn/q_norm", "self_attn/k_norm") and attention.qk_norm is not None:
            fields["offset"] = attention.qk_norm.offset
        if experts is not None and leaf == "kernel" and module.startswith("mlp/"):
            down = module == "mlp/down_proj"
            fields |= {"experts": experts.num_experts, "side_by_side": down}
            if down and experts.weights == "k_times":
                fields["factor"] = experts.max_top_k
            name = entry.name.removesuffix(".weight") + "_exps.weight"
            return FileTensor(name, (entry,), **fields)
    if leaf == "scale" and "offset" not in fields:
        fields["offset"] = spec.norm.offset
    if module == "lm_head":
        fields |= {"normalised": spec.normed_head, "is_head": True}
    if module == "embed_tokens":
        fields["is_head"] = spec.tied_head
    return FileTensor(entry.name, (entry,), **fields)


# --- rows, out --------------------------------------------------------------------------------------------------------


def rows_of(source: ParamSource, tensor: FileTensor) -> Iterator[np.ndarray]:
    """The rows of a tensor, in blocks; matrices of experts one by one."""
    if tensor.experts and tensor.side_by_side:
        entry = ExpertsEntry(tensor.parts[0], tuple(map(str, range(tensor.experts))), side_by_side=True)
        for expert in expert_tensors(source, entry, tensor.factor):
            yield from expert.blocks
        return
    for block in itertools.chain.from_iterable(stored_blocks(source, part) for part in tensor.parts):
        if tensor.heads:
            yield neighbours(block, head_dim(tensor))
        elif tensor.offset:
            yield block.astype(np.float32) + np.float32(tensor.offset)
        elif tensor.normalised:
            numbers = block.astype(np.float32)
            lengths = np.sqrt(np.sum(numbers * numbers, axis=1, keepdims=True))
            yield numbers / np.maximum(lengths, np.float32(_NORMALISED))
        else:
            yield block


def head_dim(tensor: FileTensor) -> int:
    """h of a tensor whose rows are those of heads."""
    return tensor.shape[0] // tensor.heads


def neighbours(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows of whole heads, those that turn together (i and i + h / 2) as neighbours."""
    return rows.reshape(-1, 2, size // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halves(rows: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `neighbours`."""
    return rows.reshape(-1, size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# --- rows, in ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves(WrappedTensor):
    """A tensor whose rows are neighbours in its file, read in the order of halves.

    Args:
        size: h.
    """

    size: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        first, last = start // self.size * self.size, math.ceil(stop / self.size) * self.size
        return halves(self.tensor.rows(first, last), self.size)[start - first : stop - first]


@dataclass(frozen=True)
class Shifted(WrappedTensor):
    """A norm's scale without what was added to it."""

    offset: float

    def rows(self, start: int, stop: int) -> np.ndarray:
        block = self.tensor.rows(start, stop)
        return (block.astype(np.float32) - np.float32(self.offset)).astype(block.dtype)


def part_tensors(tensor: FileTensor, stored: Tensor) -> Iterator[tuple[Entry, Tensor]]:
    """The parts of a dense tensor of a file, as the leaves have them."""
    if tensor.heads:
        stored = Halves(stored, head_dim(tensor))
    if tensor.offset:
        stored = Shifted(stored, tensor.offset)
    if len(tensor.parts) == 1:
        yield tensor.parts[0], stored
        return
    start = 0
    for part in tensor.parts:
        stop = start + part.layout.stored[0]
        yield part, JoinedRows(part.name, ((stored, start, stop),))
        start = stop
