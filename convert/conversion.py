"""One conversion as a function: open a model or adapter of any format, write it in another.

`convert.convert` is the public interface; the verbs of the command are made of the same pieces.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.formats.card import write_card
from convert.formats.chat_template import TrainedTemplate, trained_template_or_name, write_chat_template
from convert.formats.chatglm import is_chatglm, rewrite_tokenizer
from convert.formats.compressed import GROUP_SIZE, Scheme, check_compressed, write_compressed
from convert.formats.gguf.read import GgufSource
from convert.formats.gguf.types import TypeName
from convert.formats.gguf.write import check_gguf, write_gguf
from convert.formats.hf_experts import hf_layout, write_hf
from convert.formats.meta import MetaSource, write_meta
from convert.formats.mindspore import DEFAULT_ALPHA, MindSporeSource, check_model, find_config, write_mindspore
from convert.formats.mixtral import check_mixtral
from convert.formats.peft import write_peft
from convert.formats.tiktoken import is_tiktoken, write_tokenizer_json
from convert.source import FORMATS, adapter_format, format_of, is_adapter, open_adapter, open_model
from convert.transforms.architecture import RenamedSource
from jaxlm.config.plain import plain
from jaxlm.config.reading import build
from jaxlm.errors import UserError
from jaxlm.models.families import family_of
from jaxlm.spec import DecoderSpec
from jaxlm.weights.leaves import AdapterSource, CastSource, LeafSource, ParamSource, total_bytes
from jaxlm.weights.manifest import Hasher
from jaxlm.weights.native import write as native
from jaxlm.weights.native.layout import SMALL_FILES, TOKENIZER
from jaxlm.weights.output import output_directory, parse_size
from jaxlm.weights.quantized import QuantizedParts

Format = Literal["hf", "jax", "meta", "mindspore", "peft", "gguf"]
Progress = Callable[[int], None]
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Opened:
    """A model or adapter that is to be written in another format.

    Args:
        model: the source, unless it is an adapter.
        adapter: the source, if it is an adapter.
        format: that it is stored in.
        assumed: what the source's format does not say and is taken for granted, in words.
    """

    model: ParamSource | None
    adapter: AdapterSource | None = None
    format: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def source(self) -> LeafSource:
        source = self.model or self.adapter
        assert source is not None
        return source


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read; see the arguments of `convert`, whose names these are."""

    adapter: bool | None = None
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    base: str | None = None
    config: str | None = None
    groups: int = 1
    alpha: float | None = None
    max_positions: int | None = None


