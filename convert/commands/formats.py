"""The verbs `A-to-B`, from one format to another. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
from typing import Any

from convert.commands.command import SHARD_SIZE, add_dtype, add_gguf_type, add_shard_size, add_verb, write_as
from jaxlm.errors import UserError

# Those of convert.formats.compressed, which is too heavy for --help; a test compares.
SCHEMES = ("w4a16", "w8a16")
# Those of jaxlm.nn.rounding, which is too heavy for --help; a test compares.
KINDS = ("int8", "nf4")


def add_format_verbs(verbs: Any) -> None:
    """Adds the verbs to argparse's sub-commands."""
    verb = add_verb(verbs, "hf-to-jax", _convert, "a Hugging Face model becomes a jaxlm model")
    verb.add_argument("source", metavar="SRC", help="directory with config.json and safetensors or .bin weights")
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    add_dtype(verb)

    verb = add_verb(verbs, "jax-to-hf", _convert, "a jaxlm model becomes a Hugging Face model")
    verb.add_argument("source", metavar="SRC", help="jaxlm directory, run directory (newest checkpoint) or checkpoint")
    verb.add_argument("destination", metavar="DST", help="Hugging Face directory to create")
    add_dtype(verb)
    add_shard_size(verb)
    verb.add_argument(
        "--layout",
        choices=("dense", "mixtral"),
        help="of a model of experts: a dense model with the experts in files beside it, which jaxlm reads, or "
        "Mixtral's, for a learned router with one k (default: the one that it came in; dense if it was made here)",
    )

    verb.add_argument(
        "--architecture",
        metavar="NAME",
        help="write it as another architecture that computes the same, e.g. GlmForCausalLM for ChatGLM3, or "
        "LlamaForCausalLM for InternLM2 (default: its own)",
    )

    verb = add_verb(verbs, "peft-to-jax", _convert, "a PEFT LoRA adapter becomes a jaxlm adapter")
    verb.add_argument("source", metavar="ADAPTER", help="directory with adapter_config.json and adapter_model.*")
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    verb.add_argument("--base", required=True, metavar="BASE", help="the model it belongs to (any format)")

    verb = add_verb(verbs, "jax-to-peft", _convert, "a jaxlm adapter becomes a PEFT adapter")
    verb.add_argument("source", metavar="SRC", help="LoRA run directory, one of its checkpoints, or converted adapter")
    verb.add_argument("destination", metavar="DST", help="PEFT directory to create")

    verb = add_verb(
        verbs, "quantize", _quantize, "a model becomes a jaxlm model whose linear layers are rounded to 4 or 8 bits"
    )
    verb.add_argument("source", metavar="SRC", help="the model, in any format")
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    verb.add_argument("--kind", choices=KINDS, default="nf4", help="what they are rounded to (default: nf4)")
    verb.add_argument("--config", metavar="CONFIG", help="shape of a MindSpore model: a known name or a file")

    verb = add_verb(
        verbs, "compress", _compress, "a model becomes a Hugging Face model of 4 or 8 bits, which vLLM and SGLang load"
    )
    verb.add_argument("source", metavar="SRC", help="the model, in any format")
    verb.add_argument("destination", metavar="DST", help="Hugging Face directory to create (compressed-tensors)")
    verb.add_argument(
        "--scheme",
        choices=SCHEMES,
        default=SCHEMES[0],
        help="w4a16: linear layers in 4 bits, a scale for each group of inputs; w8a16: in 8 bits, a scale for each "
        "output (default: w4a16). Numbers are rounded by themselves, without data",
    )
    verb.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="inputs that share a scale in w4a16 (128)"
    )
    verb.add_argument("--config", metavar="CONFIG", help="shape of a MindSpore model: a known name or a file")
    add_dtype(verb)
    add_shard_size(verb)

    verb = add_verb(verbs, "meta-to-jax", _convert, "Meta's checkpoint becomes a jaxlm model")
    _add_meta_source(verb)
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    add_dtype(verb)

    verb = add_verb(verbs, "meta-to-hf", _convert, "Meta's checkpoint becomes a Hugging Face model")
    _add_meta_source(verb)
    verb.add_argument("destination", metavar="DST", help="Hugging Face directory to create")
    add_dtype(verb)
    add_shard_size(verb)

    for name, what in (("jax-to-meta", "a jaxlm model"), ("hf-to-meta", "a Hugging Face model")):
        verb = add_verb(verbs, name, _convert, f"{what} becomes a checkpoint in Meta's format")
        verb.add_argument("source", metavar="SRC", help="directory of the model")
        verb.add_argument("destination", metavar="DST", help="directory to create: consolidated.NN.pth, params.json")
        verb.add_argument(
            "--shards", type=int, default=1, metavar="N", help="files, the model-parallel size to run with (default: 1)"
        )
        add_dtype(verb)

    verb = add_verb(verbs, "mindspore-to-jax", _convert, "a MindSpore checkpoint becomes a jaxlm model")
    _add_mindspore_source(verb, "jaxlm directory to create")
    verb = add_verb(verbs, "mindspore-to-hf", _convert, "a MindSpore checkpoint becomes a Hugging Face model")
    _add_mindspore_source(verb, "Hugging Face directory to create (with --lora: PEFT)")
    add_shard_size(verb)

    for name, what in (("jax-to-mindspore", "a jaxlm model"), ("hf-to-mindspore", "a Hugging Face model")):
        verb = add_verb(verbs, name, _convert, f"{what} becomes a MindSpore checkpoint for MindFormers")
        verb.add_argument("source", metavar="SRC", help="directory of the model")
        verb.add_argument("destination", metavar="DST", help="directory to create: model.ckpt, config.json, tokenizer")
        verb.add_argument("--qkv-concat", action="store_true", help="write w_qkv and w_gate_hidden (not interleaved)")
        verb.add_argument("--crc", action="store_true", help="end the file with its CRC-32 (crc_check of MindSpore)")
        add_dtype(verb)

    for name, what in (("jax-to-gguf", "a jaxlm model"), ("hf-to-gguf", "a Hugging Face model")):
        verb = add_verb(verbs, name, _convert, f"{what} becomes a GGUF file for llama.cpp and Ollama")
        verb.add_argument("source", metavar="SRC", help="directory of the model, with its tokenizer")
        verb.add_argument("destination", metavar="DST", help="directory to create: model-TYPE.gguf, Modelfile")
        add_gguf_type(verb)

    for name, what, kind in (
        ("gguf-to-hf", "a Hugging Face model", "Hugging Face"),
        ("gguf-to-jax", "a jaxlm model", "jaxlm"),
    ):
        verb = add_verb(verbs, name, _convert, f"a GGUF file becomes {what}; packed weights become float32, or --dtype")
        verb.add_argument("source", metavar="SRC", help="a .gguf file, or the directory of one")
        verb.add_argument("destination", metavar="DST", help=f"{kind} directory to create")
        add_dtype(verb)
        if name == "gguf-to-hf":
            add_shard_size(verb)


