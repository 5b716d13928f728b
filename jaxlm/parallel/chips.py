"""Kinds of devices, and topologies by name: what a plan reckons with where no such device is.

The one table of peaks: progress lines take their MFU from it too.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from jaxlm.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it.

    Attributes:
        name: in topologies, e.g. v5e.
        platform: tpu, gpu or cpu.
        device_kind: as JAX calls it.
        flops: dense bf16 peak, FLOP/s; 0: not known, as for a CPU.
        memory: bytes that programs can have.
        bandwidth: of that memory, bytes/s.
        link: what it can send to its neighbours at once, bytes/s; as much comes in at the same time.
        clock: Hz of the cycles in which the compiler reckons; 0: it does not.
        dims: of a slice's shape: 2 or 3; 1: a number of devices.
        compute_capability: of a GPU.
        network: its share of what its host sends to other slices, bytes/s; 0: not known.
    """

    name: str
    platform: str
    device_kind: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    clock: float = 0.0
    dims: int = 1
    compute_capability: str | None = None
    network: float = 0.0


# TPUs: peak, bandwidth and link from cloud.google.com/tpu/docs/{v5e,v5p,v6e}, where links are given for both directions
# together (400, 1,200 and 800 GB/s); memory as libtpu 0.0.42 allots it when it refuses a program (15.75, 95.74 and
# 31.25 GiB). Clocks: peak over the FLOPs of a cycle (131,072, 262,144 and 524,288); the compiler's estimate for a bf16
# product of 8192 x 8192 is 88, 90 and 70 % of those. Network: of a host 2 x 100, 1 x 200 and 4 x 200 Gbit/s (the same
# pages), over its 8, 4 and 8 chips.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (dense bf16; NVLink halved to one direction);
# of the memory that the driver shows, the share that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
SHARE = 0.75
CHIPS: tuple[Chip, ...] = (
    Chip("v5e", "tpu", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9, 1.5e9, 2, network=3.125e9),
    Chip("v5p", "tpu", "TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9, 1.75e9, 3, network=6.25e9),
    Chip("v6e", "tpu", "TPU v6 lite", 918e12, 31.25 * GIB, 1600e9, 400e9, 1.75e9, 2, network=12.5e9),
    Chip("a100", "gpu", "NVIDIA A100-SXM4-80GB", 312e12, SHARE * 80 * GIB, 2039e9, 300e9, compute_capability="8.0"),
    Chip("h100", "gpu", "NVIDIA H100 80GB HBM3", 989e12, SHARE * 79.6 * GIB, 3350e9, 450e9, compute_capability="9.0"),
    Chip("h200", "gpu", "NVIDIA H200", 989e12, SHARE * 140.4 * GIB, 4800e9, 450e9, compute_capability="9.0"),
    Chip("b200", "gpu", "NVIDIA B200", 2250e12, SHARE * 179 * GIB, 8000e9, 900e9, compute_capability="10.0"),
    Chip("cpu", "cpu", "cpu", 0.0, math.inf, 0.0, 0.0),
)
_BY_NAME = {chip.name: chip for chip in CHIPS}

# Peaks by a part of the device kind, the more special first; older kinds that no topology names are here alone.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": _BY_NAME["v5e"].flops,
    "TPU v5e": _BY_NAME["v5e"].flops,
    "TPU v5": _BY_NAME["v5p"].flops,
    "TPU v6": _BY_NAME["v6e"].flops,
    "A100": _BY_NAME["a100"].flops,
    "H100": _BY_NAME["h100"].flops,
    "H200": _BY_NAME["h200"].flops,
    "B200": _BY_NAME["b200"].flops,
}


def peak_flops(device_kind: str) -> float | None:
    """bf16 peak of a device in FLOP/s, None where it is not known (CPU, consumer cards)."""
    return next((flops for name, flops in _PEAKS.items() if name.lower() in device_kind.lower()), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind that need not be here.

    Attributes:
        shape: of a slice, (16, 16); of GPUs (hosts, GPUs of each); of CPUs (devices,).
        slices: of TPUs, so many of that shape.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def slice(self) -> str:
        """One of them, by name."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        shape = self.shape[1:] if self.chip.platform == "gpu" and self.shape[0] == 1 else self.shape
        return f"{f'{self.slices}*' if self.slices > 1 else ''}{self.chip.name}:{'x'.join(map(str, shape))}"


_EXAMPLES = "v5e:16x16, v5p:4x4x8, 2*v6e:4x4 (two slices), h200:8, h100:2x8 (hosts x GPUs), cpu:8"


def parse_topology(text: str) -> Topology:
    """Reads e.g. v5e:16x16, 2*v5e:16x16 (slices), h200:8, h200:2x8 (hosts x GPUs of each), cpu:8.

    Raises:
        UserError: for an unknown chip or a shape that it does not come in, with the names that are known.
    """
    found = re.fullmatch(r"(?:(\d{1,3})\*)?([a-z0-9]+):(\d{1,4}(?:x\d{1,4})*)", text.strip().lower())
    if found is None:
        raise UserError(f"--topology: {text!r} is none; write CHIP:SHAPE, e.g. {_EXAMPLES}{_shape_of_name(text)}")
    slices, name, shape = int(found[1] or 1), found[2], tuple(int(size) for size in found[3].split("x"))
    chip = _BY_NAME.get(name)
    if chip is None:
        near = difflib.get_close_matches(name, _BY_NAME, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--topology: {text!r}: unknown chip {name!r}; known: {', '.join(_BY_NAME)}{hint}")
    if 0 in (slices, *shape):
        raise UserError(f"--topology: {text!r} has no devices")
    if chip.platform == "gpu" and len(shape) == 1:
        shape = (1, *shape)
    wanted = 2 if chip.platform == "gpu" else chip.dims
    if len(shape) != wanted:
        what = f"slices have {wanted} dims" if chip.platform == "tpu" else f"at most {wanted} numbers stand here"
        raise UserError(f"--topology: {text!r}: {what}, e.g. {_EXAMPLES}{_shape_of_name(f'{name}-{math.prod(shape)}')}")
    if slices > 1 and chip.platform != "tpu":
        raise UserError(f"--topology: {text!r}: only TPUs come in slices, e.g. {_EXAMPLES}")
    return Topology(chip, shape, slices)


# Slices by their number of chips, as Google offers them.
_SLICES = {
    2: {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
}


def _shape_of_name(text: str) -> str:
    """What to write for a name like v5litepod-256 or v5p-64."""
    found = re.fullmatch(r"(v5litepod|v5e|v6e|v5p)[-:](\d+)", text.strip().lower())
    if found is None:
        return ""
    name = "v5e" if found[1] == "v5litepod" else found[1]
    # Names of v5p count cores, of which a chip has two.
    chips = int(found[2]) // (2 if name == "v5p" and "-" in text else 1)
    shape = _SLICES[_BY_NAME[name].dims].get(chips)
    return "" if shape is None else f"; {text} is {name}:{shape}"
