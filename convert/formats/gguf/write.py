"""Writing a model as a GGUF file, a block of rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.chat_template import TrainedTemplate
from convert.formats.gguf.architectures import architecture_for, check_keys, notes_on, write_keys, write_rope
from convert.formats.gguf.library import load_gguf
from convert.formats.gguf.modelfile import FILE, modelfile
from convert.formats.gguf.tensors import FileTensor, file_tensors, rows_of
from convert.formats.gguf.types import KEPT, TypeName, file_type, matrix_type, pack, packed_bytes, raw_type
from convert.formats.gguf.vocabulary import read_vocabulary
from jaxlm.errors import UserError
from jaxlm.tokenizer import main_file
from jaxlm.weights.leaves import ParamSource, main_dtype
from jaxlm.weights.output import Advance, tell_final

_QUANTIZATION_VERSION = 2  # of how blocks are packed; ggml's GGML_QNT_VERSION


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        file: the GGUF file's name.
        notes: what llama.cpp does otherwise, in words.
    """

    file: str
    notes: tuple[str, ...]


def type_of(source: ParamSource, wanted: TypeName) -> str:
    """The type of matrices: what is wanted, or that of the dtype that most are stored in."""
    return KEPT[main_dtype(source.leaves)] if wanted == "keep" else wanted


def check_gguf(source: ParamSource) -> None:
    """Refuses a model that GGUF has no place for.

    Raises:
        UserError: its architecture, something that it computes, or its router; or the package gguf is missing.
    """
    load_gguf()
    spec, moe = source.config, source.config.experts
    architecture = architecture_for(source.path, spec)
    if moe is not None and architecture.name not in ("llama", "qwen3moe"):
        raise UserError(f"{source.path}: has experts, which GGUF's architecture {architecture.name!r} has no place for")
    if moe is not None and (moe.router != "learned" or len(set(moe.top_k)) > 1):
        used = ", ".join(f"{name} {k}" for name, k in zip(moe.modalities, moe.top_k, strict=True))
        raise UserError(
            f"{source.path}: llama.cpp's routers are trained matrices with one k for all tokens; this one's is "
            f"{moe.router}, k {used}; convert demoefy writes the dense model"
        )
    if moe is not None and moe.weights == "k_times" and moe.max_top_k == 1 < moe.num_experts:
        raise UserError(
            f"{source.path}: tokens use one expert, weighted by its share of the softmax over all; llama.cpp would "
            "weigh it by 1: another model. Train it with a k of 2 or more"
        )
    check_keys(source.path, spec, architecture)


def write_gguf(
    source: ParamSource,
    directory: Path,
    name: str,
    wanted: TypeName,
    advance: Advance,
    trained: TrainedTemplate | None = None,
) -> Written:
    """Writes a model as a file, and a Modelfile beside it.

    Args:
        directory: an existing directory.
        name: what the model is called (`general.name`).
        wanted: the type of matrices; norms, biases and routers are float32.
        advance: called with the bytes written.
        trained: the template that the model was trained with, if it records that.

    Raises:
        UserError: see `check_gguf` and `read_vocabulary`.
    """
    check_gguf(source)
    library, spec, kind = load_gguf(), source.config, type_of(source, wanted)
    architecture = architecture_for(source.path, spec)
    if main_file([file.name for file in source.tokenizer_files]) is None:
        raise UserError(f"{source.path}: has no tokenizer, which a GGUF file holds; copy its files there")
    jinja, stops = (None, ()) if trained is None else (trained.jinja, trained.stops)
    vocabulary = read_vocabulary(source.tokenizer_dir, spec.vocab_size, jinja, stops)
    path = directory / f"model-{kind}.gguf"
    writer = library.GGUFWriter(path, architecture.name)  # which adds general.architecture
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": vocabulary.model_name(name),
        "general.file_type": file_type(kind),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **write_keys(spec, architecture),
        **vocabulary.keys,
    }
    _add_keys(writer, keys)
    rope = write_rope(spec)[1]
    for tensor, factors in rope.items():
        _add_info(writer, tensor, (len(factors),), "f32")
    tensors, unpacked = file_tensors(spec, architecture), []
    kinds: dict[str, str] = {}
    for each in tensors:
        kinds[each.name] = matrix_type(kind, each.shape[-1], each.is_head) if each.is_matrix else "f32"
        if each.is_matrix and kinds[each.name] == "f16" != kind:
            unpacked.append(each.name)
        _add_info(writer, each.name, each.shape, kinds[each.name])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    _write_data(source, path, writer.data_alignment, rope, tensors, kinds, advance)
    tokens = vocabulary.keys["tokenizer.ggml.tokens"]
    text = modelfile(path.name, None if trained is None else trained.template, tuple(tokens[index] for index in stops))
    (directory / FILE).write_text(text, encoding="utf-8")
    notes = [*notes_on(spec), *vocabulary.notes]
    if unpacked:
        notes.append(f"{len(unpacked)} matrices ({unpacked[0]}, …) have rows that 32 does not divide; they are f16")
    return Written(path.name, tuple(notes))


def _add_info(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    writer.add_tensor_info(name, shape, np.dtype(np.float32), packed_bytes(kind, shape), raw_dtype=raw_type(kind))


def _add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    """Adds keys in the types that llama.cpp wants: uint32, float32, bool, text, and arrays of one of them."""
    for name, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)


def _write_data(
    source: ParamSource,
    path: Path,
    alignment: int,
    rope: Mapping[str, tuple[float, ...]],
    tensors: list[FileTensor],
    kinds: Mapping[str, str],
    advance: Advance,
) -> None:
    """Writes the numbers behind the header, each tensor at a multiple of `alignment` bytes."""
    with path.open("ab") as handle:

        def pad() -> None:
            handle.write(bytes(-handle.tell() % alignment))

        pad()
        for factors in rope.values():
            handle.write(np.asarray(factors, np.float32).tobytes())
            pad()
        for tensor in tensors:
            kind, start, count = kinds[tensor.name], handle.tell(), 0
            for rows in itertools.chain(rows_of(source, tensor)):
                handle.write(pack(rows, kind, tensor.name).data)
                count += rows.size
                advance(rows.nbytes)
            assert handle.tell() - start == packed_bytes(kind, tensor.shape), (tensor, count)
            pad()
            handle.flush()
            tell_final(advance, path, handle.tell())
    tell_final(advance, path, None)
