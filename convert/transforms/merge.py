"""A base model with an adapter folded into its weights, read like any other model.

W + scale * A B is formed in float32 and rounded once to the result's dtype; under DoRA (arXiv:2402.09353) the sum is
scaled per output to the learned magnitude before that. Same numbers as PEFT's `merge_and_unload` in float32.

`blocks` goes through a matrix by rows of outputs, as HF stores them, and so holds a few megabytes at a time, with DoRA
too: the norm of an output is that of a row. `read` gives any slice in jaxlm's layout; DoRA then needs all inputs of the
outputs asked for. Both give the same bits, whatever the slice: see `jaxlm.weights.reproducible`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.models.adapters import linears_of, resolve_lora, saved_modules
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import main_file
from jaxlm.weights.arithmetic import all_finite
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from jaxlm.weights.leaves import (
    AdapterSource,
    DerivedSource,
    Index,
    LeafInfo,
    ParamSource,
    cast,
    full_index,
    row_blocks,
    stored_blocks,
)
from jaxlm.weights.names import Entry, num_input_dims
from jaxlm.weights.reproducible import low_rank_product, norms

# float32 working space beside the layer itself.
BLOCK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A matrix that is changed.

    Args:
        linear: its layer's name.
        layers: numbers of the layers stacked.
        num_inputs: number of its dims that are contracted.
        first: path of the adapter's first factor, which others may share.
        own: where its other factors are.
    """

    linear: str
    spec: LoraSpec
    layers: range
    num_inputs: int
    first: str
    own: str

    def factor(self, name: str) -> str:
        """Path of a leaf of the adapter."""
        return self.first if name == "lora_A" else f"{self.own}/{name}"


def _adapted_kernels(spec: DecoderSpec, specs: Mapping[str, LoraSpec]) -> dict[str, _Kernel]:
    """Those of an adapter by their paths."""
    linears = linears_of(spec)
    return {
        stack.leaf(row.path): _Kernel(
            row.linear,
            own,
            stack.numbers,
            num_input_dims(spec, row.linear),
            stack.leaf(f"{linears[name].path}/lora_A"),
            stack.leaf(row.path.removesuffix("/kernel")),
        )
        for name, own in specs.items()
        for row in linears[name].rows
        for stack in spec.part(row.in_encoder).stacks
    }


