"""What XLA is told beyond its defaults, by kind and number of devices: one table, each line with what it brought.

Figures: cycles by the compiler's own estimate (`parallel.program`) and peak memory of the LLaMA-2-7B train step
(sequence 2048, full remat, FSDP over all chips), compiled ahead of time with libtpu 0.0.42; nothing was run on a TPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """Options for some devices.

    Attributes:
        device_kind: as JAX calls them.
        most: on so many devices or fewer.
        options: for `compile(compiler_options=...)`.
    """

    device_kind: str
    most: int
    options: dict[str, Any]


# By default GSPMD makes a ring of small products of each product whose weights it would gather ("windowed einsum"):
# nothing waits, but small products cost more than that. Without it gradients are summed by all-reduces that are waited
# for, 54 GB a chip, at full speed of the links 0.27 s on v5e, 0.14 on v6e, 0.09 on v5p.
_NO_RINGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1000000}
# What makes all-gathers run beside products where by default they are waited for.
_ASYNC_GATHERS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

TABLE: tuple[Rule, ...] = (
    # v5e:4x4, 2 rows: 3.34 -> 2.47 Gcycles (-0.58 s), 9.61 -> 9.52 GiB.
    Rule("TPU v5 lite", 16, _NO_RINGS),
    # v5p:4x4x2, 4 rows: 4.03 -> 2.08 Gcycles (-1.1 s), 7.80 -> 7.56 GiB; the gathers alone: 4.02 Gcycles, and 10.6 GB
    # of them no longer waited for.
    Rule("TPU v5", 32, _NO_RINGS | _ASYNC_GATHERS),
    # v6e:4x4, 4 rows: 2.78 -> 1.43 Gcycles (-0.77 s), 11.04 -> 11.21 GiB; compiled in 426 s, before 106 (busy machine).
    Rule("TPU v6 lite", 16, _NO_RINGS | _ASYNC_GATHERS),
)


def compiler_options(device_kind: str, count: int) -> dict[str, Any]:
    """The options for so many devices of a kind; {} where the defaults are best, or nothing was measured."""
    found: dict[str, Any] = {}
    for rule in TABLE:
        if rule.device_kind == device_kind and count <= rule.most:
            found |= rule.options
    return found
