"""The step `dedup`: equal texts, then near duplicates by MinHash; of each group the first document stays.

Documents are numbered in the order of the shards; every phase is a function of its input files, so that the result
depends neither on how the work was divided nor on who was first:

    hash      shard -> hash of each text, hashes of the bands of its signature
    exact     part of the hashes -> documents that stood before
    pairs     band, part of its hashes -> pairs of documents in one bucket
    candidates  part of the documents -> its pairs, each once; the documents in any pair
    shingles  shard -> n-grams of its documents in pairs
    verify    part of the documents -> pairs whose true Jaccard similarity reaches the threshold
    clusters  all of these -> documents to drop
    write     shard -> shard
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.config.prepare import DedupConfig
from jaxlm.data.prepare import minhash
from jaxlm.data.prepare.counts import Counts
from jaxlm.data.prepare.shards import Bad, read_documents
from jaxlm.data.prepare.work import Mark, Phase, Step, replacing, write_documents
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object

Ids = NDArray[np.int64]

EXACT, NEAR = "equal to an earlier document", "like an earlier document"
_BATCH = 256  # documents hashed at a time
# Documents whose hashes are sorted at a time: 24 bytes each, some 1.5 GB at the worst.
PART_DOCUMENTS = 20_000_000


def phases(step: Step) -> Iterator[Phase]:
    """The phases in order; each is asked for when the one before it is complete.

    Raises:
        UserError: a source would lose more than it may.
    """
    shards = len(step.shards)
    yield Phase("hash", shards, hash_shard)
    parts = num_parts(step)
    yield Phase("exact", parts, find_exact)
    if step.config.dedup.near:
        yield Phase("pairs", step.config.dedup.bands * parts, find_pairs)
        yield Phase("candidates", parts, collect_candidates)
        yield Phase("shingles", shards, write_shingles)
        yield Phase("verify", parts, verify_pairs)
    yield Phase("clusters", 1, find_dropped)
    refuse_loss(step)
    yield Phase("write", shards, write_shard)


def check(config: DedupConfig) -> None:
    """Finds out before the work what would stop it.

    Raises:
        UserError: a number out of its range, or a library that is missing.
    """
    checks = [
        ("threshold", config.threshold, 0 < config.threshold <= 1, "above 0, at most 1"),
        ("min_kept", config.min_kept, 0 <= config.min_kept <= 1, "between 0 and 1"),
        *(
            (name, getattr(config, name), getattr(config, name) >= 1, "at least 1")
            for name in ("ngram", "bands", "rows")
        ),
        ("max_bucket", config.max_bucket, config.max_bucket >= 2, "at least 2"),
        ("max_cluster", config.max_cluster, config.max_cluster >= 2, "at least 2"),
    ]
    for name, value, holds, wanted in checks:
        if not holds:
            raise UserError(f"dedup.{name}: {value} must be {wanted}")
    if config.near:
        minhash.method_version(config.minhash)


def decides(config: DedupConfig) -> dict[str, Any]:
    """What decides which documents stay, beside the documents: `min_kept` only stops."""
    values: dict[str, Any] = {"near": config.near}
    if config.near:
        names = ("threshold", "ngram", "bands", "rows", "max_bucket", "max_cluster")
        values |= {name: getattr(config, name) for name in names}
        values["minhash"] = minhash.method_version(config.minhash)
    return values


# Where documents are -----------------------------------------------------------------------------


def offsets_of(step: Step) -> Ids:
    """int64 [shards + 1]: the number of each shard's first document."""
    return _offsets(str(step.folder), step.digest, len(step.shards))


@functools.lru_cache(maxsize=2)
def _offsets(folder: str, digest: str, shards: int) -> Ids:
    marks = (read_object(Path(folder) / "marks" / f"hash-{number:05d}.json") for number in range(shards))
    return np.cumsum([0, *(mark["documents"] for mark in marks)], dtype=np.int64)


