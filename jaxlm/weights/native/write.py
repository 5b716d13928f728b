"""Writing models and adapters as jaxlm directories, through TensorStore, with bounded memory."""

from __future__ import annotations

import dataclasses
import errno
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxlm.errors import UserError
from jaxlm.locate import record_base
from jaxlm.spec import is_stacked
from jaxlm.weights.hf import copy_files
from jaxlm.weights.leaves import AdapterSource, Index, LeafInfo, LeafSource, ParamSource, main_dtype
from jaxlm.weights.names import Shape
from jaxlm.weights.native import layout
from jaxlm.weights.native.layout import ARRAYS, HF_CONFIG, MODEL_JSON, PEFT_CONFIG, SMALL_FILES, TOKENIZER
from jaxlm.weights.native.model_json import ModelFile, json_bytes
from jaxlm.weights.native.read import brief
from jaxlm.weights.output import Advance, tell_final
from jaxlm.weights.partition import PARTITION_FILE, npy_bytes
from jaxlm.weights.quantized import QuantizedParts


def write_model(source: ParamSource, directory: Path, advance: Advance) -> None:
    """Writes a full model as a jaxlm directory."""
    _write_small(directory, source, ModelFile(source.config, main_dtype(source.leaves)))
    if source.hf_config is not None:
        (directory / SMALL_FILES / HF_CONFIG).write_bytes(json_bytes(source.hf_config))
    _write_tree(source, directory, "params", advance)


def write_quantized(source: QuantizedParts, directory: Path, original: str, advance: Advance) -> None:
    """Writes a model with its kernels in few bits as a jaxlm directory that records `original`, the path of its source.

    An adapter is merged into that one's weights, not into the rounded ones.
    """
    file = ModelFile(source.config, main_dtype(source.leaves), base=record_base(original, directory))
    _write_small(directory, source, dataclasses.replace(file, rounding=source.rounding))
    if source.hf_config is not None:
        (directory / SMALL_FILES / HF_CONFIG).write_bytes(json_bytes(source.hf_config))
    _write_tree(source, directory, "params", advance)


def write_adapter(source: AdapterSource, directory: Path, base: str, advance: Advance) -> None:
    """Writes an adapter as a jaxlm directory that records `base`, the path of its base."""
    recorded = record_base(base, directory)
    file = ModelFile(source.config, main_dtype(source.leaves), source.lora, source.layers, recorded)
    _write_small(directory, source, file)
    if source.peft_config is not None:
        (directory / SMALL_FILES / PEFT_CONFIG).write_bytes(json_bytes(source.peft_config))
    _write_tree(source, directory, "lora", advance)


def _write_small(directory: Path, source: ParamSource | AdapterSource, file: ModelFile) -> None:
    folder = directory / SMALL_FILES
    folder.mkdir()
    (folder / MODEL_JSON).write_bytes(file.to_bytes())
    partition = None if file.config.experts is None else source.partition
    if partition is not None:
        (folder / PARTITION_FILE).write_bytes(npy_bytes(partition))
    copy_files(source.tokenizer_files, folder / TOKENIZER)
    copy_files(source.prompt_files, folder)


def _write_tree(source: LeafSource, directory: Path, collection: str, advance: Advance) -> None:
    started = time.time_ns()
    model = directory / ARRAYS
    model.mkdir()
    # Synced by who watches the files, or with the whole directory: no write waits for the disk.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
    chunks = {
        path: layout.chunk_shape(leaf.shape, leaf.dtype.itemsize, is_stacked(path))
        for path, leaf in source.leaves.items()
    }
    # Writes run behind reads, up to twice CHUNK_BYTES.
    pending: deque[tuple[Any, int, Path]] = deque()
    try:
        for path, leaf in source.leaves.items():
            folder = model / layout.array_name(collection, path)
            store = _create(folder, leaf, chunks[path], context)
            for index, block in _chunks(source, path, chunks[path]):
                # Not copied: nothing else has the block.
                write = store[index].write(block, can_reference_source_data_indefinitely=True)
                pending.append((write, block.nbytes, _chunk_file(folder, index, chunks[path])))
                while sum(nbytes for _, nbytes, _ in pending) > 2 * layout.CHUNK_BYTES:
                    _finish(pending, model, advance)
        while pending:
            _finish(pending, model, advance)
    finally:
        # After an error too: a write still running would put files back into a directory that is being removed.
        for future, *_ in pending:
            future.exception()
    shapes = {path: leaf.shape for path, leaf in source.leaves.items()}
    layout.write_metadata(directory, collection, shapes, chunks, (started, time.time_ns()))


def _chunks(source: LeafSource, path: str, chunk: Shape) -> Iterator[tuple[Index, np.ndarray]]:
    """A leaf in pieces that cover whole chunks, with their place."""
    shape = source.leaves[path].shape
    stacked = is_stacked(path)
    rows, count = (chunk[1], shape[1]) if stacked else (chunk[0], shape[0])
    for layer in range(shape[0] if stacked else 1):
        prefix: Index = (slice(layer, layer + 1),) if stacked else ()
        # Another layout is turned a layer at a time: reading it row by row would read it many times.
        whole = source.read(path, prefix) if stacked else None
        for start in range(0, count, rows):
            index = (*prefix, slice(start, min(start + rows, count)))
            yield index, source.read(path, index) if whole is None else whole[:, index[-1]]


def _create(path: Path, leaf: LeafInfo, chunk: Shape, context: Any) -> Any:
    spec = {
        "driver": "zarr3",
        "kvstore": f"file://{path.absolute()}/",
        # All-zero chunks (a fresh adapter's B) must be files too, so that a missing one is an error.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(leaf.shape),
            "data_type": leaf.dtype.name,
            "fill_value": 0 if leaf.dtype.kind in "iu" else 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }
    try:
        return ts.open(spec, create=True, context=context).result()
    except ValueError as error:
        raise _write_error(path, error) from None


def _chunk_file(folder: Path, index: Index, chunk: Shape) -> Path:
    """Where zarr keeps the chunk that begins at `index`."""
    places = [part.start // size for part, size in zip(index, chunk, strict=False)]
    return folder.joinpath("c", *(str(place) for place in [*places, *(0 for _ in chunk[len(places) :])]))


def _finish(pending: deque[tuple[Any, int, Path]], model: Path, advance: Advance) -> None:
    """Waits for the oldest write."""
    future, nbytes, file = pending[0]
    try:
        future.result()
    except ValueError as error:
        raise _write_error(model, error) from None
    pending.popleft()
    advance(nbytes)
    tell_final(advance, file, None)


def _write_error(path: Path, error: ValueError) -> Exception:
    if "No space left" in str(error) or "quota" in str(error):
        return OSError(errno.ENOSPC, "No space left on device", str(path))
    return UserError(f"{path}: cannot be written ({brief(error)})")
