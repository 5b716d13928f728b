"""Reading a GGUF file as a model. Packed numbers become float32 when they are read."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.gguf.architectures import (
    ARCHITECTURES,
    ROPE_TENSORS,
    FileShape,
    Keys,
    read_spec,
)
from convert.formats.gguf.library import load_gguf
from convert.formats.gguf.tensors import FileTensor, file_tensors, part_tensors
from convert.formats.gguf.tokenizer_files import write_tokenizer_files
from convert.formats.gguf.types import in_one_dtype, open_tensor
from convert.formats.mixtral import Divided
from jaxlm.errors import UserError
from jaxlm.tokenizer.files import find_tokenizer_files
from jaxlm.weights.hf import StackedTensors, check_num_layers
from jaxlm.weights.leaves import check_leaves
from jaxlm.weights.names import Entry, Shape, leaf_shapes
from jaxlm.weights.tensors import JoinedColumns, Tensor

SUFFIX = ".gguf"


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: it, or the one in a directory without a config.json; None for another path.

    Raises:
        UserError: there are several.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() and not (path / "config.json").is_file() else []
    if len(files) > 1:
        raise UserError(
            f"{path}: has {len(files)} GGUF files; name one of them: {', '.join(file.name for file in files)}"
        )
    return files[0] if files else None


class GgufSource(StackedTensors):
    """A model in a GGUF file.

    Args:
        file: the file.

    Attributes:
        note: why the file's tokenizer could not be read, in words; None when it could.

    Raises:
        UserError: it is damaged or in parts, its architecture is not known, or a tensor is missing, unexpected or of
            another shape than the keys say.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.path = file
        self.hf_config: dict[str, Any] | None = None
        values, stored = _read_header(file)
        keys = Keys(file, values)
        if values.get("split.count", 1) > 1:
            raise UserError(f"{file}: is one of {values['split.count']} parts; join them with llama-gguf-split --merge")
        self.config = read_spec(keys, _shape_of(file, stored))
        check_num_layers(file, self.config.num_layers, len(stored))
        expected = file_tensors(self.config, ARCHITECTURES[keys.architecture])
        shapes = {tensor.name: tensor.shape for tensor in expected}
        weights = {name: tensor for name, tensor in stored.items() if name not in ROPE_TENSORS}
        check_leaves(file, {name: tensor.shape for name, tensor in weights.items()}, shapes)
        tensors: dict[str, Tensor] = {}
        entries: list[Entry] = []
        for each in expected:
            parts = _parts(each, weights[each.name])
            tensors |= {entry.name: tensor for entry, tensor in parts}
            entries += [entry for entry, _ in parts]
        self.add(file, leaf_shapes(self.config), _by_leaf(tensors, entries), entries)
        # What else reads a tokenizer reads files, and may do so as long as the process lives.
        self.tokenizer_dir = Path(tempfile.mkdtemp(prefix="jaxlm-gguf-"))
        atexit.register(shutil.rmtree, self.tokenizer_dir, ignore_errors=True)
        self.note = write_tokenizer_files(values, self.tokenizer_dir)
        self.tokenizer_files = find_tokenizer_files(self.tokenizer_dir)


def _read_header(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(keys, tensors) of a file."""
    library = load_gguf()
    try:
        reader = library.GGUFReader(file)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError) as error:
        raise UserError(f"{file}: is not a GGUF file, or is cut short or damaged ({error}); copy it again") from None
    if reader.byte_order != "I":
        raise UserError(f"{file}: is written for a machine with another order of bytes")
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[tensor.name] = open_tensor(tensor.name, file, int(tensor.data_offset), shape, tensor.tensor_type)
    return values, tensors


def _shape_of(file: Path, tensors: Mapping[str, Tensor]) -> FileShape:
    """What the tensors say about the decoder."""
    if "token_embd.weight" not in tensors:
        raise UserError(f"{file}: tensor 'token_embd.weight' is missing; copy the file again")
    factors = {
        name: tuple(float(str(number)) for number in tensors[name].read().astype(np.float32))
        for name in ROPE_TENSORS
        if name in tensors
    }

    def has(*names: str) -> bool:
        return any(f"blk.0.{name}.bias" in tensors for name in names)

    return FileShape(
        tensors["token_embd.weight"].shape[0],
        "output.weight" not in tensors,
        has("attn_q", "attn_qkv"),
        has("attn_output"),
        has("ffn_down"),
        factors,
    )


def _parts(tensor: FileTensor, stored: Tensor) -> list[tuple[Entry, Tensor]]:
    """The parts of a tensor of a file, each as its leaf has it."""
    if not tensor.experts:
        return list(part_tensors(tensor, stored))
    (entry,) = tensor.parts
    experts, rows, columns = tensor.shape
    if not tensor.side_by_side:
        return [(entry, _at(stored, 0, (experts * rows, columns)))]
    matrices = tuple(_at(stored, expert, (rows, columns)) for expert in range(experts))
    whole: Tensor = JoinedColumns(entry.name, matrices)
    return [(entry, Divided(whole, tensor.factor) if tensor.factor > 1 else whole)]


def _at(stored: Tensor, number: int, shape: Shape) -> Tensor:
    """A matrix of a tensor that holds several, one behind the other."""
    nbytes = _file_bytes(stored) // (int(np.prod(stored.shape)) // int(np.prod(shape)))
    return dataclasses.replace(stored, offset=stored.offset + number * nbytes, shape=shape)  # type: ignore[type-var, attr-defined]


def _file_bytes(stored: Tensor) -> int:
    """Bytes of a tensor in its file."""
    kind = getattr(stored, "kind", None)
    if kind is None:
        return stored.nbytes
    block, size = load_gguf().GGML_QUANT_SIZES[kind]
    return int(np.prod(stored.shape)) // int(block) * int(size)


def _by_leaf(tensors: dict[str, Tensor], entries: list[Entry]) -> dict[str, Tensor]:
    """The tensors, those of a leaf in one dtype: layers may be packed in different types."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.path, []).append(entry.name)
    result: dict[str, Tensor] = {}
    for group in names.values():
        result |= dict(zip(group, in_one_dtype([tensors[name] for name in group]), strict=True))
    return result
