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

import numpy as np

from jaxlm.errors import UserError

PARTITION_FILE = "partition.npy"
PATTERN_FILE = "patterns_{}.npy"
_HEADER_BYTES = 1024
_HEADER = re.compile(
    rb"\x93NUMPY(?s:....|......)\{'descr': '(?P<dtype>[<|](?:b1|[iu][1248]|f[248]))', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>(?:\d{1,15}, ?){0,3}(?:\d{1,15})?)\), \} *\n"
)
# Elements of a layer's matrix that are in float32 at a time.
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
        found = _HEADER.match(start)
        if found is None:
            raise UserError(f"{path}: is no .npy file of numbers, as numpy.save writes them; save it again")
        shape = tuple(int(part) for part in found["shape"].replace(b",", b" ").split())
        dtype = np.dtype(found["dtype"].decode())
        if size != found.end() + math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: has {size} bytes, which is not what its header says; copy it again")
        flat = np.fromfile(path, np.uint8, offset=found.end())
        values = flat != 0 if dtype.kind == "b" else flat.view(dtype)
        return values.reshape(shape, order="F" if found["fortran"] == b"True" else "C")
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
    found = read_npy(path)
    if found.dtype != np.int32 or found.shape != (layers, neurons):
        raise UserError(
            f"{path}: is {found.dtype} {list(found.shape)}, the model needs int32 [{layers}, {neurons}]; "
            "it belongs to another model: copy the one that `convert moefy` wrote"
        )
    for layer, row in enumerate(found):
        inside = row[(row >= 0) & (row < neurons)]
        if len(inside) < neurons:
            bad = row[(row < 0) | (row >= neurons)][0]
            raise UserError(f"{path}: layer {layer} names neuron {bad}; they are 0 to {neurons - 1}; copy it again")
        counts = np.bincount(inside, minlength=neurons)
        if (counts != 1).any():
            raise UserError(
                f"{path}: layer {layer} has neuron {counts.argmax()} twice and misses {counts.argmin()}; copy it again"
            )
    return found


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

    Args:
        weights: [D, F], any float dtype; no more than CLUSTER_ELEMENTS of it are copied at a time.
        experts: E, a divisor of F.
        seed: the same gives the same.

    Returns:
        [F] int32, the expert of each neuron.

    Raises:
        ValueError: when a weight is not finite.
    """
    width, neurons = weights.shape
    rng = np.random.default_rng(seed)
    lengths = np.sqrt(sum(np.square(part).sum(axis=0, dtype=np.float64) for _, part in _strips(weights)))
    if not np.isfinite(lengths).all():
        raise ValueError(f"neuron {int(np.flatnonzero(~np.isfinite(lengths))[0])} has weights that are not finite")
    scale = (1.0 / np.maximum(lengths, 1e-30)).astype(np.float32)
    chosen = np.sort(rng.choice(neurons, min(neurons, SAMPLE * experts), replace=False))
    sample = weights[:, chosen].astype(np.float32) * scale[chosen]
    centres = sample[:, _first_centres(sample, experts, rng)]
    owners = np.full(neurons, -1, np.int32)
    for _ in range(ROUNDS):
        # |x - c|^2 less |x|^2, which is 1 for all.
        distances = np.broadcast_to(np.square(centres).sum(axis=0), (neurons, experts)).copy()
        for rows, part in _strips(weights):
            distances -= 2.0 * (part.T @ centres[rows]) * scale[:, None]
        before, owners = owners, assign_balanced(distances)
        if np.array_equal(before, owners):
            break
        members = np.zeros((neurons, experts), np.float32)
        members[np.arange(neurons), owners] = scale * np.float32(experts / neurons)
        centres = np.empty((width, experts), np.float32)
        for rows, part in _strips(weights):
            centres[rows] = part @ members
    return owners


def _strips(weights: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    step = max(1, CLUSTER_ELEMENTS // weights.shape[1])
    for start in range(0, weights.shape[0], step):
        rows = slice(start, start + step)
        yield rows, weights[rows].astype(np.float32)


def _first_centres(sample: np.ndarray, experts: int, rng: np.random.Generator) -> list[int]:
    """k-means++ (Arthur and Vassilvitskii 2007): centres far from each other, the best of a few drawn at each step."""
    tries = 2 + int(np.log(experts))
    squares = np.square(sample).sum(axis=0)

    def squared_distances(candidates: np.ndarray) -> np.ndarray:
        products = sample[:, candidates].T @ sample
        found: np.ndarray = np.maximum(squares + squares[candidates, None] - 2.0 * products, 0.0)
        return found

    first = int(rng.integers(sample.shape[1]))
    centres, nearest = [first], squared_distances(np.array([first]))[0].astype(np.float64)
    nearest[first] = 0.0
    while len(centres) < experts:
        total = nearest.sum()
        # All neurons may be alike; then any others do.
        odds = nearest / total if total > 0 else np.isin(np.arange(len(nearest)), centres, invert=True) * 1.0
        candidates = rng.choice(len(nearest), tries, p=odds / odds.sum())
        left = np.minimum(nearest, squared_distances(candidates))
        best = int(left.sum(axis=1).argmin())
        centres.append(int(candidates[best]))
        nearest = left[best]
        nearest[centres] = 0.0
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
