"""Preparing data: documents to filtered, deduplicated, split samples and token stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxlm.locate import NameOrPath, ReadPath, WrittenPath

Action = Literal["keep", "mask", "drop"]


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """One source of documents.

    Args:
        path: file, folder, glob, or directory written by HF datasets' save_to_disk; for build also a store of
            tokens. Or an address that fsspec reads (s3://, gs://), or hf://datasets/owner/name/file.
        name: what reports call it; null: its path. Sources of one name are counted together.
        format: json, jsonl, csv, parquet, text or hf, megatron or knowlm for a store, mindrecord; auto goes by the file
            name.
        split: split of an HF datasets directory that has several.
        documents: for text files, whether a document is a line or a whole file.
        text: the column that holds the text, or an expression with columns in braces, e.g. "{title}\\n{abstract}".
        language: the rule by which `split` finds sentences: english, chinese or code (lines); auto asks each document
            how much of it is written in Chinese characters.
        template: for build as the first step: how a record becomes text, as in data.train; text takes the key `text`.
        columns: the template's field names mapped to the columns of this file.
    """

    path: ReadPath
    name: str | None = None
    format: Literal["auto", "json", "jsonl", "csv", "parquet", "text", "hf", "megatron", "knowlm", "mindrecord"] = (
        "auto"
    )
    split: str | None = None
    documents: Literal["line", "file"] = "line"
    text: str = "text"
    language: Literal["auto", "english", "chinese", "code"] = "auto"
    template: NameOrPath = "text"
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GopherConfig:
    """Quality rules of Gopher (Rae et al. 2021, table A1), as datatrove states them.

    Args:
        min_words: fewest words; Chinese, Japanese and Korean characters count as a word each.
        max_words: most words.
        min_mean_length: shortest mean word, characters; not asked of texts in Chinese characters.
        max_mean_length: longest mean word.
        max_symbols: most "#", and most ellipses, per word.
        max_bullets: largest share of lines that begin with a bullet.
        max_ellipsis_lines: largest share of lines that end with an ellipsis.
        min_alphabetic: smallest share of words with a letter.
        min_stop_words: fewest different stop words.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_mean_length: float = 3.0
    max_mean_length: float = 10.0
    max_symbols: float = 0.1
    max_bullets: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic: float = 0.8
    min_stop_words: int = 2


@dataclass(frozen=True, kw_only=True)
class RepetitionConfig:
    """Repetition rules of Gopher (Rae et al. 2021, table A1): largest shares.

    Args:
        lines: of lines that stand a second time.
        paragraphs: of paragraphs that stand a second time.
        line_characters: of characters in such lines.
        paragraph_characters: of characters in such paragraphs.
        top_ngrams: of characters in the most frequent n-gram, for n = 2, 3, 4.
        all_ngrams: of characters in n-grams that stand a second time, for n = 5 to 10.
    """

    lines: float = 0.3
    paragraphs: float = 0.3
    line_characters: float = 0.2
    paragraph_characters: float = 0.2
    top_ngrams: tuple[float, ...] = (0.2, 0.18, 0.16)
    all_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)


@dataclass(frozen=True, kw_only=True)
class C4Config:
    """Rules of C4 (Raffel et al. 2020, section 2.2). Lines that break one are cut out; the rest is judged.

    Args:
        end_marks: keep only lines that end with a terminal punctuation mark or a quotation mark.
        min_line_words: fewest words of a line.
        min_sentences: fewest sentences of what is left.
        code: drop documents with a curly brace, as C4 does to be rid of code.
    """

    end_marks: bool = True
    min_line_words: int = 3
    min_sentences: int = 5
    code: bool = False


