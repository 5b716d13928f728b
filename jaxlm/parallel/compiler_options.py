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


TABLE: tuple[Rule, ...] = (
    # v5e:4x4, 2 rows: 3.34 -> 2.47 Gcycles, 9.61 -> 9.52 GiB. By default GSPMD makes a ring of small products of each
    # product whose weights it would gather ("windowed einsum"): nothing waits, but small products cost more than that.
    Rule("TPU v5 lite", 16, {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1000000}),
)


def compiler_options(device_kind: str, count: int) -> dict[str, Any]:
    """The options for so many devices of a kind; {} where the defaults are best, or nothing was measured."""
    found: dict[str, Any] = {}
    for rule in TABLE:
        if rule.device_kind == device_kind and count <= rule.most:
            found |= rule.options
    return found