@dataclass(frozen=True)
class WriteOptions:
    """How a model is written; every field is for one format.

    Args:
        shard_size: hf: bytes of tensors in a file.
        layout: hf: how a model of experts is laid out, 'dense' or 'mixtral'; None: as it came.
        shards: meta: number of files.
        joined: mindspore: wq, wk, wv are joined in w_qkv, and w1, w3 in w_gate_hidden.
        crc: mindspore: the file ends with its CRC-32.
        base: jax, peft: the path of an adapter's base, to be recorded.
        gguf_type: gguf: what matrices are stored in; 'keep': the dtype that they have.
        scheme: hf: what linear layers are rounded to, in the form of compressed-tensors; None: as they are.
        group_size: hf: number of inputs that share a scale, in the scheme 'w4a16'.
    """

    shard_size: int = parse_size(SHARD_SIZE)
    layout: Literal["dense", "mixtral"] | None = None
    shards: int = 1
    joined: bool = False
    crc: bool = False
    base: str | None = None
    gguf_type: TypeName = "keep"
    scheme: Scheme | None = None
    group_size: int = GROUP_SIZE


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Args:
        path: the directory, which has a manifest of its files.
        format: one of `Format`.
        files: bytes of every file but the manifest, by its name in the directory.
        assumed: what the source's format does not say and was taken for granted, in words.
        notes: what the result lacks, in words.
        template: the one that the model was trained with, if it records that; see `convert.formats.chat_template`.
    """

    path: Path
    format: str
    files: Mapping[str, int]
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    template: TrainedTemplate | None = field(default=None, repr=False)


def convert(
    source: str | Path,
    destination: str | Path,
    to: Format | None = None,
    *,
    source_format: Format | None = None,
    adapter: bool | None = None,
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    base: str | Path | None = None,
    config: str | Path | None = None,
    groups: int = 1,
    alpha: float | None = None,
    max_positions: int | None = None,
    shard_size: str | int = SHARD_SIZE,
    layout: Literal["dense", "mixtral"] | None = None,
    architecture: str | None = None,
    shards: int = 1,
    joined: bool = False,
    crc: bool = False,
    gguf_type: TypeName = "keep",
    scheme: Scheme | None = None,
    group_size: int = GROUP_SIZE,
    progress: Progress | None = None,
) -> Converted:
    """Writes a model or adapter in another format, tensor by tensor, in little memory whatever its size.

    Args:
        source: a model or adapter of any format, see `convert.source.open_model`.
        destination: the directory to create; it appears when it is complete.
        to: the format of the result; None: Hugging Face's (an adapter: PEFT's) for what is jaxlm's own, else jaxlm's.
        source_format: refuses a source of any other format; None: the files tell.
        adapter: whether the low-rank factors are taken, of a MindSpore file that has both; None: the files tell.
        dtype: what weights are written in: 'float32', 'bfloat16', 'float16'; 'keep': as they are stored.
        base: the model that an adapter belongs to, in any format; needed unless the adapter is jaxlm's own.
        config: the shape of a MindSpore model, by name, a config.json or MindFormers' YAML; None: the one beside it.
        groups: number of times that wq, wk, wv alternate in the w_qkv of a MindSpore model.
        alpha: lora_alpha, which a MindSpore adapter does not record; None: 16, as MindFormers' configurations.
        max_positions: the longest row of Meta's model in tokens, which its files do not say; None: as published.
        shard_size: to hf: the largest weight file, as '5GB' or a number of bytes.
        layout: to hf: how a model of experts is laid out, 'dense' or 'mixtral'; None: as it came.
        architecture: to hf: writes a model as another architecture that computes the same; None: its own.
        shards: to meta: number of files, the model-parallel size to run with.
        joined: to mindspore: writes w_qkv and w_gate_hidden.
        crc: to mindspore: ends the file with its CRC-32.
        gguf_type: to gguf: what matrices are stored in: 'f32', 'f16', 'bf16', 'q8_0', 'q5_1', 'q5_0', 'q4_1' or 'q4_0';
            'keep': the dtype that they have.
        scheme: to hf: rounds linear layers, 'w8a16' or 'w4a16', in the form that vLLM and SGLang load.
        group_size: to hf: number of inputs that share a scale, in the scheme 'w4a16'.
        progress: called with the numbers of bytes that were written.

    Raises:
        UserError: the source has none of the formats, is damaged, or is not `source_format`; it has the format `to`
            already; that format has no place for it; the destination exists or cannot be written; an argument has
            another type than here, or does nothing for these formats.
    """
    for name, path in (("source", source), ("destination", destination)):
        if not isinstance(path, (str, os.PathLike)) or path == "":
            raise UserError(f"{name}: expected a path, found {path!r}")
    for name, named in (("to", to), ("source_format", source_format)):
        if named is not None and named not in FORMATS:
            raise UserError(f"{name}: {named!r} is not a format; known: {', '.join(FORMATS)}")
    read_values: dict[str, Any] = {"adapter": adapter, "dtype": dtype, "base": base, "config": config}
    read_values |= {"groups": groups, "alpha": alpha, "max_positions": max_positions}
    size = parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    write_values: dict[str, Any] = {
        "shard_size": size,
        "layout": layout,
        "shards": shards,
        "joined": joined,
        "crc": crc,
        "base": base,
        "gguf_type": gguf_type,
        "scheme": scheme,
        "group_size": group_size,
    }
    reading, writing = build(plain(read_values), ReadOptions), build(plain(write_values), WriteOptions)
    opened = open_source(source, source_format, to, reading)
    form: str = to or default_format(opened)
    _check_effects("from", opened.format, reading, {"groups": "mindspore", "max_positions": "meta"})
    if opened.adapter is None:
        _check_effects("from", opened.format, reading, {"config": "mindspore"})
    _check_effects("to", form, writing, _WRITTEN_TO)
    if architecture is not None:
        if form != "hf" or not isinstance(architecture, str):
            raise UserError(f"architecture: {architecture!r} is for models that are written as hf, and names one")
        opened = with_architecture(opened, architecture)
    return write(form, opened, destination, writing, progress)


# Options of `WriteOptions` that do something for one format only.
_WRITTEN_TO = {
    "shard_size": "hf",
    "layout": "hf",
    "shards": "meta",
    "joined": "mindspore",
    "crc": "mindspore",
    "gguf_type": "gguf",
    "scheme": "hf",
    "group_size": "hf",
}


def _check_effects(direction: str, form: str, options: ReadOptions | WriteOptions, only: Mapping[str, str]) -> None:
    """Refuses an option that is not at its default and does nothing for this format."""
    for name, needed in only.items():
        value = getattr(options, name)
        if form != needed and value != getattr(type(options)(), name):
            raise UserError(
                f"{name}: {value!r} is for conversions {direction} {needed}, this one is {direction} {form}"
            )


def default_format(opened: Opened) -> str:
    """The format that a model or adapter is written in where none is named."""
    if opened.format != "jax":
        return "jax"
    return "hf" if opened.adapter is None else "peft"


# --- opening ----------------------------------------------------------------------------------------------------------


def open_source(path: str | Path, form: str | None, to: str | None, options: ReadOptions) -> Opened:
    """Opens what is to be converted.

    Args:
        form: the format that it must have; None: any.
        to: the format that it is to be written in; None: not known yet.

    Raises:
        UserError: see `convert`.
    """
    if is_adapter(path) if options.adapter is None else options.adapter:
        return _open_adapter(path, form, to, options)
    for name, value in (("alpha", options.alpha), ("base", options.base)):
        if value is not None:
            raise UserError(f"--{name}: is for an adapter only (the factors in a MindSpore file: --lora)")
    return _open_model(path, form, to, options)


def _open_model(path: str | Path, form: str | None, to: str | None, options: ReadOptions) -> Opened:
    groups = options.groups
    for name, number in (("groups", groups), ("max-positions", options.max_positions)):
        if number is not None and number < 1:
            raise UserError(f"--{name} {number}: must be at least 1")
    source = open_model(path, options.config, groups, options.max_positions)
    actual = format_of(source)
    _check_format(path, actual, FORMATS[actual].called, form, to)
    assumed: list[str] = source.assumed if isinstance(source, (MetaSource, MindSporeSource)) else []
    if isinstance(source, GgufSource) and source.note is not None:
        assumed = [f"no tokenizer: {source.note}"]
    if isinstance(source, MindSporeSource) and groups != 1 and not source.joined:
        raise UserError(f"--groups {groups}: {path} holds no concatenated tensors")
    model = source if options.dtype == "keep" else CastSource(source, options.dtype)
    return Opened(model, format=actual, assumed=tuple(assumed))


def with_architecture(opened: Opened, architecture: str) -> Opened:
    """A model that was opened, to be written as another architecture; see `RenamedSource`.

    Raises:
        UserError: it is an adapter, or see there.
    """
    if opened.model is None:
        raise UserError(f"--architecture {architecture}: {opened.source.path} is an adapter; it takes its base's names")
    return replace(opened, model=RenamedSource(opened.model, architecture))


def _open_adapter(path: str | Path, form: str | None, to: str | None, options: ReadOptions) -> Opened:
    alpha = options.alpha
    if options.dtype != "keep" or options.groups != 1:
        raise UserError("--dtype and --groups: are not for adapters; factors stay as they are stored")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"--alpha {alpha:g}: must be positive")
    actual = adapter_format(path)
    if is_adapter(path):
        _check_format(path, actual, f"a {FORMATS[actual].title} adapter", form, to)
    model: ParamSource | DecoderSpec | None = None
    if options.base is not None:
        model = open_model(options.base, options.config)
    elif actual == "mindspore":
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        model = find_config(folder, options.config, {})[0]
    assumed: tuple[str, ...] = ()
    if actual == "mindspore" and alpha is None:
        assumed = (f"lora_alpha {DEFAULT_ALPHA:g}, as MindFormers' configurations (another: --alpha A)",)
    adapter = open_adapter(path, model, DEFAULT_ALPHA if alpha is None else alpha)
    return Opened(None, adapter, actual, assumed)


def _check_format(path: str | Path, actual: str, called: str, form: str | None, to: str | None) -> None:
    """Refuses a source that has the format `to` already, or another one than `form`."""
    if actual == to:
        raise UserError(f"{path}: is {called} already")
    if form is not None and actual != form:
        verb = "" if to is None else f": use convert {actual}-to-{to}"
        raise UserError(f"{path}: is {called}, not {FORMATS[form].called}{verb}")


# --- writing ----------------------------------------------------------------------------------------------------------


def write(
    form: str,
    opened: Opened | ParamSource,
    destination: str | Path,
    options: WriteOptions | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Writes a model or adapter as a new directory, with a manifest.

    Args:
        form: one of `Format`.
        progress: called with the numbers of bytes that were written.

    Raises:
        UserError: the format has no place for it, or the destination cannot be written.
    """
    options = options or WriteOptions()
    opened = opened if isinstance(opened, Opened) else Opened(opened)
    source, model, adapter = opened.source, opened.model, opened.adapter
    if model is not None:
        _check_model(form, model, options)
    elif form not in ("jax", "peft"):
        raise UserError(f"{source.path}: is an adapter, which has no form in {form}; merge it into its base first")
    elif form == "jax" and options.base is None:
        raise UserError(f"{source.path}: needs --base BASE, which a jaxlm adapter records")
    template = None if form == "jax" else trained_template_or_name(source)
    with new_directory(source, destination, progress) as output:
        notes = _write_adapter(form, adapter, output, options) if adapter else ()
        if model is not None:
            notes = _write_model(form, model, output, options, opened.format == "meta", template)
        if template is not None and form in ("hf", "peft"):
            write_chat_template(template, output.directory)
        if form != "jax":
            known = model or adapter
            assert known is not None
            write_card(known, form, output.directory, template, bool(opened.format))
    return Converted(Path(destination), form, output.files, opened.assumed, notes, template)