def _quantize(options: argparse.Namespace) -> None:
    from convert.commands.command import write_quantized
    from convert.source import open_model

    write_quantized(open_model(options.source, options.config), options.source, options.kind, options.destination)


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


def _add_meta_source(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", metavar="SRC", help="directory with consolidated.NN.pth and params.json")
    verb.add_argument(
        "--max-positions",
        type=int,
        metavar="N",
        help="longest row in tokens, which the files do not say (default: as published for that LLaMA)",
    )


def _compress(options: argparse.Namespace) -> None:
    """Rounds the linear layers of a model."""
    from convert.conversion import ReadOptions, WriteOptions, open_source
    from jaxlm.weights.output import parse_size

    opened = open_source(options.source, None, None, ReadOptions(False, options.dtype, config=options.config))
    size = parse_size(options.shard_size or SHARD_SIZE)
    how = WriteOptions(shard_size=size, scheme=options.scheme, group_size=options.group_size)
    write_as("hf", opened, options.destination, how)


def _convert(options: argparse.Namespace) -> None:
    """Runs the verb `A-to-B`, whose source must be of format A."""
    from convert.conversion import ReadOptions, WriteOptions, open_source, with_architecture
    from jaxlm.weights.output import parse_size

    given = vars(options)
    form, to = options.verb.split("-to-")
    adapter = "peft" in (form, to) or bool(given.get("lora"))
    shard_size = given.get("shard_size")
    if adapter and shard_size is not None:
        raise UserError(f"--shard-size {shard_size}: is not for --lora; an adapter is one file; leave it out")
    reading = ("dtype", "base", "config", "groups", "alpha", "max_positions")
    how = {name: given[name] for name in reading if name in given}
    to = "peft" if adapter and to == "hf" else to
    opened = open_source(options.source, form, to, ReadOptions(adapter, **how))
    if given.get("architecture") is not None:
        opened = with_architecture(opened, given["architecture"])
    writing = WriteOptions(
        parse_size(shard_size or SHARD_SIZE),
        given.get("layout"),
        given.get("shards", 1),
        given.get("qkv_concat", False),
        given.get("crc", False),
        given.get("base"),
        given.get("gguf_type") or "keep",
    )
    write_as(to, opened, options.destination, writing)
