"""Which attention runs: by what this device can do, by what was measured on it, else by rule; and a line that says so.

Measurements lie in two tables, JSON files: the one shipped with jaxlm, and the user's own, which
`python -m jaxlm.tune` writes and which counts first.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxlm.errors import UserError
from jaxlm.spec import AttentionSpec

NAMES = ("pallas_tpu", "pallas_gpu", "cudnn", "xla", "reference")
TABLE_ENV = "JAXLM_TUNED"
SHIPPED = Path(__file__).with_name("tuned.json")
FORMAT = 1
TUNE = "python -m jaxlm.tune"


@dataclasses.dataclass(frozen=True)
class AttentionBackend:
    """An implementation; hashable, so that it can be part of a model.

    Attributes:
        name: one of NAMES.
        block_q, block_k: sizes of the blocks of a Pallas kernel; None: its own.
    """

    name: str
    block_q: int | None = None
    block_k: int | None = None

    def __str__(self) -> str:
        return self.name if self.block_q is None else f"{self.name} (blocks of {self.block_q} x {self.block_k})"


@dataclasses.dataclass(frozen=True)
class ShapeKey:
    """Where attention is to run, and on what.

    Attributes:
        platform: 'cpu', 'gpu' or 'tpu'.
        device_kind: e.g. 'NVIDIA H200', 'TPU v5e', 'cpu'.
        capability: compute capability of a GPU, e.g. '9.0'; None elsewhere.
        dtype: compute dtype.
        length: tokens of a row.
        head_dim, heads, kv_heads: of the model.
        packed: rows have segment ids.
        window: of sliding-window attention.
    """

    platform: str
    device_kind: str
    capability: str | None
    dtype: str
    length: int
    head_dim: int
    heads: int
    kv_heads: int
    packed: bool
    window: int | None = None

    @property
    def device(self) -> str:
        """In words."""
        return self.device_kind if self.capability is None else f"{self.device_kind} ({self.capability})"

    @property
    def bucket(self) -> int:
        """The length, up to the next power of two: one class of lengths."""
        return 1 << max(0, self.length - 1).bit_length()

    @property
    def shape_class(self) -> str:
        """What is measured once: 'h128 g4 packed' and the like."""
        window = "" if self.window is None or self.window >= self.length else f" window{self.window}"
        packed = " packed" if self.packed else ""
        return f"h{self.head_dim} g{self.heads // self.kv_heads}{packed}{window}"


def shape_key(attention: AttentionSpec, dtype: str, length: int, packed: bool, device: Any = None) -> ShapeKey:
    """The case of a model on a device.

    Args:
        attention: of the model's layers.
        device: None: the first of JAX's.
    """
    import jax

    device = jax.devices()[0] if device is None else device
    return ShapeKey(
        platform=device.platform,
        device_kind=device.device_kind,
        capability=getattr(device, "compute_capability", None) if device.platform == "gpu" else None,
        dtype=dtype,
        length=length,
        head_dim=attention.head_dim,
        heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        packed=packed,
        window=attention.window,
    )


# What cannot serve ------------------------------------------------------------------------


def _not_pallas(backend: Literal["tpu", "gpu"], case: ShapeKey) -> str | None:
    from jaxlm.kernels import flash_attention

    return flash_attention.unsupported(
        backend, dtype=case.dtype, head_dim=case.head_dim, heads=case.heads, kv_heads=case.kv_heads
    )


def _not_pallas_tpu(case: ShapeKey) -> str | None:
    return "needs a TPU" if case.platform != "tpu" else _not_pallas("tpu", case)


def _not_pallas_gpu(case: ShapeKey) -> str | None:
    if case.platform != "gpu" or case.capability != "9.0":
        return "needs a Hopper GPU (compute capability 9.0)"
    return _not_pallas("gpu", case)


def _not_cudnn(case: ShapeKey) -> str | None:
    if case.platform != "gpu":
        return "needs an NVIDIA GPU"
    version = tuple(int(part) for part in (case.capability or "0").split("."))
    if version < (8, 0):
        return "needs compute capability 8.0"
    if case.dtype != "bfloat16":
        return f"computes in bfloat16, not {case.dtype}"
    most = 256 if version >= (9, 0) else 128
    if case.head_dim > most or case.head_dim % 8:
        return f"takes head dims up to {most} that 8 divides, not {case.head_dim}"
    return None


_LACKS: Mapping[str, Callable[[ShapeKey], str | None]] = {
    "pallas_tpu": _not_pallas_tpu,
    "pallas_gpu": _not_pallas_gpu,
    "cudnn": _not_cudnn,
    "xla": lambda case: None,
    "reference": lambda case: None,
}


def why_not(name: str, case: ShapeKey) -> str | None:
    """Why an implementation cannot serve, in words; None if it can."""
    return _LACKS[name](case)


# Tables -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest implementation of a case, as it was measured.

    Attributes:
        choice: it.
        milliseconds: of values and gradients, by implementation; each with its best blocks.
        length: tokens of a row that were measured.
        made: with what and when, e.g. 'jax 0.10.2, 2026-11-21'.
    """

    choice: AttentionBackend
    milliseconds: Mapping[str, float]
    length: int
    made: str


# (device kind, dtype, shape class) -> length bucket -> entry
Table = dict[tuple[str, str, str], dict[int, Entry]]


