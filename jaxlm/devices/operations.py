"""A step's operations under the names that their source has: `layers/self_attn/q_proj`, not `fusion.123`."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

Pass = Literal["forward", "recomputed", "backward", ""]

# What JAX puts into a path between the names of modules.
_SYNTAX = re.compile(
    r"(while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation|custom_[jv]vp(_call)?|shard_map|pjit"
    r"|(jit|vmap|jvp|transpose|custom_jvp|custom_vjp|remat)\(.*\)|.*->.*|)"
)


class Place(NamedTuple):
    """What an operation is called.

    Attributes:
        name: modules and named scopes from the outside in, e.g. layers/mlp/up_proj; empty for what stands in none.
        step_pass: forward, recomputed (in the backward pass), backward, or empty for what is not differentiated.
        kind: the operation: dot_general, mul, ...
    """

    name: str
    step_pass: Pass
    kind: str

    def __str__(self) -> str:
        return f"{self.name or 'step'}: {self.kind}"


@dataclasses.dataclass(frozen=True)
class Operation:
    """All operations of one place in a step.

    Attributes:
        name, step_pass, kind: see `Place`.
        cost: cycles or seconds of one step on one device.
        count: number of runs in a step.
    """

    name: str
    step_pass: str
    kind: str
    cost: float
    count: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Operation:
        """Reads what `dataclasses.asdict` gave, through JSON."""
        return cls(**values)


def place(op_name: str) -> Place:
    """Reads the path that JAX records with each operation (`op_name` in the metadata of a compiled program).

    A path is e.g. jit(step)/transpose(jvp(Decoder.loss))/Decoder.hidden/while/body/checkpoint/layers/layers.attend/
    self_attn/q_proj/dot_general: Flax writes names of modules, and Module.method where a method is called by its name.
    """
    *path, kind = op_name.split("/")
    step_pass: Pass = ""
    if any(part.startswith("transpose(") for part in path):
        step_pass = "recomputed" if "rematted_computation" in path else "backward"
    elif any(part.startswith("jvp(") for part in path):
        step_pass = "forward"
    names: list[str] = []
    method = ""
    for part in path:
        inner = re.fullmatch(r"(?:transpose\()?jvp\((\w+\.\w+)?\)*", part)
        if inner is not None:  # jvp(Decoder.loss): the method that is differentiated
            method = (inner[1] or "").rpartition(".")[2]
        elif _SYNTAX.fullmatch(part):
            continue
        elif "." in part:
            owner, _, name = part.rpartition(".")
            method = name.strip("_") if owner not in names else method
        else:
            names.append(part)
    return Place("/".join(names) or method, step_pass, re.sub(r"^jit\((.*)\)$", r"\1", kind))


def ranked(costs: Mapping[Place, float], counts: Mapping[Place, float]) -> tuple[Operation, ...]:
    """The operations, the costliest first."""
    order = sorted(costs, key=lambda at: (-costs[at], at))
    return tuple(Operation(at.name, at.step_pass, at.kind, costs[at], counts[at]) for at in order)


def table(operations: Iterable[Operation], total: float, unit: str, scale: float, top: int = 10) -> list[str]:
    """Lines of a table: the costliest operations with their share, the rest as one, and the shares of the passes.

    Args:
        operations: the costliest first.
        total: what shares are of, as `Operation.cost`.
        unit: the heading of the first column.
        scale: what a cost is divided by for it.
        top: number of operations that have a line of their own.
    """
    rows = list(operations)
    lines = [f"{unit:>10}  {'share':>6}  {'runs':>7}  {'pass':10}  operation"]
    for row in rows[:top]:
        lines.append(
            f"{row.cost / scale:10.3f}  {row.cost / total:6.1%}  {row.count:7,.0f}  {row.step_pass:10}  "
            f"{row.name or '(step)'}: {row.kind}"
        )
    others = sum(row.cost for row in rows[top:])
    if others:
        lines.append(f"{others / scale:10.3f}  {others / total:6.1%}  {'':7}  {'':10}  {len(rows) - top} others")
    by_pass: dict[str, float] = collections.defaultdict(float)
    for row in rows:
        by_pass[row.step_pass or "beside them"] += row.cost
    order = [name for name in ("forward", "recomputed", "backward", "beside them") if name in by_pass]
    return [*lines, f"together: {', '.join(f'{name} {by_pass[name] / total:.1%}' for name in order)}"]
