"""What `convert inspect` tells about a model, an adapter or a weight file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.peft import find_adapter_weights, peft_tensors
from convert.source import FORMATS, format_of, is_adapter, open_model, stored_adapter
from convert.transforms.delta import inv_freq_sum, sum_of
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.models.adapters import method_name
from jaxlm.tokenizer import load_tokenizer
from jaxlm.tokenizer.files import MAIN_FILES
from jaxlm.weights.files import read_tensors
from jaxlm.weights.hf import hf_tensors
from jaxlm.weights.leaves import AdapterSource, LeafSource, ParamSource, total_bytes
from jaxlm.weights.manifest import MANIFEST, read_manifest
from jaxlm.weights.partition import order_name
from jaxlm.weights.tensors import BLOCK_BYTES, Tensor


@dataclass
class Description:
    """What a path holds.

    Args:
        kind: 'model', 'adapter' or 'file'.
        summary: what an adapter is, in words.
        tensors: name, shape, dtype and bytes of each; layers are stacked, except in a bare file.
        config: the model's or the adapter's.
        tokenizer: kind, vocab_size, ids and chat template; None without one.
        manifest: number of files in manifest.json and their bytes; None without one.
        order: how the neurons of a model of experts, or its adapter, are ordered; None: dense.
        checksum: sum of all numbers, and the same with the rotary buffers that old transformers versions stored.
    """

    path: str
    kind: str
    format: str
    tensors: list[tuple[str, tuple[int, ...], str, int]]
    parameters: int
    nbytes: int
    summary: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    manifest: dict[str, int] | None = None
    checksum: dict[str, float] | None = None
    order: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        keys = ("name", "shape", "dtype", "bytes")
        values = dataclasses.asdict(self)
        return values | {"tensors": [dict(zip(keys, tensor, strict=True)) for tensor in self.tensors]}


def describe(path: Path, base: Path | None, config: str | None, checksum: bool) -> Description:
    """Reads the headers of a path, and all of its numbers for `checksum`.

    Args:
        base: the model that an adapter belongs to, for the formats that do not record its shape.
        config: MindSpore only: shape by name, or a file with it.

    Raises:
        UserError: it has none of the known formats, or is broken.
    """
    if path.is_file() and path.suffix in (".safetensors", ".bin", ".pth", ".json"):
        return _describe_file(path, "file", checksum)
    if is_adapter(path):
        if (path / "adapter_config.json").is_file() and base is None:
            return _describe_file(find_adapter_weights(path), "adapter", checksum)
        adapter = stored_adapter(path, None if base is None else open_model(base).config)
        return _describe_adapter(adapter, checksum)
    return _describe_model(open_model(path, config=config), checksum)


def _describe_file(path: Path, kind: str, checksum: bool) -> Description:
    tensors = read_tensors(path)
    rows = [(name, tensor.shape, tensor.dtype.name, tensor.nbytes) for name, tensor in tensors.items()]
    elements = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors.values())
    description = Description(str(path), kind, path.suffix[1:], rows, elements, sum(row[3] for row in rows))
    if kind == "adapter":
        description.format, description.path = "PEFT", str(path.parent)
        description.config = read_object(path.parent / "adapter_config.json")
        description.tokenizer = _tokenizer(path.parent)
        description.manifest = _manifest(path.parent)
    if checksum:
        description.checksum = {"sum": sum_of(block for tensor in tensors.values() for block in _blocks(tensor))}
    return description


def _blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, BLOCK_BYTES * rows // max(1, tensor.nbytes))
    for start in range(0, rows, step):
        yield tensor.rows(start, min(start + step, rows))


def _describe_adapter(adapter: AdapterSource, checksum: bool) -> Description:
    description = _leaves(adapter, "adapter")
    description.summary = describe_lora(adapter)
    description.config = dataclasses.asdict(adapter.lora) | {"base": adapter.base, "layers": adapter.layers}
    description.order = _order(adapter)
    if checksum:
        description.checksum = {"sum": sum_of(block for spec in peft_tensors(adapter) for block in spec.blocks)}
    return description


def _describe_model(model: ParamSource, checksum: bool) -> Description:
    description = _leaves(model, "model")
    description.config = model.config.to_dict()
    description.order = _order(model)
    description.tokenizer = _tokenizer(model.tokenizer_dir) if model.tokenizer_files else None
    if checksum:
        total = sum_of(block for spec in hf_tensors(model) for block in spec.blocks)
        description.checksum = {"sum": total}
        if all(layer.rope is not None for layer in model.config.attention_layers):
            description.checksum["with_rotary_buffers"] = total + inv_freq_sum(model.config)
    return description


def _order(source: ParamSource | AdapterSource) -> str | None:
    if source.config.experts is None:
        return None
    partition = source.partition
    if partition is None:
        return "as they stand, no other order is kept"
    return f"moved by convert moefy, the original order is kept ({order_name(partition)})"


def _leaves(source: LeafSource, kind: str) -> Description:
    rows = [(name, leaf.shape, leaf.dtype.name, leaf.nbytes) for name, leaf in source.leaves.items()]
    elements = sum(leaf.nbytes // leaf.dtype.itemsize for leaf in source.leaves.values())
    description = Description(
        str(source.path), kind, FORMATS[format_of(source)].title, rows, elements, total_bytes(source.leaves)
    )
    description.manifest = _manifest(source.path)
    return description


def _manifest(directory: Path) -> dict[str, int] | None:
    if not (directory / MANIFEST).is_file():
        return None
    files = read_manifest(directory)["files"].values()
    return {"files": len(files), "bytes": sum(entry["bytes"] for entry in files)}


def _tokenizer(directory: Path) -> dict[str, Any] | None:
    names = [name for name in MAIN_FILES if (directory / name).is_file()]
    if not names:
        return None
    try:
        tokenizer = load_tokenizer(directory)
    except UserError as error:
        return {"files": names, "error": str(error)}
    return {
        "files": names,
        "kind": "SentencePiece" if names[0].endswith(".model") else "tokenizers",
        "vocab_size": tokenizer.vocab_size,
        **{name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id", "unk_id")},
        "special_tokens": tokenizer.special_tokens(),
        "chat_template": tokenizer.chat_template is not None,
    }


def describe_lora(adapter: AdapterSource) -> str:
    """'LoRA rank 8, alpha 16, on q_proj v_proj'."""
    lora = adapter.lora
    saved = f", saved in full: {' '.join(lora.modules_to_save)}" if lora.modules_to_save else ""
    return f"{method_name(lora)} rank {lora.rank}, alpha {lora.alpha:g}, on {' '.join(lora.targets)}{saved}"