def user_table() -> Path:
    """Where the user's table is: as JAXLM_TUNED says, else in the user's cache directory."""
    given = os.environ.get(TABLE_ENV)
    if given:
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "jaxlm" / "tuned.json"


def read_table(path: Path) -> Table:
    """A table; empty when there is no such file.

    Raises:
        UserError: for a file that is no table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(
                f"{path}: a table of format {content['format']}, this jaxlm reads {FORMAT}; delete it and run {TUNE}"
            )
        table: Table = {}
        for row in content["entries"]:
            key = row["device_kind"], row["dtype"], row["shape_class"]
            choice = AttentionBackend(row["implementation"], row["block_q"], row["block_k"])
            if choice.name not in NAMES:
                raise ValueError(f"implementation {choice.name!r}")
            entry = Entry(choice, row["milliseconds"], row["length"], row["made"])
            table.setdefault(key, {})[row["bucket"]] = entry
        return table
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; set {TABLE_ENV} to another file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no table of tuned kernels ({error!r}); delete it and run {TUNE}") from None


def write_table(path: Path, table: Table) -> None:
    """Writes a table; a reader sees the old or the new one, never half of it."""
    rows = [
        {
            **dict(zip(("device_kind", "dtype", "shape_class"), key, strict=True)),
            "bucket": bucket,
            "length": entry.length,
            "implementation": entry.choice.name,
            "block_q": entry.choice.block_q,
            "block_k": entry.choice.block_k,
            "milliseconds": dict(entry.milliseconds),
            "made": entry.made,
        }
        for key, buckets in sorted(table.items())
        for bucket, entry in sorted(buckets.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"format": FORMAT, "entries": rows}, out, indent=1)
            out.write("\n")
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _tables() -> list[tuple[str, Table]]:
    """The tables that count, first ones first, each with what it is called."""
    return [(str(user_table()), read_table(user_table())), ("jaxlm's table", read_table(SHIPPED))]


def measured(case: ShapeKey) -> tuple[Entry, str] | None:
    """What was measured for a case (or for the nearest length), and the table that says so; None: nothing was."""
    for origin, table in _tables():
        buckets = table.get((case.device_kind, case.dtype, case.shape_class), {})
        usable = {length: entry for length, entry in buckets.items() if why_not(entry.choice.name, case) is None}
        if usable:
            nearest = min(usable, key=lambda length: abs(math.log2(length / case.bucket)))
            return usable[nearest], origin
    return None


# The choice -------------------------------------------------------------------------------

SLOWER = {
    "pallas_tpu": "not the rule",
    "pallas_gpu": "not the rule where rows are single documents",
    "cudnn": "packed segments reach it as a dense mask",
    "xla": "computes what the mask empties",
    "reference": "the plain twin, stores all scores",
}


def _rule(case: ShapeKey) -> tuple[str, str]:
    """Where nothing was measured: by platform."""
    if case.platform == "tpu" and why_not("pallas_tpu", case) is None:
        return "pallas_tpu", "skips what the mask empties"
    if case.platform == "gpu":
        if not case.packed and why_not("cudnn", case) is None:
            return "cudnn", f"{case.dtype} rows of one document on a GPU"
        if why_not("pallas_gpu", case) is None:
            return "pallas_gpu", "skips what the mask empties"
    return "xla", f"the fused form for {case.platform}" if case.platform == "cpu" else "no kernel can serve here"


def choose_attention(requested: str, case: ShapeKey) -> tuple[AttentionBackend, str]:
    """What runs, and the start-up line that says so in a few words; `attention_details` says the rest.

    Args:
        requested: the config's `model.attention`: 'auto' or one of NAMES.
        case: what it has to serve.

    Raises:
        UserError: when the one asked for cannot serve, or a table is broken.
    """
    if requested != "auto":
        lack = why_not(requested, case)
        if lack is not None:
            raise UserError(
                f"model.attention: {requested!r} cannot serve: {lack}; this is {case.device}; use 'auto' or 'xla'"
            )
        note = f"; {SLOWER['cudnn']}: right, but slow" if requested == "cudnn" and case.packed else ""
        return AttentionBackend(requested), f"{requested}: as configured{note}"
    found = measured(case)
    if found is None:
        name, why = _rule(case)
        return AttentionBackend(name), f"{name}: {why}"
    entry, _ = found
    time = entry.milliseconds[entry.choice.name]
    return entry.choice, f"{entry.choice}: the fastest measured, {time:.3g} ms at length {entry.length:,}"


def attention_details(choice: AttentionBackend, case: ShapeKey) -> str:
    """One line on what the choice rests on, and why not each of the other implementations."""
    found = measured(case)
    times: Mapping[str, float] = {}
    if found is None:
        known = any(key[0] == case.device_kind for _, table in _tables() for key in table)
        what = f"{case.dtype} {case.shape_class} was not measured" if known else "not measured"
        basis = f"{what} on this device kind, {case.device_kind}; run {TUNE}"
    else:
        entry, origin = found
        basis = f"measured: {entry.made}; {origin}"
        if choice == entry.choice:
            times = entry.milliseconds
    others = []
    for name in NAMES:
        if name != choice.name:
            lack = why_not(name, case)
            slower = f"{times[name] / times[choice.name]:.1f} times slower" if name in times else SLOWER[name]
            others.append(f"{name} ({lack or slower})")
    return f"{basis}; not {', '.join(others)}"
