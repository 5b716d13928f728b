"""Which neurons of a feed-forward layer are together in an expert.

As owners, [F]: the expert of each neuron; or as the permutation that makes experts contiguous blocks, [F]: the original
neuron at each place. Inside an expert neurons keep their order, so blocks that were contiguous stay as they were.

    DIR/jaxlm/partition.npy    int32 [L, F], the permutation of every layer of a model made by `convert moefy`
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError

PARTITION_FILE = "partition.npy"
PATTERN_FILE = "patterns_{}.npy"
_HEADER_BYTES = 1024
_HEADER = re.compile(
    rb"\x93NUMPY(?s:....|......)\{'descr': '(?P<dtype>[<|](?:b1|[iu][1248]|f[248]))', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>(?:\d{1,15}, ?){0,3}(?:\d{1,15})?)\), \} *\n"
)
# Elements of a layer's matrix that are in float32 or float64 at a time.
CLUSTER_ELEMENTS = 4 << 20
# k-means: neurons that the first centres are chosen from, for each expert; and the most rounds.
SAMPLE, ROUNDS = 64, 50


def read_npy(path: Path) -> np.ndarray:
    """An array of numbers from a .npy file.

    The header must be as numpy.save writes it, and the file as long as that says. numpy's own reader takes memory for
    whatever a header claims, and reads it as Python, with errors of many kinds.

    Raises:
        UserError: when it is missing, or anything else than a whole file of numbers.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
        size = path.stat().st_size
        header = _HEADER.match(start)
        if header is None:
            raise UserError(f"{path}: is not a .npy file of numbers as numpy.save writes them; save it again")
        shape = tuple(int(part) for part in header["shape"].replace(b",", b" ").split())
        dtype = np.dtype(header["dtype"].decode())
        if size != header.end() + math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: has {size} bytes, which is not what its header says; copy it again")
        flat = np.fromfile(path, np.uint8, offset=header.end())
        values = flat != 0 if dtype.kind == "b" else flat.view(dtype)
        return values.reshape(shape, order="F" if header["fortran"] == b"True" else "C")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def npy_bytes(array: np.ndarray) -> bytes:
    """The .npy file of an array."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def load_partition(path: Path, layers: int, neurons: int) -> np.ndarray:
    """The permutation [L, F] int32 that a model was divided by.

    Raises:
        UserError: when it is of another size, or a row holds a neuron twice.
    """
    partition = read_npy(path)
    if partition.dtype != np.int32 or partition.shape != (layers, neurons):
        raise UserError(
            f"{path}: is {partition.dtype} {list(partition.shape)}, the model needs int32 [{layers}, {neurons}]; "
            "it belongs to another model: copy the one that `convert moefy` wrote"
        )
    for layer, row in enumerate(partition):
        inside = row[(row >= 0) & (row < neurons)]
        if len(inside) < neurons:
            bad = row[(row < 0) | (row >= neurons)][0]
            raise UserError(f"{path}: layer {layer} names neuron {bad}; they are 0 to {neurons - 1}; copy it again")
        counts = np.bincount(inside, minlength=neurons)
        if (counts != 1).any():
            raise UserError(
                f"{path}: layer {layer} has neuron {counts.argmax()} twice and misses {counts.argmin()}; copy it again"
            )
    return partition


def permutation(owners: np.ndarray) -> np.ndarray:
    """Owners [F] -> the original neuron at each place, int32 [F]."""
    return np.argsort(owners, kind="stable").astype(np.int32)


def order_name(partition: np.ndarray | None) -> str:
    """The order of a model's neurons in a few letters, to compare it by: the beginning of the file's sha256."""
    return "original" if partition is None else f"sha256 {hashlib.sha256(npy_bytes(partition)).hexdigest()[:16]}"


def inverse(permutations: np.ndarray) -> np.ndarray:
    """Permutations [L, F] -> the place of each original neuron, [L, F]."""
    return np.argsort(permutations, axis=1, kind="stable").astype(np.int32)


# --- partitions that are given ----------------------------------------------------------------------------------------


def read_owners(path: Path, layers: int, neurons: int) -> np.ndarray:
    """The experts of the neurons of every layer, int32 [L, F], from a partition that someone has made.

    Args:
        path: a folder with SciMind's patterns_{layer}.npy, each bool [E, F]; or a .npy file of whole numbers [L, F].

    Raises:
        UserError: when it is of the wrong size, a neuron is in two experts or in none, or experts differ in size.
    """
    if path.is_dir():
        owners = _read_patterns(path, layers, neurons)
    else:
        owners = read_npy(path)
        if owners.dtype.kind not in "iu" or owners.shape != (layers, neurons):
            raise UserError(
                f"--partition {path}: is {owners.dtype} {list(owners.shape)}; for this model it is the number of the "
                f"expert of each neuron, int32 [{layers}, {neurons}] (layers, neurons)"
            )
    experts = int(owners.max()) + 1
    if owners.min() < 0 or experts > neurons:
        bad = int(owners.min()) if owners.min() < 0 else experts - 1
        raise UserError(f"--partition {path}: names expert {bad}; they go from 0 to at most the neurons less one")
    for layer, row in enumerate(owners):
        sizes = np.bincount(row.astype(np.int64), minlength=experts)
        if (sizes != neurons / experts).any():
            raise UserError(
                f"--partition {path}: layer {layer}: expert {sizes.argmax()} has {sizes.max()} neurons and expert "
                f"{sizes.argmin()} has {sizes.min()}; each of the {experts} must have {neurons / experts:g}"
            )
    return owners.astype(np.int32)


def _read_patterns(folder: Path, layers: int, neurons: int) -> np.ndarray:
    owners = np.empty((layers, neurons), np.int32)
    experts = None
    for layer in range(layers):
        file = folder / PATTERN_FILE.format(layer)
        pattern = read_npy(file)
        if pattern.ndim != 2 or pattern.shape[1] != neurons or pattern.dtype != bool or not len(pattern):
            raise UserError(
                f"--partition {file}: is {pattern.dtype} {list(pattern.shape)}; this model needs bool "
                f"[experts, {neurons}]"
            )
        if experts not in (None, len(pattern)):
            raise UserError(f"--partition {file}: has {len(pattern)} experts, layer 0 has {experts}; give one kind")
        experts = len(pattern)
        counts = pattern.sum(axis=0)
        if (counts != 1).any():
            neuron = int(np.flatnonzero(counts != 1)[0])
            raise UserError(
                f"--partition {file}: neuron {neuron} is in {counts[neuron]} experts; each must be in exactly one"
            )
        owners[layer] = pattern.argmax(axis=0)
    if (folder / PATTERN_FILE.format(layers)).exists():
        raise UserError(f"--partition {folder}: has patterns of more than {layers} layers; it is for another model")
    return owners


def write_patterns(folder: Path, permutations: np.ndarray, experts: int) -> None:
    """Writes permutations [L, F] as SciMind's patterns_{layer}.npy, each bool [E, F], which `read_owners` reads."""
    folder.mkdir()
    layers, neurons = permutations.shape
    owners = inverse(permutations) // (neurons // experts)
    for layer in range(layers):
        pattern = owners[layer] == np.arange(experts)[:, None]
        (folder / PATTERN_FILE.format(layer)).write_bytes(npy_bytes(pattern))


