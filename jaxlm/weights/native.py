"""jaxlm directories: converted models and adapters, training checkpoints, run directories.

    DIR/jaxlm/model.json     {"format": "jaxlm", "version": 1, "model": ..., "lora": ..., "base": ..., "dtype": ...}
    DIR/jaxlm/tokenizer/     tokenizer files as they came
    DIR/jaxlm/prompt.json    {"template": NAME}, how training asked; NAME may be template.json, which lies beside it
    DIR/jaxlm/partition.npy  of a model that `convert moefy` made, or an adapter of one: see `jaxlm.weights.partition`
    DIR/model/               an Orbax pytree, {"params": ...} or {"lora": ...}

`model/` is read and written through TensorStore slice by slice. Training writes it with Orbax (one OCDBT database); the
converter writes plain zarr3 arrays that Orbax restores all the same, with a CRC-32C in every chunk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxlm.config import LoraConfig, to_dict
from jaxlm.errors import UserError
from jaxlm.jsonfields import read_fields
from jaxlm.jsontext import read_object
from jaxlm.locate import record_base
from jaxlm.models.version1 import read_model, recorded
from jaxlm.nn.lora import SAVEABLE, resolve_lora
from jaxlm.spec import DecoderSpec
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from jaxlm.weights.hf import copy_files
from jaxlm.weights.leaves import (
    AdapterSource,
    Index,
    LeafInfo,
    LeafSource,
    ParamSource,
    check_leaves,
    full_index,
    index_shape,
    main_dtype,
)
from jaxlm.weights.names import Shape, adapter_shapes, leaf_shapes
from jaxlm.weights.output import Advance, tell_final
from jaxlm.weights.partition import PARTITION_FILE, load_partition, npy_bytes

COMMITTED = "commit_success.txt"
# The same as in training checkpoints; a chunk is the least that can be read.
CHUNK_BYTES = 64 << 20
CACHE_BYTES = 128 << 20
PROMPT_FILES = ("prompt.json", "template.json")
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"


def find_native(path: Path) -> Path | None:
    """The model directory that `path` means: itself, or the newest complete checkpoint of a run directory.

    None when it is neither; UserError when it is one that is not complete.
    """
    if (path / "jaxlm" / "model.json").is_file():
        if not (path / COMMITTED).is_file() or ".orbax-checkpoint-tmp" in path.name:
            raise UserError(f"{path}: this checkpoint was not written to its end (no {COMMITTED}); use another one")
        return path
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if not folder.is_dir():
        return None
    steps = [step for step in folder.iterdir() if step.name.isdigit() and step.is_dir()]
    complete = [step for step in steps if (step / COMMITTED).is_file() and (step / "jaxlm" / "model.json").is_file()]
    if not complete:
        raise UserError(f"{folder}: holds no complete checkpoint ({len(steps)} incomplete); let the run save one first")
    return max(complete, key=lambda step: int(step.name))


class _Arrays:
    """The arrays of one `model/` directory."""

    def __init__(self, directory: Path, collection: str) -> None:
        self._directory = directory / "model"
        metadata = read_object(self._directory / "_METADATA")
        try:
            self._ocdbt = bool(metadata["use_ocdbt"])
            self._driver = "zarr3" if metadata["use_zarr3"] else "zarr"
            names = [
                tuple(str(part["key"]) for part in entry["key_metadata"])
                for entry in metadata["tree_metadata"].values()
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self._directory / '_METADATA'}: not Orbax's metadata of a tree ({error})") from None
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
                    f"{self._directory}: array {'.'.join(name)!r} cannot be opened ({_brief(error)})"
                ) from None
        self.leaves = {
            path: LeafInfo(tuple(s.shape), s.dtype.numpy_dtype, tuple(s.chunk_layout.read_chunk.shape) or None)
            for path, s in self._stores.items()
        }
        for path, leaf in self.leaves.items():
            if leaf.dtype not in WEIGHT_DTYPES.values():
                raise UserError(f"{self._directory}: array {path!r} has dtype {leaf.dtype}; that is no weight")

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
            found = self._stores[path][full].read(order="C").result()
        except ValueError as error:
            raise UserError(f"{self._directory}: {path!r} cannot be read ({_brief(error)}); copy it again") from None
        return np.asarray(found)


def _brief(error: ValueError) -> str:
    return str(error).splitlines()[0][:300]


class _Native:
    def __init__(self, path: Path, content: dict[str, Any], collection: str) -> None:
        self.path = path
        self.tokenizer_dir = path / "jaxlm" / "tokenizer"
        self.tokenizer_files = sorted(file for file in self.tokenizer_dir.glob("*") if file.is_file())
        self.prompt_files = [file for name in PROMPT_FILES if (file := path / "jaxlm" / name).is_file()]
        self.config = read_model(content["model"], f"{path / 'jaxlm' / 'model.json'}: model")
        self._arrays = _Arrays(path, collection)
        self.leaves: Mapping[str, LeafInfo] = self._arrays.leaves

    def read(self, path: str, index: Index) -> np.ndarray:
        return self._arrays.read(path, index)

    @property
    def partition(self) -> np.ndarray | None:
        """Read when it is asked for.

        Raises:
            UserError: when it does not fit the model.
        """
        file = self.path / "jaxlm" / PARTITION_FILE
        if self.config.experts is None or not file.is_file():
            return None
        return load_partition(file, self.config.num_layers, self.config.feed_forward.size)

    def _optional_json(self, name: str) -> dict[str, Any] | None:
        file = self.path / "jaxlm" / name
        return read_object(file) if file.is_file() else None


class NativeSource(_Native):
    """A full model in a jaxlm directory."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(path, content, "params")
        self.hf_config = self._optional_json("hf_config.json")
        found = {name: leaf.shape for name, leaf in self.leaves.items()}
        with _as_recorded(path):
            check_leaves(path / "model", found, leaf_shapes(self.config))


