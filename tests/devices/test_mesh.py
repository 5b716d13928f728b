"""Building meshes and placing tensors; no model is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import (
    abstract_mesh,
    axis_sizes,
    load_sharded,
    make_mesh,
    put_batch,
    rows_axis_size,
    tree_shardings,
)
from jaxlm.errors import UserError
from jaxlm.sharding import BATCH, FSDP_AXES, SHARD_AXES
from tests.kernels.ahead_of_time import compile_for_tpus


def leaf(shape: tuple[int, ...], axes: tuple[Any, ...]) -> Any:
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (dict(), (1, 8, 1, 1, 1)),
        (dict(data=8, fsdp=1), (8, 1, 1, 1, 1)),
        (dict(data=-1, fsdp=2, tensor=2), (2, 2, 1, 1, 2)),
        (dict(data=2, fsdp=1, tensor=-1), (2, 1, 1, 1, 4)),
        (dict(data=2, fsdp=2, tensor=2), (2, 2, 1, 1, 2)),
    ],
)
def test_sizes(sizes: dict[str, int], expected: tuple[int, ...]) -> None:
    mesh = make_mesh(MeshConfig(**sizes))
    assert axis_sizes(mesh) == dict(zip(("data", "fsdp", "expert", "sequence", "tensor"), expected, strict=True))
    assert rows_axis_size(mesh) == expected[0] * expected[1]
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(data=3, fsdp=1), r"data 3 asks for 3 devices, this machine has 8; set one axis to -1"),
        (dict(data=3), r"8 devices cannot be divided by 3"),
        (dict(data=-1, fsdp=-1), r"only one axis can be -1, found data, fsdp"),
        (dict(tensor=0), r"mesh.tensor: 0"),
        (dict(fsdp=-2), r"mesh.fsdp: -2"),
        (dict(expert=2), r"mesh.expert: 2"),
        (dict(sequence=3, fsdp=8), r"asks for 24 devices"),
    ],
)
def test_errors(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_mesh(MeshConfig(**sizes))


ALONG_TORUS = """
import numpy as np
from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.sharding import FSDP_AXES

for topology, more in CASES:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(**more), devices)
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    # Along each axis of fsdp, how many of the torus' dims change.
    moving = [int((np.ptp(places, axis=at + 1).reshape(-1, 3) > 0).any(0).sum()) for at in range(3)]
    print("compiled", *(mesh.shape[axis] for axis in FSDP_AXES), *moving)
"""


def test_fsdp_lies_along_the_torus() -> None:
    cases: list[tuple[str, dict[str, int]]] = [
        ("v5e:4x4", {}),
        ("v5p:4x4x2", {}),
        ("v5e:16x16", dict(tensor=16)),
        ("v5e:8x8", dict(data=8)),
        ("v5e:4x4", dict(tensor=2)),
        ("v5e:2x2", dict(fsdp=1, data=4)),
    ]
    found = [[int(n) for n in line] for line in compile_for_tpus(f"CASES = {cases!r}\n{ALONG_TORUS}")]
    assert [line[:3] for line in found] == [[4, 4, 1], [4, 4, 2], [16, 1, 1], [8, 1, 1], [4, 2, 1], [1, 1, 1]]
    assert [line[3:] for line in found] == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]


ACROSS_SLICES = """
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.sharding import BATCH

for topology, slices, more in CASES:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
    mesh = make_mesh(MeshConfig(**more), devices)
    index = np.array([device.slice_index for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    crossing = [at for at in range(index.ndim) if np.ptp(index, axis=at).any()]
    rows = jax.ShapeDtypeStruct((1, 16, 256), jnp.float32, sharding=NamedSharding(mesh, BATCH))
    traced = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P())).trace(rows)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    print("compiled", *crossing, len(np.unique(index)), text.count("all-reduce("))
"""


def test_data_lies_across_slices() -> None:
    """The first axis and no other, also where it is longer than there are slices; and the compiler takes it."""
    cases: list[tuple[str, int, dict[str, int]]] = [
        ("v5e:2x2", 2, dict(data=2)),
        ("v5e:4x4", 2, dict(data=4, fsdp=2, tensor=-1)),
        ("v5p:2x2x1", 4, dict(data=-1, fsdp=2, tensor=2)),
    ]
    found = compile_for_tpus(f"CASES = {cases!r}\n{ACROSS_SLICES}")
    assert [line[:2] for line in found] == [["0", "2"], ["0", "2"], ["0", "4"]]
    assert all(int(line[2]) for line in found)


def test_data_must_lie_across_slices() -> None:
    devices: Any = [
        SimpleNamespace(platform="tpu", slice_index=at // 4, coords=(at % 2, at // 2 % 2, 0)) for at in range(8)
    ]
    with pytest.raises(UserError, match=r"mesh.data: 1 is not a multiple of the 2 slices.* Set mesh.data to 2"):
        make_mesh(MeshConfig(), devices)
    with pytest.raises(UserError, match=r"mesh.data: 3 is not a multiple of the 2 slices"):
        abstract_mesh(MeshConfig(data=3), 12, slices=2)


def test_elsewhere_fsdp_is_one_axis() -> None:
    assert [make_mesh(MeshConfig(tensor=2)).shape[axis] for axis in FSDP_AXES] == [4, 1, 1]


def test_dim_that_does_not_divide() -> None:
    mesh = make_mesh(MeshConfig(fsdp=1, data=4, tensor=2))
    tree = {"layers": {"k_proj": {"kernel": leaf((3, 8, 1, 4), ("layers", "embed", "kv_heads", "head_dim"))}}}
    with pytest.raises(UserError, match=r"mesh.tensor: 2 does not divide 1, the kv_heads dim of layers/k_proj/kernel"):
        tree_shardings(tree, mesh)


def test_specs_and_collision() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tree = {"a": leaf((4, 8), ("vocab", "embed")), "b": leaf((3, 4), ("layers", "norm"))}
    shardings = tree_shardings(tree, mesh)
    assert shardings["a"].spec == P("tensor", SHARD_AXES) and shardings["b"].spec == P(None, None)
    with pytest.raises(AssertionError, match="two dims on one mesh axis"):
        tree_shardings({"a": leaf((4, 8), ("heads", "mlp"))}, mesh)


def test_load_reads_each_shard_and_no_more() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    full = np.arange(32, dtype=np.float64).reshape(4, 8)
    asked: list[tuple[int, ...]] = []

    def read(path: str, index: tuple[slice, ...]) -> np.ndarray:
        assert path == "m/a"
        part = full[index]
        asked.append(part.shape)
        return part

    abstract = {"m": {"a": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)}}
    shardings = tree_shardings({"m": {"a": leaf((4, 8), ("vocab", "embed"))}}, mesh)
    loaded = load_sharded(abstract, shardings, read)["m"]["a"]
    assert loaded.dtype == jnp.bfloat16 and loaded.sharding.spec == P("tensor", SHARD_AXES)
    np.testing.assert_array_equal(np.asarray(loaded, np.float64), full)
    assert asked == [(2, 4)] * 4  # of eight devices, two have the same each time


def test_batch_is_split_over_rows() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(2 * 8 * 3).reshape(2, 8, 3).astype(np.int32)
    placed = put_batch({"input_ids": rows}, mesh)["input_ids"]
    assert placed.sharding.spec == BATCH
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}
