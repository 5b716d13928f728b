"""The table of compiler options, against the compiler that is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxlm.devices.chips import CHIPS
from jaxlm.devices.compiler_options import TABLE, Rule, compiler_options, least_effort
from jaxlm.training.setup import TrainSetup
from tests.kernels.ahead_of_time import compile_for_tpus

# A product whose weights are gathered, on the smallest slice that has links.
GATHERED = """
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

def product(topology, options):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    split = NamedSharding(Mesh(np.array(devices).reshape(-1), ("fsdp",)), P("fsdp"))
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=split)
    lowered = jax.jit(lambda x, w: x @ w).trace(x, x).lower(lowering_platforms=("tpu",))
    lowered.compile(compiler_options=options)
    print("compiled", topology, len(options), 0, flush=True)
"""
SMALL = {"TPU v5 lite": "v5e:2x2", "TPU v5": "v5p:2x2x1", "TPU v6 lite": "v6e:2x2"}


def test_the_compiler_takes_every_rule_on_its_devices() -> None:
    calls = [f"product({SMALL[rule.device_kind]!r}, {rule.options!r})" for rule in TABLE]
    calls.append(f"product('v5e:2x2', {least_effort()!r})")
    assert len(compile_for_tpus(GATHERED + "\n".join(calls))) == len(TABLE) + 1


def test_rules_name_devices_that_there_are() -> None:
    assert {rule.device_kind for rule in TABLE} <= {chip.device_kind for chip in CHIPS}


@pytest.mark.parametrize(("count", "found"), [(1, {"a": 1, "b": 3}), (8, {"a": 1, "b": 3}), (9, {"a": 2}), (33, {})])
def test_later_rules_win_within_their_number_of_devices(
    monkeypatch: pytest.MonkeyPatch, count: int, found: dict[str, int]
) -> None:
    rules = (Rule("x", 32, {"a": 2}), Rule("x", 8, {"a": 1, "b": 3}), Rule("y", 64, {"c": 4}))
    monkeypatch.setattr("jaxlm.devices.compiler_options.TABLE", rules)
    assert compiler_options("x", count) == found


def test_devices_are_counted_by_slice() -> None:
    def options(slices: int, each: int) -> dict[str, Any]:
        devices = [
            SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", slice_index=at)
            for at in range(slices)
            for _ in range(each)
        ]
        config = SimpleNamespace(train=SimpleNamespace(compiler_options={"mine": 1}))
        build: Any = SimpleNamespace(mesh=SimpleNamespace(devices=np.array(devices)), config=config)
        return TrainSetup.compiler_options(build)

    assert options(2, 16) == options(1, 16) == compiler_options("TPU v5 lite", 16) | {"mine": 1}
    assert options(1, 32) != options(2, 16)
