"""Devices as a mesh, and where each logical axis of a tensor lies on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.errors import UserError
from jaxlm.sharding import AXES, BATCH, EXPERT, FSDP, FSDP_AXES, MESH_AXES, ROW_AXES, RULES, SHARD_AXES, TENSOR
from jaxlm.spec import is_stacked

# Read at a time of a leaf that is given out to shards.
PIECE_BYTES = 256 << 20
_AXIS_TYPES = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None, experts: int | None = None) -> Mesh:
    """The mesh over all five axes.

    Where TPUs are in several slices (`slice_index`), `data` goes over them, and every other axis stays inside of one:
    between slices lies the data centre's network, a hundredth as fast as the links of a slice, and only the sum of the
    gradients, each device's own shard, is small enough for it.

    Args:
        experts: number of experts of each feed-forward layer; None for a dense model.

    Raises:
        UserError: when the sizes do not multiply to the number of devices, would cut an expert apart, or `data` is not
            a multiple of the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    there_are = "this machine has" if jax.process_count() == 1 else f"all {jax.process_count()} processes have"
    data, fsdp, *others = _axis_sizes(config, len(devices), experts, there_are)
    sizes = (data, *_along_torus(fsdp, _torus(devices)), *others)
    slices = slice_count(devices)
    _check_slices(data, slices)
    if slices == 1:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=_AXIS_TYPES, devices=devices)
    # make_mesh does not know of slices, and would lay any axis over them.
    inside, across = (data // slices, *sizes[1:]), (slices, *[1] * (len(sizes) - 1))
    grid = create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=_AXIS_TYPES)


def check_mesh(config: MeshConfig) -> None:
    """Refuses a mesh that does not fit the devices of this run, as far as that can be said without a model.

    Raises:
        UserError: as `make_mesh`, but for experts.
    """
    there_are = "this machine has" if jax.process_count() == 1 else f"all {jax.process_count()} processes have"
    sizes = dataclasses.astuple(config)
    experts = None if config.expert == 1 else math.prod(abs(size) for size in sizes)
    data, *_ = _axis_sizes(config, jax.device_count(), experts, there_are)
    _check_slices(data, slice_count(jax.devices()))


def slice_count(devices: Sequence[jax.Device]) -> int:
    """The number of TPU slices that the devices are in."""
    # JAX calls a host of GPUs a slice; devices to compile for have no index when there is only one.
    on_tpu = devices[0].platform == "tpu"
    return len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1


def _check_slices(data: int, slices: int) -> None:
    if data % slices:
        raise UserError(
            f"mesh.data: {data} is not a multiple of the {slices} slices that the devices are in; parameters are split "
            f"inside a slice, and each has a copy. Set mesh.data to {slices}, and fsdp or another axis to -1"
        )


def _along_torus(count: int, dims: Sequence[int]) -> tuple[int, int, int]:
    """`count` devices as sizes along the dims of the torus that they are in; () for no torus."""
    sizes = [1, 1, 1]
    for at, dim in enumerate(dims[:3]):
        sizes[at] = math.gcd(count, dim)
        count //= sizes[at]
    sizes[0] *= count  # what does not divide any dim
    return sizes[0], sizes[1], sizes[2]


def _torus(devices: Sequence[jax.Device]) -> tuple[int, ...]:
    places = [getattr(device, "coords", None) for device in devices]
    return () if None in places else tuple(int(extent) + 1 for extent in np.ptp(np.array(places), axis=0))


def abstract_mesh(
    config: MeshConfig, count: int, experts: int | None = None, slices: int = 1, torus: Sequence[int] = ()
) -> AbstractMesh:
    """`make_mesh` without devices, for shapes and shardings: `count` of them in `slices` slices of `torus`."""
    data, fsdp, *others = _axis_sizes(config, count, experts, "the topology has")
    _check_slices(data, slices)
    return AbstractMesh((data, *_along_torus(fsdp, torus), *others), MESH_AXES, axis_types=_AXIS_TYPES)