class MergedSource(DerivedSource):
    """`base` with `adapter` merged in.

    Args:
        adapter: opened with the base's configuration, so that its shapes were checked against it.
        dtype: the result's, or that of each leaf; None: the base's, tensor by tensor.

    Raises:
        UserError: when the adapter's saved embedding and head do not have the same number of rows.
    """

    def __init__(
        self, base: ParamSource, adapter: AdapterSource, dtype: str | Mapping[str, np.dtype[Any]] | None = None
    ) -> None:
        super().__init__(base)
        self._base = base
        self._adapter = adapter
        specs = resolve_lora(base.config, adapter.lora, adapter.layers)
        self._kernels = _adapted_kernels(base.config, specs)
        saved = saved_modules(base.config, adapter.lora)
        self._saved = {row.path: f"modules_to_save/{row.path}" for rows in saved.values() for row in rows}
        leaves = {}
        for path, leaf in base.leaves.items():
            shape = adapter.leaves[self._saved[path]].shape if path in self._saved else leaf.shape
            chunk = None if path in self._saved else leaf.chunk
            result = WEIGHT_DTYPES[dtype] if isinstance(dtype, str) else (dtype or {}).get(path, leaf.dtype)
            leaves[path] = LeafInfo(shape, result, chunk)
        self.leaves = leaves
        self.config = self._with_vocabulary(base.config)
        # The adapter was trained last, so what it was asked with is what the merged model answers to.
        self.prompt_files = adapter.prompt_files or base.prompt_files
        names = {file.name for file in adapter.tokenizer_files}
        own = main_file(names) is not None
        self.tokenizer_dir = adapter.tokenizer_files[0].parent if own else base.tokenizer_dir
        if own:
            # The adapter's tokenizer may have tokens that the base's lacks; the two are not mixed.
            generation = [file for file in base.tokenizer_files if file.name == "generation_config.json"]
            self.tokenizer_files = adapter.tokenizer_files + [file for file in generation if file.name not in names]

    def _with_vocabulary(self, config: DecoderSpec) -> DecoderSpec:
        rows = {
            path: self.leaves[path].shape[0]
            for path in ("embed_tokens/embedding", "lm_head/kernel")
            if path in self.leaves
        }
        if len(set(rows.values())) > 1:
            raise UserError(
                f"{self._adapter.path}: after merging, the embedding would have {rows['embed_tokens/embedding']} rows "
                f"and the head {rows['lm_head/kernel']}; the adapter must save both (modules_to_save)"
            )
        return dataclasses.replace(config, vocab_size=rows["embed_tokens/embedding"])

    def read(self, path: str, index: Index) -> np.ndarray:
        if path in self._saved:
            saved = self._adapter.read(self._saved[path], index)
            if not all_finite(saved):
                raise UserError(
                    f"{self._adapter.path}: the saved module {path} holds infinities or NaNs; nothing can be merged "
                    "with that: take an earlier checkpoint of its run"
                )
            return cast(saved, self.leaves[path].dtype, path)
        part = self._base.read(path, index)
        kernel = self._kernels.get(path)
        if kernel is None:
            return cast(part, self.leaves[path].dtype, path)
        out = np.empty(part.shape, self.leaves[path].dtype)
        full = full_index(self.leaves[path].shape, index)
        for position, place in enumerate(range(full[0].start, full[0].stop, full[0].step)):
            if kernel.spec.ranks[kernel.layers[place]]:
                self._merge(part[position], out[position], path, kernel, place, full[1:])
            else:
                out[position] = cast(part[position], out.dtype, path)
        return out

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        dtype = self.leaves[entry.path].dtype
        kernel = self._kernels.get(entry.path)
        if entry.path in self._saved:
            turned = entry.layout.split > 0
            whole = entry.layout.to_stored(np.ascontiguousarray(self.read(entry.path, ()))) if turned else None
            for start, stop in row_blocks(entry.layout):
                rows = self.read(entry.path, (slice(start, stop),)) if whole is None else whole[start:stop]
                yield np.ascontiguousarray(rows)
        elif kernel is None or entry.layer is None or not kernel.spec.ranks[kernel.layers[entry.layer]]:
            for block in stored_blocks(self._base, entry):
                yield cast(block, dtype, entry.name)
        else:
            for block in self._merged_blocks(entry, kernel, entry.layer):
                yield cast(block, dtype, entry.name)

    def _merged_blocks(self, entry: Entry, kernel: _Kernel, place: int) -> Iterator[np.ndarray]:
        """Rows of outputs of one layer's merged matrix in float32; `place` is the layer's in the stack."""
        spec, layer = kernel.spec, kernel.layers[place]
        rank = spec.ranks[layer]
        every = (slice(None),) * kernel.num_inputs
        a = self._factor(kernel, place, "lora_A", (*every, slice(0, rank)))
        b = self._factor(kernel, place, "lora_B", (slice(0, rank),))
        to_inputs, to_outputs = np.ascontiguousarray(a.reshape(-1, rank).T), b.reshape(rank, -1).T
        scale = np.float32(spec.scales[layer])
        magnitude: np.ndarray | None = None
        if spec.dora:
            magnitude = self._factor(kernel, place, "magnitude", ()).reshape(-1)
        for (start, stop), block in zip(row_blocks(entry.layout), stored_blocks(self._base, entry), strict=True):
            merged = low_rank_product(to_outputs[start:stop], to_inputs)
            merged *= scale
            merged += block.astype(np.float32, copy=False)
            self._check_finite(merged, entry.name)
            if magnitude is not None:
                merged *= self._gain(magnitude[start:stop], merged, 1, entry.name, start)[:, None]
            yield merged

    def _factor(self, kernel: _Kernel, place: int, name: str, index: Index) -> np.ndarray:
        """A part of the adapter in float32; the index leaves out the layer."""
        values = self._adapter.read(kernel.factor(name), (slice(place, place + 1), *index)).astype(np.float32)
        if not all_finite(values):
            raise UserError(
                f"{self._adapter.path}: {name} of {kernel.linear}, layer {kernel.layers[place]}, holds infinities or "
                "NaNs; nothing can be merged with that: take an earlier checkpoint of its run"
            )
        return values

    def _check_finite(self, merged: np.ndarray, name: str) -> None:
        """Refuses a merged matrix with infinities or NaNs: the factors have none, so the base does."""
        if not all_finite(merged):
            raise UserError(
                f"{self._base.path}: {name} holds infinities or NaNs; no adapter can be merged into it: the file is "
                "damaged, or of a run that diverged"
            )

    def _gain(self, magnitude: np.ndarray, merged: np.ndarray, dim: int, name: str, first: int) -> np.ndarray:
        """DoRA's factor of each output; `dim` is that of the inputs, `first` the first output's number."""
        lengths = norms(merged, dim)
        if not lengths.all():
            row = first + int(np.flatnonzero(lengths == 0)[0])
            raise UserError(
                f"{self._base.path}: {name}: all weights of output {row} are zero, so DoRA's magnitude has no "
                "direction to go by; the adapter belongs to another base"
            )
        return magnitude / lengths

    def _merge(self, base: np.ndarray, out: np.ndarray, path: str, kernel: _Kernel, place: int, index: Index) -> None:
        """Fills `out` with a slice of one layer's merged kernel; `base` is the same slice of the base's."""
        spec, layer, num_inputs = kernel.spec, kernel.layers[place], kernel.num_inputs
        if base.size == 0:
            return
        inputs, outputs = index[:num_inputs], index[num_inputs:]
        rank = slice(0, spec.ranks[layer])
        b = self._factor(kernel, place, "lora_B", (rank, *outputs)).reshape(spec.ranks[layer], -1)

        def factor_a(part: Index) -> np.ndarray:
            return self._factor(kernel, place, "lora_A", (*part, rank)).reshape(-1, spec.ranks[layer])

        flat, flat_out = base.reshape(-1, b.shape[1]), out.reshape(-1, b.shape[1])
        scale = np.float32(spec.scales[layer])
        a = factor_a(inputs)

        def merged(base_part: np.ndarray, a_part: np.ndarray, columns: slice) -> np.ndarray:
            part = low_rank_product(a_part, b[:, columns])
            part *= scale
            part += base_part.astype(np.float32, copy=False)
            self._check_finite(part, path)
            return part

        gain: np.ndarray | None = None
        if spec.dora:
            magnitude = self._factor(kernel, place, "magnitude", outputs).reshape(-1)
            # The norm of an output runs over all inputs, also when only some of them are asked for.
            every = tuple(slice(0, size) for size in self.leaves[path].shape[1 : 1 + num_inputs])
            whole, whole_a = flat, a
            if a.shape[0] != int(np.prod([part.stop for part in every])):
                whole = self._base.read(path, (slice(place, place + 1), *every, *outputs)).reshape(-1, b.shape[1])
                whole_a = factor_a(every)
            gain = np.empty_like(magnitude)
            for columns in _pieces(whole.shape[1], whole.shape[0]):
                here_merged = merged(whole[:, columns], whole_a, columns)
                gain[columns] = self._gain(magnitude[columns], here_merged, 0, path, columns.start)
        for rows in _pieces(flat.shape[0], flat.shape[1]):
            part = merged(flat[rows], a[rows], slice(None))
            if gain is not None:
                part *= gain
            flat_out[rows] = cast(part, out.dtype, path)