def write_quantized(
    parts: QuantizedParts, original: str | Path, destination: str | Path, progress: Progress | None = None
) -> Mapping[str, int]:
    """Writes a model with its kernels in few bits as a new jaxlm directory, with a manifest.

    Args:
        original: where the model that is rounded is, to be recorded.
        progress: called with the numbers of bytes that were written.

    Returns:
        Bytes of every file but the manifest, by its name in the directory.
    """
    with new_directory(parts, destination, progress) as output:
        native.write_quantized(parts, output.directory, str(original), output)
    return output.files


class Output:
    """A directory that is being written: the `advance` of its writers, which has finished parts of files hashed.

    Attributes:
        directory: where to write; it has another name until it is complete.
        files: bytes of every file but the manifest, when it is.
    """

    def __init__(self, directory: Path, hasher: Hasher, progress: Progress | None) -> None:
        self.directory = directory
        self.files: dict[str, int] = {}
        self._hasher, self._progress = hasher, progress

    def __call__(self, nbytes: int) -> None:
        if self._progress is not None:
            self._progress(nbytes)

    def final(self, path: Path, end: int | None) -> None:
        """See `jaxlm.weights.output.Watcher`."""
        self._hasher.final(path, end)


@contextlib.contextmanager
def new_directory(source: LeafSource, destination: str | Path, progress: Progress | None = None) -> Iterator[Output]:
    """A directory with a manifest, which takes its name when it is complete; there must be room for `source`."""
    keep_freed_memory()
    with output_directory(destination, total_bytes(source.leaves)) as directory, Hasher(directory) as hasher:
        output = Output(directory, hasher, progress)
        yield output
        output.files = hasher.finish()


