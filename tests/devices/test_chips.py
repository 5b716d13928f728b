"""Devices by name: which slices there are, what cards are known, and what is said of others."""

from __future__ import annotations

import math
import re

import pytest

from jaxlm.devices.chips import CHIPS, GIB, SHARE, chip_of, near_slices, parse_topology, peak_flops
from jaxlm.errors import UserError

# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; accelerator types of v4 and v5p count two cores a chip.
OFFERED = {
    "v5e": ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"],
    "v6e": ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"],
    "v4": ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "16x16x16"],
    "v5p": ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x24"],
}


@pytest.mark.parametrize("name", OFFERED)
def test_every_slice_that_is_offered(name: str) -> None:
    for shape in OFFERED[name]:
        found = parse_topology(f"{name}:{shape}")
        assert str(found) == f"{name}:{shape}" and found.count == math.prod(map(int, shape.split("x")))
        cores = found.count * (2 if name in ("v4", "v5p") else 1)
        with pytest.raises(UserError, match=rf"{name}-{cores} is {name}:{shape}"):
            parse_topology(f"{name}-{cores}")
    assert parse_topology("v5p:4x4x2").count == 32  # in any order


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5e:3x3", ["v5e:2x4 (8 chips)", "v5e:4x4 (16 chips)"]),
        ("v5e:2x8", ["v5e:4x4 (16 chips)"]),
        ("2*v6e:1x2", ["v6e:1x1 (1 chips)", "v6e:2x2 (4 chips)"]),
        ("v6e:32x16", ["v6e:16x16 (256 chips)"]),
        ("v4:3x3x3", ["v4:2x2x4 (16 chips)", "v4:2x4x4 (32 chips)"]),
        ("v4:16x16x24", ["v4:16x16x16 (4096 chips)"]),
        ("v5p:1x1x1", ["v5p:2x2x1 (4 chips)"]),
        ("v5p:4x4x6", ["v5p:4x4x4 (64 chips)", "v5p:4x4x8 (128 chips)"]),
        ("v5p:2x2x16", ["v5p:4x4x4 (64 chips)"]),
        ("v5p:64x64x64", ["v5p:16x16x24 (6144 chips)"]),
    ],
)
def test_slices_that_do_not_exist_name_those_that_do(name: str, near: list[str]) -> None:
    with pytest.raises(UserError, match="has no such slice") as error:
        parse_topology(name)
    assert str(error.value).split("chips: ", 1)[1] == " and ".join(near)
    for one in near:
        parse_topology(one.split(" ")[0])


def test_the_nearest_of_equals_is_the_roundest() -> None:
    v5p = parse_topology("v5p:4x4x4").chip
    assert near_slices(v5p, (1, 1, 384)) == [(4, 8, 12)]  # and not 4x4x24
    assert near_slices(v5p, (1, 1, 500)) == [(4, 4, 28), (8, 8, 8)]


# Teraflops and GB as NVIDIA's data sheets and white papers have them; names as the driver gives them.
CARDS = [
    ("NVIDIA GeForce RTX 3090", "rtx3090", 71, 24),
    ("NVIDIA GeForce RTX 4090", "4090", 165.2, 24),
    ("NVIDIA GeForce RTX 5090", "rtx-5090", 209.5, 32),
    ("NVIDIA A10", "a10", 125, 24),
    ("NVIDIA A10G", "a10g", 70, 24),
    ("NVIDIA L4", "l4", 121, 24),
    ("NVIDIA L40", "l40", 181, 48),
    ("NVIDIA L40S", "l40s", 362, 48),
    ("NVIDIA A40", "a40", 149.7, 48),
    ("NVIDIA RTX A6000", "a6000", 154.8, 48),
    ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada", 364.2, 48),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312, 40),
    ("NVIDIA A100-PCIE-40GB", "a100-40gb", 312, 40),
    ("NVIDIA A100-SXM4-80GB", "a100", 312, 80),
    ("NVIDIA A100 80GB PCIe", "a100-80gb", 312, 80),
    ("NVIDIA H100 80GB HBM3", "h100-80gb", 989, 80),
    ("Tesla T4", "t4", 8.1, 16),
    ("Tesla V100-SXM2-16GB", "v100", 15.7, 16),
    ("Tesla V100-SXM2-32GB", "v100-32gb", 15.7, 32),
    ("Tesla P100-SXM2-16GB", "p100", 10.6, 16),
    ("NVIDIA H100 80GB HBM3", "h100", 989, 80),
    ("NVIDIA H100 PCIe", "h100-pcie", 756, 80),
    ("NVIDIA H100 NVL", "h100-nvl", 835, 94),
    ("NVIDIA H200", "h200", 989, 141),
    ("NVIDIA B200", "b200", 2250, 180),
]


@pytest.mark.parametrize(("kind", "name", "teraflops", "gigabytes"), CARDS)
def test_cards(kind: str, name: str, teraflops: float, gigabytes: int) -> None:
    chip = parse_topology(f"{name}:2x8").chip
    assert chip_of(kind) is chip and peak_flops(kind) == teraflops * 1e12
    # Marketing's gigabytes are GiB on some cards, and error correction takes a sixteenth of GDDR6.
    assert 0.92 * gigabytes <= chip.memory / SHARE / GIB <= gigabytes


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Quadro RTX 6000",
        "TPU v9",
    ],
)
def test_other_chips_and_parts_of_one_have_no_peak(kind: str) -> None:
    assert peak_flops(kind) is None


def test_every_chip_is_known_by_its_own_name() -> None:
    for chip in CHIPS[:-1]:
        assert chip_of(chip.device_kind) is chip
        assert chip.flops and chip.memory and chip.bandwidth and chip.link


def test_memory_by_hand() -> None:
    other = parse_topology("gpu:2x4", 24)
    assert (str(other), other.count, other.chip.memory) == ("gpu:2x4", 8, SHARE * 24 * GIB)
    assert parse_topology("h100:8", 94).chip.memory == SHARE * 94 * GIB


@pytest.mark.parametrize(
    ("text", "memory", "message"),
    [
        ("mi300:8", None, "unknown chip 'mi300'; known: v4, .*rtx4090.*any other GPU.*gpu:8 --memory 24"),
        ("rtx4091:1", None, "did you mean 'rtx409"),
        ("gpu:8", None, "say how much memory each has.*--memory 24"),
        ("v5e:4x4", 24.0, "--memory: 'v5e:4x4' is not a GPU"),
        ("cpu:8", 24.0, "--memory: 'cpu:8' is not a GPU"),
        ("gpu:8", -1.0, "--memory: -1.0 is not a number of GiB"),
        ("gpu:8", math.nan, "--memory: nan is not a number of GiB"),
        ("2*v4:4x4x4", None, "how fast v4's slices send"),
        ("4090:1x2x3", None, "at most 2 numbers"),
    ],
)
def test_mistakes(text: str, memory: float | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_topology(text, memory)
    assert re.search(message, str(error.value)), error.value
