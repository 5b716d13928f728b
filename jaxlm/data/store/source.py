"""Stores as a data source: tokens as they are, without a template."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data import mindrecord
from jaxlm.data.encoding import Example
from jaxlm.data.records import TOKENS, is_mindrecord_source, token_index
from jaxlm.data.report import SourceReport
from jaxlm.data.store import knowlm, megatron
from jaxlm.data.store.columns import read_blocks
from jaxlm.data.store.manifest import MANIFEST, check_tokenizer
from jaxlm.data.store.stored import StoredTokens
from jaxlm.data.tokenise import CHARACTERS, RECORDS, chosen_template, fit_row
from jaxlm.data.tokens import Chunk, chunk_of
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

# Texts by whose tokens two tokenizers of one vocabulary are told apart.
_PROBE = (
    "The Moho lies 35 km deep.\n\tδ18O = +5.5‰",
    "石英和长石，占地壳的63%。",
    "https://a.b/c?d=e_f  <s>x</s>",
    "🌋é́ﬁ½",
)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary, its special tokens, its ids of some texts.

    Not of its files: a tokenizer.model alone is the same as one in a directory of a model.
    """
    digest = hashlib.sha256()
    for index in range(tokenizer.vocab_size):
        digest.update(tokenizer.token(index).encode(errors="surrogatepass") + b"\0")
    for text in _PROBE:
        for special in (False, True):
            digest.update(repr(tokenizer.encode(text, special).ids).encode())
    roles = (*tokenizer.opening, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, sorted(tokenizer.special_ids))
    digest.update(repr((roles, [(m.name, m.range) for m in tokenizer.modalities])).encode())
    return digest.hexdigest()


def own_store(source: SourceConfig) -> Path | None:
    """The directory of jaxlm's own store that a source of tokens is; None where it is another's."""
    index = token_index(source)
    return index.parent if index.name == TOKENS and index.with_name(MANIFEST).is_file() else None


def open_as_source(
    source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, start_id: int | None
) -> tuple[StoredTokens, SourceReport] | None:
    """A store as it lies, for a run with this source alone; None where its examples would have to be cut first.

    Every example of a store has something to learn, so that none would be left out.

    Raises:
        UserError: a store that is damaged, or made by another tokenizer.
    """
    directory = own_store(source)
    if directory is None or source.limit is not None:
        return None
    stored = StoredTokens(directory, as_source=True)
    check_tokenizer(directory, stored.manifest, tokenizer, tokenizer_digest(tokenizer))
    rooms = [(stored.offsets, config.sequence_length), (stored.encoder_offsets, config.row_length("encoder_ids"))]
    if (stored.encoder_offsets is None) == (start_id is not None):
        return None
    for offsets, room in rooms:
        too_long = offsets is not None and len(stored) > 0 and int(np.diff(offsets).max()) > room
        if too_long and config.packing_mode != "group_texts":
            return None
    template, why = chosen_template(source, tokenizer)
    counts = stored.manifest
    report = SourceReport(
        source.path, template, why, counts.examples, tokens=counts.tokens, trained_tokens=counts.trained_tokens
    )
    return stored, report


def read_chunks(
    source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, start_id: int | None
) -> Iterator[Chunk]:
    """The tokens of a store, cut to rows as `too_long` says.

    Every token is trained but the first of each sequence; a store of jaxlm's own has a mask, MindRecord labels.

    Raises:
        UserError: a store that is damaged, made by another tokenizer, or without what an encoder reads.
    """
    index_file = token_index(source)
    template, why = chosen_template(source, tokenizer)
    stored: StoredTokens | None = None
    examples: Iterator[Example]
    if is_mindrecord_source(source):
        files = mindrecord.mindrecord_files(index_file)
        documents = np.arange(sum(map(mindrecord.count_rows, files)) + 1)
        examples = itertools.starmap(
            Example, itertools.chain.from_iterable(mindrecord.read_scimind(file, tokenizer.pad_id) for file in files)
        )
    elif own_store(source) is not None:
        stored = StoredTokens(index_file.parent)
        check_tokenizer(index_file.parent, stored.manifest, tokenizer, tokenizer_digest(tokenizer))
        starts = np.flatnonzero(np.diff(stored.record, prepend=-1))
        documents = np.append(starts, len(stored))
        examples = (stored[number] for number in range(len(stored)))
    else:
        index = _read_index(index_file, source)
        documents = index.documents
        examples = _sequences(index_file.with_suffix(".bin"), index, config.packing_mode == "group_texts")
    if (stored is None or stored.encoder_ids is None) == (start_id is not None):
        other = "nothing" if start_id is not None else "something"
        raise UserError(
            f"data: {source.path} holds {other} for an encoder, which does not fit the model; tokenise again"
        )
    left = source.limit
    pieces: list[list[Example]] = []
    report, tokens = SourceReport(source.path, template, why), 0
    number = 0
    for first, last in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True):
        count = last - first if left is None else min(last - first, left - number)
        document: list[Example] = []
        for _ in range(count):
            number += 1
            example = next(examples)
            tokens += len(example.input_ids)
            document += fit_row(f"{index_file}:{number}", example, config, report)
        pieces.append(document)
        if len(pieces) >= RECORDS or 4 * tokens >= CHARACTERS:
            yield chunk_of(pieces, report, start_id is not None)
            pieces, report, tokens = [], SourceReport(source.path, template, why), 0
            if stored is not None:
                stored.release()
        if number == left:
            break
    if not number:
        raise UserError(f"data: {source.path} holds no sequences; remove it from the sources")
    if pieces:
        yield chunk_of(pieces, report, start_id is not None)


def _read_index(path: Path, source: SourceConfig) -> megatron.Index:
    kind = source.format
    if kind == "auto":
        with path.open("rb") as file:
            kind = "megatron" if file.read(len(megatron.MAGIC)) == megatron.MAGIC else "knowlm"
    return megatron.read_index(path) if kind == "megatron" else knowlm.read_index(path)


def _sequences(path: Path, index: megatron.Index, running: bool) -> Iterator[Example]:
    """The sequences of a `.bin`, read in blocks."""
    size = path.stat().st_size
    blocks = read_blocks(path, index.dtype)
    buffer = np.zeros(0, index.dtype)
    for number, length in enumerate(index.lengths.tolist()):
        while len(buffer) < length:
            buffer = np.concatenate([buffer, next(blocks)])
        ids, buffer = buffer[:length], buffer[length:]
        if index.dtype.itemsize >= 4 and length and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 31:
            raise UserError(f"data: {path}: sequence {number + 1:,} holds an id outside of 0 … 2^31; copy it again")
        mask = np.ones(length, np.bool_)
        mask[:1] = running
        yield Example(ids.astype(np.int32), mask)
    if path.stat().st_size != size:
        raise UserError(f"data: {path} changed while it was read; start again when it is complete")
