"""The verbs for Meta's and MindSpore's formats. Like `cli`, nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.commands.command import (
    SHARD_SIZE,
    add_dtype,
    add_shard_size,
    add_verb,
    say_adapter,
    say_model,
    say_template,
    with_dtype,
    write_hf,
    write_jax,
    writing,
)
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from convert.formats.meta import MetaSource
    from jaxlm.spec import DecoderSpec
    from jaxlm.weights.leaves import AdapterSource, ParamSource


def add_format_verbs(verbs: Any) -> None:
    """Adds the verbs to argparse's sub-commands."""
    verb = add_verb(verbs, "meta-to-jax", _meta_to_jax, "Meta's checkpoint becomes a jaxlm model")
    _add_meta_source(verb)
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    add_dtype(verb)

    verb = add_verb(verbs, "meta-to-hf", _meta_to_hf, "Meta's checkpoint becomes a Hugging Face model")
    _add_meta_source(verb)
    verb.add_argument("destination", metavar="DST", help="Hugging Face directory to create")
    add_dtype(verb)
    add_shard_size(verb)

    for name, what in (("jax-to-meta", "a jaxlm model"), ("hf-to-meta", "a Hugging Face model")):
        verb = add_verb(verbs, name, _to_meta, f"{what} becomes a checkpoint in Meta's format")
        verb.add_argument("source", metavar="SRC", help="directory of the model")
        verb.add_argument("destination", metavar="DST", help="directory to create: consolidated.NN.pth, params.json")
        verb.add_argument(
            "--shards", type=int, default=1, metavar="N", help="files, the model-parallel size to run with (default: 1)"
        )
        add_dtype(verb)

    verb = add_verb(verbs, "mindspore-to-jax", _mindspore_to_jax, "a MindSpore checkpoint becomes a jaxlm model")
    _add_mindspore_source(verb, "jaxlm directory to create")
    verb = add_verb(verbs, "mindspore-to-hf", _mindspore_to_hf, "a MindSpore checkpoint becomes a Hugging Face model")
    _add_mindspore_source(verb, "Hugging Face directory to create (with --lora: PEFT)")
    add_shard_size(verb)

    for name, what in (("jax-to-mindspore", "a jaxlm model"), ("hf-to-mindspore", "a Hugging Face model")):
        verb = add_verb(verbs, name, _to_mindspore, f"{what} becomes a MindSpore checkpoint for MindFormers")
        verb.add_argument("source", metavar="SRC", help="directory of the model")
        verb.add_argument("destination", metavar="DST", help="directory to create: model.ckpt, config.json, tokenizer")
        verb.add_argument("--qkv-concat", action="store_true", help="write w_qkv and w_gate_hidden (not interleaved)")
        verb.add_argument("--crc", action="store_true", help="end the file with its CRC-32 (crc_check of MindSpore)")
        add_dtype(verb)


def _add_mindspore_source(verb: argparse.ArgumentParser, destination: str) -> None:
    verb.add_argument(
        "source", metavar="SRC", help="a .ckpt or .safetensors file with MindSpore's names, or its folder"
    )
    verb.add_argument("destination", metavar="DST", help=destination)
    verb.add_argument(
        "--config",
        metavar="FILE",
        help="shape of the model: config.json, MindFormers' YAML, or a known name like llama-2-7b "
        "(default: the one file of these beside SRC)",
    )
    verb.add_argument(
        "--groups",
        type=int,
        default=1,
        metavar="N",
        help="how often wq, wk, wv alternate in w_qkv (tensor parallelism it was concatenated for; default: 1)",
    )
    verb.add_argument("--lora", action="store_true", help="take the LoRA factors, not the model")
    verb.add_argument("--alpha", type=float, metavar="A", help="lora_alpha, which SRC does not record (default: 16)")
    verb.add_argument("--base", metavar="BASE", help="with --lora: the base model, in any format")
    add_dtype(verb)


