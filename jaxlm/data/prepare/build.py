"""The step `build`: documents, records or samples to a token store that `data.train` opens.

tokenise  shard -> part of a store
join      all parts -> the store, in `store/`; KnowLM's files beside it when asked for
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.config.prepare import PrepareConfig
from jaxlm.data.encoding import resolve_ends
from jaxlm.data.mindrecord import SCIMIND_FIELDS, MindRecordWriter, scimind_row
from jaxlm.data.prepare.shards import Bad, Shard, read_documents, read_shard
from jaxlm.data.prepare.split import open_tokenizer
from jaxlm.data.prepare.work import Mark, Phase, Step
from jaxlm.data.records import Record
from jaxlm.data.report import SourceReport
from jaxlm.data.store import knowlm
from jaxlm.data.store.build import Work, join
from jaxlm.data.store.columns import Part, PartWriter
from jaxlm.data.store.source import read_chunks
from jaxlm.data.store.stored import StoredTokens
from jaxlm.data.tokenise import CHARACTERS, RECORDS, Batch, Tokeniser
from jaxlm.data.tokens import Chunk, merged
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

ROWS = 4096  # samples read at a time


def phases(step: Step) -> Iterator[Phase]:
    """One task for each shard, then one for all."""
    yield Phase("tokenise", len(step.shards), tokenise_shard)
    yield Phase("join", 1, join_parts)


def store(step: Step) -> Path:
    """Where the store is written."""
    return step.folder / "store"


def check(config: PrepareConfig) -> None:
    """Finds out before the work what would stop it.

    Raises:
        UserError: no tokenizer, a template that is not there, a length that is too short.
    """
    if config.tokenizer is None:
        raise UserError("tokenizer: build needs one, e.g. --tokenizer models/llama")
    if config.build.sequence_length < 2:
        raise UserError(f"build.sequence_length: {config.build.sequence_length} must be at least 2")
    _, tokenizer = _settings(config)
    if config.build.knowlm and tokenizer.vocab_size > 1 << 16:
        raise UserError(
            f"build.knowlm: KnowLM's store holds ids in 16 bits, and {tokenizer.path} has {tokenizer.vocab_size:,}; "
            "leave it out"
        )
    if not 0 <= config.build.mindrecord <= 1000:
        raise UserError(f"build.mindrecord: {config.build.mindrecord}; give a number of files, 0 to 1000")


def source_names(config: PrepareConfig) -> list[str]:
    """The names of the sources, in order, each once: a source's number in the store is its place."""
    return list(dict.fromkeys(source.name or source.path for source in config.sources))


def _settings(config: PrepareConfig) -> tuple[DataConfig, Tokenizer]:
    assert config.tokenizer is not None
    tokenizer = open_tokenizer(config.tokenizer)
    options = config.build
    data = DataConfig(
        sequence_length=options.sequence_length,
        train_on_inputs=options.train_on_inputs,
        add_bos=options.add_bos,
        add_eos=options.add_eos,
        drop_unknown=options.drop_unknown,
        too_long=options.too_long,
    )
    return resolve_ends(data, tokenizer)[0], tokenizer


# The phases --------------------------------------------------------------------------------------


def tokenise_shard(step: Step, number: int) -> Mark:
    """A shard as part of a store."""
    shard, config = step.shards[number], step.config
    data, tokenizer = _settings(config)
    names = source_names(config)
    bad = Bad(config.max_bad)
    writer = PartWriter(_part(step, number), Work((), data, tokenizer).dtype, with_encoder=False)
    try:
        for source, chunk in _chunks(shard, config, data, tokenizer, bad):
            writer.add(names.index(source), chunk)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    return {"num_examples": writer.examples, "tokens": writer.tokens, "bad": bad.count, "first_bad": bad.first}


def _part(step: Step, number: int) -> Path:
    return step.folder / f"part-{number:05d}"


def _chunks(
    shard: Shard, config: PrepareConfig, data: DataConfig, tokenizer: Tokenizer, bad: Bad
) -> Iterator[tuple[str, Chunk]]:
    """Chunks of tokens, each with the name of its source."""
    if shard.kind == "samples":
        yield from _samples(shard)
    elif shard.kind == "tokens":
        stored = SourceConfig(path=shard.path, format=shard.tokens)  # type: ignore[arg-type]
        shard.check_unchanged()
        yield from ((shard.source, chunk) for chunk in read_chunks(stored, data, tokenizer, None))
        shard.check_unchanged()
    else:
        template = "text" if shard.kind == "part" else shard.template
        tokeniser = Tokeniser([dict(shard.columns) if template != "text" else {}], data, tokenizer, None)
        for source, batch in _batches(shard, template, bad):
            yield source, tokeniser.chunk(batch)


def _batches(shard: Shard, template: str, bad: Bad) -> Iterator[tuple[str, Batch]]:
    """Records of one source, a bounded number at a time."""
    records: Iterable[tuple[str, Record]]
    if template == "text":
        documents = (each for each in read_documents(shard, bad) if each.text.strip())
        records = ((each.source, Record(each.id, {"text": each.text})) for each in documents)
    else:
        records = ((shard.source, record) for record in read_shard(shard, bad))
    for source, group in itertools.groupby(records, lambda pair: pair[0]):
        batch: list[Record] = []
        characters = 0
        for _, record in group:
            batch.append(record)
            characters += sum(len(value) for value in record.data.values() if isinstance(value, str))
            if len(batch) == RECORDS or characters >= CHARACTERS:
                yield source, Batch(0, source, template, "", batch, characters)
                batch, characters = [], 0
        if batch:
            yield source, Batch(0, source, template, "", batch, characters)


