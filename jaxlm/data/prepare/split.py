"""The step `split`: documents to samples of whole sentences, as token ids in Parquet files."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.config.prepare import PrepareConfig
from jaxlm.data.prepare.counts import Counts
from jaxlm.data.prepare.sentences import Language, is_cjk, splitter
from jaxlm.data.prepare.shards import Bad, Document, read_documents
from jaxlm.data.prepare.windows import Cutter
from jaxlm.data.prepare.work import Mark, Phase, Step, replacing
from jaxlm.errors import UserError
from jaxlm.sums import file_sha256
from jaxlm.tokenizer import Encoding, Tokenizer, load_tokenizer

_ROWS = 4096  # samples of a row group


class Sample(NamedTuple):
    """Tokens of neighbouring sentences of a document."""

    ids: list[int]
    document: Document


def phases(step: Step) -> Iterator[Phase]:
    """One task for each shard."""
    yield Phase("split", len(step.shards), run)


def part(step: Step, number: int) -> Path:
    """The samples that a task writes."""
    return step.folder / f"part-{number:05d}.parquet"


def check(config: PrepareConfig) -> None:
    """Finds out before the work what would stop it.

    Raises:
        UserError: no tokenizer, one without an end of text, a length that is too short, a library that is missing.
    """
    if config.split.length < 2:
        raise UserError(f"split.length: {config.split.length} must be at least 2")
    if not 1 <= config.split.min_tokens <= config.split.length:
        raise UserError(
            f"split.min_tokens: {config.split.min_tokens} must be between 1 and split.length, {config.split.length}"
        )
    if config.split.encode == "document" and not config.split.keep_newlines:
        raise UserError("split.keep_newlines: false cuts texts apart, which needs split.encode: sentence")
    _cutter(config)
    if any(source.language in ("auto", "english") for source in config.sources):
        splitter("english", config.split.keep_newlines, config.split.delimiters)("One. Two.")


def run(step: Step, number: int) -> Mark:
    """Splits a shard."""
    bad, counts = Bad(step.config.max_bad), Counts(step.config.filter.examples)
    samples = split_documents(read_documents(step.shards[number], bad), step.config, counts)
    facts = _write(part(step, number), samples)
    return {**facts, "bad": bad.count, "first_bad": bad.first, **counts.to_dict()}


def split_documents(documents: Iterable[Document], config: PrepareConfig, counts: Counts) -> Iterator[Sample]:
    """The samples of documents, in order; what happened is counted.

    Raises:
        UserError: as `check`.
    """
    cutter, options = _cutter(config), config.split
    for document in documents:
        counts.read(document)
        language = _language(document)
        split = splitter(language, options.keep_newlines, options.delimiters)
        samples = cutter.samples(document.text, split, language)
        long_enough = [sample for sample in samples if len(sample) >= options.min_tokens]
        counts.add(document.source, "samples", len(long_enough))
        counts.add(document.source, "tokens", sum(map(len, long_enough)))
        counts.add(document.source, "short_samples", len(samples) - len(long_enough))
        if not samples:
            counts.take(document, "empty")
        elif not long_enough:
            counts.take(document, f"fewer than {options.min_tokens} tokens")
        else:
            counts.keep(document)
        yield from (Sample(sample, document) for sample in long_enough)


def _language(document: Document) -> Language:
    if document.language in ("english", "chinese", "code"):
        return document.language  # type: ignore[return-value]
    return "chinese" if is_cjk(document.text) else "english"


def _cutter(config: PrepareConfig) -> Cutter:
    if config.tokenizer is None:
        raise UserError("tokenizer: split needs one, e.g. --tokenizer models/llama/tokenizer.model")
    tokenizer = open_tokenizer(config.tokenizer)

    def encode(texts: Sequence[str]) -> list[Encoding]:
        return tokenizer.encode_batch(texts, special_tokens=False)

    released = config.split.delimiters == "released"
    return Cutter(
        encode,
        bos=tuple(tokenizer.opening),
        eos=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        space=tokenizer.id_of("▁"),
        length=config.split.length,
        whole=config.split.encode == "document",
        overlap=config.split.overlap,
        recut=not released,
    )


@functools.lru_cache(maxsize=1)
def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer, once for all tasks of a process."""
    return load_tokenizer(path)


def _write(path: Path, samples: Iterable[Sample]) -> Mark:
    """A Parquet file of `input_ids`, `id` and `source`; its facts as `write_documents` gives them."""
    import pyarrow  # takes a moment, and --help need not wait for it
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            ("input_ids", pyarrow.list_(pyarrow.int32())),
            ("id", pyarrow.string()),
            ("source", pyarrow.string()),
        ]
    )
    totals: collections.Counter[str] = collections.Counter(samples=0, tokens=0)
    with replacing(path) as temporary:
        with pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            rows = iter(samples)
            while batch := list(itertools.islice(rows, _ROWS)):
                totals.update(samples=len(batch), tokens=sum(len(sample.ids) for sample in batch))
                columns = {
                    "input_ids": [sample.ids for sample in batch],
                    "id": [sample.document.id for sample in batch],
                    "source": [sample.document.source for sample in batch],
                }
                writer.write_table(pyarrow.table(columns, schema))
        facts = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
    return {**totals, **facts}
