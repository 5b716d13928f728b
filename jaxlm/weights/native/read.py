"""Models and adapters in jaxlm directories as sources of leaves, read through TensorStore slice by slice."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.models.adapters import resolve_lora, saved_modules
from jaxlm.nn.rounding import dequantize, parts_of
from jaxlm.spec import DecoderSpec
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from jaxlm.weights.leaves import AdapterSource, Index, LeafInfo, check_leaves, full_index, index_shape
from jaxlm.weights.names import Shape, adapter_shapes, grows, leaf_shapes
from jaxlm.weights.native.layout import (
    ARRAYS,
    HF_CONFIG,
    MODEL_JSON,
    PEFT_CONFIG,
    SMALL_FILES,
    TOKENIZER,
    read_tree_metadata,
)
from jaxlm.weights.native.model_json import ModelFile
from jaxlm.weights.native.prompt_json import PROMPT_FILES
from jaxlm.weights.partition import PARTITION_FILE, load_partition
from jaxlm.weights.quantized import kernels_of, layers_of

# Chunks that are kept for the next slices of them.
CACHE_BYTES = 128 << 20
_INTEGERS = (np.dtype(np.int8), np.dtype(np.uint8))


class _Arrays:
    """The arrays of one `model/` directory."""

    def __init__(self, directory: Path, collection: str, dtypes: Collection[np.dtype[Any]]) -> None:
        self._directory = directory / ARRAYS
        self._ocdbt, self._driver, names = read_tree_metadata(self._directory)
        # One context for all arrays, so that an OCDBT database is opened once. Chunks are kept for the next slices of
        # them: small models have all layers in one, and so had older checkpoints.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._stores = {}
        futures = {name: self._open(".".join(name)) for name in names if name[:1] == (collection,)}
        for name, future in futures.items():
            try:
                self._stores["/".join(name[1:])] = future.result()
            except ValueError as error:
                raise UserError(
                    f"{self._directory}: array {'.'.join(name)!r} cannot be opened ({brief(error)})"
                ) from None
        self.leaves = {
            path: LeafInfo(tuple(s.shape), s.dtype.numpy_dtype, tuple(s.chunk_layout.read_chunk.shape) or None)
            for path, s in self._stores.items()
        }
        for path, leaf in self.leaves.items():
            if leaf.dtype not in dtypes:
                raise UserError(
                    f"{self._directory}: array {path!r} has dtype {leaf.dtype}; which is not a dtype of weights"
                )

    def _open(self, name: str) -> Any:
        base = f"file://{self._directory.absolute()}/"
        spec: dict[str, Any] = {"driver": self._driver, "recheck_cached_data": "open"}
        if self._ocdbt:
            spec["kvstore"] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            spec["kvstore"] = f"{base}{name}/"
        if self._driver == "zarr3":
            # A chunk that is not there would otherwise be read as zeros.
            spec["fill_missing_data_reads"] = False
        return ts.open(spec, open=True, read=True, context=self._context)

    def read(self, path: str, index: Index) -> np.ndarray:
        full = full_index(self.leaves[path].shape, index)
        if 0 in index_shape(full):
            return np.empty(index_shape(full), self.leaves[path].dtype)
        try:
            values = self._stores[path][full].read(order="C").result()
        except ValueError as error:
            raise UserError(f"{self._directory}: {path!r} cannot be read ({brief(error)}); copy it again") from None
        return np.asarray(values)


def brief(error: ValueError) -> str:
    return str(error).splitlines()[0][:300]


class _Native:
    """Args: content: what `read_model_json` says of the directory."""

    def __init__(self, path: Path, content: ModelFile, collection: str) -> None:
        files = path / SMALL_FILES
        self.path = path
        self.config = content.config
        self.tokenizer_dir = files / TOKENIZER
        self.tokenizer_files = sorted(file for file in self.tokenizer_dir.glob("*") if file.is_file())
        self.prompt_files = [file for name in PROMPT_FILES if (file := files / name).is_file()]
        # Kernels in few bits have integers among their arrays.
        integers = () if content.rounding is None or content.lora is not None else _INTEGERS
        self._arrays = _Arrays(path, collection, (*WEIGHT_DTYPES.values(), *integers))
        self.leaves: Mapping[str, LeafInfo] = self._arrays.leaves

    def read(self, path: str, index: Index) -> np.ndarray:
        return self._arrays.read(path, index)

    @property
    def partition(self) -> np.ndarray | None:
        """Read when it is asked for.

        Raises:
            UserError: when it does not fit the model.
        """
        file = self.path / SMALL_FILES / PARTITION_FILE
        if self.config.experts is None or not file.is_file():
            return None
        return load_partition(file, self.config.num_layers, self.config.feed_forward.size)

    def _optional_json(self, name: str) -> dict[str, Any] | None:
        file = self.path / SMALL_FILES / name
        return read_object(file) if file.is_file() else None


class NativeSource(_Native):
    """A full model in a jaxlm directory."""

    def __init__(self, path: Path, content: ModelFile) -> None:
        super().__init__(path, content, "params")
        self.hf_config = self._optional_json(HF_CONFIG)
        shapes = {name: leaf.shape for name, leaf in self.leaves.items()}
        with _as_recorded(path):
            check_leaves(path / ARRAYS, shapes, leaf_shapes(self.config))


class QuantizedNativeSource(_Native):
    """A full model whose kernels `convert quantize` rounded (see `weights.quantized.QuantizedSource`).

    Attributes:
        original: where the model that was rounded was, and from here, as `jaxlm.locate.find_base` reads it.
    """

    stays_quantized = True

    def __init__(self, path: Path, content: ModelFile) -> None:
        super().__init__(path, content, "params")
        assert content.rounding is not None and content.kind is not None
        self.rounding, self.kind, self.original = content.rounding, content.kind, content.base
        self.hf_config = self._optional_json(HF_CONFIG)
        self._kernels = kernels_of(self.config)
        expected, parts, leaves = {}, {}, {}
        for name, shape in leaf_shapes(self.config).items():
            if name not in self._kernels:
                expected[name] = shape
                continue
            leaves[name] = LeafInfo(shape, np.dtype(np.float32))
            for part, info in parts_of(self.kind, shape[1:], self._kernels[name]).items():
                expected[f"{name}/{part}"] = (shape[0], *info.shape)
                parts[f"{name}/{part}"] = LeafInfo((shape[0], *info.shape), info.dtype)
        stored = self._arrays.leaves
        with _as_recorded(path):
            check_leaves(path / ARRAYS, {name: leaf.shape for name, leaf in stored.items()}, expected)
        for name, leaf in parts.items():
            if stored[name].dtype != leaf.dtype:
                raise UserError(
                    f"{path / ARRAYS}: array {name!r} has dtype {stored[name].dtype}, expected {leaf.dtype.name}"
                )
        self.leaves = {name: leaves.get(name) or stored[name] for name in leaf_shapes(self.config)}

    def check_kept(self) -> None:
        """Every array was looked at when this was opened."""

    def read_part(self, path: str, index: Index) -> np.ndarray:
        return self._arrays.read(path, index)

    def read(self, path: str, index: Index) -> np.ndarray:
        """A slice of a leaf; of a kernel, of what it stands for, for which all of its layer is read."""
        if path not in self._kernels:
            return self._arrays.read(path, index)
        info, in_dims = self.leaves[path], self._kernels[path]

        def dense(layer: int) -> np.ndarray:
            names = parts_of(self.kind, info.shape[1:], in_dims)
            parts = {name: self._arrays.read(f"{path}/{name}", (slice(layer, layer + 1),))[0] for name in names}
            return dequantize(self.kind, parts, info.shape[1:], in_dims)

        return layers_of(dense, info.shape, info.dtype, index)


class NativeAdapter(_Native):
    """An adapter in a jaxlm directory."""

    def __init__(self, path: Path, content: ModelFile) -> None:
        super().__init__(path, content, "lora")
        assert content.lora is not None
        self.lora = content.lora
        self.layers = content.layers
        self.rounding = content.rounding
        self.base = content.base_path
        self.peft_config = self._optional_json(PEFT_CONFIG)
        with _as_recorded(path):
            _check_adapter(self, path / ARRAYS)


@contextlib.contextmanager
def _as_recorded(path: Path) -> Iterator[None]:
    """Errors of tensors and settings that do not fit each other name the file that has the settings."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (the shape is what {path / SMALL_FILES / MODEL_JSON} says)") from None


