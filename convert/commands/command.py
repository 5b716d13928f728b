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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from jaxlm.spec import ExpertsSpec
    from jaxlm.weights.leaves import AdapterSource, LeafSource, ParamSource
    from jaxlm.weights.manifest import Hasher
    from jaxlm.weights.output import Advance

SHARD_SIZE = "5GB"
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


def add_result_format(verb: argparse.ArgumentParser, default: str) -> None:
    verb.add_argument("--format", choices=("hf", "jax"), help=f"of the result (default: {default})")


def with_dtype(source: ParamSource, dtype: str) -> ParamSource:
    """The source as it is ('keep'), or read in another dtype."""
    from jaxlm.weights.leaves import CastSource

    return source if dtype == "keep" else CastSource(source, dtype)


def write_jax(source: ParamSource, destination: str) -> None:
    """Writes a jaxlm directory and says so."""
    from jaxlm.weights.native import write_model

    with writing(source, destination) as (directory, advance):
        write_model(source, directory, advance)
    say_model(source, f"python -m jaxlm.train --config CONFIG --model.path {shlex.quote(destination)}")


def write_model_as(form: str, source: ParamSource, destination: str, shard_size: str | None) -> None:
    """Writes a directory of the format 'hf' or 'jax' and says so."""
    if form == "hf":
        write_hf(source, destination, shard_size)
        return
    if shard_size is not None:
        raise UserError(
            f"--shard-size {shard_size}: is for --format hf; the result is --format jax, which is not cut into weight "
            "files of a size; leave it out"
        )
    write_jax(source, destination)


def write_hf(source: ParamSource, destination: str, shard_size: str | None, layout: str | None = None) -> None:
    """Writes a Hugging Face directory and says so."""
    from convert.formats import hf_experts
    from convert.formats.chat_template import asked_or_name, say_asked, write_asked
    from convert.formats.mixtral import check_mixtral
    from jaxlm.weights.output import parse_size

    size = parse_size(shard_size or SHARD_SIZE)
    layout = hf_experts.hf_layout(source, layout)
    if layout == "mixtral":
        check_mixtral(source)
    asked = asked_or_name(source)
    with writing(source, destination) as (directory, advance):
        hf_experts.write_hf(source, directory, size, advance, layout)
        if asked is not None:
            write_asked(asked, directory)
    say_model(source, f"AutoModelForCausalLM.from_pretrained({json.dumps(destination, ensure_ascii=False)})")
    say_asked(asked, written=True)
    if source.config.experts is not None:
        _say_experts(source.config.experts, destination, layout)


def _say_experts(moe: ExpertsSpec, destination: str, layout: str) -> None:
    """Of a Hugging Face directory: what transformers makes of the experts."""
    from convert.formats.hf_experts import FOLDER

    k = moe.top_k[0]
    if layout != "mixtral":
        print(
            f"{'experts':12} transformers computes all {moe.num_experts} for every token: to it this is a dense model. "
            f"jaxlm reads {destination}/{FOLDER} and chooses, router {moe.router}"
        )
        return
    rounded = "" if k & (k - 1) == 0 else f"; {k} is no power of two, so these are rounded"
    print(
        f"{'experts':12} {moe.num_experts}, of which transformers computes {k} for every token; w2 holds {k} times "
        f"down_proj{rounded}"
    )


class Watch:
    """The `advance` of a run: moves the progress bar, and has finished parts of files hashed on the way."""

    def __init__(self, progress: Progress, hasher: Hasher, sizes: Sequence[int]) -> None:
        self._progress = progress
        self._hasher = hasher
        # Tensors come one after the other, so the bytes written tell how many are done.
        self._ends = list(itertools.accumulate(sizes))
        self._task = progress.add_task("writing", total=sum(sizes), tensors=0, all_tensors=len(sizes))
        self._done = 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress.update(self._task, advance=nbytes, tensors=bisect.bisect_right(self._ends, self._done))

    def final(self, path: Path, end: int | None) -> None:
        """See `jaxlm.weights.output.Watcher`."""
        self._hasher.final(path, end)


@contextlib.contextmanager
def writing(source: LeafSource, destination: str) -> Iterator[tuple[Path, Advance]]:
    """The directory to write into, and what to call with the bytes written.

    Shows bytes, tensors, speed and the time left; leaves a manifest in the directory; ends with a summary.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from jaxlm.weights.leaves import total_bytes
    from jaxlm.weights.manifest import Hasher
    from jaxlm.weights.output import output_directory

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tensors]}/{task.fields[all_tensors]} tensors"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    keep_freed_memory()
    with (
        output_directory(destination, total_bytes(source.leaves)) as directory,
        Hasher(directory) as hasher,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        yield directory, Watch(progress, hasher, _tensor_sizes(source))
        progress.update(progress.task_ids[0], description="checksums")
        files = hasher.finish()
    _say_written(destination, files, time.perf_counter() - started)


def keep_freed_memory() -> None:
    """Has blocks of up to 31 MiB allocated from memory that was freed before, instead of fresh pages for each.

    The C library (glibc) takes the size of the largest piece that was given back to the system as the size from which
    pieces come from the system, so one is given back. A third of the processor time of a conversion is saved.
    """
    import numpy as np

    piece = np.empty(31 << 20, np.uint8)
    del piece


def _tensor_sizes(source: LeafSource) -> list[int]:
    """Bytes of every tensor, layers apart."""
    sizes = []
    for path, leaf in source.leaves.items():
        count = leaf.shape[0] if path.startswith("layers/") else 1
        sizes += [leaf.nbytes // max(1, count)] * count
    return sizes


def _say_written(destination: str, files: dict[str, int], seconds: float) -> None:
    from jaxlm.weights.manifest import MANIFEST
    from jaxlm.weights.output import human

    nbytes = sum(files.values())
    rows = {
        "written": destination,
        "files": f"{len(files)}, {human(nbytes)}, sha256 of each in {MANIFEST}",
        "time": f"{seconds:.1f} s, {human(nbytes / max(seconds, 1e-9))}/s",
        "peak memory": human(_peak_memory()),
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


def say_model(source: ParamSource, following: str) -> None:
    """What the result is, and what to do with it."""
    from jaxlm.models.families import family_of
    from jaxlm.weights.leaves import main_dtype, total_bytes
    from jaxlm.weights.names import num_params
    from jaxlm.weights.output import human

    size, dtype = human(total_bytes(source.leaves)), main_dtype(source.leaves)
    architecture, parameters = family_of(source.config).architecture, num_params(source.config)
    print(f"{'model':12} {architecture}, {parameters:,} parameters, {size} in {dtype}")
    print(f"{'next':12} {following}")


def say_template(source: LeafSource) -> None:
    """Of a result in Meta's or MindSpore's format: the prompt template that it has no place for."""
    from convert.formats.chat_template import asked_or_name, say_asked

    say_asked(asked_or_name(source), written=False)


def say_adapter(adapter: AdapterSource, following: str) -> None:
    """What the result is, and what to do with it."""
    from convert.analysis.describe import describe_lora
    from jaxlm.weights.leaves import main_dtype, total_bytes
    from jaxlm.weights.output import human

    size, dtype = human(total_bytes(adapter.leaves)), main_dtype(adapter.leaves)
    print(f"{'adapter':12} {describe_lora(adapter)}, {size} in {dtype}")
    print(f"{'next':12} {following}")
