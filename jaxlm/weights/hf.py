"""Hugging Face model directories: `config.json`, weights, tokenizer files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.models.families import family_of, read_config, usual_names, write_config
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer.files import find_tokenizer_files
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from jaxlm.weights.experts import expert_tensors, join_experts, own_experts, split_stacked
from jaxlm.weights.files import find_weights, read_tensors
from jaxlm.weights.leaves import (
    Index,
    LeafInfo,
    ParamSource,
    check_leaves,
    full_index,
    index_shape,
    main_dtype,
    row_blocks,
    stored_blocks,
)
from jaxlm.weights.names import BUFFERS, Entry, FusedEntry, Layout, Shape, fused_entries, hf_entries, leaf_shapes
from jaxlm.weights.output import Advance
from jaxlm.weights.safetensors import write_safetensors
from jaxlm.weights.tensors import JoinedRows, Tensor, TensorSpec, same_bytes


def stack_leaf(where: Path, path: str, shape: Shape, tensors: dict[int | None, Tensor]) -> LeafInfo:
    """The leaf that the tensors of all layers make; refuses dtypes that differ or are not those of weights."""
    first = next(iter(tensors.values()))
    for tensor in tensors.values():
        if tensor.dtype not in WEIGHT_DTYPES.values():
            raise UserError(
                f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype.name}; "
                f"weights in {', '.join(WEIGHT_DTYPES)} are read (save an unquantised model)"
            )
        if tensor.dtype != first.dtype:
            raise UserError(
                f"{where}: {first.name!r} is {first.dtype.name} and {tensor.name!r} is {tensor.dtype.name}; "
                "layers are stacked, so they need one dtype: save the model in one dtype first"
            )
    return LeafInfo(shape, first.dtype)


def check_num_layers(where: Path, num_layers: int, num_tensors: int) -> None:
    """Refuses a number of layers that the tensors cannot be of, before a list of that length is made."""
    if num_layers > num_tensors:
        raise UserError(f"{where}: says that the model has {num_layers} layers, but there are {num_tensors} tensors")


def match_tensors(where: Path, tensors: Mapping[str, Tensor], entries: list[Entry]) -> None:
    """Refuses missing, unexpected or differently shaped tensors: the first three of each kind, by name."""
    _match_shapes(where, tensors, {entry.name: entry.layout.stored for entry in entries})


def _match_shapes(where: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Shape], head: str = "") -> None:
    hint = "; if the model ties its head to the embedding, set tie_word_embeddings to true in config.json"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_leaves(where, shapes, expected, hint if head in expected and head not in tensors else "")


def parse_hf_config(where: Path, content: dict[str, Any]) -> DecoderSpec:
    """The shape that a `config.json` describes; errors name the file."""
    try:
        return read_config(content)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config.json: ')}") from None


class StackedTensors:
    """Leaves read from one stored tensor per layer."""

    partition: np.ndarray | None = None  # only jaxlm's own format keeps one

    def __init__(self) -> None:
        self.prompt_files: list[Path] = []  # only jaxlm's own format has them
        self.leaves: dict[str, LeafInfo] = {}
        self._tensors: dict[str, dict[int | None, tuple[Tensor, Layout]]] = {}

    def add(self, where: Path, shapes: dict[str, Shape], tensors: Mapping[str, Tensor], entries: list[Entry]) -> None:
        """Registers the leaves of `shapes`, made of `tensors` as `entries` says."""
        for entry in entries:
            self._tensors.setdefault(entry.path, {})[entry.layer] = (tensors[entry.name], entry.layout)
        for path, shape in shapes.items():
            parts = {layer: tensor for layer, (tensor, _) in self._tensors.setdefault(path, {}).items()}
            # An adapter may leave out all layers of a stack, which then is zeros.
            no_parts = LeafInfo(shape, tensors[entries[0].name].dtype)
            self.leaves[path] = stack_leaf(where, path, shape, parts) if parts else no_parts

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        """One tensor as the HF entry lays it out, in blocks of rows straight from the file."""
        tensor, layout = self._tensors[entry.path][entry.layer]
        assert layout.stored == entry.layout.stored, entry
        for start, stop in row_blocks(layout):
            yield tensor.rows(start, stop)

    def read(self, path: str, index: Index) -> np.ndarray:
        info = self.leaves[path]
        full = full_index(info.shape, index)
        parts = self._tensors[path]
        if None in parts:
            out = np.empty(index_shape(full), info.dtype)
            tensor, layout = parts[None]
            tensor.read_into(out, layout, full)
            return out
        # Zeros: layers without an adapter, and the rows above a layer's own rank.
        is_whole = len(parts) == info.shape[0] and all(layout.shape == info.shape[1:] for _, layout in parts.values())
        out = (np.empty if is_whole else np.zeros)(index_shape(full), info.dtype)
        for position, layer in enumerate(range(full[0].start, full[0].stop, full[0].step)):
            if layer in parts:
                tensor, layout = parts[layer]
                inside = tuple(
                    slice(part.start, max(part.start, min(part.stop, size)), part.step)
                    for part, size in zip(full[1:], layout.shape, strict=True)
                )
                target = out[position][tuple(slice(0, size) for size in index_shape(inside))]
                tensor.read_into(target, layout, inside)
        return out


class HfSource(StackedTensors):
    """A Hugging Face model directory, read without loading it.

    Raises:
        UserError: when a tensor is missing, unexpected, or of another shape than the configuration says.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tokenizer_dir = path
        self.tokenizer_files = find_tokenizer_files(path)
        content = read_object(path / "config.json")
        self.config = self.parse_config(path / "config.json", content)
        self.hf_config = self.kept_config(content)
        weights = find_weights(path)
        if weights is None:
            raise UserError(f"{path}: has config.json but no weights: {_missing_weights(path)}")
        family = family_of(self.config)
        unused = "|".join((BUFFERS, *family.unused))
        files: dict[str, Tensor] = dict(read_tensors(weights))
        self.prepare_files(weights, content, files)
        tensors = {
            _usual_name(name, family.renamed): tensor
            for name, tensor in files.items()
            if not re.fullmatch(unused, name)
        }
        for copy, name in family.copies.items():
            drop_copy(
                weights, tensors, copy, name, "they are one in this architecture; convert with transformers first"
            )
        check_num_layers(path / "config.json", self.config.num_layers, len(tensors))
        split_stacked(weights, tensors, self.config)
        for entry in own_experts(self.config):
            tensors[entry.whole.name] = join_experts(weights, tensors, entry)
        self.prepare(weights, tensors)
        entries, fused = hf_entries(self.config), fused_entries(self.config)
        wholes = {part.name: whole for whole in fused for part in whole.parts}
        expected = {
            wholes[entry.name].name if entry.name in wholes else entry.name: entry.layout.stored for entry in entries
        }
        _match_shapes(weights, tensors, expected | {whole.name: whole.stored for whole in fused}, self._head)
        for whole in fused:
            parts = [(part.name, rows) for part, rows in zip(whole.parts, whole.rows, strict=True)]
            split_fused(weights, tensors, whole.name, parts, whole.repeats)
        self.add(weights, leaf_shapes(self.config), tensors, entries)

    def parse_config(self, where: Path, content: dict[str, Any]) -> DecoderSpec:
        """The shape that `config.json` describes."""
        return parse_hf_config(where, content)

    def prepare_files(self, weights: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Makes matrices of those found in the files, where these hold something else.

        Raises:
            UserError: they do, and it is not known how.
        """
        settings = content.get("quantization_config")
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise UserError(
                f"{self.path / 'config.json'}: the model is quantised by {method!r}; read are bitsandbytes, gptq, awq "
                "and compressed-tensors; use the unquantised one"
            )

    def kept_config(self, content: dict[str, Any]) -> dict[str, Any] | None:
        """What is kept of `config.json`, to be written again."""
        return usual_names(content)

    def prepare(self, weights: Path, tensors: dict[str, Tensor]) -> None:
        """Gives the tensors found the names and shapes that the family's files have."""
        family = family_of(self.config)
        head, embedding = self._head, next(row.hf for row in family.rows if row.path == "embed_tokens/embedding")
        if family.head_by_tensors:
            own = head in tensors and not (embedding in tensors and same_bytes(tensors[head], tensors[embedding]))
            self.config = dataclasses.replace(self.config, tied_head=not own)
        drop_tied_head(weights, tensors, head, embedding, self.config)

    @property
    def _head(self) -> str:
        """The family's name of the output matrix."""
        return next(row.hf for row in family_of(self.config).rows if row.path == "lm_head/kernel")


def split_fused(
    where: Path, tensors: dict[str, Tensor], name: str, parts: Sequence[tuple[str, int]], repeats: int
) -> bool:
    """Replaces a tensor that holds several by them; whether it is there.

    Args:
        parts: the name of each, and its number of rows in one group.
        repeats: number of groups of rows, each of which has rows of all parts in turn.

    Raises:
        UserError: the tensor has another number of rows, or a part is there by itself too.
    """
    if name not in tensors:
        return False
    whole, stride = tensors.pop(name), sum(rows for _, rows in parts)
    if not whole.shape or whole.shape[0] != stride * repeats:
        raise UserError(
            f"{where}: tensor {name!r} has shape {list(whole.shape)}, the configuration expects {stride * repeats} rows"
        )
    start = 0
    for part, rows in parts:
        if part in tensors:
            raise UserError(f"{where}: holds {part!r} both by itself and in {name!r}")
        begins = [start + group * stride for group in range(repeats)]
        tensors[part] = JoinedRows(part, tuple((whole, begin, begin + rows) for begin in begins))
        start += rows
    return True


def drop_tied_head(where: Path, tensors: dict[str, Tensor], head: str, embedding: str, config: DecoderSpec) -> None:
    """Takes out the head of a tied model, which some programs store too: old transformers versions, MindFormers.

    Raises:
        UserError: when it is not the embedding.
    """
    if config.tied_head:
        why = "the configuration ties the head to the embedding (tie_word_embeddings); set it to false to keep both"
        drop_copy(where, tensors, head, embedding, why)


def drop_copy(where: Path, tensors: dict[str, Tensor], copy: str, name: str, why: str) -> None:
    """Takes out a tensor that is another one again.

    Args:
        why: what is wrong where it is not, and the way out.

    Raises:
        UserError: it is not.
    """
    if copy not in tensors or name not in tensors:
        return
    if not same_bytes(tensors[copy], tensors[name]):
        raise UserError(f"{where}: {copy} differs from {name}: {why}")
    del tensors[copy]


def _usual_name(name: str, renamed: Mapping[str, str]) -> str:
    """The name that the family's rows have for a tensor."""
    for pattern, usual in renamed.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(usual)
    return name


def _missing_weights(directory: Path) -> str:
    """What a directory without weights that can be read lacks."""
    for stem, index in (("model", "model.safetensors"), ("pytorch_model", "pytorch_model.bin")):
        parts = sorted(directory.glob(f"{stem}-*-of-*.{index.rpartition('.')[2]}"))
        if parts:
            return (
                f"there are {len(parts)} parts ({parts[0].name}, …), but not {index}.index.json, which says what is in "
                "which; download that file too"
            )
    return "model.safetensors or pytorch_model.bin, or their parts and index.json"


def hf_config_for(source: ParamSource) -> str:
    """The `config.json` of a model: the one it came with where that still holds, otherwise updated or new."""
    dtype = main_dtype(source.leaves)
    original = source.hf_config
    if original is None:
        values = _new_config(source, dtype)
    else:
        values = dict(original)
        own = source.path / "jaxlm" / "hf_config.json"
        if parse_hf_config(own if own.is_file() else source.path / "config.json", original) != source.config:
            written = _new_config(source, dtype)
            values |= written
            if read_config(values) != read_config(written):
                values = written  # another key of the original says otherwise
        named = {key for key in ("dtype", "torch_dtype") if key in values}
        for key in named or {"torch_dtype"}:
            values[key] = dtype
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _new_config(source: ParamSource, dtype: str) -> dict[str, Any]:
    """`write_config`; errors name the file that describes the model."""
    described = source.path / "jaxlm" / "model.json"
    try:
        return write_config(source.config, dtype)
    except UserError as error:
        raise UserError(f"{described if described.is_file() else source.path}: {error}") from None


def copy_files(files: list[Path], directory: Path) -> None:
    """Copies files byte for byte (links are followed)."""
    directory.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, directory / file.name)


