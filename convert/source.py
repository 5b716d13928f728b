"""Opening a model or an adapter, whatever its format. Nothing but headers is read until `read` is called.

The training loop loads a model straight into its shards:

    source = open_model(path)
    jax.make_array_from_callback(shape, sharding, lambda index: source.read(leaf, index))
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from convert.formats.gguf.read import GgufSource, find_gguf
from convert.formats.hf_experts import HF_SOURCES, open_hf
from convert.formats.meta import PARAMS, MetaSource, find_shards
from convert.formats.mindspore import (
    DEFAULT_ALPHA,
    MindSporeAdapter,
    MindSporeSource,
    find_files,
    has_embedding,
    is_lora,
    looks_like_mindspore,
    read_files,
)
from convert.formats.packed import PackedSource, packing_method
from convert.formats.peft import PeftSource
from convert.transforms.adapter_order import in_order_of
from convert.transforms.merge import MergedSource
from jaxlm.errors import UserError
from jaxlm.hub import plain_name
from jaxlm.jsontext import read_object
from jaxlm.locate import find_base, missing, on_disk
from jaxlm.models.families import family_of
from jaxlm.spec import DecoderSpec
from jaxlm.weights.files import find_weights
from jaxlm.weights.leaves import AdapterSource, LeafInfo, LeafSource, ModelFiles, ParamSource
from jaxlm.weights.native.layout import find_native
from jaxlm.weights.native.model_json import read_model_json
from jaxlm.weights.native.read import NativeAdapter, NativeSource, QuantizedNativeSource, check_adapter_leaves
from jaxlm.weights.quantized import QuantizedSource, rounding_of, same_original
from jaxlm.weights.safetensors import read_safetensors

__all__ = [
    "AdapterSource",
    "LeafInfo",
    "ParamSource",
    "is_adapter",
    "open_adapter",
    "open_model",
    "open_with_adapter",
    "recorded_base",
    "stored_adapter",
]


class FormatInfo(NamedTuple):
    """A format of models or adapters.

    Args:
        title: its name.
        called: what a source of it is called.
        sources: the classes of its sources.
    """

    title: str
    called: str
    sources: tuple[type, ...]


FORMATS = {
    "hf": FormatInfo("Hugging Face", "a Hugging Face model", HF_SOURCES),
    "gguf": FormatInfo("GGUF", "a GGUF file", (GgufSource,)),
    "jax": FormatInfo("jaxlm", "a jaxlm model", (NativeSource, QuantizedNativeSource, NativeAdapter)),
    "meta": FormatInfo("Meta", "a checkpoint in Meta's format", (MetaSource,)),
    "mindspore": FormatInfo("MindSpore", "a MindSpore checkpoint", (MindSporeSource, MindSporeAdapter)),
    "peft": FormatInfo("PEFT", "a PEFT adapter", (PeftSource,)),
}

ACCEPTED = (
    "accepted are a Hugging Face directory (config.json and weights), a converted jaxlm directory, "
    "a run directory, one of its checkpoints, Meta's checkpoint (params.json and consolidated.00.pth), MindSpore's "
    "(.ckpt, or .safetensors with MindSpore's names), and a GGUF file (.gguf)"
)


def _existing(path: str | Path) -> Path:
    if str(path).strip() == "":  # an unset variable of a shell; it would be the working directory
        raise UserError("the path of the model is empty; give one")
    path = on_disk(path)
    if path.exists():
        return path
    raise UserError(f"{missing(path)}; {ACCEPTED}")


def _is_mindspore(path: Path) -> bool:
    """Whether a path that is none of the other formats holds MindSpore's files.

    Raises:
        UserError: for a Hugging Face directory that lacks a file which says what its weights are.
    """
    files = _mindspore_files(path)
    if not path.is_dir():
        return bool(files)
    parts = sorted(path.glob("model-*-of-*.safetensors")) + sorted(path.glob("pytorch_model-*-of-*.bin"))
    weights = find_weights(path) or (parts[0] if parts else None)
    if weights is None or (files and looks_like_mindspore(read_files(files, check=False))):
        return bool(files)
    if (path / "config.json").is_file():
        return False
    raise UserError(
        f"{path}: has weights ({weights.name}) but no config.json, which says the model's shape; copy or download that "
        "file too, from where the weights are from"
    )


def _mindspore_files(path: Path) -> list[Path]:
    """The files when a path means MindSpore's; a file that is another format's is refused."""
    files = find_files(path)
    if path.is_dir() or (files and (path.suffix == ".ckpt" or looks_like_mindspore(read_files(files, check=False)))):
        return files
    hint = f"give its directory, {path.parent}" if path.suffix in (".safetensors", ".bin", ".pth") else ACCEPTED
    raise UserError(f"{path}: is a file, and not a MindSpore checkpoint; {hint}")


def _is_hf(directory: Path) -> bool:
    weights = find_weights(directory)
    # MindSpore's safetensors may have HF's file name.
    return weights is not None and not (
        weights.suffix == ".safetensors" and looks_like_mindspore(read_safetensors(weights))
    )


def _found(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"found {listing}" if names else "the directory is empty"


def format_of(source: LeafSource) -> str:
    """The key in FORMATS of a model or adapter as it was opened."""
    return next(name for name, form in FORMATS.items() if isinstance(source, form.sources))


def adapter_format(path: str | Path) -> str:
    """The key in FORMATS of the adapter that a path holds, if it holds one."""
    path = _existing(path)
    if find_native(path) is not None:
        return "jax"
    return "peft" if (path / "adapter_config.json").is_file() else "mindspore"


def is_adapter(path: str | Path) -> bool:
    """Whether a path holds a low-rank adapter rather than a full model."""
    path = _existing(path)
    native = find_native(path)
    if native is not None:
        return read_model_json(native).lora is not None
    if (path / "adapter_config.json").is_file():
        # Some trainers put the base's config.json beside the adapter; a merged model may keep adapter_config.json.
        return find_weights(path) is None
    if (path.is_dir() and ((path / PARAMS).is_file() or _is_hf(path))) or find_gguf(path) is not None:
        return False
    tensors = read_files(_mindspore_files(path), check=False)
    return is_lora(tensors) and not has_embedding(tensors)


def recorded_base(adapter: str | Path) -> str:
    """Directory of the base that an adapter (PEFT, converted, or a LoRA run) records.

    Raises:
        UserError: it is not an adapter, or its base is not here.
    """
    path = on_disk(adapter)
    native = find_native(path)
    recorded: Mapping[str, Any]
    if native is not None:
        recorded = read_model_json(native).base
    elif (path / "adapter_config.json").is_file():
        recorded = read_object(path / "adapter_config.json")
    else:
        raise UserError(f"model.adapter: {adapter} is not an adapter (no adapter_config.json)")
    base = find_base(recorded, native or path)
    if base is None:
        name = recorded.get("base") or recorded.get("base_model_name_or_path")
        # It may be large, and nobody asked for it: a name of the hub is offered, not fetched.
        where = "BASE" if plain_name(str(name)) is None else f"hf://{name}"
        raise UserError(
            f"{adapter} is a LoRA adapter of {name!r}, which is not here; name its base: "
            f"--model {where} --model.adapter {shlex.quote(str(adapter))}"
        )
    return str(base)


def open_with_adapter(path: str | None, adapter: str | None) -> ModelFiles:
    """Opens a model and the adapter on it; an adapter that is named as the model brings its base along.

    Args:
        path: where the model lies, or an adapter, when `adapter` is None; None: the base that `adapter` records.
        adapter: where an adapter lies; None: none, unless `path` is one.

    Raises:
        UserError: either cannot be opened, or the two do not fit.
    """
    if path is not None and adapter is None and is_adapter(path):
        path, adapter = None, path
    if path is None:
        assert adapter is not None
        path = recorded_base(adapter)
    base = open_model(path)
    if adapter is None:
        return ModelFiles(path, base, None, None, base)
    opened = open_adapter(adapter, base)
    return ModelFiles(path, base, adapter, opened, MergedSource(base, opened))


def open_model(
    path: str | Path, config: str | Path | None = None, groups: int = 1, max_positions: int | None = None
) -> ParamSource:
    """A full model: a Hugging Face directory, a jaxlm directory, a checkpoint, or a run directory (its newest step);
    Meta's checkpoint; MindSpore's, a file or its directory; a GGUF file, or the directory of one.

    Args:
        config: MindSpore only: shape by name, config.json or MindFormers' YAML; None takes the one beside the file.
        groups: MindSpore only: see `MindSporeSource`.
        max_positions: Meta only: the longest row in tokens, which that format does not say.

    Raises:
        UserError: when it is none of these, is an adapter, or is not complete.
    """
    path = _existing(path)
    native = find_native(path)
    if is_adapter(path):
        raise UserError(
            f"{path}: is a LoRA adapter, not a full model; give the base model and this adapter, "
            f"or make one model of them: convert merge BASE {shlex.quote(str(path))} OUT"
        )
    if native is not None:
        content = read_model_json(native)
        return NativeSource(native, content) if content.rounding is None else QuantizedNativeSource(native, content)
    if (file := find_gguf(path)) is not None:
        return GgufSource(file)
    if path.is_dir() and (path / PARAMS).is_file() and find_shards(path) and not _is_hf(path):
        return MetaSource(path, max_positions)
    if path.is_dir() and _is_hf(path) and (path / "config.json").is_file():
        return PackedSource(path) if packing_method(read_object(path / "config.json")) else open_hf(path)
    if _is_mindspore(path):
        return MindSporeSource(path, config, groups)
    if (path / "config.json").is_file():
        return open_hf(path)  # which says that there are no weights
    if (path / PARAMS).is_file():
        return MetaSource(path, max_positions)
    if find_shards(path):
        raise UserError(f"{path}: has consolidated.00.pth but no {PARAMS}, which lies beside it in Meta's releases")
    raise UserError(f"{path}: is not a model: {_found(path)}; {ACCEPTED}")


def original_of(base: ParamSource) -> ParamSource:
    """The model that a quantised one was made of, into whose weights adapters are merged; any other model itself.

    Raises:
        UserError: it is not where it was, is not recorded, or has other weights by now.
    """
    if not isinstance(base, QuantizedSource):
        return base
    way_out = "bring it back, or merge into the rounded weights with --rounded"
    recorded = getattr(base, "original", {})
    path = find_base(recorded, base.path)
    if path is None:
        name = recorded.get("base")
        where = "a model that it does not record" if name is None else f"{name!r}, which is not here"
        raise UserError(
            f"{base.path}: holds rounded weights ({base.kind}), and an adapter is merged into the original ones, of "
            f"{where}; {way_out}"
        )
    original = open_model(path)
    if isinstance(original, QuantizedSource) or not same_original(rounding_of(original, base.kind), base.rounding):
        raise UserError(
            f"{base.path}: was rounded from {path}, which has other weights by now (by a hash of samples); {way_out}"
        )
    return original


def check_rounding(adapter: AdapterSource, base: ParamSource) -> None:
    """Refuses an adapter that was trained on other rounded weights than those of a base, or of the base's original.

    Raises:
        UserError: it was.
    """
    trained_on = getattr(adapter, "rounding", None)
    if trained_on is None:
        return
    quantized = isinstance(base, QuantizedSource)
    here = rounding_of(base, base.kind if isinstance(base, QuantizedSource) else trained_on.partition("-")[0])
    before, now = trained_on.split()[0], here.split()[0]
    if not same_original(here, trained_on):
        problem = f"was trained on another model (rounded to {before}) than {base.path}, by a hash of samples"
    elif quantized and before != now:
        problem = f"was trained on weights rounded to {before}, and {base.path} is rounded to {now}"
    else:
        return
    recorded = getattr(adapter, "base", None)
    way_out = "give the base that it was trained on" + (f", {recorded}" if recorded else "")
    raise UserError(f"{adapter.path}: {problem}; {way_out}")


def open_adapter(
    path: str | Path, base: ParamSource | DecoderSpec | None = None, alpha: float = DEFAULT_ALPHA
) -> AdapterSource:
    """A LoRA adapter: a PEFT directory, a converted one, a LoRA run (its newest checkpoint), or MindSpore's.

    Args:
        base: the model it belongs to, or at least its shape, which only jaxlm's own directories record. When the
            model's neurons stand in another order, the adapter is put in that (see `convert.transforms.adapter_order`).
        alpha: MindSpore only: lora_alpha, which that format does not record.

    Raises:
        UserError: when it is not an adapter, is not complete, or does not fit the base.
    """
    config = base if base is None or isinstance(base, DecoderSpec) else base.config
    adapter = stored_adapter(path, config, alpha)
    return adapter if base is None else in_order_of(adapter, base)


def stored_adapter(
    path: str | Path, base_config: DecoderSpec | None = None, alpha: float = DEFAULT_ALPHA
) -> PeftSource | NativeAdapter | MindSporeAdapter:
    """The same with its neurons as they are stored; its `config.experts` is that of the model it was trained on."""
    path = _existing(path)
    native = find_native(path)
    if native is not None:
        content = read_model_json(native)
        if content.lora is None:
            raise UserError(f"{path}: is a full model, not an adapter; open it as the model itself")
        adapter = NativeAdapter(native, content)
        if base_config is not None:
            adapter.config = base_config.with_experts(adapter.config.experts)
            check_adapter_leaves(adapter, native / "model")
        return adapter
    peft = (path / "adapter_config.json").is_file()
    other = not peft and path.is_dir() and ((path / PARAMS).is_file() or _is_hf(path))
    if not peft and (other or not is_lora(read_files(_mindspore_files(path), check=False))):
        raise UserError(
            f"{path}: is not an adapter{f': {_found(path)}' if path.is_dir() else ''}; accepted are a PEFT directory "
            "(adapter_config.json and adapter_model.safetensors), a converted adapter, a LoRA run directory, and a "
            "MindSpore file with LoRA factors"
        )
    if base_config is None:
        kind = "PEFT" if peft else "MindSpore"
        raise UserError(f"{path}: a {kind} adapter does not record the shape of its base; give the base model too")
    # To other systems a model that `convert moefy` divided is the dense one; some families have experts of their own.
    theirs = base_config if family_of(base_config).experts is not None else base_config.with_experts(None)
    return PeftSource(path, theirs) if peft else MindSporeAdapter(path, theirs, alpha)