def keep_freed_memory() -> None:
    """Has blocks of up to 31 MiB allocated from memory that was freed before, instead of fresh pages for each.

    The C library (glibc) takes the size of the largest piece that was given back to the system as the size from which
    pieces come from the system, so one is given back. A third of the processor time of a conversion is saved.
    """
    piece = np.empty(31 << 20, np.uint8)
    del piece


def _check_model(form: str, source: ParamSource, options: WriteOptions) -> None:
    """Refuses a model that a format has no place for, before anything is written."""
    if form == "peft":
        raise UserError(f"{source.path}: is a full model, and PEFT's format is for adapters; write it as hf")
    if form == "hf" and hf_layout(source, options.layout) == "mixtral":
        check_mixtral(source)
    if form == "mindspore":
        check_model(source)
    if form == "gguf":
        check_gguf(source)
    if form == "hf" and options.scheme is not None:
        check_compressed(source, options.scheme, options.group_size)
    if form == "hf" and options.shard_size < 1:
        raise UserError(f"--shard-size {options.shard_size}: must be positive")
    if form == "meta" and options.shards < 1:
        raise UserError(f"--shards {options.shards}: must be at least 1")


def _write_adapter(form: str, adapter: AdapterSource, output: Output, options: WriteOptions) -> tuple[str, ...]:
    if form == "peft":
        write_peft(adapter, output.directory, output)
    else:
        assert options.base is not None
        native.write_adapter(adapter, output.directory, options.base, output)
    return ()


