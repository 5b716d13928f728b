"""manifest.json of a store: what it holds, of which tokenizer, made of what."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm.data.report import SourceReport
from jaxlm.errors import UserError
from jaxlm.jsonfields import build, check_version
from jaxlm.jsontext import parse
from jaxlm.tokenizer import Tokenizer

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class FileInfo:
    """A file of a store, for checks."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Args:
        dtype: of the tokens, as numpy calls it.
        examples: their number; of each, mask, source and record are in the companions.
        documents: records that they come from.
        tokens: of all examples.
        trained_tokens: those that are targets.
        encoder_tokens: what an encoder reads; None for a decoder alone.
        largest_id: the largest id of all; -1 for an empty store.
        digest: SHA-256 of the tokens, masks, offsets and sources, as of examples in memory.
        digest_as_source: the same for a run to which the whole store is one source.
        tokenizer: SHA-256 of what decides the tokenizer's ids; empty where it is not known.
        tokenizer_path: where it was.
        vocab_size: rows that it needs.
        sources: what became of each source, as `SourceReport`.
        settings: what else the tokens depend on, by key of the configuration.
        first: the first document as text, cut short, to be looked at.
        files: by name.
        version: of this layout.
    """

    dtype: str
    examples: int
    documents: int
    tokens: int
    trained_tokens: int
    encoder_tokens: int | None
    largest_id: int
    digest: str
    digest_as_source: str
    tokenizer: str
    tokenizer_path: str
    vocab_size: int
    sources: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    first: str
    files: dict[str, FileInfo] = field(default_factory=dict)
    version: int = VERSION

    def reports(self) -> tuple[SourceReport, ...]:
        """What became of each source."""
        return tuple(report_of(values) for values in self.sources)


def values_of(report: SourceReport) -> dict[str, Any]:
    """A report as plain values."""
    return {**dataclasses.asdict(report), "end_ids": sorted(report.end_ids)}


def report_of(values: Mapping[str, Any]) -> SourceReport:
    """The report that `values_of` has written."""
    return SourceReport(**{**values, "end_ids": frozenset(values["end_ids"])})


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes manifest.json."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Reads manifest.json.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    path = directory / MANIFEST
    try:
        content = parse(path.read_text(encoding="utf-8"))
        check_version(content, VERSION, path)
        manifest = build(Manifest, content, str(path))
        manifest.reports()
    except FileNotFoundError:
        raise UserError(f"{directory}: holds no store: there is no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: is not the manifest of a store ({error}); copy the store again") from None
    return manifest


def differences(manifest: Manifest, tokenizer: Tokenizer, tokenizer_digest: str) -> list[str]:
    """What of a store does not fit a run's tokenizer, in words; empty when all does."""
    lines = []
    if manifest.tokenizer and manifest.tokenizer != tokenizer_digest:
        lines.append(
            f"it was tokenised with {manifest.tokenizer_path or 'another tokenizer'} ({manifest.tokenizer[:12]}, "
            f"{manifest.vocab_size:,} ids), the run's is {tokenizer.path} ({tokenizer_digest[:12]}, "
            f"{tokenizer.vocab_size:,} ids)"
        )
    if manifest.largest_id >= tokenizer.vocab_size:
        lines.append(
            f"its largest id is {manifest.largest_id:,}, the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,}"
        )
    return lines


def check_tokenizer(directory: Path, manifest: Manifest, tokenizer: Tokenizer, tokenizer_digest: str) -> None:
    """Refuses a store that another tokenizer has made.

    Raises:
        UserError: saying what differs.
    """
    lines: Sequence[str] = differences(manifest, tokenizer, tokenizer_digest)
    if lines:
        raise UserError(
            f"data: {directory} does not fit: {'; '.join(lines)}. Use the tokenizer that made it (tokenizer.path), or "
            "tokenise the texts again"
        )