# --- balanced k-means -------------------------------------------------------------------------------------------------


def cluster_neurons(weights: np.ndarray, experts: int, seed: int) -> np.ndarray:
    """Balanced k-means on the directions of a layer's up-projections (MoEfication, arXiv:2110.01786).

    Rows are scaled to length 1, as that paper's code does. The start is k-means++ on a sample; each round gives every
    neuron a centre of F / E neurons, closest pairs first, and moves the centres.

    Directions and those of the centres are rounded to 12 bits of their length, 1e-4 of a product of two. So all
    products are of whole numbers and exact, and the same seed gives the same experts on every processor: a last bit
    that differs would otherwise move one neuron, and that, some rounds later, most of them.

    Args:
        weights: [D, F], any float dtype. A copy of it in int16 is made; no more than CLUSTER_ELEMENTS are in float.
        experts: E, a divisor of F.
        seed: the same gives the same.

    Returns:
        [F] int32, the expert of each neuron.

    Raises:
        ValueError: when a weight is not finite.
    """
    neurons = weights.shape[1]
    rng = np.random.default_rng(seed)
    directions, unit = _directions(weights)
    chosen = np.sort(rng.choice(neurons, min(neurons, SAMPLE * experts), replace=False))
    sample = np.ascontiguousarray(directions[:, chosen])
    sums, count = sample[:, _first_centres(sample, experts, rng)].astype(np.int64), 1
    owners = np.full(neurons, -1, np.int32)
    for _ in range(ROUNDS):
        lengths = np.sqrt(np.square(sums).sum(axis=0).astype(np.float64))
        centres = np.rint(sums * (unit / np.maximum(lengths, 1.0))).astype(np.float32)
        products = np.zeros((neurons, experts), np.float32)
        for rows, part in _strips(directions, np.float32):
            products += part.T @ centres[rows]  # whole numbers below 2^24, so exact in any order
        # |x - c|^2 less |x|^2, which is 1 for all.
        lengths /= unit * count
        distances = np.square(lengths) - (2.0 / unit**2) * lengths * products
        before, owners = owners, assign_balanced(distances)
        if np.array_equal(before, owners):
            break
        members = np.zeros((neurons, experts))
        members[np.arange(neurons), owners] = 1.0
        count = neurons // experts
        for rows, part in _strips(directions, np.float64):
            sums[rows] = part @ members  # exact again
    return owners


