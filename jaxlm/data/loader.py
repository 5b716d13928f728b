"""The data of a run: `build_data` reads, tokenises and splits it; `Data` gives the batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.batches import Batches, BatchSource, EvaluationSource
from jaxlm.data.encoding import resolve_ends
from jaxlm.data.examples import Progress, build_examples, check_examples
from jaxlm.data.mixing import SourceShare, source_limits, source_names, source_weights
from jaxlm.data.order import BatchOrder, EpochOrder, Order
from jaxlm.data.packing import Plan, written_out
from jaxlm.data.planner import PACKING_VERSION, Documents, Planner, packing_version, planners_of_sources
from jaxlm.data.report import Report, SourceReport, check_ends
from jaxlm.data.split import count_split, drawn_examples
from jaxlm.data.store.build import Work
from jaxlm.data.store.cache import Cache
from jaxlm.data.tokenise import check_streams
from jaxlm.data.tokens import Tokens
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """Training and validation data of a run; made by `build_data`.

    Args:
        config: the data section of the run's configuration, with what it leaves to the tokenizer decided.
        seed: of the order.
        train: the training examples.
        validation: the validation examples, or None.
        report: counts per source.
        fingerprint: hash of all tokens and of everything that decides their order.
        ranges: token ids of each modality but text, see `BatchSource`.
        digests: of the tokens alone: training, validation ('none' where there are none).
        packing_version: that the run began with.
        validation_columns: further fields of the validation batches, see `BatchSource.with_columns`.
    """

    config: DataConfig
    seed: int
    train: Tokens
    validation: Tokens | None
    report: Report
    fingerprint: str
    ranges: tuple[tuple[int, int], ...] = ()
    digests: tuple[str, ...] = ()
    packing_version: int = PACKING_VERSION
    validation_columns: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)

    def fingerprint_1(self, section: Mapping[str, Any], seed: int) -> str:
        """As version 1 of checkpoints has it: with all keys of their data section, as written down then."""
        return _hash({**section, "workers": 0, "seed": seed}, self.digests)

    def with_packing(self, version: int) -> Data:
        """The same data, in rows as this version of packing fills them.

        Raises:
            UserError: it is newer than what is known here.
        """
        if version > PACKING_VERSION:
            raise UserError(
                f"data: the run was begun with version {version} of packing, this jaxlm knows {PACKING_VERSION}; "
                "update it, or choose another output_dir"
            )
        if version == self.packing_version:
            return self
        fingerprint = _fingerprint(self.config, self.seed, self.digests, version)
        return dataclasses.replace(self, fingerprint=fingerprint, packing_version=version)

    @cached_property
    def source_tokens(self) -> tuple[int, ...]:
        """Tokens of each training source."""
        return tuple(self._documents.tokens(len(self.config.train)).tolist())

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """The training sources as reports call them."""
        return tuple(source_names(self.config))

    @cached_property
    def _documents(self) -> Documents:
        return Documents(self.train, self.config.sequence_length)

    @cached_property
    def _planner(self) -> Planner:
        config = self.config
        weights, limits = source_weights(config, self.source_tokens), source_limits(config)
        encoder_length = config.row_length("encoder_ids")
        mode, version = config.packing_mode, self.packing_version
        return Planner(self._documents, weights, mode, encoder_length, self.seed, version, limits)

    def train_rows(self, epoch: int) -> Plan:
        """The rows of an epoch, written out."""
        return written_out(self._planner(epoch))

    def _order(self, batch: int, epochs: float, steps: int | None, known: Mapping[str, Any] | None) -> Order:
        mixing = self.config.mixing
        if mixing is None or not mixing.per_batch:
            return EpochOrder(self._planner, batch, epochs, steps, known)
        if self.train.encoder_offsets is not None and self.config.packed:
            raise UserError(
                "data.mixing.per_batch: rows of several questions and answers differ in number from pass to pass; set "
                "data.packing: false"
            )
        if sum(mixing.per_batch) != batch:
            raise UserError(
                f"data.mixing.per_batch: {list(mixing.per_batch)} are {sum(mixing.per_batch)} rows, but "
                f"train.global_batch_size is {batch}; make the two the same"
            )
        return BatchOrder(
            planners_of_sources(self._planner, len(self.config.train)),
            self.source_names,
            mixing.per_batch,
            drop=mixing.last_rows == "drop",
            longest=mixing.epoch == "longest",
            epochs=epochs,
            steps=steps,
            most=source_limits(self.config),
        )

    def shares(self, batches: Batches) -> list[SourceShare]:
        """What a run takes of each source, as it is planned."""
        passes = batches.order.passes(len(batches))
        columns = zip(self.source_names, self.source_tokens, passes, strict=True)
        return [SourceShare(*each) for each in columns]

    def train_batches(
        self,
        global_batch_size: int,
        accumulation: int = 1,
        epochs: float = 1.0,
        steps: int | None = None,
        local_rows: Sequence[int] | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> Batches:
        """Batches of [A, B_local, T], see `BatchSource`.

        Args:
            global_batch_size: rows of an optimizer step over all hosts: A * B_global.
            accumulation: A, micro-steps of an optimizer step.
            epochs: passes over the data; ignored when steps is given.
            steps: optimizer steps.
            local_rows: rows of a micro-step that this host has; None for all.
            known: `counters` of an earlier start on the same data.

        Raises:
            UserError: sizes that do not divide, or nothing to run.
        """
        if global_batch_size < 1 or global_batch_size % accumulation:
            raise UserError(
                f"train.global_batch_size is {global_batch_size}, which {accumulation} accumulation steps do not divide"
            )
        if steps is None and not epochs > 0:
            raise UserError(f"train.epochs is {epochs}; it must be above 0")
        source = BatchSource(
            self.train,
            self._order(global_batch_size, epochs, steps, known),
            self.config.sequence_length,
            rows=global_batch_size // accumulation,
            accumulation=accumulation,
            local_rows=local_rows,
            ranges=self.ranges,
            encoder_length=self.config.row_length("encoder_ids"),
            num_sources=len(self.config.train),
        )
        return Batches(source, self.config.workers)

    def eval_batches(self, batch_size: int, local_rows: Sequence[int] | None = None) -> Batches:
        """Batches of [B_local, T] with every validation row once; the last is filled with empty rows.

        Args:
            batch_size: rows of a batch over all hosts.
            local_rows: rows of a batch that this host has; None for all.
        """
        if self.validation is None:
            raise AssertionError("there are no validation data")
        return self.every_row(self.validation, batch_size, local_rows).with_columns(self.validation_columns)

    def every_row(self, examples: Tokens, batch_size: int, local_rows: Sequence[int] | None = None) -> Batches:
        """As `eval_batches`, of these examples."""
        weights = (1.0,) * (int(examples.source.max()) + 1)
        config, encoder_length = self.config, self.config.row_length("encoder_ids")
        # Rows of validation stay those of version 1, so that figures of older runs can be compared to the last bit.
        documents = Documents(examples, config.sequence_length)
        planner = Planner(documents, weights, config.packing_mode, encoder_length, self.seed, version=1)
        source = BatchSource(
            examples,
            EpochOrder(planner, batch_size),
            config.sequence_length,
            rows=batch_size,
            local_rows=local_rows,
            ranges=self.ranges,
            encoder_length=encoder_length,
        )
        return Batches(EvaluationSource(source), 0)


def build_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    vocab_size: int,
    max_positions: int,
    progress: Progress | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    start_id: int | None = None,
    cache: Cache | None = None,
) -> Data:
    """Reads, tokenises and splits the data of a run.

    Args:
        config: the data section.
        tokenizer: the tokenizer.
        seed: of the split and of the order.
        vocab_size: rows of the model's embedding.
        max_positions: the longest row that the model takes.
        progress: called with a source's path and the number of its records read so far.
        ranges: token ids of each modality but text, in the order of the model's; None: the tokenizer's.
        start_id: for a model with an encoder: the token that its decoder begins with.
        cache: where large sources are tokenised into stores; None: all of them into memory.

    Raises:
        UserError: anything wrong with the configuration or the data.
    """
    if not config.train:
        raise UserError("data.train is empty; give at least one source, e.g. data.train: [{path: data.json}]")
    if not 2 <= config.sequence_length <= max_positions:
        raise UserError(
            f"data.sequence_length is {config.sequence_length}; it must be at least 2 and at most "
            f"the model's max_position_embeddings, {max_positions}"
        )
    for source in config.train:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise UserError(f"data.train: weight of {source.path} is {source.weight}; it must be above 0")
    if isinstance(config.validation, (int, float)):
        share = isinstance(config.validation, float)
        if not (0 <= config.validation < 1 if share else config.validation >= 0):
            raise UserError(
                f"data.validation is {config.validation}; it must be a number of records (e.g. 2000), a share of them "
                "between 0 and 1 (e.g. 0.1), or a list of sources"
            )
    config, note = resolve_ends(config, tokenizer)

    def read(
        sources: Sequence[SourceConfig], held_out: int | float
    ) -> tuple[Tokens, Tokens | None, tuple[SourceReport, ...], tuple[SourceReport, ...]]:
        if cache is None or not cache.wants(sources):
            examples, reports = build_examples(sources, config, tokenizer, vocab_size, progress, start_id)
            if not held_out:
                return examples, None, reports, ()
            drawn = drawn_examples(examples, held_out, seed)
            reports, others = count_split(reports, examples, drawn)
            taken = (examples.take(np.flatnonzero(part)) for part in (~drawn, drawn))
            return next(taken), next(taken), reports, others
        check_streams(config, start_id)
        opened = cache.open(Work(tuple(sources), config, tokenizer, start_id), held_out, seed)
        parts = [part for part in (opened.train, opened.validation) if part is not None]
        largest = max(part.manifest.largest_id for part in parts)
        check_examples(opened.train, largest, opened.reports, tokenizer, vocab_size)
        return opened.train, opened.validation, opened.reports, opened.validation_reports

    drawn_share: int | float = config.validation if isinstance(config.validation, (int, float)) else 0
    train, validation, reports, validation_reports = read(config.train, drawn_share)
    check_ends(reports, config, tokenizer)
    if not isinstance(config.validation, (int, float)) and config.validation:
        validation, _, validation_reports, _ = read(config.validation, 0)
    digests = tuple("none" if examples is None else examples.digest() for examples in (train, validation))
    if ranges is None:
        ranges = [modality.range for modality in tokenizer.modalities]
    chats = all(report.template == "chat" for report in reports)
    notes = ["each record begins and ends as the chat template writes it" if chats else note]
    if tokenizer.asks_for_date and tokenizer.date and any(r.template == "chat" for r in reports):
        notes.append(
            f"date: the chat template is told {tokenizer.date.isoformat(sep=' ')} (data.date), to the run's end"
        )
    report = Report(reports, validation_reports, tuple(notes))
    version = packing_version(config.packing_mode, start_id is not None)
    fingerprint = _fingerprint(config, seed, digests, version)
    return Data(config, seed, train, validation, report, fingerprint, tuple(ranges), digests, version)


# What of the data section shows in the tokens themselves, or in neither tokens nor order.
_IN_TOKENS = {
    "train",
    "validation",
    "train_on_inputs",
    "add_bos",
    "add_eos",
    "allow_no_end",
    "cache",
    "date",
    "drop_unknown",
    "too_long",
    "workers",
    "mixing",  # goes in by itself
}


def _fingerprint(config: DataConfig, seed: int, digests: Sequence[str], packing: int) -> str:
    """Hash of all tokens and of what decides their order.

    Keys that have their default value are left out, so that a key that is newer than a checkpoint changes nothing.
    """
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _IN_TOKENS and getattr(config, field.name) != field.default
    }
    if config.mixing is not None:
        given["mixing"] = dataclasses.asdict(config.mixing)
    if packing > 1:
        given["packing_version"] = packing
    for name, default in (("weight", 1.0), ("tokens", None), ("max_passes", None)):
        values = [getattr(source, name) for source in config.train]
        if set(values) != {default}:
            given["weights" if name == "weight" else name] = values
    return _hash({**given, "seed": seed}, digests)


def _hash(settings: Mapping[str, Any], digests: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in digests:
        digest.update(part.encode())
    return digest.hexdigest()
