"""Small stores for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.examples import Examples, from_chunks
from jaxlm.data.report import SourceReport
from jaxlm.data.store.columns import Digests, InMemory
from jaxlm.data.store.manifest import Manifest, values_of
from jaxlm.data.store.stored import write_store
from jaxlm.data.tokens import Chunk


def chunks(seed: int = 0, with_encoder: bool = False, largest: int = 300) -> list[tuple[int, Chunk]]:
    """Three chunks of two sources: lengths from 0 on, documents of up to three examples."""
    random = np.random.default_rng(seed)
    result = []
    for source in (0, 0, 1):
        lengths = random.integers(0, 9, 7).astype(np.int32)
        others = random.integers(1, 5, 7).astype(np.int32)
        result.append(
            (
                source,
                Chunk(
                    random.integers(0, largest, lengths.sum()).astype(np.int32),
                    random.random(lengths.sum()) < 0.5,
                    lengths,
                    np.arange(7) % 3 == 0,
                    SourceReport(f"source-{source}", "text", records=3, end_ids=frozenset({2}), unused={"b": 1}),
                    random.integers(0, largest, others.sum()).astype(np.int32) if with_encoder else None,
                    others if with_encoder else None,
                ),
            )
        )
    return result


def manifest(dtype: Any, with_encoder: bool = False, **changes: Any) -> Any:
    """What makes the manifest of a store of `chunks`."""

    def make(sums: Digests, first: Any) -> Manifest:
        values = dict(
            dtype=np.dtype(dtype).name,
            examples=21,
            documents=sums.documents,
            tokens=sums.tokens,
            trained_tokens=sums.trained,
            encoder_tokens=sums_of_encoder if with_encoder else None,
            largest_id=sums.largest,
            digest=sums.contents.hexdigest(),
            digest_as_source=sums.as_source,
            tokenizer="",
            tokenizer_path="",
            vocab_size=300,
            sources=(values_of(SourceReport("source-0", "text")),),
            settings={},
            first=str(first[:4]),
        )
        return Manifest(**{**values, **changes})

    sums_of_encoder = sum(int(chunk.encoder_lengths.sum()) for _, chunk in chunks(with_encoder=True))  # type: ignore[union-attr]
    return make


def small_store(directory: Path, dtype: Any = np.uint16, with_encoder: bool = False, **changes: Any) -> Examples:
    """Writes a store; returns the same in memory."""
    parts = chunks(with_encoder=with_encoder)
    columns = [InMemory(parts[:1], with_encoder), InMemory(parts[1:], with_encoder)]
    write_store(directory, columns, np.dtype(dtype), manifest(dtype, with_encoder, **changes))
    return from_chunks(parts, with_encoder)