def _samples(shard: Shard) -> Iterator[tuple[str, Chunk]]:
    """Samples that the step split has written; those of one document are one record."""
    import pyarrow
    import pyarrow.parquet

    shard.check_unchanged()
    before: str | None = None
    try:
        with pyarrow.parquet.ParquetFile(shard.path) as table:
            for batch in table.iter_batches(ROWS):
                ids = batch.column("input_ids")
                documents, sources = batch.column("id").to_pylist(), batch.column("source").to_pylist()
                offsets = ids.offsets.to_numpy()
                begin = 0
                for source, group in itertools.groupby(sources):
                    end = begin + len(list(group))
                    own = documents[begin:end]
                    begins = [one != other for one, other in zip(own, [before, *own], strict=False)]
                    before = own[-1]
                    yield (
                        source,
                        _sample_chunk(
                            source,
                            ids.values.to_numpy()[offsets[begin] : offsets[end]],
                            offsets[begin : end + 1],
                            begins,
                        ),
                    )
                    begin = end
    except pyarrow.ArrowException as error:
        raise UserError(f"{shard.path} is not what split has written: {error}; run split again") from None
    shard.check_unchanged()


def _sample_chunk(source: str, ids: NDArray[np.int32], offsets: NDArray[np.int32], begins: list[bool]) -> Chunk:
    lengths = np.diff(offsets).astype(np.int32)
    mask = np.ones(len(ids), np.bool_)
    mask[offsets[:-1] - offsets[0]] = False  # nothing in the row predicts it
    report = SourceReport(
        source,
        "text",
        "samples of whole sentences",
        records=sum(begins),
        tokens=len(ids),
        trained_tokens=int(mask.sum()),
    )
    return Chunk(ids, mask, lengths, np.array(begins, np.bool_), report)


def join_parts(step: Step, _: int) -> Mark:
    """The store of all parts.

    Raises:
        UserError: nothing is left of the sources.
    """
    data, tokenizer = _settings(step.config)
    parts = [Part(_part(step, number)) for number in range(len(step.shards))]
    names = source_names(step.config)
    reports = [SourceReport(name, "text") for name in names]
    for part in parts:
        for number, report in part.reports.items():
            reports[number] = merged(report, reports[number])
    if not sum(part.examples for part in parts):
        raise UserError(
            f"build: nothing is left of {', '.join(names)}: {sum(report.records for report in reports):,} records were "
            "read, and none has anything to learn"
        )
    settings = {
        f"data.{key}": getattr(data, key) for key in ("sequence_length", "train_on_inputs", "add_bos", "add_eos")
    }
    settings |= {"data.too_long": data.too_long, "data.drop_unknown": data.drop_unknown, "prepared": step.digest}
    join(Work((), data, tokenizer), store(step), parts, reports, settings)
    if step.config.build.knowlm:
        _write_knowlm(step.folder / "knowlm", StoredTokens(store(step)), tokenizer)
    if step.config.build.mindrecord:
        _write_mindrecord(step, StoredTokens(store(step)), tokenizer)
    return {
        "sources": {
            report.path: {
                "read": report.records,
                "kept": report.records - report.dropped,
                "tokens": report.tokens,
                "trained_tokens": report.trained_tokens,
                "cut": report.truncated,
                "split": report.split,
            }
            for report in reports
        },
        "num_examples": sum(part.examples for part in parts),
    }


def _write_mindrecord(step: Step, tokens: StoredTokens, tokenizer: Tokenizer) -> None:
    """Rows as SciMind trains on them."""
    for file in step.folder.glob("data.mindrecord*"):  # of a run that was killed here
        file.unlink()
    options = step.config.build
    # Tokens of modalities follow the others; without any, no id is one.
    first = min((modality.range[0] for modality in tokenizer.modalities), default=tokenizer.vocab_size)
    with MindRecordWriter(step.folder / "data.mindrecord", SCIMIND_FIELDS, shards=options.mindrecord) as writer:
        for number in range(len(tokens)):
            example = tokens[number]
            writer.write(scimind_row(example.input_ids, example.loss_mask, options.sequence_length, first))


def _write_knowlm(prefix: Path, tokens: StoredTokens, tokenizer: Tokenizer) -> None:
    """KnowLM's four files; its types are the sources."""
    if (np.diff(tokens.source) < 0).any():
        raise UserError(
            "build.knowlm: KnowLM's store holds each source in one run; give sources of one name behind one another"
        )
    types = np.unique(tokens.source, return_inverse=True)[1].tolist()
    samples = ((types[number], tokens[number].input_ids) for number in range(len(tokens)))
    temporary = prefix.with_name(f".{prefix.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    knowlm.write_store(temporary / prefix.name, samples, tokenizer.bos_id, tokenizer.eos_id)
    for ending in (".bin", ".dis", ".tmp", ".idx"):
        (temporary / f"{prefix.name}{ending}").replace(prefix.with_suffix(ending))
    temporary.rmdir()


def clean(step: Step) -> None:
    """Removes the parts of a complete store."""
    for number in range(len(step.shards)):
        shutil.rmtree(_part(step, number), ignore_errors=True)


def decides(config: PrepareConfig) -> dict[str, Any]:
    """What decides the store beside what is read and the tokenizer."""
    return {**dataclasses.asdict(config.build), "sources": source_names(config)}
