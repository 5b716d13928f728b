"""Where records come from, and how they become rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxlm.locate import NameOrPath, ReadPath, WrittenPath


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data source.

    Args:
        path: file, folder, glob, directory written by HF datasets' save_to_disk, or a store of tokens (its .idx or its
            directory); or an address of one that fsspec reads (s3://, gs://, https://), or
            hf://datasets/owner/name/file.
        format: json, jsonl, csv, parquet, text or hf; megatron or knowlm for a store, or mindrecord, whose tokens
            are taken as they are; auto goes by the file name.
        template: how a record becomes text: a template name or JSON file, `chat` for the tokenizer's own
            chat template, `text` for plain text; auto goes by the columns found.
        weight: how often a record is seen per epoch: 2.0 twice, 0.5 a seeded half.
        tokens: tokens of this source in an epoch, e.g. 1.5e9, instead of a weight.
        max_passes: the source is left out of a run once it has been seen this often; null: never.
        columns: the template's field names mapped to the columns of this file, e.g. {instruction: question,
            output: answer}.
        split: split of an HF datasets directory that has several.
        documents: for text files, whether a document is a line or a whole file.
        limit: use only this number of records, the first ones.
    """

    path: ReadPath
    format: Literal["auto", "json", "jsonl", "csv", "parquet", "text", "hf", "megatron", "knowlm", "mindrecord"] = (
        "auto"
    )
    template: NameOrPath = "auto"
    weight: float = 1.0
    tokens: float | None = None
    max_passes: float | None = None
    columns: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    documents: Literal["line", "file"] = "line"
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How sources share a run, other than by a weight of each. Give per_batch or alpha.

    Args:
        per_batch: rows of each source in every step's batch, in the order of data.train, e.g. [424, 80]; together
            train.global_batch_size. Each source is packed and shuffled by itself.
        epoch: with per_batch, what an epoch is: until the longest source is through, while others begin again, or
            until the shortest is.
        last_rows: with per_batch, rows at the end of a pass over a source that do not fill its share of a batch: fill
            it up with the next pass, or drop them.
        alpha: sources have shares in proportion to weight x tokens^alpha: 1 as they are, 0 all the same. It is one
            over the temperature.
    """

    per_batch: tuple[int, ...] = ()
    epoch: Literal["longest", "shortest"] = "longest"
    last_rows: Literal["fill", "drop"] = "fill"
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how records become rows.

    Args:
        train: the sources.
        validation: a number of records split off the training sources (seeded), a share of them (0.1), or a list of
            sources.
        mixing: how sources share a run; absent: by the weight of each.
        records: what a record is: answers to learn, pairs of a chosen and a rejected answer, or labelled answers;
            `objective` sets it.
        sequence_length: tokens of a row.
        encoder_length: tokens of a row of questions, for a model with an encoder, whose rows of answers have
            sequence_length; null: as many.
        packing: first_fit (or true) puts whole records into rows with segment ids; group_texts concatenates
            and cuts like HF's run_clm; false pads one record a row.
        train_on_inputs: also learn the prompt, not only the answer.
        add_bos: begin each record with the tokenizer's bos token; null: if the tokenizer itself does so. A chat
            template has its own.
        add_eos: end each answer and each document with the tokenizer's eos token, and learn it; null: if it has one.
        allow_no_end: train also when nothing that ends an answer is trained.
        date: day and time (2026-11-27 12:00) for chat templates that ask for it; null: when the run was
            first started.
        drop_unknown: leave out records with a token that the tokenizer does not know, as SciMind does.
        too_long: what to do with a record longer than a row: truncate, split into pieces, drop (each reported) or
            error; auto splits plain text and truncates the rest.
        workers: loader processes; 0 loads in a thread.
        cache: where sources are tokenised once for all later starts: auto, below the user's cache directory
            ($JAXLM_CACHE_DIR, or jaxlm in $XDG_CACHE_HOME) and only for more than 16 MiB of files; a directory, for
            sources of any size; none tokenises into memory at every start.
    """

    train: tuple[SourceConfig, ...] = ()
    validation: int | float | tuple[SourceConfig, ...] = 0
    mixing: MixingConfig | None = None
    records: Literal["answers", "pairs", "labelled"] = "answers"
    sequence_length: int = 512
    encoder_length: int | None = None
    packing: bool | Literal["first_fit", "group_texts"] = True
    train_on_inputs: bool = False
    add_bos: bool | None = None
    add_eos: bool | None = None
    allow_no_end: bool = False
    date: str | None = None
    drop_unknown: bool = False
    too_long: Literal["auto", "truncate", "split", "drop", "error"] = "auto"
    workers: int = 0
    cache: WrittenPath = "auto"

    def row_length(self, field: str) -> int:
        """Tokens of a row of a batch's field: those of the encoder begin with 'encoder_'."""
        return (self.encoder_length or self.sequence_length) if field.startswith("encoder_") else self.sequence_length

    @property
    def packing_mode(self) -> str:
        """One of 'first_fit', 'group_texts', 'none'."""
        if isinstance(self.packing, bool):
            return "first_fit" if self.packing else "none"
        return self.packing

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents, told apart by segment ids."""
        return self.packing_mode == "first_fit"