class NativeAdapter(_Native):
    """An adapter in a jaxlm directory."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(path, content, "lora")
        self.lora = lora_from_dict(content["lora"], path / "jaxlm" / "model.json")
        self.layers = _layers(content.get("layers"), self.config, path / "jaxlm" / "model.json")
        self.base: str | None = content.get("base")
        self.peft_config = self._optional_json("adapter_config.json")
        with _as_recorded(path):
            _check_adapter(self, path / "model")


@contextlib.contextmanager
def _as_recorded(path: Path) -> Iterator[None]:
    """Errors of tensors and settings that do not fit each other name the file that has the settings."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (the shape is what {path / 'jaxlm' / 'model.json'} says)") from None


def check_adapter_leaves(adapter: AdapterSource, where: Path) -> None:
    """Refuses an adapter whose leaves do not fit the base that it was opened for."""
    try:
        _check_adapter(adapter, where)
    except UserError as error:
        raise UserError(f"{error}; {of_another_base(adapter.base)}") from None


def of_another_base(base: str | None) -> str:
    """Why an adapter does not fit, and what would: the base that it records."""
    found = "it does not say which" if not base else f"it records {base!r}"
    return f"the adapter seems to belong to another base than the one given: {found}"


def _check_adapter(adapter: AdapterSource, where: Path) -> None:
    """Refuses an adapter whose leaves are not those that its configuration calls for."""
    expected = adapter_shapes(adapter.config, resolve_lora(adapter.config, adapter.lora, adapter.layers))
    expected |= saved_shapes(adapter.config, adapter.lora, adapter.leaves)
    check_leaves(where, {name: leaf.shape for name, leaf in adapter.leaves.items()}, expected)


def saved_shapes(config: DecoderSpec, lora: LoraConfig, leaves: Mapping[str, LeafInfo]) -> dict[str, Shape]:
    """Shapes of the modules saved in full. Embedding and head may have other rows (added tokens) than the base."""
    shapes = {}
    for module in lora.modules_to_save:
        path = f"modules_to_save/{SAVEABLE[module]}"
        shape = leaf_shapes(config)[SAVEABLE[module]]
        if module != "norm" and path in leaves and len(leaves[path].shape) == 2:
            shape = (leaves[path].shape[0], shape[1])
        shapes[path] = shape
    return shapes