def _directions(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """The columns [D, F] scaled to one length and rounded to whole numbers, int16; and that length.

    It is so short that the product of two of them, whatever rounding adds to it, is a whole number below 2^24.
    """
    squares = np.zeros(weights.shape[1])
    for row in weights:
        squares += np.square(row.astype(np.float64))
    lengths = np.sqrt(squares)
    if not np.isfinite(lengths).all():
        raise ValueError(f"neuron {int(np.flatnonzero(~np.isfinite(lengths))[0])} has weights that are not finite")
    unit = 4096.0 - math.ceil(math.sqrt(len(weights)))
    scale = unit / np.maximum(lengths, 1e-30)
    rounded = np.empty(weights.shape, np.int16)
    for rows, part in _strips(weights, np.float64):
        part *= scale
        rounded[rows] = np.rint(part)
    return rounded, unit


def _strips(array: np.ndarray, dtype: Any) -> Iterator[tuple[slice, np.ndarray]]:
    step = max(1, CLUSTER_ELEMENTS // array.shape[1])
    for start in range(0, array.shape[0], step):
        rows = slice(start, start + step)
        yield rows, array[rows].astype(dtype)


def _first_centres(sample: np.ndarray, experts: int, rng: np.random.Generator) -> list[int]:
    """k-means++ (Arthur and Vassilvitskii 2007): centres far from each other, the best of a few drawn at each step."""
    tries = 2 + int(np.log(experts))
    numbers = sample.astype(np.float32)
    squares = np.square(sample, dtype=np.int64).sum(axis=0)

    def squared_distances(candidates: np.ndarray) -> np.ndarray:
        products = numbers[:, candidates].T @ numbers  # exact, see `cluster_neurons`
        distances: np.ndarray = squares + squares[candidates, None] - 2 * products.astype(np.int64)
        return distances

    first = int(rng.integers(sample.shape[1]))
    centres, nearest = [first], squared_distances(np.array([first]))[0]
    while len(centres) < experts:
        ends = np.cumsum(nearest)
        if ends[-1] > 0:
            candidates = np.searchsorted(ends, rng.integers(ends[-1], size=tries), side="right")
        else:  # all are alike; then any others do
            candidates = rng.choice(np.setdiff1d(np.arange(len(nearest)), centres), tries)
        left = np.minimum(nearest, squared_distances(candidates))
        best = int(left.sum(axis=1).argmin())
        centres.append(int(candidates[best]))
        nearest = left[best]
    return centres


def assign_balanced(distances: np.ndarray) -> np.ndarray:
    """Gives each neuron an expert, F / E to each: pairs are gone through by distance, and taken where both are free.

    Args:
        distances: [F, E].

    Returns:
        [F] int32.
    """
    neurons, experts = distances.shape
    free = np.full(experts, neurons // experts)
    owners = np.full(neurons, -1, np.int32)
    while (waiting := np.flatnonzero(owners < 0)).size:
        open_experts = np.flatnonzero(free > 0)
        reach = distances[np.ix_(waiting, open_experts)]
        nearest = open_experts[reach.argmin(axis=1)]
        order = np.argsort(reach.min(axis=1), kind="stable")
        # Until the first expert is full every neuron gets its nearest: that many are taken at once.
        taken = nearest[order]
        by_expert = np.argsort(taken, kind="stable")
        counts = np.bincount(taken, minlength=experts)
        place = np.empty(len(taken), np.int64)
        place[by_expert] = np.arange(len(taken)) - np.repeat(np.cumsum(counts) - counts, counts)
        end = int(np.flatnonzero(place + 1 == free[taken])[0]) + 1
        owners[waiting[order[:end]]] = taken[:end]
        free -= np.bincount(taken[:end], minlength=experts)
    return owners
