"""The data of a run: `build_data` reads, tokenises and splits it; `Data` gives the batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.batches import Batches, BatchSource, EvaluationSource
from jaxlm.data.encoding import resolve_ends
from jaxlm.data.examples import Progress, build_examples, check_examples
from jaxlm.data.packing import Plan, epoch_order, plan_rows
from jaxlm.data.report import Report, SourceReport, check_ends
from jaxlm.data.split import count_split, drawn_examples
from jaxlm.data.store.build import Work
from jaxlm.data.store.cache import Cache
from jaxlm.data.tokenise import check_streams
from jaxlm.data.tokens import Tokens
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Planner:
    """Rows by epoch; a class and not a closure, so that it can be sent to worker processes."""

    examples: Tokens
    weights: tuple[float, ...]
    mode: str
    sequence_length: int
    encoder_length: int
    seed: int

    def __call__(self, epoch: int) -> Plan:
        order, offsets = (
            epoch_order(self.examples.source, self.weights, self.seed, epoch),
            self.examples.encoder_offsets,
        )
        encoder = None if offsets is None else (offsets, self.encoder_length)
        return plan_rows(self.mode, self.examples.offsets, order, self.sequence_length, self.seed, epoch, encoder)


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
    """

    config: DataConfig
    seed: int
    train: Tokens
    validation: Tokens | None
    report: Report
    fingerprint: str
    ranges: tuple[tuple[int, int], ...] = ()
    digests: tuple[str, ...] = ()

    def fingerprint_1(self, section: Mapping[str, Any], seed: int) -> str:
        """As version 1 of checkpoints has it: with all keys of their data section, as written down then."""
        return _hash({**section, "workers": 0, "seed": seed}, self.digests)

    def _planner(self, examples: Tokens, weights: tuple[float, ...]) -> _Planner:
        config, encoder_length = self.config, self.config.row_length("encoder_ids")
        return _Planner(examples, weights, config.packing_mode, config.sequence_length, encoder_length, self.seed)

    def train_rows(self, epoch: int) -> Plan:
        """The rows of an epoch."""
        return self._planner(self.train, tuple(source.weight for source in self.config.train))(epoch)

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
            self._planner(self.train, tuple(source.weight for source in self.config.train)),
            self.config.sequence_length,
            rows=global_batch_size // accumulation,
            accumulation=accumulation,
            epochs=epochs,
            steps=steps,
            local_rows=local_rows,
            ranges=self.ranges,
            known=known,
            encoder_length=self.config.row_length("encoder_ids"),
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
        weights = (1.0,) * (int(self.validation.source.max()) + 1)
        source = BatchSource(
            self.validation,
            self._planner(self.validation, weights),
            self.config.sequence_length,
            rows=batch_size,
            local_rows=local_rows,
            ranges=self.ranges,
            encoder_length=self.config.row_length("encoder_ids"),
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
            parts = (examples.take(np.flatnonzero(part)) for part in (~drawn, drawn))
            return next(parts), next(parts), reports, others
        check_streams(config, start_id)
        stored, other = cache.open(Work(tuple(sources), config, tokenizer, start_id), held_out, seed)
        reports = stored.manifest.reports()
        check_examples(stored, stored.manifest.largest_id, reports, tokenizer, vocab_size)
        return stored, other, reports, other.manifest.reports() if other is not None else ()

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
    return Data(config, seed, train, validation, report, _fingerprint(config, seed, digests), tuple(ranges), digests)


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
}


def _fingerprint(config: DataConfig, seed: int, digests: Sequence[str]) -> str:
    """Hash of all tokens and of what decides their order.

    Keys that have their default value are left out, so that a key that is newer than a checkpoint changes nothing.
    """
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _IN_TOKENS and getattr(config, field.name) != field.default
    }
    weights = [source.weight for source in config.train]
    if set(weights) != {1.0}:
        given["weights"] = weights
    return _hash({**given, "seed": seed}, digests)


def _hash(settings: Mapping[str, Any], digests: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in digests:
        digest.update(part.encode())
    return digest.hexdigest()