def lora_from_dict(values: Any, where: Path) -> LoraConfig:
    """A LoraConfig from the plain values in model.json."""
    lora = LoraConfig(**read_fields(LoraConfig, values, f"{where}: lora"))
    for name, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: lora.{name}: {pattern!r} is no regular expression ({error})") from None
    return lora


def _layers(values: Any, config: DecoderSpec, where: Path) -> tuple[int, ...] | None:
    if values is None:
        return None
    numbers = values if isinstance(values, list) else [values]
    if not all(type(layer) is int and 0 <= layer < config.num_layers for layer in numbers) or sorted(
        set(numbers)
    ) != list(values if isinstance(values, list) else []):
        raise UserError(
            f"{where}: layers is {values!r}; expected null (all), or a list of some of the layers 0 to "
            f"{config.num_layers - 1}, in order"
        )
    return tuple(numbers)


@dataclass(frozen=True)
class ModelFile:
    """The fields of model.json; `model` and `lora` are read by themselves.

    Args:
        model: the shape, see `models.version1`.
        lora: of an adapter, see `LoraConfig`; None for a full model.
        base: of an adapter: the base's path or name.
        base_from_here: of an adapter: the base's path from this directory, for when both are moved.
        layers: of an adapter: the layers that carry it; None: all.
        dtype: that most bytes are stored in.
    """

    format: str
    version: int
    model: dict[str, Any]
    lora: dict[str, Any] | None = None
    base: str | None = None
    base_from_here: str | None = None
    layers: Any = None
    dtype: str | None = None


def read_model_json(path: Path) -> dict[str, Any]:
    """`jaxlm/model.json` of a directory; UserError for another format, a newer version, or a field that is none."""
    file = path / "jaxlm" / "model.json"
    content = read_object(file)
    if content.get("format") != "jaxlm" or content.get("version") != 1:
        raise UserError(
            f"{file}: format {content.get('format')!r} version {content.get('version')!r}; "
            "this jaxlm reads format 'jaxlm' version 1"
        )
    read_fields(ModelFile, content, f"{file}:")
    return content


@dataclass(frozen=True)
class PromptFile:
    """The fields of prompt.json: how training asked.

    Args:
        template: name of a template; 'template.json' is the file beside it; None: not recorded.
        add_bos: whether bos comes first; None: as the tokenizer has it.
        add_eos: whether eos ends an answer; None: not recorded.
        stop_ids: tokens that ended the answers.
    """

    template: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    stop_ids: tuple[int, ...] = ()


def read_prompt_json(file: Path) -> PromptFile:
    """prompt.json; UserError for a field that is none."""
    return PromptFile(**read_fields(PromptFile, read_object(file), f"{file}:"))


def trained_prompt(directory: Path) -> PromptFile:
    """How training asked, with a template of its own as the path of its file; empty where nothing is noted."""
    file = directory / "jaxlm" / "prompt.json"
    noted = read_prompt_json(file) if file.is_file() else PromptFile()
    if noted.template is None or not noted.template.endswith(".json"):
        return noted
    return replace(noted, template=str(file.parent / noted.template))


def write_model(source: ParamSource, directory: Path, advance: Advance) -> None:
    """Writes a full model as a jaxlm directory."""
    _write_small(directory, source, source.config, source.tokenizer_files, {"lora": None, "base": None})
    if source.hf_config is not None:
        _write_json(directory / "jaxlm" / "hf_config.json", source.hf_config)
    _write_tree(source, directory, "params", advance)


def write_adapter(source: AdapterSource, directory: Path, base: str, advance: Advance) -> None:
    """Writes an adapter as a jaxlm directory."""
    layers = None if source.layers is None else list(source.layers)
    content = {"lora": to_dict(source.lora), "layers": layers, **record_base(base, directory)}
    _write_small(directory, source, source.config, source.tokenizer_files, content)
    if source.peft_config is not None:
        _write_json(directory / "jaxlm" / "adapter_config.json", source.peft_config)
    _write_tree(source, directory, "lora", advance)


