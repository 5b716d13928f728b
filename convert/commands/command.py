"""What the verbs of `convert` share: their options, writing with a progress bar, and the summary at the end."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import json
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.errors import UserError

if TYPE_CHECKING:
    from convert.conversion import Converted, Opened, WriteOptions
    from jaxlm.nn.rounding import Kind
    from jaxlm.spec import ExpertsSpec
    from jaxlm.weights.leaves import AdapterSource, LeafSource, ParamSource

# That of convert.conversion, which is too heavy for --help; a test compares.
SHARD_SIZE = "5GB"
# Those of convert.formats.gguf.types.TypeName.
GGUF_TYPES = ("keep", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
DTYPES = ("keep", "float32", "bfloat16", "float16")


def add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
) -> argparse.ArgumentParser:
    """A sub-command. `run` returns the exit status, None for 0."""
    verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.set_defaults(run=run)
    return verb


def add_dtype(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dtype", choices=DTYPES, default="keep", help="of the written weights (default: as stored)")


def add_shard_size(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--shard-size", metavar="SIZE", help=f"largest weight file (default: {SHARD_SIZE})")


def add_gguf_type(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--type",
        dest="gguf_type",
        choices=GGUF_TYPES,
        metavar="TYPE",
        help=f"of the matrices in a GGUF file: {', '.join(GGUF_TYPES)} (default: the dtype that they have)",
    )


def write_as(
    form: str, opened: Opened | ParamSource, destination: str, options: WriteOptions | None = None
) -> Converted:
    """Writes a model or adapter in a format, with a progress bar, and says what was written and what to do with it."""
    from convert import conversion

    opened = opened if isinstance(opened, conversion.Opened) else conversion.Opened(opened)
    options = options or conversion.WriteOptions()
    for text in opened.assumed:
        print(f"taken: {text}", file=sys.stderr)
    started = time.perf_counter()
    with progress_bar("writing", opened.source) as progress:
        written = conversion.write(form, opened, destination, options, progress)
    for note in written.notes:
        print(f"note: {note}", file=sys.stderr)
    _say_written(destination, written.files, time.perf_counter() - started)
    if opened.adapter is not None:
        _say_adapter(opened.adapter, written, destination, options)
    elif opened.model is not None:
        _say_model(opened.model, written, destination, options)
    return written


def write_quantized(source: ParamSource, path: str, kind: Kind, destination: str) -> None:
    """Writes a model with its linear layers in few bits, and says what to do with it.

    Args:
        path: where the source is, as it was named.
    """
    from convert.conversion import write_quantized
    from jaxlm.units import disk_size
    from jaxlm.weights.leaves import total_bytes
    from jaxlm.weights.names import num_params
    from jaxlm.weights.quantized import QuantizedParts, QuantizedSource

    if isinstance(source, QuantizedSource) and source.kind != kind:
        raise UserError(f"{path}: is stored in {source.kind}; numbers that are rounded once are not rounded again")
    if isinstance(source, QuantizedSource) and source.stays_quantized:
        raise UserError(f"{path}: is a jaxlm model in {kind} already")
    parts, started = QuantizedParts(source, kind), time.perf_counter()
    with progress_bar("rounding", parts) as progress:
        files = write_quantized(parts, path, destination, progress)
    _say_written(destination, files, time.perf_counter() - started)
    size, parameters = total_bytes(parts.leaves), num_params(source.config)
    print(f"{'model':12} {parameters:,} parameters, {disk_size(size)}, {8 * size / parameters:.2f} bits each; {kind}")
    print(f"{'next':12} python -m jaxlm.train --config CONFIG --model.path {shlex.quote(destination)} --lora.rank 64")


def write_result(
    form: str, source: ParamSource, destination: str, shard_size: str | None = None, gguf_type: str | None = None
) -> Converted:
    """Writes what a verb made of a model, as 'hf', 'jax' or 'gguf'."""
    from convert.conversion import WriteOptions
    from jaxlm.weights.output import parse_size

    if form != "hf" and shard_size is not None:
        raise UserError(
            f"--shard-size {shard_size}: is for --format hf; the result is --format {form}, which is not cut into "
            "weight files of a size; leave it out"
        )
    if form != "gguf" and gguf_type is not None:
        raise UserError(f"--type {gguf_type}: is for --format gguf; the result is --format {form}; leave it out")
    size = parse_size(shard_size or SHARD_SIZE)
    return write_as(form, source, destination, WriteOptions(shard_size=size, **_typed(gguf_type)))


def _typed(gguf_type: str | None) -> dict[str, Any]:
    """The option of `WriteOptions` for a type of a GGUF file, where one is named."""
    return {} if gguf_type is None else {"gguf_type": gguf_type}


def result_format(named: str | None, source: ParamSource) -> str:
    """The format of a verb's result: the one that was named, else jaxlm's for a jaxlm model and Hugging Face's."""
    from convert.source import format_of

    return named or ("jax" if format_of(source) == "jax" else "hf")


