"""`convert VERB SOURCE DESTINATION`: the conversions as commands.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from jaxlm.errors import UserError

if TYPE_CHECKING:
    from convert.leaves import AdapterSource, Advance, LeafSource, ParamSource

DTYPES = ("keep", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 2 a mistake in the input."""
    options = _parser().parse_args(arguments)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        options.run(options)
    except UserError as error:
        print(f"convert {options.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"convert {options.verb}: interrupted; nothing was left at the destination", file=sys.stderr)
        return 130
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that the temporary directory is removed.
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert",
        description="Take models and adapters from one format to another. Memory stays bounded, whatever their size; "
        "the destination appears only when it is complete.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = _verb(verbs, "hf-to-jax", _hf_to_jax, "a Hugging Face model becomes a jaxlm model")
    verb.add_argument("source", metavar="SRC", help="directory with config.json and safetensors or .bin weights")
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    _add_dtype(verb)

    verb = _verb(verbs, "jax-to-hf", _jax_to_hf, "a jaxlm model becomes a Hugging Face model")
    verb.add_argument("source", metavar="SRC", help="jaxlm directory, run directory (newest checkpoint) or checkpoint")
    verb.add_argument("destination", metavar="DST", help="Hugging Face directory to create")
    _add_dtype(verb)
    _add_shard_size(verb)

    verb = _verb(verbs, "peft-to-jax", _peft_to_jax, "a PEFT LoRA adapter becomes a jaxlm adapter")
    verb.add_argument("source", metavar="ADAPTER", help="directory with adapter_config.json and adapter_model.*")
    verb.add_argument("destination", metavar="DST", help="jaxlm directory to create")
    verb.add_argument("--base", required=True, metavar="BASE", help="the model it belongs to (any format)")

    verb = _verb(verbs, "jax-to-peft", _jax_to_peft, "a jaxlm adapter becomes a PEFT adapter")
    verb.add_argument("source", metavar="SRC", help="LoRA run directory, one of its checkpoints, or converted adapter")
    verb.add_argument("destination", metavar="DST", help="PEFT directory to create")

    verb = _verb(verbs, "merge", _merge, "fold an adapter into its base model")
    verb.add_argument("base", metavar="BASE", help="the model: Hugging Face or jaxlm")
    verb.add_argument("source", metavar="ADAPTER", help="the adapter: PEFT, jaxlm, or a LoRA run directory")
    verb.add_argument("destination", metavar="OUT", help="directory to create")
    verb.add_argument("--format", choices=("hf", "jax"), help="of the result (default: that of BASE)")
    _add_dtype(verb)
    _add_shard_size(verb)

    from convert.formats_cli import add_format_verbs

    add_format_verbs(verbs)

    verb = _verb(verbs, "inspect", _inspect, "show what a model, adapter or weight file holds")
    verb.add_argument("source", metavar="PATH", help="any model or adapter directory, or a .safetensors or .bin file")
    return parser


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.set_defaults(run=run)
    return verb


def _add_dtype(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dtype", choices=DTYPES, default="keep", help="of the written weights (default: as stored)")


def _add_shard_size(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")


def _with_dtype(source: ParamSource, dtype: str) -> ParamSource:
    from convert.leaves import CastSource

    return source if dtype == "keep" else CastSource(source, dtype)


def _hf_to_jax(options: argparse.Namespace) -> None:
    from convert.hf import HfSource
    from convert.source import open_model

    source = open_model(options.source)
    if not isinstance(source, HfSource):
        raise UserError(f"{options.source}: is a jaxlm model already")
    _write_jax(_with_dtype(source, options.dtype), options.destination)


def _jax_to_hf(options: argparse.Namespace) -> None:
    from convert.hf import HfSource
    from convert.source import open_model

    source = open_model(options.source)
    if isinstance(source, HfSource):
        raise UserError(f"{options.source}: is a Hugging Face model already")
    _write_hf(_with_dtype(source, options.dtype), options.destination, options.shard_size)


def _peft_to_jax(options: argparse.Namespace) -> None:
    from convert.native import write_adapter
    from convert.peft import PeftSource
    from convert.source import open_adapter, open_model

    adapter = open_adapter(options.source, open_model(options.base).config)
    if not isinstance(adapter, PeftSource):
        raise UserError(f"{options.source}: is a jaxlm adapter already")
    with _writing(adapter, options.destination) as (directory, advance):
        write_adapter(adapter, directory, options.base, advance)
    _say_adapter(adapter, options.destination, f"convert merge {options.base} {options.destination} OUT")


def _jax_to_peft(options: argparse.Namespace) -> None:
    from convert.peft import PeftSource, write_peft
    from convert.source import is_adapter, open_adapter

    if is_adapter(options.source) and (Path(options.source) / "adapter_config.json").is_file():
        raise UserError(f"{options.source}: is a PEFT adapter already")
    adapter = open_adapter(options.source)
    assert not isinstance(adapter, PeftSource)
    with _writing(adapter, options.destination) as (directory, advance):
        write_peft(adapter, directory, advance)
    _say_adapter(adapter, options.destination, f'PeftModel.from_pretrained(base, "{options.destination}")')


def _merge(options: argparse.Namespace) -> None:
    from convert.hf import HfSource
    from convert.merge import MergedSource
    from convert.source import open_adapter, open_model

    base = open_model(options.base)
    dtype = None if options.dtype == "keep" else options.dtype
    merged = MergedSource(base, open_adapter(options.source, base.config), dtype)
    if (options.format or ("hf" if isinstance(base, HfSource) else "jax")) == "hf":
        _write_hf(merged, options.destination, options.shard_size)
    else:
        _write_jax(merged, options.destination)


def _write_jax(source: ParamSource, destination: str) -> None:
    from convert.native import write_model

    with _writing(source, destination) as (directory, advance):
        write_model(source, directory, advance)
    _say_model(source, destination, f"python -m jaxlm.train --config CONFIG --model.path {destination}")


def _write_hf(source: ParamSource, destination: str, shard_size: str) -> None:
    from convert.hf import write_hf
    from convert.output import parse_size

    size = parse_size(shard_size)
    with _writing(source, destination) as (directory, advance):
        write_hf(source, directory, size, advance)
    _say_model(source, destination, f'AutoModelForCausalLM.from_pretrained("{destination}")')


@contextlib.contextmanager
def _writing(source: LeafSource, destination: str) -> Iterator[tuple[Path, Advance]]:
    """The directory to write into, and what to call with the bytes written (a progress bar)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from convert.leaves import total_bytes
    from convert.output import output_directory

    columns = TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with (
        output_directory(destination, total_bytes(source.leaves)) as directory,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("", total=total_bytes(source.leaves))
        yield directory, lambda nbytes: progress.advance(task, nbytes)


def _say_model(source: ParamSource, destination: str, following: str) -> None:
    from convert.leaves import main_dtype, total_bytes
    from convert.output import human

    size, dtype = human(total_bytes(source.leaves)), main_dtype(source.leaves)
    parameters = source.config.num_params()
    print(f"{destination}: {source.config.architecture}, {parameters:,} parameters, {size} in {dtype}")
    print(f"next: {following}")


def _say_adapter(adapter: AdapterSource, destination: str, following: str) -> None:
    from convert.leaves import main_dtype, total_bytes
    from convert.output import human

    size, dtype = human(total_bytes(adapter.leaves)), main_dtype(adapter.leaves)
    print(f"{destination}: {_describe_lora(adapter)}, {size} in {dtype}")
    print(f"next: {following}")


def _describe_lora(adapter: AdapterSource) -> str:
    lora = adapter.lora
    kind = "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA"
    saved = f", saved in full: {' '.join(lora.modules_to_save)}" if lora.modules_to_save else ""
    return f"{kind} rank {lora.rank}, alpha {lora.alpha:g}, on {' '.join(lora.targets)}{saved}"


def _inspect(options: argparse.Namespace) -> None:
    from convert.peft import find_adapter_weights
    from convert.source import is_adapter, open_adapter, open_model
    from convert.tensors import read_tensors

    path = Path(options.source)
    rows: list[tuple[str, tuple[int, ...], str, int]]
    if path.is_file() or (is_adapter(path) and (path / "adapter_config.json").is_file()):
        tensors = read_tensors(path if path.is_file() else find_adapter_weights(path))
        print("tensors in the file" if path.is_file() else "PEFT adapter")
        rows = [(name, tensor.shape, tensor.dtype.name, tensor.nbytes) for name, tensor in tensors.items()]
    else:
        source: LeafSource
        if is_adapter(path):
            source = adapter = open_adapter(path)
            print(f"{source.path}: jaxlm adapter: {_describe_lora(adapter)}, base {adapter.base}")
        else:
            source = model = open_model(path)
            c = model.config
            print(
                f"{source.path}: {c.architecture}: L {c.num_layers}, D {c.hidden_size}, F {c.intermediate_size}, "
                f"H {c.num_heads}, K {c.num_kv_heads}, h {c.head_dim}, V {c.vocab_size}, "
                f"rope {c.rope.rope_type} {c.rope.rope_theta:g}, window {c.sliding_window}, "
                f"tied {c.tie_word_embeddings}; {c.num_params():,} parameters"
            )
        rows = [(name, leaf.shape, leaf.dtype.name, leaf.nbytes) for name, leaf in source.leaves.items()]
        if source.tokenizer_files:
            print("tokenizer: " + " ".join(file.name for file in source.tokenizer_files))
    _print_table(rows)


def _print_table(rows: list[tuple[str, tuple[int, ...], str, int]]) -> None:
    from convert.output import human

    width = max((len(name) for name, *_ in rows), default=0)
    for name, shape, dtype, nbytes in rows:
        print(f"{name:{width}}  {'x'.join(map(str, shape)) or 'scalar':>20}  {dtype:9} {human(nbytes):>9}")
    print(f"{len(rows)} tensors, {human(sum(row[3] for row in rows))}")
