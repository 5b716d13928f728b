"""MinHash (Broder 1997): sets of n-grams, their signatures, and hashes of the signatures' bands."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.prepare.sentences import CJK
from jaxlm.errors import UserError

U64 = NDArray[np.uint64]

SEED = 1
_UNIT = re.compile(rf"{CJK.pattern}|(?:(?!{CJK.pattern})[^\W_])+")
_SPACES = bytes(sign if chr(sign).isalnum() and sign < 128 else 32 for sign in range(256))
_MULTIPLIER, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_CHUNK = 1 << 15  # n-grams hashed at a time, so that they stay in the processor's cache


def ngram_hashes(text: str, size: int) -> U64:
    """uint64 [n]: hashes of all n-grams of words, a Chinese, Japanese or Korean character being a word.

    Case and punctuation do not count. A text of fewer words is one n-gram; one without words has none.
    """
    words = word_hashes(text)
    if not len(words):
        return words
    size = min(size, len(words))
    hashes = words[: len(words) - size + 1].copy()
    for place in range(1, size):
        hashes = _mixed(hashes) + words[place : len(words) - size + 1 + place]
    return _mixed(hashes)


def word_hashes(text: str) -> U64:
    """uint64 [words]: a CRC-32 of each word."""
    if text.isascii():  # several times faster; `any_word_hashes` gives the same
        words = text.lower().encode().translate(_SPACES).split()
        return np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    return any_word_hashes(text)


def any_word_hashes(text: str) -> U64:
    """`word_hashes` of a text in any script."""
    words = _UNIT.findall(text.casefold())
    return np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))


def _mixed(values: U64) -> U64:
    """A permutation of 64 bits (the finaliser of SplitMix64, shortened)."""
    values = (values ^ (values >> np.uint64(30))) * _SECOND
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIER
    return values ^ (values >> np.uint64(31))


def signatures(flat: U64, offsets: NDArray[np.int64], number: int, method: str) -> NDArray[np.uint32]:
    """uint32 [texts, number]: the least value of each hash function over a text's n-grams.

    Args:
        flat: hashes of the n-grams of all texts; every text has at least one.
        offsets: int64 [texts + 1], where each text's begin.
        number: hash functions.
        method: "rensa" (Rust) or "numpy"; two families of functions, so that their signatures are not to be mixed.

    Raises:
        UserError: rensa is not installed.
    """
    if method == "rensa":
        matrix = _rensa().digest_matrix_from_flat_token_hashes(flat, offsets.astype(np.uint64), number, SEED)
        return np.array(matrix.to_rows(), np.uint32).reshape(-1, number)
    multipliers = np.random.Generator(np.random.PCG64(SEED)).integers(0, 1 << 63, number, dtype=np.uint64) * 2 + 1
    result = np.empty((len(offsets) - 1, number), np.uint32)
    first = 0
    while first < len(result):
        last = max(int(np.searchsorted(offsets, offsets[first] + _CHUNK, "right")) - 1, first + 1)
        part, begins = flat[offsets[first] : offsets[last]], offsets[first:last] - offsets[first]
        for column, multiplier in enumerate(multipliers):
            # Multiply-shift (Dietzfelbinger et al. 1997): the upper half of the product.
            values = (part * multiplier) >> np.uint64(32)
            result[first:last, column] = np.minimum.reduceat(values, begins)
        first = last
    return result


def _rensa() -> Any:
    try:
        import rensa  # optional
    except ImportError:
        raise UserError(
            "dedup.minhash: rensa is not installed; pip install 'jaxlm[prepare]', or set dedup.minhash: numpy"
        ) from None
    return rensa.RMinHash


def method_version(method: str) -> str:
    """Which hash functions these are; results of other versions are not to be mixed with them."""
    return f"rensa {_rensa().ALGORITHM_VERSION}" if method == "rensa" else "numpy 1"


def band_hashes(signature: NDArray[np.uint32], bands: int, rows: int) -> U64:
    """uint64 [bands, texts]: one hash for each group of `rows` neighbours in a signature."""
    grouped = signature.reshape(len(signature), bands, rows).astype(np.uint64)
    hashes = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), grouped.shape[:2]).copy()
    for row in range(rows):
        hashes = _mixed(hashes) + grouped[:, :, row]
    return np.ascontiguousarray(_mixed(hashes).T)


def jaccard(first: U64, second: U64) -> float:
    """The share of two sets' members that both have; 1 for two empty sets.

    Args:
        first, second: sorted, each member once.
    """
    both = len(np.intersect1d(first, second, assume_unique=True))
    either = len(first) + len(second) - both
    return both / either if either else 1.0


def flatten(sets: Sequence[U64]) -> tuple[U64, NDArray[np.int64]]:
    """Arrays end to end, and where each begins."""
    offsets = np.cumsum([0, *map(len, sets)], dtype=np.int64)
    return (np.concatenate(sets) if sets else np.zeros(0, np.uint64)), offsets
