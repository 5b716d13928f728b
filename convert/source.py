"""Opening a model or an adapter, whatever its format. Nothing but headers is read until `read` is called.

The training loop loads a model straight into its shards:

    source = open_model(path)
    jax.make_array_from_callback(shape, sharding, lambda index: source.read(leaf, index))
"""

from __future__ import annotations

from pathlib import Path

from convert.hf import HfSource
from convert.leaves import AdapterSource, LeafInfo, ParamSource
from convert.meta import PARAMS, MetaSource, find_shards
from convert.native import NativeAdapter, NativeSource, check_adapter_leaves, find_native, read_model_json
from convert.peft import PeftSource
from convert.tensors import find_weights
from jaxlm.errors import UserError
from jaxlm.models.shapes import LlamaConfig

__all__ = ["AdapterSource", "LeafInfo", "ParamSource", "is_adapter", "open_adapter", "open_model"]

ACCEPTED = (
    "accepted are a Hugging Face directory (config.json and weights), a converted jaxlm directory, "
    "a run directory, one of its checkpoints, and Meta's checkpoint (params.json and consolidated.00.pth)"
)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such directory; {ACCEPTED}")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; {ACCEPTED}")
    return path


def _found(path: Path) -> str:
    names = sorted(item.name for item in path.iterdir())
    listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"found {listing}" if names else "the directory is empty"


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds a low-rank adapter rather than a full model."""
    directory = _existing(path)
    native = find_native(directory)
    if native is not None:
        return read_model_json(native).get("lora") is not None
    # Some trainers put the base's config.json beside the adapter; a merged model may keep adapter_config.json.
    return (directory / "adapter_config.json").is_file() and find_weights(directory) is None


def open_model(path: str | Path, max_positions: int | None = None) -> ParamSource:
    """A full model: a Hugging Face directory, a jaxlm directory, a checkpoint, or a run directory (its newest step);
    Meta's checkpoint.

    Args:
        max_positions: the longest row in tokens, where the format does not say it (Meta's).

    Raises:
        UserError: when it is none of these, is an adapter, or is not complete.
    """
    directory = _existing(path)
    native = find_native(directory)
    if is_adapter(directory):
        raise UserError(
            f"{directory}: is a LoRA adapter, not a full model; give the base model and this adapter, "
            f"or make one model of them: convert merge BASE {directory} OUT"
        )
    if native is not None:
        return NativeSource(native, read_model_json(native))
    if (directory / "config.json").is_file():
        return HfSource(directory)
    if (directory / PARAMS).is_file():
        return MetaSource(directory, max_positions)
    if find_shards(directory):
        raise UserError(
            f"{directory}: has consolidated.00.pth but no {PARAMS}, which lies beside it in Meta's releases"
        )
    raise UserError(f"{directory}: is no model: {_found(directory)}; {ACCEPTED}")


def open_adapter(path: str | Path, base_config: LlamaConfig | None = None) -> AdapterSource:
    """A LoRA adapter: a PEFT directory, a converted one, or a LoRA run (its newest checkpoint).

    Args:
        base_config: shape of the model it belongs to. Only jaxlm's own directories record it; PEFT's need it.

    Raises:
        UserError: when it is no adapter, is not complete, or does not fit the base.
    """
    directory = _existing(path)
    native = find_native(directory)
    if native is not None:
        content = read_model_json(native)
        if content.get("lora") is None:
            raise UserError(f"{directory}: is a full model, not an adapter; open it as the model itself")
        adapter = NativeAdapter(native, content)
        if base_config is not None:
            adapter.config = base_config
            check_adapter_leaves(adapter, native / "model")
        return adapter
    if not (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory}: is no adapter: {_found(directory)}; accepted are a PEFT directory (adapter_config.json and "
            "adapter_model.safetensors), a converted adapter, and a LoRA run directory"
        )
    if base_config is None:
        raise UserError(f"{directory}: a PEFT adapter does not record the shape of its base; give the base model too")
    return PeftSource(directory, base_config)