def _open_mindspore(options: argparse.Namespace) -> ParamSource:
    from convert.formats.mindspore import MindSporeSource

    for name in ("alpha", "base"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: is for --lora only")
    if options.groups < 1:
        raise UserError(f"--groups {options.groups}: must be at least 1")
    source = _of_format(options, config=options.config, groups=options.groups)
    assert isinstance(source, MindSporeSource)
    if source.joined:
        how = "whole, one below the other" if options.groups == 1 else f"interleaved in {options.groups} groups"
        print(f"taken: wq, wk, wv in w_qkv lie {how} (the file does not say it; another: --groups N)", file=sys.stderr)
    elif options.groups != 1:
        raise UserError(f"--groups {options.groups}: {options.source} holds no concatenated tensors")
    return with_dtype(source, options.dtype)


def _open_mindspore_adapter(options: argparse.Namespace) -> AdapterSource:
    from convert.formats.mindspore import DEFAULT_ALPHA, find_config
    from convert.source import open_adapter, open_model

    if options.dtype != "keep" or options.groups != 1:
        raise UserError("--dtype and --groups: are not for --lora; factors stay as they are stored")
    base: ParamSource | DecoderSpec
    if options.base is not None:
        base = open_model(options.base, options.config)
    else:
        path = Path(options.source)
        base, _ = find_config(path if path.is_dir() else path.parent, options.config, {})
    alpha = options.alpha
    if alpha is None:
        alpha = DEFAULT_ALPHA
        print(f"taken: lora_alpha {alpha:g}, as MindFormers' configurations (another: --alpha A)", file=sys.stderr)
    if not 0 < alpha < math.inf:
        raise UserError(f"--alpha {alpha:g}: must be positive")
    return open_adapter(options.source, base, alpha)


def _mindspore_to_jax(options: argparse.Namespace) -> None:
    from jaxlm.weights.native import write_adapter

    if not options.lora:
        write_jax(_open_mindspore(options), options.destination)
        return
    if options.base is None:
        raise UserError("--lora: needs --base BASE, which a jaxlm adapter records")
    adapter = _open_mindspore_adapter(options)
    with writing(adapter, options.destination) as (directory, advance):
        write_adapter(adapter, directory, options.base, advance)
    say_adapter(adapter, f"convert merge {shlex.quote(options.base)} {shlex.quote(options.destination)} OUT")


def _mindspore_to_hf(options: argparse.Namespace) -> None:
    from convert.formats.peft import write_peft

    if not options.lora:
        write_hf(_open_mindspore(options), options.destination, options.shard_size)
        return
    if options.shard_size is not None:
        raise UserError(f"--shard-size {options.shard_size}: is not for --lora; an adapter is one file; leave it out")
    adapter = _open_mindspore_adapter(options)
    with writing(adapter, options.destination) as (directory, advance):
        write_peft(adapter, directory, advance)
    say_adapter(adapter, f"PeftModel.from_pretrained(base, {json.dumps(options.destination, ensure_ascii=False)})")


def _to_mindspore(options: argparse.Namespace) -> None:
    from convert.formats.mindspore import FILE_NAME, PATTERNS, check_experts, write_mindspore

    source = open_as(options)
    check_experts(source)
    with writing(source, options.destination) as (directory, advance):
        write_mindspore(source, directory, advance, joined=options.qkv_concat, crc=options.crc)
    out, moe = options.destination, source.config.experts
    say_model(source, f"load_checkpoint: {out}/{FILE_NAME} in MindFormers' YAML")
    say_template(source)
    if moe is None:
        return
    top_k = ",".join(f"{name}={k}" for name, k in zip(moe.modalities, moe.top_k, strict=True))
    ranges = "".join(f" --range {name}={a}:{b}" for name, (a, b) in zip(moe.modalities[1:], moe.ranges, strict=True))
    print(
        f"{'experts':12} {moe.num_experts}, in {out}/{PATTERNS}; SciMind's code has k and token ids fixed: 14 of 16, "
        "and 2 from token 32000 on"
    )
    said = f"--router {moe.router} --top-k {top_k}{ranges}"
    print(f"{'back':12} convert moefy {shlex.quote(out)} MOE --partition {shlex.quote(f'{out}/{PATTERNS}')} {said}")


def _add_meta_source(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", metavar="SRC", help="directory with consolidated.NN.pth and params.json")
    verb.add_argument(
        "--max-positions",
        type=int,
        metavar="N",
        help="longest row in tokens, which the files do not say (default: as published for that LLaMA)",
    )


def _open_meta(options: argparse.Namespace) -> tuple[MetaSource, ParamSource]:
    """The source, and how it is read (in which dtype)."""
    from convert.formats.meta import MetaSource

    if options.max_positions is not None and options.max_positions < 1:
        raise UserError(f"--max-positions {options.max_positions}: must be at least 1")
    source = _of_format(options, max_positions=options.max_positions)
    assert isinstance(source, MetaSource)
    for what in source.assumed:
        print(f"taken: {what}", file=sys.stderr)
    return source, with_dtype(source, options.dtype)


def _meta_to_jax(options: argparse.Namespace) -> None:
    from jaxlm.weights.native import write_model

    meta, source = _open_meta(options)
    with writing(source, options.destination) as (directory, advance):
        write_model(source, directory, advance)
        _add_tokenizer(meta, directory / "jaxlm" / "tokenizer")
    say_model(source, f"python -m jaxlm.train --config CONFIG --model.path {shlex.quote(options.destination)}")


def _meta_to_hf(options: argparse.Namespace) -> None:
    from convert.formats.hf_experts import write_hf
    from jaxlm.weights.output import parse_size

    meta, source = _open_meta(options)
    size = parse_size(options.shard_size or SHARD_SIZE)
    with writing(source, options.destination) as (directory, advance):
        write_hf(source, directory, size, advance)
        _add_tokenizer(meta, directory)
    say_model(source, f"AutoModelForCausalLM.from_pretrained({json.dumps(options.destination, ensure_ascii=False)})")


def _add_tokenizer(source: MetaSource, directory: Path) -> None:
    """What Hugging Face needs to read LLaMA 3's tokenizer; LLaMA 1's and 2's it reads as they are."""
    from convert.formats.tiktoken import is_tiktoken, write_tokenizer_json

    model = directory / "tokenizer.model"
    if not model.is_file():
        print(f"note: no tokenizer.model in {source.path} or above it; the result has no tokenizer", file=sys.stderr)
    elif is_tiktoken(model) and not (directory / "tokenizer.json").exists():
        new = source.config.attention.rope.rope_type == "llama3"
        write_tokenizer_json(model, directory, source.config.vocab_size, new)


def open_as(options: argparse.Namespace, **how: Any) -> ParamSource:
    """The source of the verb `A-to-B`, which must be of format A, in the dtype asked for."""
    source = _of_format(options, **how)
    return with_dtype(source, options.dtype)


def _of_format(options: argparse.Namespace, **how: Any) -> ParamSource:
    from convert.formats.hf_experts import HF_SOURCES
    from convert.formats.meta import MetaSource
    from convert.formats.mindspore import MindSporeSource
    from convert.source import open_model
    from jaxlm.weights.native import NativeSource

    formats: dict[str, tuple[Any, str]] = {
        "hf": (HF_SOURCES, "a Hugging Face model"),
        "jax": (NativeSource, "a jaxlm model"),
        "meta": (MetaSource, "a checkpoint in Meta's format"),
        "mindspore": (MindSporeSource, "a MindSpore checkpoint"),
    }
    wanted, result = options.verb.split("-to-")
    source = open_model(options.source, **how)
    kind = next(name for name, (form, _) in formats.items() if isinstance(source, form))
    if kind == wanted:
        return source
    if kind == result:
        raise UserError(f"{options.source}: is {formats[kind][1]} already")
    raise UserError(
        f"{options.source}: is {formats[kind][1]}, not {formats[wanted][1]}: use convert {kind}-to-{result}"
    )


def _to_meta(options: argparse.Namespace) -> None:
    from convert.formats.meta import FILE_NAMES, write_meta

    if options.shards < 1:
        raise UserError(f"--shards {options.shards}: must be at least 1")
    source = open_as(options)
    with writing(source, options.destination) as (directory, advance):
        write_meta(source, directory, options.shards, advance)
    if not any(file.name == "tokenizer.model" for file in source.tokenizer_files):
        print(
            f"note: {options.source} has no tokenizer.model, which Meta's code reads; copy it from Meta's release",
            file=sys.stderr,
        )
    length = source.config.max_position_embeddings
    say_model(
        source,
        f"run it with {options.shards} processes ({FILE_NAMES}); max_seq_len up to {length}",
    )
    say_template(source)
