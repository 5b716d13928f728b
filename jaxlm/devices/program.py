"""What a compiled program does in one run on one device, read from its text: products, collectives, kernels, cycles.

The bodies of loops count as often as they run, which XLA's own cost analysis does not do.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlm.devices.operations import Operation, Place, place, ranked

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
    "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# What only arranges for other computations to run.
_RUNS_OTHERS = ("fusion", "call", "async-start", "custom-call")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a run.

    Attributes:
        kind: all-gather, ...
        overlaps: it is started and awaited apart, so that others can run meanwhile.
        count: number of runs.
        bytes: received by a device, or sent where that is more; an all-reduce counts twice.
    """

    kind: str
    overlaps: bool
    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Program:
    """One run of a program on one device.

    Attributes:
        flops: of matrix products; kernels and library calls are not among them.
        cycles: the compiler's estimates, summed; None when it gives none (only TPUs' does). Kernels have none.
        collectives: by kind, and whether they overlap.
        kernels: Pallas kernels by name, and how often each runs.
        operations: where the cycles are, the costliest first; empty when there are none.
    """

    flops: float
    cycles: float | None
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    operations: tuple[Operation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Program:
        """Reads what `to_dict` gave, through JSON."""
        return cls(
            **{
                **values,
                "collectives": tuple(Collective(**fields) for fields in values["collectives"]),
                "operations": tuple(Operation.from_dict(fields) for fields in values["operations"]),
            }
        )

    def collective_bytes(self, overlaps: bool) -> float:
        """Bytes of the collectives that overlap with other work, or of those that do not."""
        return sum(collective.bytes for collective in self.collectives if collective.overlaps == overlaps)


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    line: str

    def called(self, *keys: str) -> list[str]:
        """Computations that the attributes of these names refer to."""
        groups = re.findall(rf"\b(?:{'|'.join(keys)})=\{{?((?:%[\w.\-]+(?:, )?)+)", self.line)
        return [name.lstrip("%") for group in groups for name in group.split(", ") if name]


def _dims(shape: str) -> list[tuple[str, list[int]]]:
    return [
        (kind, [int(n) for n in dims.split(",") if n]) for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    ]


def _size(shape: str) -> int:
    """Bytes of an array, or of all of a tuple."""
    return sum(_BYTES.get(kind, 0) * math.prod(dims) for kind, dims in _dims(shape))


def _parse_op(line: str) -> _Op | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = rest.find(" ")
    if rest.startswith("("):  # a tuple's shape has spaces and, for TPUs, brackets of its own
        depth = 0
        for end, char in enumerate(rest):
            depth += (char == "(") - (char == ")")
            if depth == 0:
                end += 1
                break
    kind = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if kind is None:
        return None
    inside = rest[end + kind.end() :]
    return _Op(head[1], rest[:end], kind[1], tuple(re.findall(r"%([\w.\-]+)", inside[: inside.find(")")])), line)


class _Reader:
    def __init__(self, text: str) -> None:
        self.bodies: dict[str, dict[str, _Op]] = {}
        self.entry = ""
        body: dict[str, _Op] = {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if head is not None:
                body = self.bodies[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
                continue
            op = _parse_op(line)
            if op is not None:
                body[op.name] = op
        self.flops = self.cycles = 0.0
        self.has_cycles = False
        self.moved: dict[tuple[str, bool], list[float]] = collections.defaultdict(lambda: [0, 0.0])
        self.kernels: dict[str, int] = collections.Counter()
        self.cycles_at: dict[Place, float] = collections.defaultdict(float)
        self.runs_at: dict[Place, float] = collections.defaultdict(float)

    def trips(self, loop: _Op) -> int:
        """How often a loop's body runs."""
        known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.line)
        if known is not None:
            return int(known[1])
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        ops = list(self.bodies[condition].values())
        end = max((int(n) for op in ops for n in re.findall(r"constant\((\d+)\)", op.line)), default=1)
        # A loop that the compiler has unrolled counts in steps: what the body adds to the counter.
        place = next((re.search(r"index=(\d+)", op.line) for op in ops if op.kind == "get-tuple-element"), None)
        inner = self.bodies[body]
        root = next((op for op in inner.values() if op.line.lstrip().startswith("ROOT")), None)
        if place is None or root is None or int(place[1]) >= len(root.operands):
            return end
        counter = inner.get(root.operands[int(place[1])])
        if counter is None or counter.kind != "add":
            return end
        for operand in counter.operands:
            step = re.search(r"constant\((\d+)\)", inner[operand].line) if operand in inner else None
            if step is not None:
                return -(-end // int(step[1]))
        return end

    def product(self, op: _Op, body: dict[str, _Op]) -> float:
        """FLOPs of a dot or of the convolution that a TPU makes of it."""
        sizes = []
        for shape in (op.shape, *(body[name].shape if name in body else "" for name in op.operands[:2])):
            dims = _dims(shape)
            if not dims:
                return 0.0
            sizes.append(math.prod(dims[0][1]))
        # (m n)(m k)(k n) is the square of m n k; dims that all three have stand there once too often.
        batch = re.search(r"lhs_batch_dims=\{([\d,]+)\}", op.line)
        shared = 1
        if batch is not None:
            lhs = _dims(body[op.operands[0]].shape)[0][1]
            shared = math.prod(lhs[int(at)] for at in batch[1].split(","))
        return 2 * math.sqrt(math.prod(sizes) / shared)

    def place(self, op: _Op) -> Place:
        """Where an operation comes from: a fusion from its product, if it has one, which is nearly all of its work.

        The metadata of a fusion are those of what it ends with, e.g. of the addition to a stack of gradients.
        """
        ops = [op]
        if op.kind == "fusion":
            inner = [each for called in op.called("calls") for each in self.bodies.get(called, {}).values()]
            product = self.inner_product(op, 3)
            ops = [*([] if product is None else [product]), op, *reversed(inner)]  # the last one is what it ends with
        for each in ops:
            if (named := re.search(r'op_name="([^"]*/[^"]*)"', each.line)) is not None:
                return place(named[1])
        return Place("", "", next((each.kind for each in ops if each.kind != "fusion"), op.kind))

    def inner_product(self, fusion: _Op, depth: int) -> _Op | None:
        for called in fusion.called("calls"):
            for op in self.bodies.get(called, {}).values():
                if op.kind in ("dot", "convolution"):
                    return op
                if op.kind == "fusion" and depth and (inner := self.inner_product(op, depth - 1)) is not None:
                    return inner
        return None

    def collective(
        self, op: _Op, body: dict[str, _Op], times: int, within: str, overlaps: bool, seen: set[str]
    ) -> None:
        kind = op.kind.removesuffix("-start")
        if kind not in _COLLECTIVES:
            return
        started = op.kind != kind
        overlaps = overlaps or started or "async_collective_name" in op.line or "chain_id" in op.line
        channel = re.search(r"channel_id=(\d+)", op.line)
        # A collective that overlaps is spread over several fusions of a computation, under one channel. Others may
        # share a channel: all that come from `shard_map` do.
        if overlaps and channel is not None:
            if channel[1] in seen:
                return
            seen.add(channel[1])
        given = sum(_size(body[name].shape) for name in op.operands if name in body)
        moved = float(given)
        if kind == "all-gather":
            moved = _size(op.shape) - (given if started else 0)
        elif kind == "all-reduce":
            if "all-reduce-scatter" in within:  # what a TPU's compiler makes of a reduce-scatter
                kind = "reduce-scatter"
            else:
                moved = 2 * given
        entry = self.moved[kind, overlaps]
        entry[0] += times
        entry[1] += times * moved

    def walk(
        self, name: str, times: int, overlaps: bool = False, fused: bool = False, seen: set[str] | None = None
    ) -> None:
        """Counts a computation; inside a fusion only products and collectives, as its cycles are one estimate.

        Args:
            overlaps, fused: it is run by an async-start, by a fusion.
            seen: channels found so far in the computation that the fusion is part of.
        """
        body = self.bodies.get(name, {})
        seen = seen if fused and seen is not None else set()
        for op in body.values():
            estimate = re.search(r'"estimated_cycles":"(\d+)"', op.line)
            if estimate is not None:
                self.has_cycles = True
            if estimate is not None and not fused and op.kind not in ("while", "call", "conditional"):
                self.cycles += times * int(estimate[1])
                at = self.place(op)
                self.cycles_at[at] += times * int(estimate[1])
                self.runs_at[at] += times
            if op.kind in ("dot", "convolution"):
                self.flops += times * self.product(op, body)
            self.collective(op, body, times, name, overlaps, seen)
            if op.kind == "custom-call" and re.search(
                r'custom_call_target="(tpu_custom_call|\w*mosaic_gpu\w*)"', op.line
            ):
                self.kernels[re.sub(r"\.\d+$", "", op.name)] += times
            for called, more in self.runs(op):
                inside = fused or op.kind in ("fusion", "async-start")
                self.walk(called, times * more, overlaps or op.kind == "async-start", inside, seen)

    def runs(self, op: _Op) -> Iterator[tuple[str, int]]:
        """The computations that an operation runs, and how often; for a conditional its last branch, the update."""
        if op.kind == "while":
            for body in op.called("body"):
                yield body, self.trips(op)
        elif op.kind == "conditional":
            branches = op.called("branch_computations") or op.called("true_computation")
            for branch in branches[-1:]:
                yield branch, 1
        elif op.kind in _RUNS_OTHERS:
            for called in op.called("calls", "to_apply", "called_computations"):
                yield called, 1


def read_program(text: str) -> Program:
    """Reads a compiled program.

    Args:
        text: `compiled.as_text()`.
    """
    reader = _Reader(text)
    reader.walk(reader.entry, 1)
    collectives = tuple(
        Collective(kind, overlaps, int(count), size) for (kind, overlaps), (count, size) in sorted(reader.moved.items())
    )
    operations = ranked(reader.cycles_at, reader.runs_at)
    cycles = reader.cycles if reader.has_cycles else None
    return Program(reader.flops, cycles, collectives, dict(reader.kernels), operations)


@dataclasses.dataclass(frozen=True)
class Names:
    """The operations of a compiled program by the names that the compiler gave them.

    Attributes:
        module: the program's name.
        places: where each operation comes from.
        containers: operations that only run others: loops, calls, conditionals.
    """

    module: str
    places: Mapping[str, Place]
    containers: frozenset[str]


def read_names(text: str) -> Names:
    """Reads which operation of the source each one of a compiled program is.

    Args:
        text: `compiled.as_text()`.
    """
    reader = _Reader(text)
    module = re.match(r"HloModule ([\w.\-]+)", text)
    ops = [op for body in reader.bodies.values() for op in body.values()]
    containers = frozenset(op.name for op in ops if op.kind in ("while", "call", "conditional"))
    return Names("" if module is None else module[1], {op.name: reader.place(op) for op in ops}, containers)


# Operations that move nothing by themselves: they name, or end what another has begun.
_MOVES_NOTHING = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id")


def memory_bytes(text: str, kernels: Mapping[str, float]) -> float:
    """Bytes that one run moves between a TPU's memory and the chip, of a program without loops.

    What the compiler keeps on the chip (memory space 1 of its layouts) is not counted, so that a weight which is
    fetched ahead counts once; of an array that is looked up in (a gather), only what is taken.

    Args:
        text: `compiled.as_text()`.
        kernels: what a run of each Pallas kernel moves, by its name, as their operands are not read as a whole.

    Raises:
        KeyError: the program has a kernel of another name.
    """
    reader = _Reader(text)
    body, total = reader.bodies[reader.entry], 0.0
    for op in body.values():
        assert op.kind not in ("while", "conditional"), f"{op.name}: only programs without loops are counted"
        if op.kind in _MOVES_NOTHING or op.kind.endswith("-done"):
            continue
        if 'custom_call_target="tpu_custom_call"' in op.line:
            total += kernels[re.sub(r"\.\d+$", "", op.name)]
        elif op.kind in ("copy-start", "slice-start"):  # (source, or all of it, and result): one of both is on the chip
            shapes = re.findall(r"\b[a-z]+\d*\[[\d,]*\]\S*", op.shape)[:2]
            total += min(map(_size, shapes)) if any(map(_in_memory, shapes)) else 0
        else:
            given = [body[name].shape for name in op.operands if name in body]
            results = _in_memory(op.shape)
            if op.name.startswith("gather"):
                total += results + min(sum(map(_in_memory, given)), _size(op.shape))
            else:
                total += results + sum(map(_in_memory, given))
    return total


def _in_memory(shape: str) -> int:
    """Bytes of an array, or of the parts of a tuple, that are in the device's memory."""
    parts = re.findall(r"\b[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", shape)
    return sum(_size(part) for part in parts if not re.search(r"S\(\d+\)", part))
