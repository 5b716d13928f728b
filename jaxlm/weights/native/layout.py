"""Where everything lies in a jaxlm directory, and what Orbax keeps around it. Needs neither JAX nor Orbax."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.weights.names import Shape

# Folders of a directory; also the names of Orbax's items in a checkpoint.
SMALL_FILES = "jaxlm"
ARRAYS = "model"
TRAIN = "train"
# Small files, and the folder with those of the tokenizer.
MODEL_JSON = "model.json"
HF_CONFIG = "hf_config.json"
PEFT_CONFIG = "adapter_config.json"
TOKENIZER = "tokenizer"
# Small files of a checkpoint alone: the run's settings, hashes of what it computes from, the data iterator's state.
RUN_YAML = "run.yaml"
FINGERPRINTS = "fingerprints.json"
DATA_STATE = "data.json"
# The steps of a run directory.
CHECKPOINTS = "checkpoints"
# Orbax's mark of a complete checkpoint: it is in the directory, and in every item that has a handler of our own.
COMMITTED = "commit_success.txt"
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_UNFINISHED = ".orbax-checkpoint-tmp"
# Largest piece of a stored array, the least that can be read: a layer is read without its whole stack.
CHUNK_BYTES = 64 << 20


def find_native(path: Path) -> Path | None:
    """The model directory that `path` means: itself, or the newest complete checkpoint of a run directory.

    None when it is neither; UserError when it is one that is not complete.
    """
    if (path / SMALL_FILES / MODEL_JSON).is_file():
        if not (path / COMMITTED).is_file() or _UNFINISHED in path.name:
            raise UserError(f"{path}: this checkpoint was not written to its end (no {COMMITTED}); use another one")
        return path
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    if not folder.is_dir():
        return None
    steps = [step for step in folder.iterdir() if step.name.isdigit() and step.is_dir()]
    complete = [step for step in steps if (step / COMMITTED).is_file() and (step / SMALL_FILES / MODEL_JSON).is_file()]
    if not complete:
        raise UserError(f"{folder}: holds no complete checkpoint ({len(steps)} incomplete); let the run save one first")
    return max(complete, key=lambda step: int(step.name))


def chunk_shape(shape: Shape, itemsize: int, stacked: bool) -> Shape:
    """At most one layer, and at most CHUNK_BYTES, cut along the first dim inside the layer."""
    inner = shape[1:] if stacked else shape
    row_bytes = math.prod(inner[1:]) * itemsize
    rows = max(1, min(inner[0], CHUNK_BYTES // max(1, row_bytes)))
    return ((1,) if stacked else ()) + (rows, *inner[1:])


def array_name(collection: str, path: str) -> str:
    """The folder of a leaf below `model/`: 'params.layers.self_attn.q_proj.kernel'."""
    return ".".join((collection, *path.split("/")))


def read_tree_metadata(arrays: Path) -> tuple[bool, str, list[tuple[str, ...]]]:
    """Orbax's `_METADATA` of a `model/` directory: OCDBT or not, TensorStore's driver, the keys of every array.

    Raises:
        UserError: when it is missing or is not Orbax's.
    """
    where = arrays / "_METADATA"
    metadata = read_object(where)
    try:
        names = [
            tuple(str(part["key"]) for part in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()
        ]
        return bool(metadata["use_ocdbt"]), "zarr3" if metadata["use_zarr3"] else "zarr", names
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not Orbax's metadata of a tree ({error})") from None


def write_metadata(
    directory: Path, collection: str, shapes: Mapping[str, Shape], chunks: Mapping[str, Shape], times: tuple[int, int]
) -> None:
    """Writes what Orbax keeps beside the arrays, and last the mark that the directory is complete.

    Args:
        collection: 'params' or 'lora'.
        shapes: the leaves', by path.
        chunks: the shapes of the leaves' chunks, by path.
        times: when writing began and when it ended, in nanoseconds since 1970.
    """
    tree, arrays = {}, []
    for path, shape in shapes.items():
        keys = (collection, *path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
        entry = {"write_shape": list(shape), "chunk_shape": list(chunks[path]), "ext_metadata": None}
        arrays.append({"array_metadata": {"param_name": array_name(collection, path), **entry}})
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    model = directory / ARRAYS
    (model / "_METADATA").write_text(json.dumps(metadata))
    (model / "array_metadatas").mkdir()
    (model / "array_metadatas" / "process_0").write_text(json.dumps({"array_metadatas": arrays}))
    checkpoint: dict[str, Any] = {
        "item_handlers": {ARRAYS: _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": times[0],
        "commit_timestamp_nsecs": times[1],
        "custom_metadata": {},
    }
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(checkpoint))
    (directory / "orbax.checkpoint").touch()
    # The directory gets its name only after this.
    (directory / COMMITTED).write_text("Checkpoint commit was successful\n")