def axis_sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The size of each of `AXES`."""
    parts = {axis: FSDP_AXES if axis == FSDP else (axis,) for axis in AXES}
    return {axis: math.prod(mesh.shape[name] for name in names) for axis, names in parts.items()}


def _axis_sizes(config: MeshConfig, count: int, experts: int | None, there_are: str) -> tuple[int, ...]:
    sizes = [getattr(config, axis) for axis in AXES]
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}: {size}; give a positive number, or -1 for what is left")
    if experts is None and config.expert != 1:
        raise UserError(f"mesh.expert: {config.expert}: this model has no experts to divide; set it to 1")
    if sizes.count(-1) > 1:
        fills = [axis for axis, size in zip(AXES, sizes, strict=True) if size == -1]
        raise UserError(f"mesh: only one axis can be -1, found {', '.join(fills)}")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if count % fixed:
            raise UserError(f"mesh: {count} devices cannot be divided by {fixed} ({_describe(config)})")
        sizes[sizes.index(-1)] = count // fixed
    elif fixed != count:
        raise UserError(f"mesh: {_describe(config)} asks for {fixed} devices, {there_are} {count}; set one axis to -1")
    owners = sizes[AXES.index(EXPERT)] * sizes[AXES.index(TENSOR)]
    if experts and experts % owners:
        raise UserError(
            f"mesh: expert {sizes[AXES.index('expert')]} times tensor {sizes[AXES.index('tensor')]} must divide the "
            f"{experts} experts; each device has whole ones"
        )
    return tuple(sizes)


def _describe(config: MeshConfig) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(config).items() if size != 1) or "all 1"


def shard_axes_size(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts that parameters are split into along `embed`."""
    return math.prod(mesh.shape[axis] for axis in SHARD_AXES)