def check_adapter_leaves(adapter: AdapterSource, where: Path) -> None:
    """Refuses an adapter whose leaves do not fit the base that it was opened for."""
    try:
        _check_adapter(adapter, where)
    except UserError as error:
        raise UserError(f"{error}; {of_another_base(adapter.base)}") from None


def of_another_base(base: str | None) -> str:
    """Why an adapter does not fit, and what would: the base that it records."""
    recorded = "it does not say which" if not base else f"it records {base!r}"
    return f"the adapter seems to belong to another base than the one given: {recorded}"


def _check_adapter(adapter: AdapterSource, where: Path) -> None:
    """Refuses an adapter whose leaves are not those that its configuration calls for."""
    expected = adapter_shapes(adapter.config, resolve_lora(adapter.config, adapter.lora, adapter.layers))
    expected |= saved_shapes(adapter.config, adapter.lora, adapter.leaves)
    check_leaves(where, {name: leaf.shape for name, leaf in adapter.leaves.items()}, expected)


def saved_shapes(config: DecoderSpec, lora: LoraConfig, leaves: Mapping[str, LeafInfo]) -> dict[str, Shape]:
    """Shapes of the modules saved in full. Embedding and head may have other rows (added tokens) than the base."""
    shapes, of_base = {}, leaf_shapes(config)
    for row in itertools.chain.from_iterable(saved_modules(config, lora).values()):
        path, shape = f"modules_to_save/{row.path}", of_base[row.path]
        if grows(row) and path in leaves and len(leaves[path].shape) == len(shape):
            shape = (leaves[path].shape[0], *shape[1:])
        shapes[path] = shape
    return shapes