def _write_small(
    directory: Path,
    source: ParamSource | AdapterSource,
    config: DecoderSpec,
    files: list[Path],
    content: dict[str, Any],
) -> None:
    (directory / "jaxlm").mkdir()
    head = {"format": "jaxlm", "version": 1, "model": recorded(config)}
    _write_json(directory / "jaxlm" / "model.json", head | content | {"dtype": main_dtype(source.leaves)})
    partition = None if config.experts is None else source.partition
    if partition is not None:
        (directory / "jaxlm" / PARTITION_FILE).write_bytes(npy_bytes(partition))
    copy_files(files, directory / "jaxlm" / "tokenizer")
    copy_files(source.prompt_files, directory / "jaxlm")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def chunk_shape(shape: Shape, itemsize: int, stacked: bool) -> Shape:
    """At most one layer, and at most CHUNK_BYTES, cut along the first dimension inside the layer."""
    inner = shape[1:] if stacked else shape
    row_bytes = int(np.prod(inner[1:], dtype=np.int64)) * itemsize
    rows = max(1, min(inner[0], CHUNK_BYTES // max(1, row_bytes)))
    return ((1,) if stacked else ()) + (rows, *inner[1:])


def _write_tree(source: LeafSource, directory: Path, collection: str, advance: Advance) -> None:
    started = time.time_ns()
    model = directory / "model"
    model.mkdir()
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    names = {path: (collection, *path.split("/")) for path in source.leaves}
    chunks = {}
    # Writes run behind reads, up to twice CHUNK_BYTES.
    pending: deque[tuple[Any, int, Path]] = deque()
    try:
        for path, leaf in source.leaves.items():
            chunks[path] = chunk_shape(leaf.shape, leaf.dtype.itemsize, path.startswith("layers/"))
            folder = model / ".".join(names[path])
            store = _create(folder, leaf, chunks[path], context)
            for index, block in _chunks(source, path, chunks[path]):
                pending.append((store[index].write(block), block.nbytes, _chunk_file(folder, index, chunks[path])))
                while sum(nbytes for _, nbytes, _ in pending) > 2 * CHUNK_BYTES:
                    _finish(pending, model, advance)
        while pending:
            _finish(pending, model, advance)
    finally:
        # After an error too: a write still running would put files back into a directory that is being removed.
        for future, *_ in pending:
            future.exception()
    _write_metadata(source, directory, names, chunks, started)


def _chunks(source: LeafSource, path: str, chunk: Shape) -> Iterator[tuple[Index, np.ndarray]]:
    """A leaf in pieces that cover whole chunks, with their place."""
    shape = source.leaves[path].shape
    stacked = path.startswith("layers/")
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
            "fill_value": 0.0,
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
    return UserError(f"{path}: cannot be written ({_brief(error)})")


def _write_metadata(
    source: LeafSource, directory: Path, names: dict[str, tuple[str, ...]], chunks: dict[str, Shape], started: int
) -> None:
    tree, arrays = {}, []
    for path, leaf in source.leaves.items():
        tree[str(names[path])] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in names[path]],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(leaf.shape),
            },
        }
        entry = {"write_shape": list(leaf.shape), "chunk_shape": list(chunks[path]), "ext_metadata": None}
        arrays.append({"array_metadata": {"param_name": ".".join(names[path]), **entry}})
    model = directory / "model"
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (model / "_METADATA").write_text(json.dumps(metadata))
    (model / "array_metadatas").mkdir()
    (model / "array_metadatas" / "process_0").write_text(json.dumps({"array_metadatas": arrays}))
    checkpoint = {
        "item_handlers": {"model": _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": started,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(checkpoint))
    (directory / "orbax.checkpoint").touch()
    # Orbax's mark of a complete checkpoint; the directory gets its name only after this.
    (directory / COMMITTED).write_text("Checkpoint commit was successful\n")
