"""What is in a store, in a step's folder or in files: counts, lengths, samples."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.config.prepare import DocumentsConfig
from jaxlm.data.prepare.shards import Bad, Shard, plan_shards, read_documents
from jaxlm.data.store import knowlm, megatron
from jaxlm.data.store.manifest import MANIFEST
from jaxlm.data.store.stored import StoredTokens
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.tokenizer import Tokenizer, load_tokenizer

_SHOWN = 600  # characters of a sample


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is in it.

    Args:
        what: "examples", "samples" or "documents".
        unit: what lengths count, "tokens" or "characters".
        sources: by source: their number, and the sum of their lengths.
        facts: further lines.
        lengths: by length, the number of them.
        samples: texts with their names.
    """

    what: str
    unit: str
    sources: dict[str, tuple[int, int]]
    facts: dict[str, str]
    lengths: collections.Counter[int]
    samples: list[tuple[str, str]]

    def histogram(self, most: int = 12) -> list[tuple[int, int, int]]:
        """(shortest, longest, number) of up to `most` ranges of lengths; widths double once lengths spread."""
        if not self.lengths:
            return []
        longest = max(self.lengths)
        edges = [0, *(1 << power for power in range(longest.bit_length() + 1))]
        rows = []
        for low, high in itertools.pairwise(edges):
            rows.append((low, high - 1, sum(count for length, count in self.lengths.items() if low <= length < high)))
        while rows and not rows[0][2]:
            del rows[0]
        rows = [row for row in rows if row[0] <= longest]
        if len(rows) > most:
            head = rows[: len(rows) - most + 1]
            rows = [(head[0][0], head[-1][1], sum(row[2] for row in head)), *rows[len(head) :]]
        return rows


def inspect(path: Path, tokenizer: str | None, num_samples: int, text: str = "text") -> Contents:
    """Looks into something.

    Args:
        path: a store (its directory or .idx), a folder that `prepare` wrote, or files of documents.
        tokenizer: turns ids into text; None: the one that the store was made with, if it is still there.
        num_samples: texts shown, spread evenly.
        text: for files: the column of the text, or an expression.

    Raises:
        UserError: it is none of these, or is damaged.
    """
    step = path / "store" if (path / "store" / MANIFEST).is_file() else path
    if (step / MANIFEST).is_file():
        return _stored(step, tokenizer, num_samples)
    if path.suffix == ".idx":
        return _index(path, tokenizer, num_samples)
    if parts := sorted(path.glob("part-*.parquet")):
        return _samples(parts, tokenizer, num_samples)
    if parts := sorted([*path.glob("part-*.jsonl"), *path.glob("part-*.jsonl.zst")]):
        return _documents([Shard(str(part), "part", "") for part in parts], num_samples)
    return _documents(plan_shards([DocumentsConfig(path=str(path), text=text)], 1 << 62), num_samples)


