"""safetensors files, read from their header and written a block at a time.

Every offset, shape and length comes from the file, so all of them are checked against it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.errors import UserError
from jaxlm.weights.ahead import read_ahead
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.output import Advance, tell_final
from jaxlm.weights.tensors import StoredTensor, TensorSpec

SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# The safetensors format's own limit.
MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header.

    Raises:
        UserError: when the header is broken, or a tensor lies outside the file or on another one.
    """
    again = "; copy or download the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path}: not a safetensors file, or cut short in its header ({size} bytes){again}")
            raw = handle.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    header: dict[str, Any] = {}

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header is not valid JSON ({error}){again}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is not a JSON object{again}")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _safetensors_entry(path, name, entry, data_start, size) for name, entry in header.items()}
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset < end:
            raise UserError(f"{path}: tensor {tensor.name!r} overlaps the one before it{again}")
        if tensor.offset > end:
            raise UserError(f"{path}: {tensor.offset - end} bytes before tensor {tensor.name!r} belong to none{again}")
        end = tensor.offset + tensor.nbytes
    if end != size:
        raise UserError(f"{path}: {size - end} bytes after the last tensor belong to none{again}")
    return tensors


def _safetensors_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets in the header") from None
    dtype = SAFETENSORS_DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise UserError(f"{path}: tensor {name!r} has the unknown dtype {dtype_name!r}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise UserError(f"{path}: tensor {name!r} has shape {shape} and data_offsets [{begin}, {end}] in the header")
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise UserError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype_name} needs {needed} bytes, "
            f"its data_offsets give {end - begin}"
        )
    if data_start + end > size:
        raise UserError(
            f"{path}: cut short inside tensor {name!r}: the file has {size} bytes, {data_start + end} are needed; "
            "copy or download the file again"
        )
    return StoredTensor(name, path, data_start + begin, tuple(shape), dtype)


def _split(specs: list[TensorSpec], shard_size: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def write_safetensors(directory: Path, stem: str, specs: list[TensorSpec], shard_size: int, advance: Advance) -> None:
    """Writes `{stem}.safetensors`, or shards with an index when they exceed `shard_size` bytes together."""
    shards = _split(specs, shard_size)
    if len(shards) == 1:
        write_safetensors_file(directory / f"{stem}.safetensors", shards[0], advance)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors_file(directory / name, shard, advance)
        weight_map |= {spec.name: name for spec in shard}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def write_safetensors_file(path: Path, specs: list[TensorSpec], advance: Advance) -> None:
    """Writes one file: the header first, then tensor after tensor."""
    # Wide dtypes first, so that every tensor is aligned to its own width, as the format's own library does.
    specs = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    end = 8 + len(raw)
    with path.open("wb", buffering=0) as handle, read_ahead((spec, spec.blocks) for spec in specs) as tensors:
        _write(handle.fileno(), len(raw).to_bytes(8, "little") + raw)
        for spec, blocks in tensors:
            written = 0
            for block in blocks:
                assert block.dtype == spec.dtype and block.flags.c_contiguous, spec.name
                _write(handle.fileno(), block.reshape(-1).view(np.uint8).data)
                written += block.nbytes
                advance(block.nbytes)
                tell_final(advance, path, end + written)
            assert written == spec.nbytes, f"{spec.name}: {written} of {spec.nbytes} bytes"
            end += written
    tell_final(advance, path, None)


def _write(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
