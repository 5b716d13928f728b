"""Emergency checkpoints of one process; several are in tests/processes/test_distributed_training.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.processes.distributed import Hosts
from jaxlm.training.local_checkpoint import LocalCheckpoints
from jaxlm.training.state import TrainState

FILES = {"run.yaml": b"a: 1\n", "fingerprints.json": b"{}", "model.json": b"not kept"}


def state_of(step: int, **sizes: int) -> TrainState:
    """Split, copied and both; float32, bfloat16, int32 and a scalar."""
    mesh = make_mesh(MeshConfig(**sizes))

    def place(value: Any, spec: P) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, spec))

    drawn = jax.random.normal(jax.random.key(step), (8, 4))
    return TrainState(
        step=place(jnp.int32(step), P()),
        trainable={"w": place(drawn, P("fsdp", "tensor")), "b": place(drawn.astype(jnp.bfloat16), P(None, "tensor"))},
        opt_state=(place(drawn * 2, P("fsdp")), place(jnp.arange(6), P())),
        dropout_key=place(jnp.arange(2, dtype=jnp.uint32), P()),
        skipped=place(jnp.int32(1), P()),
    )


def opened(tmp_path: Path, state: TrainState, run: str = "run") -> LocalCheckpoints:
    (tmp_path / run).mkdir(exist_ok=True)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    return LocalCheckpoints(tmp_path / "disk", tmp_path / run, Hosts(), abstract)


SIZES = dict(data=2, fsdp=2, tensor=2)


def filled(tmp_path: Path, *steps: int) -> LocalCheckpoints:
    local = opened(tmp_path, state_of(0, **SIZES))
    for step in steps:
        local.save(state_of(step, **SIZES), {"step": step}, FILES)
    local.wait()
    return local


def test_comes_back_bit_for_bit_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    filled(tmp_path, 3, 6, 9)
    local = opened(tmp_path, state_of(0, **SIZES))
    assert local.newest(after=0) == 9 and local.newest(after=9) is None
    assert sorted(path.name for path in local.path(9).parent.iterdir()) == ["6", "9"]
    wanted = state_of(9, **SIZES)
    found, data = local.restore(9)
    assert data == {"step": 9} and local.files(9) == {name: FILES[name] for name in ("run.yaml", "fingerprints.json")}
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype and ours.sharding == theirs.sharding
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    # Two rows of devices have the same shards: they are written once.
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(wanted))
    assert (local.path(9) / "shards.bin").stat().st_size == size
    local.clear()
    assert not list((tmp_path / "disk").rglob("*.bin"))


@pytest.mark.parametrize("damage", ["short", "flipped", "no index", "half an index", "unfinished"])
def test_an_incomplete_copy_is_not_used(damage: str, tmp_path: Path) -> None:
    local = filled(tmp_path, 3, 6)
    data, index = local.path(6) / "shards.bin", local.path(6) / "index.json"
    if damage == "short":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "flipped":
        content = bytearray(data.read_bytes())
        content[100] ^= 1
        data.write_bytes(content)
    elif damage == "no index":
        index.unlink()
    elif damage == "half an index":
        index.write_text(index.read_text()[:50])
    else:
        local.path(6).rename(local.path(6).with_name("6.tmp"))
    assert opened(tmp_path, state_of(0, **SIZES)).newest(after=0) == 3


def test_another_mesh_another_run_or_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = filled(tmp_path, 3, 6)
    assert opened(tmp_path, state_of(0, data=4, fsdp=1, tensor=2)).newest(after=0) is None
    assert opened(tmp_path, state_of(0, **SIZES), "other").newest(after=0) is None
    # The step that all have: another process has lost the last one.
    monkeypatch.setattr(Hosts, "exchange", lambda self, name, value: [value, json.dumps([3])])
    assert local.newest(after=0) == 3 and local.newest(after=3) is None
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run")  # to begin anew
    assert opened(tmp_path, state_of(0, **SIZES)).newest(after=0) is None


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_text("a file")
    with pytest.raises(UserError, match=r"train.local_checkpoints: .*disk.* cannot be written .*own disk, or null"):
        opened(tmp_path, state_of(0, **SIZES))
    (tmp_path / "disk").unlink()
    local = opened(tmp_path, state_of(0, **SIZES))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    local.save(state_of(3, **SIZES), {}, FILES)
    with pytest.raises(UserError, match="No space left on device"):
        local.save(state_of(6, **SIZES), {}, FILES)
    assert local.newest(after=0) is None