def merge_in_order(
    base: ParamSource, adapters: Iterable[Callable[[ParamSource], AdapterSource]], dtype: str | None = None
) -> ParamSource:
    """A base with adapters folded in, one after the other; sums are float32 until all are in, and rounded once.

    Modules that an adapter saves whole take the place of what is there, and its tokenizer too; so the last one's stays.
    Source: Chinese-LLaMA's merge of several adapters (which rounds to float16 after each).

    Args:
        adapters: each opens one for the model with those before it.
        dtype: the result's; None: the base's, tensor by tensor.

    Raises:
        UserError: an adapter has fewer rows of tokens than the model before it.
    """
    opens = list(adapters)
    source = base
    for number, open_it in enumerate(opens, 1):
        adapter = open_it(source)
        if number == len(opens):
            merged = MergedSource(source, adapter, dtype or {path: leaf.dtype for path, leaf in base.leaves.items()})
        else:
            specs = resolve_lora(source.config, adapter.lora, adapter.layers)
            wide = dict.fromkeys(_adapted_kernels(source.config, specs), np.dtype(np.float32))
            merged = MergedSource(source, adapter, wide)
        if len(opens) > 1 and merged.config.vocab_size < source.config.vocab_size:
            raise UserError(
                f"{adapter.path}: saves an embedding of {merged.config.vocab_size} rows, and the model before it has "
                f"{source.config.vocab_size}: with several adapters the vocabulary may only grow. Give them in the "
                "order in which they were trained"
            )
        source = merged
    return source


def _pieces(count: int, width: int) -> list[slice]:
    """`count` rows (or columns) of `width` float32 numbers, in pieces of BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // (4 * width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
