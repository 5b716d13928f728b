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


# TPUs: peak, bandwidth and link from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, where links are given for both
# directions together (600, 400, 1,200 and 800 GB/s); memory as libtpu 0.0.42 allots it when it refuses a program
# (15.75, 95.74 and 31.25 GiB; v4: 30.75). Clocks: peak over the FLOPs of a cycle (131,072, 262,144 and 524,288); the
# compiler's estimate for a bf16 product of 8192 x 8192 is 88, 90 and 70 % of those. Network: of a host 2 x 100, 1 x 200
# and 4 x 200 Gbit/s (the same pages), over its 8, 4 and 8 chips. Slices as these pages list them, see `slice_exists`.
_TPUS = (
    Chip("v4", "tpu", "TPU v4", 275e12, 30.75 * GIB, 1228e9, 300e9, dims=3),
    Chip("v5e", "tpu", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9, 1.5e9, 2, network=3.125e9),
    Chip("v5p", "tpu", "TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9, 1.75e9, 3, network=6.25e9),
    Chip("v6e", "tpu", "TPU v6 lite", 918e12, 31.25 * GIB, 1600e9, 400e9, 1.75e9, 2, network=12.5e9),
)

# GPUs: of the memory that the driver shows, the share that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says
# otherwise.
SHARE = 0.75


def _gpu(
    name: str, device_kind: str, teraflops: float, gib: float, bandwidth: float, link: float, capability: str
) -> Chip:
    """A GPU: memory in GiB as nvidia-smi shows it, bandwidth and link (one direction) in GB/s."""
    return Chip(
        name,
        "gpu",
        device_kind,
        teraflops * 1e12,
        SHARE * gib * GIB,
        bandwidth * 1e9,
        link * 1e9,
        compute_capability=capability,
    )


# Dense bf16 with float32 sums, from NVIDIA's data sheets, and for GeForce and RTX cards from the white papers of the
# GA102, AD102 and RTX Blackwell GPUs (tables "Peak FP16 Tensor TFLOPS with FP32 Accumulate"). P100, V100 and T4 have no
# bfloat16 units, and XLA computes it in float32: theirs is the float32 peak. Link: NVLink halved to one direction where
# the card has it, else PCIe x16 (3.0: 16, 4.0: 32, 5.0: 64 GB/s).
_GPUS = (
    _gpu("p100", "Tesla P100-SXM2-16GB", 10.6, 15.9, 732, 80, "6.0"),
    _gpu("v100", "Tesla V100-SXM2-16GB", 15.7, 15.8, 900, 150, "7.0"),
    _gpu("v100-32gb", "Tesla V100-SXM2-32GB", 15.7, 31.7, 900, 150, "7.0"),
    _gpu("t4", "Tesla T4", 8.1, 15.0, 320, 16, "7.5"),
    _gpu("a100", "NVIDIA A100-SXM4-80GB", 312, 80.0, 2039, 300, "8.0"),
    _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 312, 40.0, 1555, 300, "8.0"),
    _gpu("a10", "NVIDIA A10", 125, 22.5, 600, 32, "8.6"),
    _gpu("a10g", "NVIDIA A10G", 70, 22.5, 600, 32, "8.6"),
    _gpu("a40", "NVIDIA A40", 149.7, 45.0, 696, 56, "8.6"),
    _gpu("a6000", "NVIDIA RTX A6000", 154.8, 48.0, 768, 56, "8.6"),
    _gpu("rtx3090", "NVIDIA GeForce RTX 3090", 71, 24.0, 936, 32, "8.6"),
    _gpu("rtx3090ti", "NVIDIA GeForce RTX 3090 Ti", 80, 24.0, 1008, 32, "8.6"),
    _gpu("l4", "NVIDIA L4", 121, 22.5, 300, 32, "8.9"),
    _gpu("l40", "NVIDIA L40", 181, 45.0, 864, 32, "8.9"),
    _gpu("l40s", "NVIDIA L40S", 362, 45.0, 864, 32, "8.9"),
    _gpu("rtx6000ada", "NVIDIA RTX 6000 Ada Generation", 364.2, 48.0, 960, 32, "8.9"),
    _gpu("rtx4080", "NVIDIA GeForce RTX 4080", 97.5, 16.0, 716.8, 32, "8.9"),
    _gpu("rtx4090", "NVIDIA GeForce RTX 4090", 165.2, 24.0, 1008, 32, "8.9"),
    _gpu("h100", "NVIDIA H100 80GB HBM3", 989, 79.6, 3350, 450, "9.0"),
    _gpu("h100-pcie", "NVIDIA H100 PCIe", 756, 79.6, 2000, 64, "9.0"),
    _gpu("h100-nvl", "NVIDIA H100 NVL", 835, 93.6, 3938, 300, "9.0"),
    _gpu("gh200", "NVIDIA GH200 480GB", 989, 95.6, 4000, 450, "9.0"),
    _gpu("h200", "NVIDIA H200", 989, 140.4, 4800, 450, "9.0"),
    _gpu("h200-nvl", "NVIDIA H200 NVL", 835, 140.4, 4800, 450, "9.0"),
    _gpu("b200", "NVIDIA B200", 2250, 179, 8000, 900, "10.0"),
    _gpu("gb200", "NVIDIA GB200", 2500, 185, 8000, 900, "10.0"),
    _gpu("rtx5080", "NVIDIA GeForce RTX 5080", 112.6, 15.9, 960, 64, "12.0"),
    _gpu("rtx5090", "NVIDIA GeForce RTX 5090", 209.5, 31.8, 1792, 64, "12.0"),
    _gpu("rtxpro6000", "NVIDIA RTX PRO 6000 Blackwell", 503.8, 95.6, 1792, 64, "12.0"),
)
CHIPS: tuple[Chip, ...] = (*_TPUS, *_GPUS, Chip("cpu", "cpu", "cpu", 0.0, math.inf, 0.0, 0.0))
_BY_NAME = {chip.name: chip for chip in CHIPS}
# Any other GPU: its memory is said by hand, its speed is not known.
ANY_GPU = Chip("gpu", "gpu", "GPU", 0.0, math.inf, 0.0, 0.0)
_ALIASES = {"a100-80gb": "a100", "v100-16gb": "v100", "h100-sxm": "h100", "h100-80gb": "h100", "v5litepod": "v5e"}
# What a device kind says beside the model's number: other chips, or a part of one.
_OTHERS = re.compile(r"laptop|mobile|max-q|\bmig\b|\d d\b|super", re.IGNORECASE)
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
} | dict.fromkeys(("TPU v6", "TPU v6 lite", "TPU v6e"), "v6e")
# The words of a device kind by which a GPU is known, the more special first.
_GPU_KINDS = (
    (r"GH200", "gh200"),
    (r"H100 PCIe", "h100-pcie"),
    (r"(H100|H200) NVL", r"\1-nvl"),
    (r"A100\b.*40GB", "a100-40gb"),
    (r"V100\b.*32GB", "v100-32gb"),
    (r"RTX (PRO|A?)\s?6000 Blackwell", "rtxpro6000"),
    (r"RTX 6000 Ada", "rtx6000ada"),
    (r"RTX A6000", "a6000"),
    (r"RTX (3090|4080|5080|5090|4090)$", r"rtx\1"),
    (r"RTX 3090 Ti", "rtx3090ti"),
    (r"\b(P100|V100|T4|A100|A10|A10G|A40|L4|L40|L40S|H100|H200|B200|GB200)\b", r"\1"),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that is not known, or a part of one (MIG)."""
    if device_kind in _TPU_KINDS:
        return _BY_NAME[_TPU_KINDS[device_kind]]
    if _OTHERS.search(device_kind):
        return None
    for pattern, name in _GPU_KINDS:
        match = re.search(pattern, device_kind, re.IGNORECASE)
        if match is not None:
            return _BY_NAME[match.expand(name).lower()]
    return None


def peak_flops(device_kind: str) -> float | None:
    """bf16 peak of a device in FLOP/s, None where it is not known (a CPU, other cards)."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.flops


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind that need not be here.

    Attributes:
        shape: of a slice, (16, 16); of GPUs (hosts, GPUs of each); of CPUs (devices,).
        slices: number of TPU slices of that shape.
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
        return f"{self.chip.name}:{_by_x(self.shape)}"

    def __str__(self) -> str:
        shape = self.shape[1:] if self.chip.platform == "gpu" and self.shape[0] == 1 else self.shape
        return f"{f'{self.slices}*' if self.slices > 1 else ''}{self.chip.name}:{_by_x(shape)}"


_EXAMPLES = "v5e:16x16, v5p:4x4x8, 2*v6e:4x4 (two slices), h200:8, h100:2x8 (hosts x GPUs), rtx4090:1, cpu:8"


def parse_topology(text: str, memory: float | None = None) -> Topology:
    """Reads e.g. v5e:16x16, 2*v5e:16x16 (slices), h200:8, h200:2x8 (hosts x GPUs of each), cpu:8.

    Args:
        memory: GiB that each GPU has, in place of what is known of it; `gpu:8` is any other, of unknown speed.

    Raises:
        UserError: for an unknown chip, with the names that are known, or a shape that it does not come in, with those
            near it.
    """
    match = re.fullmatch(r"(?:(\d{1,3})\*)?([a-z0-9][a-z0-9-]*):(\d{1,4}(?:x\d{1,4})*)", text.strip().lower())
    if match is None:
        raise UserError(
            f"--topology: {text!r} is not a topology; write CHIP:SHAPE, e.g. {_EXAMPLES}{_shape_of_name(text)}"
        )
    slices, shape = int(match[1] or 1), tuple(int(size) for size in match[3].split("x"))
    chip = _named(text, match[2], memory)
    if 0 in (slices, *shape):
        raise UserError(f"--topology: {text!r} has no devices")
    if chip.platform == "gpu" and len(shape) == 1:
        shape = (1, *shape)
    wanted = 2 if chip.platform == "gpu" else chip.dims
    if len(shape) != wanted:
        what = f"slices have {wanted} dims" if chip.platform == "tpu" else f"at most {wanted} numbers stand here"
        named = _shape_of_name(f"{chip.name}-{math.prod(shape) * _cores(chip)}")
        raise UserError(f"--topology: {text!r}: {what}, e.g. {_EXAMPLES}{named}")
    if slices > 1 and chip.platform != "tpu":
        raise UserError(f"--topology: {text!r}: only TPUs come in slices, e.g. {_EXAMPLES}")
    if slices > 1 and not chip.network:
        raise UserError(f"--topology: {text!r}: how fast {chip.name}'s slices send to each other is not known here")
    if chip.platform == "tpu" and not slice_exists(chip, shape):
        near = " and ".join(
            f"{chip.name}:{_by_x(other)} ({math.prod(other)} chips)" for other in near_slices(chip, shape)
        )
        raise UserError(
            f"--topology: {text!r}: {chip.name} has no such slice; it comes as {_offered(chip)}. "
            f"Next to these {math.prod(shape)} chips: {near}"
        )
    return Topology(chip, shape, slices)


def _named(text: str, name: str, memory: float | None) -> Chip:
    """The chip of a topology, with the memory that is said by hand."""
    by_hand = "any other GPU, of unknown speed: --topology gpu:8 --memory 24 (GiB of each)"
    known = _BY_NAME | {"gpu": ANY_GPU}
    squeezed = {re.sub(r"[^a-z0-9]", "", full): full for full in known}
    # 4090 and rtx-4090 are rtx4090.
    bare = re.sub(r"^(nvidia|geforce|tesla)|[^a-z0-9]", "", name)
    chip = known.get(_ALIASES.get(name, name)) or known.get(squeezed.get(bare) or squeezed.get(f"rtx{bare}", ""))
    if chip is None:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--topology: {text!r}: unknown chip {name!r}; known: {', '.join(_BY_NAME)}; {by_hand}{hint}")
    if memory is None:
        if chip is ANY_GPU:
            raise UserError(
                f"--topology: {text!r}: say how much memory each has, as nvidia-smi shows it: --memory 24 (GiB)"
            )
        return chip
    if chip.platform != "gpu":
        raise UserError(f"--memory: {text!r} is not a GPU; the option is for GPUs, e.g. --topology gpu:8 --memory 24")
    if not 0 < memory < 10_000:
        raise UserError(f"--memory: {memory} is not a number of GiB; e.g. --memory 24")
    return dataclasses.replace(chip, memory=SHARE * memory * GIB)


# Slices as Google offers them: a few with two dims; with three the small ones, and whole cubes of 4 x 4 x 4 chips.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_MOST = {"v4": 4096, "v5p": 6144}  # chips of the largest slice


def slice_exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether a TPU comes in slices of this shape; the dims in any order."""
    if chip.dims == 2:
        return tuple(sorted(shape)) in _FLAT
    whole = all(size % 4 == 0 for size in shape) and math.prod(shape) <= _MOST[chip.name]
    return whole or sorted(shape) in [sorted(small) for small in _SMALL]


def near_slices(chip: Chip, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The slices with as many chips or, without one, the next smaller and larger ones; the roundest of equals."""
    offered: list[tuple[int, ...]] = list(_FLAT)
    if chip.dims == 3:
        sizes = range(4, 33, 4)
        cubes = [
            (a, b, c) for a in sizes for b in sizes for c in sizes if a <= b <= c and slice_exists(chip, (a, b, c))
        ]
        offered = [*_SMALL, *cubes]
    best: dict[int, tuple[int, ...]] = {}
    for other in sorted(offered, key=sum, reverse=True):
        best[math.prod(other)] = other
    count = math.prod(shape)
    below, above = [c for c in best if c <= count], [c for c in best if c >= count]
    return [best[c] for c in sorted({*([max(below)] if below else []), *([min(above)] if above else [])})]


def _offered(chip: Chip) -> str:
    if chip.dims == 2:
        return ", ".join(map(_by_x, _FLAT))
    return f"{', '.join(map(_by_x, _SMALL))}, or multiples of 4 in every dim, up to {_MOST[chip.name]:,} chips"


def _by_x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _cores(chip: Chip) -> int:
    """Cores of a chip, which Google's names count: v4-64 and v5p-64 have 32 chips, v5litepod-64 and v6e-64 have 64."""
    return 2 if chip.dims == 3 else 1


def _shape_of_name(text: str) -> str:
    """What to write for a name like v5litepod-256 or v5p-64."""
    match = re.fullmatch(r"(v5litepod|v4|v5e|v6e|v5p)[-:](\d{1,6})", text.strip().lower())
    if match is None:
        return ""
    chip = _BY_NAME[_ALIASES.get(match[1], match[1])]
    chips = int(match[2]) // (_cores(chip) if "-" in text else 1)
    near = near_slices(chip, (chips,))
    return f"; {text} is {chip.name}:{_by_x(near[0])}" if math.prod(near[0]) == chips else ""
