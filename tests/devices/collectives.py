"""Which collectives a compiled program has, over which mesh axes, of what size."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
from jax.sharding import Mesh

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of a program.

    Attributes:
        kind: all-gather, ...
        axes: of the mesh; of a collective-permute those that its pairs differ in.
        shapes: of its results.
    """

    kind: str
    axes: frozenset[str]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def largest(self) -> int:
        """Numbers in the largest result."""
        return max(math.prod(shape) for shape in self.shapes)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """All of a compiled program's; those over groups of one device move nothing and are left out."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
        if match is None:
            continue
        axes = _axes(_groups(line, mesh.size), mesh)
        shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", match[1]))
        if axes:
            found.append(Collective(match[2], axes, shapes))
    return found


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _groups(line: str, devices: int) -> list[list[int]]:
    """Devices that talk to each other, in each of the ways that XLA writes it."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    if pairs is not None:
        return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    lists = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    if lists is not None:
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", lists[1])]
    tiles = re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\])(?:T(\([\d,]+\)))?", line)
    if tiles is not None:
        return _order(tiles[2], tiles[3]).reshape(_numbers(tiles[1])).tolist()  # type: ignore[no-any-return]
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[[\d,]+\])(?:T(\([\d,]+\)))?\))? \{(.*?)\}", line
    )
    assert named is not None, line
    # 'name' is a whole axis; 'name':(2)4 are the four in the middle, where two parts of it come first.
    parts = {name: (before, size) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[4])}
    order = np.arange(devices) if named[2] is None else _order(named[2], named[3])
    shape, talk = [], []
    for name, whole in re.findall(r"'(\w+)'=(\d+)", named[1]):
        before, size = parts.get(name, ("1", "1"))
        before, size = int(before or 1), int(size or whole)
        shape += [before, size, int(whole) // before // size]
        talk += [len(shape) - 2] if name in parts else []
    grid = order.reshape(shape)
    return np.moveaxis(grid, talk, range(-len(talk), 0)).reshape(-1, math.prod(grid.shape[at] for at in talk)).tolist()  # type: ignore[no-any-return]


def _order(sizes: str, transposed: str | None) -> np.ndarray:
    shape = _numbers(sizes)
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid if transposed is None else grid.transpose(_numbers(transposed))).reshape(-1)


def _axes(groups: list[list[int]], mesh: Mesh) -> frozenset[str]:
    """The mesh axes along which the members of the groups differ."""
    shape = tuple(mesh.shape.values())
    differ = set()
    for group in groups:
        for one, other in itertools.combinations(group, 2):
            places = np.unravel_index([one, other], shape)
            differ |= {name for name, (a, b) in zip(mesh.axis_names, places, strict=True) if a != b}
    return frozenset(differ)
