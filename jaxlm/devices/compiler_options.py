"""Options for XLA beyond its defaults, by kind and number of devices: one table, each line with what it brought.

Figures: cycles by the compiler's own estimate (`devices.program`) and peak memory of the LLaMA-2-7B train step
(sequence 2048, full remat, FSDP over all chips), compiled ahead of time with libtpu 0.0.42; nothing was run on a TPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Rule:
    """Options for some devices; where they are in several slices, those of one count.

    Attributes:
        device_kind: as JAX calls them.
        most: largest number of devices that it is for.
        options: for `compile(compiler_options=...)`.
    """

    device_kind: str
    most: int
    options: dict[str, Any]


# By default GSPMD makes a ring of small products of each product whose weights it would gather ("windowed einsum"):
# nothing waits, but small products cost more than that. Without it gradients are summed by all-reduces that are waited
# for, 54 GB a chip, at full speed of the links 0.27 s on v5e, 0.14 on v6e, 0.09 on v5p.
_NO_RINGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1000000}

# What a product and what is fused to it may take of the memory on the chip, by default 16 MiB: with so little the
# compiler cuts a feed-forward layer's products into slivers (LLaMA-2-7B, 4 x 2048 tokens: 10.1 -> 6.1 Mcycles for one).
_VMEM = {"xla_tpu_scoped_vmem_limit_kib": 32768}

TABLE: tuple[Rule, ...] = (
    # v5e:4x4, 2 rows: 1.98 -> 1.84 Gcycles; 4 rows: 3.95 -> 3.64; LoRA, 4 rows: 3.37 -> 2.89; v5e:16x16, 4 rows, remat
    # qkv: 3.72 -> 3.41; memory as before.
    Rule("TPU v5 lite", 256, _VMEM),
    # v5p:4x4x2, 4 rows: 2.12 -> 1.83 Gcycles.
    Rule("TPU v5", 128, _VMEM),
    # v5e:4x4, 2 rows: 3.34 -> 2.47 Gcycles (-0.58 s), 9.61 -> 9.52 GiB.
    Rule("TPU v5 lite", 16, _NO_RINGS),
    # v5p:4x4x2, 4 rows: 4.03 -> 2.05 Gcycles (-1.1 s), 7.80 -> 7.50 GiB.
    Rule("TPU v5", 32, _NO_RINGS),
    # v6e:4x4, 4 rows: 2.78 -> 1.40 Gcycles (-0.78 s), 11.04 -> 10.98 GiB.
    Rule("TPU v6 lite", 16, _NO_RINGS),
    # Not here: async all-gathers by "collective fusion" (xla_tpu_enable_async_collective_fusion). On v5e they are the
    # default; for v5p and v6e newer compilers refuse them: results may be wrong.
)


def compiler_options(device_kind: str, count: int) -> dict[str, Any]:
    """The options for `count` devices of a kind; {} where the defaults are best, or nothing was measured."""
    options: dict[str, Any] = {}
    for rule in TABLE:
        if rule.device_kind == device_kind and count <= rule.most:
            options |= rule.options
    return options


def least_effort() -> dict[str, Any]:
    """The option that lets a TPU's compiler try less: memory stays nearly the same, cycles do not.

    Older versions of JAX have a number for it, newer ones a level.
    """
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        return {"exec_time_optimization_effort": -1.0}
    return {"optimization_level": "O0"}