def _picked(number: int, wanted: int) -> list[int]:
    """Numbers spread evenly, the first among them."""
    return sorted({number * place // wanted for place in range(wanted)}) if number else []


def _decoded(tokenizer: Tokenizer | None, ids: NDArray[Any]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids[:100].tolist()))
    return tokenizer.decode(ids.tolist(), skip_special=False)[:_SHOWN]


def _stored(path: Path, tokenizer: str | None, num_samples: int) -> Contents:
    tokens = StoredTokens(path)
    manifest = tokens.manifest
    own = tokenizer or (manifest.tokenizer_path if Path(manifest.tokenizer_path).exists() else None)
    decode = None if own is None else load_tokenizer(own)
    lengths, source = tokens.lengths, np.asarray(tokens.source)
    sources = {
        report.path: (int((source == number).sum()), int(lengths[source == number].sum()))
        for number, report in enumerate(manifest.reports())
    }
    facts = {
        "documents": f"{manifest.documents:,}",
        "trained tokens": f"{manifest.trained_tokens:,}",
        "dtype": manifest.dtype,
        "tokenizer": f"{manifest.tokenizer_path} ({manifest.vocab_size:,} ids)",
    }
    samples = [
        (f"example {number}", _decoded(decode, tokens[number].input_ids))
        for number in _picked(len(tokens), num_samples)
    ]
    return Contents("examples", "tokens", sources, facts, _counted(lengths), samples)


def _index(path: Path, tokenizer: str | None, num_samples: int) -> Contents:
    with path.open("rb") as file:
        is_megatron = file.read(len(megatron.MAGIC)) == megatron.MAGIC
    index = megatron.read_index(path) if is_megatron else knowlm.read_index(path)
    decode = None if tokenizer is None else load_tokenizer(tokenizer)
    tokens = np.memmap(path.with_suffix(".bin"), index.dtype, "r") if index.tokens else np.zeros(0, index.dtype)
    ends = np.cumsum(index.lengths, dtype=np.int64)
    samples = [
        (f"example {number}", _decoded(decode, tokens[ends[number] - index.lengths[number] : ends[number]]))
        for number in _picked(len(index.lengths), num_samples)
    ]
    facts = {"format": "Megatron-Core" if is_megatron else "KnowLM", "dtype": index.dtype.name}
    sources = {str(path): (len(index.lengths), index.tokens)}
    return Contents("examples", "tokens", sources, facts, _counted(index.lengths), samples)


def _counted(lengths: NDArray[Any]) -> collections.Counter[int]:
    values, counts = np.unique(lengths, return_counts=True)
    return collections.Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _samples(parts: list[Path], tokenizer: str | None, num_samples: int) -> Contents:
    import pyarrow
    import pyarrow.parquet

    own = tokenizer or read_object(parts[0].with_name("plan.json"))["config"]["tokenizer"]
    decode = load_tokenizer(own) if Path(own).exists() else None

    def rows() -> Iterator[tuple[str, str, int, Any]]:
        for part in parts:
            try:
                for batch in pyarrow.parquet.ParquetFile(part).iter_batches(4096):
                    for row in batch.to_pylist():
                        yield row["source"], row["id"], len(row["input_ids"]), row["input_ids"]
            except (pyarrow.ArrowException, KeyError) as error:
                raise UserError(f"{part}: is not what split has written ({error})") from None

    sources, lengths, picked = _walked(rows(), num_samples)
    shown = [(name, _decoded(decode, np.array(ids))) for name, ids in picked]
    return Contents("samples", "tokens", sources, {}, lengths, shown)


def _documents(shards: Iterable[Shard], num_samples: int) -> Contents:
    bad = Bad(1 << 62)
    documents = (document for shard in shards for document in read_documents(shard, bad))
    rows = ((each.source, each.id, len(each.text), each.text) for each in documents)
    sources, lengths, picked = _walked(rows, num_samples)
    facts = {"broken records": f"{bad.count:,}, e.g. {bad.first[0]}"} if bad.count else {}
    return Contents(
        "documents", "characters", sources, facts, lengths, [(name, text[:_SHOWN]) for name, text in picked]
    )


def _walked(
    rows: Iterable[tuple[str, str, int, Any]], num_samples: int
) -> tuple[dict[str, tuple[int, int]], collections.Counter[int], list[tuple[str, Any]]]:
    """Counts by source, lengths, and samples spread over what comes, however much that is."""
    sources: dict[str, tuple[int, int]] = {}
    lengths: collections.Counter[int] = collections.Counter()
    picked: list[tuple[str, Any]] = []
    every = 1
    for number, (source, name, length, value) in enumerate(rows):
        count, total = sources.get(source, (0, 0))
        sources[source] = (count + 1, total + length)
        lengths[length] += 1
        if num_samples and number % every == 0:
            if len(picked) == 2 * num_samples:
                picked, every = picked[::2], 2 * every
            if number % every == 0:
                picked.append((name, value))
    return sources, lengths, [picked[place] for place in _picked(len(picked), min(num_samples, len(picked)))]


def plot(contents: Contents, file: Path) -> None:
    """Draws the lengths to a PNG file."""
    import matplotlib  # takes a moment

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    values = np.array(sorted(contents.lengths))
    weights = [contents.lengths[value] for value in values.tolist()]
    axes.hist(values, bins=min(60, max(1, len(values))), weights=weights, color="#4878a8")
    axes.set_xlabel(f"{contents.unit} of one of the {contents.what}")
    axes.set_ylabel(contents.what)
    axes.set_title(f"{sum(weights):,} {contents.what}, {int(values @ np.array(weights)):,} {contents.unit}")
    figure.tight_layout()
    figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