@contextlib.contextmanager
def progress_bar(description: str, source: LeafSource) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of a source; what it gives is called with the bytes that are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from jaxlm.screen import Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tensors]}/{task.fields[all_tensors]} tensors"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    sizes = _tensor_sizes(source)
    # Tensors come one after the other, so the bytes tell the number that are done.
    ends, done = list(itertools.accumulate(sizes)), 0
    with Bars(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=sum(sizes), tensors=0, all_tensors=len(sizes))

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress.update(task, advance=nbytes, tensors=bisect.bisect_right(ends, done))

        try:
            yield advance
        finally:
            if not done:  # refused before anything was done: no empty bar above the message
                progress.remove_task(task)


def _tensor_sizes(source: LeafSource) -> list[int]:
    """Bytes of every tensor, layers apart."""
    from jaxlm.spec import is_stacked

    sizes = []
    for path, leaf in source.leaves.items():
        count = leaf.shape[0] if is_stacked(path) else 1
        sizes += [leaf.nbytes // max(1, count)] * count
    return sizes


def _say_written(destination: str, files: Mapping[str, int], seconds: float) -> None:
    from jaxlm.units import disk_size, memory_size
    from jaxlm.weights.manifest import MANIFEST

    nbytes = sum(files.values())
    rows = {
        "written": destination,
        "files": f"{len(files)}, {disk_size(nbytes)}, sums of each in {MANIFEST}",
        "time": f"{seconds:.1f} s, {disk_size(nbytes / max(seconds, 1e-9))}/s",
        "peak memory": memory_size(_peak_memory()),
    }
    for name, value in rows.items():
        print(f"{name:12} {value}")


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage, whose number begins with that of the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _say_model(source: ParamSource, written: Converted, destination: str, options: WriteOptions) -> None:
    """What the result is, what to do with it, and what its format has no place for."""
    from jaxlm.models.families import family_of
    from jaxlm.units import disk_size
    from jaxlm.weights.leaves import main_dtype, total_bytes
    from jaxlm.weights.names import num_params

    size, dtype = disk_size(total_bytes(source.leaves)), main_dtype(source.leaves)
    length, kind = source.config.max_position_embeddings, "CausalLM" if source.config.encoder is None else "Seq2SeqLM"
    following = {
        "hf": f"AutoModelFor{kind}.from_pretrained({json.dumps(destination, ensure_ascii=False)})",
        "jax": f"python -m jaxlm.train --config CONFIG --model.path {shlex.quote(destination)}",
        "meta": f"run it with {options.shards} processes (consolidated.NN.pth); max_seq_len up to {length}",
        "mindspore": f"load_checkpoint: {destination}/model.ckpt in MindFormers' YAML",
        "gguf": _how_to_run(written, destination),
    }
    family, parameters = family_of(source.config), num_params(source.config)
    architecture = family.architecture
    if options.scheme is not None:
        following["hf"] = f"vllm serve {shlex.quote(destination)}"
    elif not family.in_transformers:
        following["hf"] = f"copy the code of {architecture} beside it, or write it with --architecture"
    print(f"{'model':12} {architecture}, {parameters:,} parameters, {size} in {dtype}")
    print(f"{'next':12} {following[written.format]}")
    _say_template(written)
    if source.config.experts is not None and written.format == "hf":
        _say_hf_experts(source, destination, options.layout)
    elif source.config.experts is not None and written.format == "mindspore":
        _say_mindspore_experts(source.config.experts, destination)


def _how_to_run(written: Converted, destination: str) -> str:
    """Commands that run a GGUF file."""
    file = next((name for name in written.files if name.endswith(".gguf")), "model.gguf")
    path, made = shlex.quote(f"{destination}/{file}"), shlex.quote(f"{destination}/Modelfile")
    return f"llama-cli -m {path}, or: ollama create NAME -f {made} && ollama run NAME"


def _say_adapter(adapter: AdapterSource, written: Converted, destination: str, options: WriteOptions) -> None:
    """What the result is, and what to do with it."""
    from convert.analysis.describe import describe_lora
    from jaxlm.units import disk_size
    from jaxlm.weights.leaves import main_dtype, total_bytes

    size, dtype = disk_size(total_bytes(adapter.leaves)), main_dtype(adapter.leaves)
    following = f"PeftModel.from_pretrained(base, {json.dumps(destination, ensure_ascii=False)})"
    if written.format == "jax":
        following = f"convert merge {shlex.quote(options.base or 'BASE')} {shlex.quote(destination)} OUT"
    print(f"{'adapter':12} {describe_lora(adapter)}, {size} in {dtype}")
    print(f"{'next':12} {following}")
    _say_template(written)
    if written.format == "peft" and adapter.config.experts is not None:
        print(f"{'base':12} to PEFT, the dense model that convert jax-to-hf writes, all experts on")


def _say_template(written: Converted) -> None:
    """Says where the prompt template went, or that the result lacks it."""
    from convert.formats.chat_template import FILE

    template = written.template
    if template is None:
        return
    stops = f"; an answer ends at {', '.join(map(str, template.stops))}" if template.stops else ""
    needed = f"jaxlm.generate needs --template {shlex.quote(template.name)} there"
    if written.format == "gguf" and template.jinja is not None:
        print(f"{'template':12} {template.name}, written as the file's chat template{stops}")
    elif written.format == "gguf" and template.own:
        print(f"{'template':12} the tokenizer's own chat template, in the file{stops}")
    elif written.format not in ("hf", "peft"):
        print(f"{'template':12} {template.name}, which this format has no place for: {needed}")
    elif template.own:
        print(f"{'template':12} the tokenizer's own chat template{stops}")
    elif template.jinja is not None:
        print(f"{'template':12} {template.name}, written as {FILE}{stops}")
    else:
        print(f"{'template':12} {template.name}, not written as {FILE}: {template.lacks}; {needed}")


def _say_hf_experts(source: ParamSource, destination: str, layout: str | None) -> None:
    """What transformers makes of the experts in a Hugging Face directory."""
    from convert.formats.hf_experts import FOLDER, hf_layout

    moe = source.config.experts
    assert moe is not None
    k, layout = moe.top_k[0], hf_layout(source, layout)
    if layout == "own":
        print(f"{'experts':12} {moe.num_experts}, of which transformers computes {k} for every token, as jaxlm")
        return
    if layout != "mixtral":
        print(
            f"{'experts':12} transformers computes all {moe.num_experts} for every token: to it this is a dense model. "
            f"jaxlm reads {destination}/{FOLDER} and chooses, router {moe.router}"
        )
        return
    rounded = "" if k & (k - 1) == 0 else f"; {k} is not a power of two, so these are rounded"
    print(
        f"{'experts':12} {moe.num_experts}, of which transformers computes {k} for every token; w2 holds {k} times "
        f"down_proj{rounded}"
    )


def _say_mindspore_experts(moe: ExpertsSpec, destination: str) -> None:
    """Where the experts are in a MindSpore directory, and the command that takes them back."""
    from convert.formats.mindspore import PATTERNS

    top_k = ",".join(f"{name}={k}" for name, k in zip(moe.modalities, moe.top_k, strict=True))
    ranges = "".join(f" --range {name}={a}:{b}" for name, (a, b) in zip(moe.modalities[1:], moe.ranges, strict=True))
    print(
        f"{'experts':12} {moe.num_experts}, in {destination}/{PATTERNS}; SciMind's code has k and token ids fixed: 14 "
        "of 16, and 2 from token 32000 on"
    )
    patterns = shlex.quote(f"{destination}/{PATTERNS}")
    print(
        f"{'back':12} convert moefy {shlex.quote(destination)} MOE --partition {patterns} --router {moe.router} "
        f"--top-k {top_k}{ranges}"
    )