def rows_axis_size(mesh: Mesh | AbstractMesh) -> int:
    """The number of groups of devices that rows are split over."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """The model's logical constraints mean this mesh inside the block."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def tree_shardings(boxed: Any, mesh: Mesh | AbstractMesh, whole_if_uneven: tuple[str, ...] = ()) -> Any:
    """NamedShardings for a tree of logically partitioned (boxed) abstract arrays, same structure unboxed.

    Args:
        whole_if_uneven: logical axes that are not split when they cannot be split evenly.

    Raises:
        UserError: when a dim is not divisible by the mesh axes it is split over.
    """
    specs = nn.get_partition_spec(boxed)
    shapes = nn.unbox(boxed)
    rules = dict(reversed(RULES))  # the first of each name: parameters have no rows

    def sharding(path: tuple[Any, ...], spec: P, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [rules[name] if name is not None else None for name in spec]
        used = [name for axis in axes for name in _as_tuple(axis)]
        if len(set(used)) != len(used):
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {spec} puts two dims on one mesh axis: {axes}")
        for at, (dim, axis, logical) in enumerate(zip(leaf.shape, axes, spec, strict=False)):
            split = [name for name in _as_tuple(axis) if mesh.shape[name] > 1]
            size = math.prod(mesh.shape[name] for name in split)
            if dim % size and logical in whole_if_uneven:
                axes[at] = None
            elif dim % size:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                keys = " times ".join(dict.fromkeys(f"mesh.{axis.partition('_')[0]}" for axis in split))
                raise UserError(f"{keys}: {size} does not divide {dim}, the {logical} dim of {name} {leaf.shape}")
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(sharding, specs, shapes, is_leaf=lambda x: isinstance(x, P))


def _as_tuple(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def load_sharded(
    abstract: Any,
    shardings: Any,
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    chunks: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """A tree of arrays, each read straight into its shards: no host holds more than its own slices and a piece.

    With `chunks`, what the shards of this process need of a leaf is read once, in pieces, and given out to them:
    reading it shard by shard would read a file that is laid out another way (rows of outputs, and shards of inputs)
    once for each.

    Args:
        abstract: tree of ShapeDtypeStruct; values are cast to these dtypes.
        shardings: NamedSharding for each leaf.
        read: (path like 'layers/mlp/up_proj/kernel', slices) -> that part of the leaf.
        chunks: by path, the shape of what lies together in storage, which pieces do not cut; see `stored_chunks`. A
            leaf that is not there is read shard by shard, each once.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/")
    flat_shardings = traverse_util.flatten_dict(shardings, sep="/")

    def load(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        own = flat_shardings[path].addressable_devices_indices_map(leaf.shape).values()
        shards = {places: np.empty([b - a for a, b in places], leaf.dtype) for places in _places(own, leaf.shape)}
        together = (chunks or {}).get(path)
        for piece in list(shards) if together is None else _pieces(list(shards), leaf, together):
            data = read(path, tuple(slice(*place) for place in piece))
            for places, values in shards.items():
                common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(places, piece, strict=True)]
                if all(a < b for a, b in common):
                    into = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, places, strict=True))
                    of = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, piece, strict=True))
                    values[into] = data[of]

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            (places,) = _places([index], leaf.shape)
            return shards[places]

        return jax.make_array_from_callback(leaf.shape, flat_shardings[path], shard)

    return traverse_util.unflatten_dict({path: load(path, leaf) for path, leaf in flat.items()}, sep="/")


_Places = tuple[tuple[int, int], ...]


def _places(indices: Iterable[tuple[slice, ...] | None], shape: tuple[int, ...]) -> dict[_Places, None]:
    """The different slices as (start, stop) of every dim, in order."""
    full = ((index or ()) + (slice(None),) * (len(shape) - len(index or ())) for index in indices)
    ends = ([part.indices(size)[:2] for part, size in zip(index, shape, strict=True)] for index in full)
    return dict.fromkeys(tuple(places) for places in ends)


def stored_chunks(source: Any, abstract: Any) -> dict[str, tuple[int, ...]]:
    """What lies together in the storage of a source, for `load_sharded`.

    That is what the source says of a leaf (`LeafInfo.chunk`); else a layer of a stacked leaf, a row of embedding and
    head, and other leaves as a whole.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/")
    leaves = getattr(source, "leaves", {})
    chunks = {}
    for path, leaf in flat.items():
        by_rows = is_stacked(path) or path.startswith(("embed_tokens/", "lm_head/"))
        own = getattr(leaves.get(path), "chunk", None)
        chunks[path] = own or ((1, *leaf.shape[1:]) if by_rows else leaf.shape)
    return chunks


def _pieces(shards: list[_Places], leaf: jax.ShapeDtypeStruct, chunk: tuple[int, ...]) -> Iterator[_Places]:
    """What to read: the box around all shards, in pieces of whole chunks; the shards, where the box is far larger."""
    if not leaf.shape:
        yield ()
        return
    box = tuple((min(a for a, _ in dim), max(b for _, b in dim)) for dim in zip(*shards, strict=True))

    def volume(places: _Places) -> int:
        return math.prod(b - a for a, b in places)

    if volume(box) > 2 * sum(map(volume, shards)):
        yield from shards  # they lie far apart
        return
    # Cut along the first dim that chunks are cut along.
    dim = next((at for at, (part, size) in enumerate(zip(chunk, leaf.shape, strict=True)) if part < size), None)
    if dim is None:
        yield box
        return
    start, stop = box[dim]
    slab = volume(box) // max(1, stop - start) * leaf.dtype.itemsize * chunk[dim]  # bytes of a piece of one chunk
    step = chunk[dim] * max(1, PIECE_BYTES // max(1, slab))
    first = start - start % chunk[dim]
    for begin in range(first, stop, step):
        yield (*box[:dim], (max(begin, start), min(begin + step, stop)), *box[dim + 1 :])


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """Which of a micro-step's rows this host's devices hold, rising.

    Hosts whose devices share rows (a tensor axis across hosts) have the same; a host's rows need not be neighbours
    (the mesh follows the network of the devices).
    """
    where = NamedSharding(mesh, BATCH).addressable_devices_indices_map((1, rows, math.prod(mesh.shape.values())))
    return tuple(sorted({row for index in where.values() if index for row in range(*index[1].indices(rows))}))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, rows: int | None = None) -> dict[str, jax.Array]:
    """This host's rows [A, B_local, T] as global arrays [A, B, T] split over the row axes.

    Args:
        rows: B, where a host has some of the rows only: those that `local_rows` names.
    """
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1 or rows is None:
        return {key: jax.device_put(value, sharding) for key, value in batch.items()}
    place = {row: at for at, row in enumerate(local_rows(mesh, rows))}

    def put(value: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = [place[row] for row in range(*index[1].indices(rows))]
            return value[index[0], wanted, index[2]]

        return jax.make_array_from_callback((value.shape[0], rows, value.shape[2]), sharding, shard)

    return {key: put(value) for key, value in batch.items()}