def _write_model(
    form: str,
    source: ParamSource,
    output: Output,
    options: WriteOptions,
    from_meta: bool,
    template: TrainedTemplate | None,
) -> tuple[str, ...]:
    """Writes a model; returns what its user should know."""
    directory = output.directory
    if form == "gguf":
        name = source.path.stem if source.path.is_file() else source.path.name
        return write_gguf(source, directory, name, options.gguf_type, output, template).notes
    if form == "hf" and options.scheme is not None:
        write_compressed(source, directory, options.scheme, options.group_size, options.shard_size, output)
        return ()
    if form == "hf":
        write_hf(source, directory, options.shard_size, output, options.layout)
        if is_chatglm(directory) and family_of(source.config).in_transformers:
            rewrite_tokenizer(directory)  # which the architecture's own code reads as it is
        return _add_tokenizer_json(source, directory) if from_meta else ()
    if form == "jax":
        native.write_model(source, directory, output)
        return _add_tokenizer_json(source, directory / SMALL_FILES / TOKENIZER) if from_meta else ()
    if form == "meta":
        write_meta(source, directory, options.shards, output)
        if any(file.name == "tokenizer.model" for file in source.tokenizer_files):
            return ()
        return (f"{source.path} has no tokenizer.model, which Meta's code reads; copy it from Meta's release",)
    assert form == "mindspore", form
    write_mindspore(source, directory, output, joined=options.joined, crc=options.crc)
    return ()


def _add_tokenizer_json(source: ParamSource, directory: Path) -> tuple[str, ...]:
    """What Hugging Face needs to read LLaMA 3's tokenizer; LLaMA 1's and 2's it reads as they are."""
    model = directory / "tokenizer.model"
    if not model.is_file():
        return (f"no tokenizer.model in {source.path} or above it; the result has no tokenizer",)
    if is_tiktoken(model) and not (directory / "tokenizer.json").exists():
        write_tokenizer_json(
            model, directory, source.config.vocab_size, source.config.attention.rotary.rope_type == "llama3"
        )
    return ()
