"""Weight files by their kind: which file of a directory holds the weights, and which reader reads it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.weights.mindspore_ckpt import is_ckpt, read_ckpt
from jaxlm.weights.safetensors import read_safetensors
from jaxlm.weights.tensors import StoredTensor
from jaxlm.weights.torch_zip import read_torch_zip


def shard_path(directory: Path, name: Any, index: Path) -> Path:
    """The file that an index names, refused when it lies outside the directory.

    A model in the Hugging Face cache consists of links into the `blobs` folder beside it; those are followed.
    """
    inside = isinstance(name, str) and name not in ("", ".") and name.isprintable()
    if inside:
        for pure in (PurePosixPath(name), PureWindowsPath(name)):
            inside = inside and not pure.is_absolute() and not pure.drive and ".." not in pure.parts
    if not inside:
        raise UserError(f"{index}: names the file {name!r}; a shard must lie inside {directory}")
    path = directory / name
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    real = path.resolve()
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise UserError(f"{index}: {name!r} is a link to {real}, outside {directory}; put the file itself there")
    if not path.is_file():
        raise UserError(f"{index}: names {name!r}, which is not in {directory}; download the missing file")
    return path


def find_weights(directory: Path, stem: str = "model", torch_stem: str = "pytorch_model") -> Path | None:
    """The file to read weights from: safetensors before torch, like transformers; None: the directory has neither."""
    for name in (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{torch_stem}.bin",
        f"{torch_stem}.bin.index.json",
    ):
        if (directory / name).is_file():
            return directory / name
    return None


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors, .bin, .pth or MindSpore .ckpt file, or of all shards named by an index.json."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".json":
        return _read_index(path)
    if path.suffix == ".ckpt" and is_ckpt(path):
        return read_ckpt(path)
    return read_torch_zip(path)


def _read_index(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no 'weight_map' from tensor to file")
    shards = {name: shard_path(index.parent, name, index) for name in weight_map.values() if isinstance(name, str)}
    tensors: dict[str, StoredTensor] = {}
    for file_name, path in sorted(shards.items()):
        held = read_tensors(path)
        listed = {name for name, file in weight_map.items() if file == file_name}
        for name in sorted(listed - held.keys()):
            raise UserError(f"{index}: says that {file_name} holds {name!r}; it does not")
        for name in sorted(held.keys() - listed):
            raise UserError(f"{path}: holds tensor {name!r}, which {index.name} does not list there")
        tensors.update(held)
    for name in sorted(weight_map.keys() - tensors.keys()):
        shard_path(index.parent, weight_map[name], index)
    return tensors