def hf_tensors(source: ParamSource) -> list[TensorSpec]:
    """The tensors of a model as HF names and lays them out, to be read once, in this order."""
    fused = {part.name: whole for whole in fused_entries(source.config) for part in whole.parts}
    experts = {entry.whole.name: entry for entry in own_experts(source.config)}
    tensors = []
    for entry in hf_entries(source.config):
        if entry.name in experts:
            tensors += expert_tensors(source, experts[entry.name])
            continue
        dtype, whole = source.leaves[entry.path].dtype, fused.get(entry.name)
        if whole is None:
            tensors.append(TensorSpec(entry.name, entry.layout.stored, dtype, stored_blocks(source, entry)))
        elif entry.name == whole.parts[0].name:
            tensors.append(TensorSpec(whole.name, whole.stored, dtype, _fused_blocks(source, whole)))
    return tensors


def _fused_blocks(source: ParamSource, whole: FusedEntry) -> Iterator[np.ndarray]:
    """The rows of a tensor that holds several, in its order."""
    if whole.repeats == 1:
        for part in whole.parts:
            yield from stored_blocks(source, part)
        return
    for group in range(whole.repeats):
        for part, rows in zip(whole.parts, whole.rows, strict=True):
            layout, units = part.layout, rows // part.layout.row_unit
            index = [slice(0, size) for size in layout.shape]
            index[layout.inverse[0]] = slice(group * units, (group + 1) * units)
            assert part.layer is not None
            leaf = source.read(part.path, (slice(part.layer, part.layer + 1), *index))[0]
            few = Layout((rows, *layout.stored[1:]), (units, *layout.view[1:]), layout.perm)
            yield few.to_stored(np.ascontiguousarray(leaf))


def write_files(source: ParamSource, directory: Path, shard_size: int, advance: Advance) -> None:
    """Writes a model as a Hugging Face directory (safetensors), one piece of a tensor at a time.

    Args:
        source: a dense model, or one of experts whose family's files hold them.
        directory: an existing, empty directory.
        shard_size: bytes of tensors in a file; a larger tensor gets a file of its own.
        advance: called with the bytes written.
    """
    write_safetensors(directory, "model", hf_tensors(source), shard_size, advance)
    (directory / "config.json").write_text(hf_config_for(source), encoding="utf-8")
    copy_files(source.tokenizer_files, directory)