@dataclass(frozen=True, kw_only=True)
class FineWebConfig:
    """Rules of FineWeb (Penedo et al. 2024, section 3.6).

    Args:
        min_end_marks: smallest share of lines that end with a terminal punctuation mark.
        max_short_lines: largest share of lines of at most `short_line` characters.
        short_line: characters of a short line.
        max_line_duplicates: largest share of characters in lines that stand a second time.
        max_newlines: most line breaks per word.
    """

    min_end_marks: float = 0.12
    max_short_lines: float = 0.67
    short_line: int = 30
    max_line_duplicates: float = 0.01
    max_newlines: float = 0.3


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Repairs and rules, in this order; a document is taken out by the first rule that it breaks.

    Args:
        repair: mend broken encodings (mojibake) and bring Unicode to one form, with ftfy.
        normalisation: the Unicode form that `repair` writes; none leaves what is not broken as it is.
        min_characters: fewest characters of a document.
        max_characters: most characters of a document; null: any.
        gopher: quality rules; absent: not applied, as for the next three. {} takes the published numbers.
        repetition: repetition rules.
        c4: C4's rules.
        fineweb: FineWeb's rules.
        languages: keep only these languages, by their two letters, e.g. [en, zh]; empty: all.
        min_language_score: smallest probability of the language found.
        harmful_words: file of words, one a line; a document with one of them is taken out.
        max_harmful: occurrences of such words that are let pass.
        email: e-mail addresses: keep, mask (as <email>) or drop the document.
        phone: telephone numbers: keep, mask (as <phone>) or drop.
        identifier: numbers like those of identity cards, bank accounts and credit cards: keep, mask (as <id>) or drop.
        examples: documents taken out that are shown for each rule, the first ones.
    """

    repair: bool = True
    normalisation: Literal["NFC", "NFKC", "none"] = "NFC"
    min_characters: int = 1
    max_characters: int | None = None
    gopher: GopherConfig | None = None
    repetition: RepetitionConfig | None = None
    c4: C4Config | None = None
    fineweb: FineWebConfig | None = None
    languages: tuple[str, ...] = ()
    min_language_score: float = 0.5
    harmful_words: ReadPath | None = None
    max_harmful: int = 0
    email: Action = "keep"
    phone: Action = "keep"
    identifier: Action = "keep"
    examples: int = 3


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Duplicates: equal texts, then near ones.

    Args:
        near: look for near duplicates too, by MinHash.
        threshold: the Jaccard similarity of two sets of n-grams from which on two documents are near duplicates.
        ngram: words of an n-gram; characters in Chinese, Japanese and Korean.
        bands: groups of hashes; documents that share one are compared.
        rows: hashes of a group. With b bands and r rows, a pair of similarity s is found with the probability
            1 - (1 - s^r)^b.
        minhash: who computes the hashes: rensa, or numpy (slower, and other hashes).
        max_bucket: documents of a bucket that are all compared with one another; in a larger one each is compared with
            its neighbours and with the first.
        max_cluster: largest group that is reduced to one document; in a larger one a document goes only if it is
            itself like one that stays.
        min_kept: smallest share of a source's documents that must stay; else nothing is written.
    """

    near: bool = True
    threshold: float = 0.8
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    minhash: Literal["rensa", "numpy"] = "rensa"
    max_bucket: int = 50
    max_cluster: int = 1000
    min_kept: float = 0.5


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Documents to samples of whole sentences, as KnowLM's pretraining.

    Args:
        length: most tokens of a sample.
        encode: document: a text is tokenised whole, and cut where sentences end; sentence: each sentence by itself, as
            KnowLM does, so that SentencePiece puts a space in front of each.
        overlap: a sample that has room is filled with the sentences before it, which then stand in two samples.
        delimiters: which signs end a Chinese sentence: corrected: ; ! ? ； ？ 。 ！ and the line break; released: as
            KnowLM's code, where also ( ) [ ] \\ and n are glued to the sentence before when they stand alone.
        keep_newlines: keep delimiters and line breaks; false cuts them off, as KnowLM without --do_keep_newlines, and
            needs encode: sentence.
        min_tokens: samples of fewer tokens are dropped.
    """

    length: int = 1024
    encode: Literal["document", "sentence"] = "document"
    overlap: bool = True
    delimiters: Literal["corrected", "released"] = "corrected"
    keep_newlines: bool = True
    min_tokens: int = 21


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Documents, records or samples to a token store; keys as in `data` of a training run.

    Args:
        sequence_length: most tokens of an example; samples of split stay as they are.
        train_on_inputs: also learn prompts.
        add_bos: begin each record with the tokenizer's bos token; null: if the tokenizer itself does so.
        add_eos: end answers and documents with the tokenizer's eos token; null: if it has one.
        drop_unknown: leave out records with a token that the tokenizer does not know.
        too_long: truncate, split, drop or error; auto splits plain text and truncates the rest.
        knowlm: also write KnowLM's own store: knowlm.bin, .idx, .dis and .tmp.
        mindrecord: also write SciMind's MindRecord, in this number of files (data.mindrecord): rows of sequence_length
            tokens, padded with 0, which is SciMind's seq_length + 1.
    """

    sequence_length: int = 2048
    train_on_inputs: bool = False
    add_bos: bool | None = None
    add_eos: bool | None = None
    drop_unknown: bool = False
    too_long: Literal["auto", "truncate", "split", "drop", "error"] = "auto"
    knowlm: bool = False
    mindrecord: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who runs the pieces of the work.

    Args:
        name: local (processes of this machine), datatrove (its LocalPipelineExecutor), slurm (its
            SlurmPipelineExecutor), or ray (Ray Data).
        workers: processes at a time; 0: one per core.
        options: arguments of datatrove's executor, e.g. {partition: cpu, time: "12:00:00"} for Slurm, or of ray.init,
            e.g. {address: auto}.
    """

    name: Literal["local", "datatrove", "slurm", "ray"] = "local"
    workers: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Preparing data.

    Args:
        sources: where documents come from.
        steps: what is done, in this order; each step reads what the one before it wrote.
        output_dir: each step writes a folder below it.
        tokenizer: a directory or SentencePiece .model file, for split and build; or a run or model that has one.
        filter: repairs, quality rules, languages, personal data.
        dedup: duplicates.
        split: samples of whole sentences.
        build: the token store.
        engine: who runs it.
        block_bytes: files of lines are worked on in pieces of about this size; other files, and compressed ones, are a
            piece each.
        compression: how steps write documents: none, or zst.
        max_bad: broken records that are left out; with more the step ends.
    """

    sources: tuple[DocumentsConfig, ...] = ()
    steps: tuple[Literal["filter", "dedup", "split", "build"], ...] = ("filter", "dedup", "build")
    output_dir: WrittenPath = "prepared"
    tokenizer: ReadPath | None = None
    filter: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    block_bytes: int = 32_000_000
    compression: Literal["none", "zst"] = "none"
    max_bad: int = 0