def num_parts(step: Step) -> int:
    """Into how many parts documents and hashes are divided; a function of the number of documents."""
    return max(1, -(-int(offsets_of(step)[-1]) // PART_DOCUMENTS))


def _file(step: Step, name: str, number: int) -> Path:
    return step.folder / "work" / f"{name}-{number:05d}.npy"


def _save(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _load(step: Step, name: str, number: int) -> NDArray[Any]:
    result: NDArray[Any] = np.load(_file(step, name, number), mmap_mode="r", allow_pickle=False)
    return result


# The phases --------------------------------------------------------------------------------------


def hash_shard(step: Step, number: int) -> Mark:
    """Hashes of a shard's documents: uint64 [n, 2] of the texts, uint64 [bands, n], bool [n] which have words."""
    config = step.config.dedup
    bad = Bad(step.config.max_bad)
    exact: list[bytes] = []
    has_words: list[bool] = []
    bands: list[minhash.U64] = []
    batch: list[minhash.U64] = []
    sources: collections.Counter[str] = collections.Counter()

    def finish_batch() -> None:
        if batch:
            flat, offsets = minhash.flatten(batch)
            signature = minhash.signatures(flat, offsets, config.bands * config.rows, config.minhash)
            bands.append(minhash.band_hashes(signature, config.bands, config.rows))
            batch.clear()

    for document in read_documents(step.shards[number], bad):
        sources[document.source] += 1
        exact.append(hashlib.blake2b(document.text.strip().encode(), digest_size=16).digest())
        if config.near:
            hashes = minhash.ngram_hashes(document.text, config.ngram)
            has_words.append(len(hashes) > 0)
            batch.append(hashes if len(hashes) else np.zeros(1, np.uint64))
            if len(batch) == _BATCH:
                finish_batch()
    finish_batch()
    _save(_file(step, "exact", number), np.frombuffer(b"".join(exact), "<u8").reshape(-1, 2))
    if config.near:
        empty = np.zeros((config.bands, 0), np.uint64)
        _save(_file(step, "bands", number), np.concatenate([empty, *bands], 1))
        _save(_file(step, "words", number), np.array(has_words, np.bool_))
    return {"documents": len(exact), "sources": dict(sources), "bad": bad.count, "first_bad": bad.first}


def find_exact(step: Step, part: int) -> Mark:
    """int64 [m, 2]: documents that are equal to an earlier one, and the first of those."""
    parts, offsets = num_parts(step), offsets_of(step)
    hashes, ids = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)]
    for shard in range(len(step.shards)):
        own = _load(step, "exact", shard)
        chosen = np.flatnonzero(own[:, 0] % parts == part)
        hashes.append(own[chosen])
        ids.append(offsets[shard] + chosen)
    keys, numbers = np.concatenate(hashes), np.concatenate(ids)
    order = np.lexsort((numbers, keys[:, 1], keys[:, 0]))
    keys, numbers = keys[order], numbers[order]
    begins = np.ones(len(keys), np.bool_)
    begins[1:] = (keys[1:] != keys[:-1]).any(1)
    first = numbers[begins][np.cumsum(begins) - 1] if len(numbers) else numbers
    _save(_file(step, "equal", part), np.stack([numbers, first], 1)[~begins])
    return {"equal": int((~begins).sum())}


def _equal(step: Step) -> Ids:
    """int64 [m, 2], sorted: all documents equal to an earlier one, and that one."""
    pairs = np.concatenate([_load(step, "equal", part) for part in range(num_parts(step))])
    return pairs[np.argsort(pairs[:, 0])]


def find_pairs(step: Step, number: int) -> Mark:
    """int64 [m, 2]: documents i < j that share a bucket of a band, none of them equal to an earlier one."""
    config, parts, offsets = step.config.dedup, num_parts(step), offsets_of(step)
    band, part = divmod(number, parts)
    is_out = np.zeros(int(offsets[-1]), np.bool_)
    is_out[_equal(step)[:, 0]] = True
    hashes, ids = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for shard in range(len(step.shards)):
        own = _load(step, "bands", shard)[band]
        usable = _load(step, "words", shard) & ~is_out[offsets[shard] : offsets[shard + 1]] & (own % parts == part)
        chosen = np.flatnonzero(usable)
        hashes.append(own[chosen])
        ids.append(offsets[shard] + chosen)
    pairs, large = bucket_pairs(np.concatenate(hashes), np.concatenate(ids), config.max_bucket)
    _save(_file(step, "pairs", number), pairs)
    return {"pairs": len(pairs), "large_buckets": large}


def bucket_pairs(hashes: minhash.U64, ids: Ids, max_bucket: int) -> tuple[Ids, int]:
    """Pairs to compare, and the number of buckets that are too large to compare all.

    Args:
        hashes: uint64 [n], which bucket each document is in.
        ids: int64 [n], ascending.
        max_bucket: in a larger one each document is paired with the one before it and with the first.
    """
    order = np.argsort(hashes, kind="stable")
    hashes, ids = hashes[order], ids[order]
    begins = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.zeros(0, int)
    sizes = np.diff(np.append(begins, len(hashes)))
    place_of = np.repeat(begins, sizes)  # where each one's bucket begins
    size_of = np.repeat(sizes, sizes)
    places = np.arange(len(hashes)) - place_of
    found = [np.zeros((0, 2), np.int64)]
    small = size_of <= max_bucket
    longest = int(sizes[sizes <= max_bucket].max(initial=1))
    for distance in range(1, longest):
        second = np.flatnonzero(small & (places >= distance))
        found.append(np.stack([ids[second - distance], ids[second]], 1))
    after_first = np.flatnonzero(~small & (places >= 1))
    found.append(np.stack([ids[place_of[after_first]], ids[after_first]], 1))
    later = after_first[places[after_first] >= 2]
    found.append(np.stack([ids[later - 1], ids[later]], 1))
    return np.concatenate(found), int((sizes > max_bucket).sum())


def _range(step: Step, part: int) -> tuple[int, int]:
    """The documents of a part."""
    total, parts = int(offsets_of(step)[-1]), num_parts(step)
    return total * part // parts, total * (part + 1) // parts


def collect_candidates(step: Step, part: int) -> Mark:
    """int64 [m, 2], sorted, each once: the pairs whose first is in the part; int64 [k]: its documents in any pair."""
    begin, end = _range(step, part)
    pairs, members = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
    for number in range(step.config.dedup.bands * num_parts(step)):
        own = _load(step, "pairs", number)
        pairs.append(own[(own[:, 0] >= begin) & (own[:, 0] < end)])
        members.append(np.unique(own[(own >= begin) & (own < end)]))
    candidates = np.unique(np.concatenate(pairs), axis=0)
    _save(_file(step, "candidates", part), candidates)
    _save(_file(step, "members", part), np.unique(np.concatenate(members)))
    return {"candidates": len(candidates)}


def write_shingles(step: Step, number: int) -> Mark:
    """For the shard's documents in pairs: int64 [k] which, int64 [k + 1] offsets, uint64 their n-grams, sorted."""
    offsets = offsets_of(step)
    begin, end = int(offsets[number]), int(offsets[number + 1])
    near = [part for part in range(num_parts(step)) if _range(step, part)[0] < end and begin < _range(step, part)[1]]
    members = np.concatenate([np.zeros(0, np.int64), *(_load(step, "members", part) for part in near)])
    members = members[(members >= begin) & (members < end)]
    sets: list[minhash.U64] = []
    if len(members):
        wanted = iter((members - begin).tolist())
        place = next(wanted)
        for at, document in enumerate(read_documents(step.shards[number], Bad(step.config.max_bad))):
            if at == place:
                sets.append(np.unique(minhash.ngram_hashes(document.text, step.config.dedup.ngram)))
                place = next(wanted, -1)
    flat, starts = minhash.flatten(sets)
    _save(_file(step, "shingle-ids", number), members)
    _save(_file(step, "shingle-offsets", number), starts)
    _save(_file(step, "shingles", number), flat)
    return {"compared": len(members)}


def verify_pairs(step: Step, part: int) -> Mark:
    """int64 [m, 2]: the part's pairs whose n-grams are as similar as the threshold asks."""
    offsets, threshold = offsets_of(step), step.config.dedup.threshold
    candidates = np.array(_load(step, "candidates", part))

    @functools.lru_cache(maxsize=64)
    def shard_sets(shard: int) -> tuple[NDArray[Any], ...]:
        return tuple(_load(step, name, shard) for name in ("shingle-ids", "shingle-offsets", "shingles"))

    @functools.lru_cache(maxsize=4096)
    def ngrams(document: int) -> minhash.U64:
        ids, starts, flat = shard_sets(int(np.searchsorted(offsets, document, "right")) - 1)
        place = int(np.searchsorted(ids, document))
        return np.array(flat[starts[place] : starts[place + 1]])

    holds = [minhash.jaccard(ngrams(int(i)), ngrams(int(j))) >= threshold for i, j in candidates]
    edges = candidates[np.array(holds, np.bool_)] if len(candidates) else candidates
    _save(_file(step, "edges", part), edges)
    return {"edges": len(edges)}


def find_dropped(step: Step, _: int) -> Mark:
    """int64 [m, 2], sorted: the documents that go, and the one that stays in place of each."""
    total = int(offsets_of(step)[-1])
    equal = _equal(step)
    near, large = np.zeros((0, 2), np.int64), 0
    if step.config.dedup.near:
        edges = np.concatenate([_load(step, "edges", part) for part in range(num_parts(step))])
        near, large = choose(edges, total, step.config.dedup.max_cluster)
    _save(_file(step, "dropped", 0), np.concatenate([near, equal])[np.argsort(np.append(near[:, 0], equal[:, 0]))])
    _save(_file(step, "dropped-equal", 0), equal[:, 0])
    return {"equal": len(equal), "near": len(near), "large_clusters": large}


def choose(edges: Ids, total: int, max_cluster: int) -> tuple[Ids, int]:
    """Which documents go, and for whose sake; and the number of groups that are too large.

    Args:
        edges: int64 [m, 2], i < j, near duplicates.
        total: the number of documents.
        max_cluster: a group of more is not reduced to its first one, since its ends may have nothing in common: there a
            document goes only if it has an edge to one that stays.
    """
    from scipy.sparse import coo_array  # imports slowly, and comes with JAX
    from scipy.sparse.csgraph import connected_components

    if not len(edges):
        return np.zeros((0, 2), np.int64), 0
    # Only documents with an edge, so that memory follows the duplicates.
    nodes, flat = np.unique(edges, return_inverse=True)
    flat = flat.reshape(-1, 2)
    graph = coo_array((np.ones(len(flat), np.int8), (flat[:, 0], flat[:, 1])), shape=(len(nodes), len(nodes)))
    _, label = connected_components(graph, directed=False)
    sizes = np.bincount(label)
    first = np.full(len(sizes), len(nodes))
    np.minimum.at(first, label, np.arange(len(nodes)))
    is_large = sizes[label] > max_cluster
    goes = ~is_large & (first[label] != np.arange(len(nodes)))
    pairs = [np.stack([nodes[goes], nodes[first[label[goes]]]], 1)]
    # Large groups, in order of the second: whether the first one stays is known by then.
    gone: dict[int, int] = {}
    chosen = flat[is_large[flat[:, 0]]]
    for i, j in chosen[np.lexsort((chosen[:, 0], chosen[:, 1]))].tolist():
        if j not in gone and i not in gone:
            gone[j] = i
    if gone:
        pairs.append(nodes[np.array(list(gone.items()), np.int64)])
    dropped = np.concatenate(pairs)
    assert total > dropped.max(initial=-1)
    return dropped[np.argsort(dropped[:, 0])], int((sizes > max_cluster).sum())


def kept_by_source(step: Step) -> dict[str, tuple[int, int]]:
    """Documents that stay, and all documents, of each source; a shard has one source."""
    offsets = offsets_of(step)
    dropped = np.array(_load(step, "dropped", 0)[:, 0])
    result: dict[str, tuple[int, int]] = {}
    for number, mark in enumerate(step.marks("hash", len(step.shards))):
        gone = int(np.searchsorted(dropped, offsets[number + 1]) - np.searchsorted(dropped, offsets[number]))
        for source, count in mark["sources"].items():
            kept, total = result.get(source, (0, 0))
            result[source] = (kept + count - gone, total + count)
    return result


def refuse_loss(step: Step) -> None:
    """UserError when a source keeps less than `dedup.min_kept`."""
    least = step.config.dedup.min_kept
    for source, (kept, total) in kept_by_source(step).items():
        if kept < least * total:
            raise UserError(
                f"dedup.min_kept: {source} would keep {kept:,} of {total:,} documents ({kept / total:.1%}), less than "
                f"{least:.0%}; nothing was written. Look at it (jaxlm prepare inspect), or let it happen with "
                f"--dedup.min_kept {int(kept / total * 100) / 100:g}: what is computed is kept"
            )


def clean(step: Step) -> None:
    """Removes what a complete step needs no more: all but which documents went, and for whose sake."""
    for file in (step.folder / "work").glob("*.npy"):
        if not file.name.startswith("dropped"):
            file.unlink(missing_ok=True)


def write_shard(step: Step, number: int) -> Mark:
    """A shard without the documents that go."""
    offsets = offsets_of(step)
    begin, end = int(offsets[number]), int(offsets[number + 1])
    dropped = _load(step, "dropped", 0)
    low, high = np.searchsorted(dropped[:, 0], [begin, end])
    gone = set(dropped[low:high, 0].tolist())
    all_equal = _load(step, "dropped-equal", 0)
    low, high = np.searchsorted(all_equal, [begin, end])
    equal = set(all_equal[low:high].tolist())
    bad, counts = Bad(step.config.max_bad), Counts(step.config.filter.examples)

    def documents() -> Iterator[Any]:
        for at, document in enumerate(read_documents(step.shards[number], bad), begin):
            counts.read(document)
            if at in gone:
                counts.take(document, EXACT if at in equal else NEAR)
            else:
                counts.keep(document)
                yield document

    facts = write_documents(step.part(number), documents())
    return {**facts, "bad": bad.count, "first_bad": bad.first, **counts.to_dict()}
