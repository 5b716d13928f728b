"""Which attention backend runs: by what this device can do, by what was measured on it, else by rule; and a line on it.

Measurements lie in two tables, JSON files: the one shipped with jaxlm, and the user's own, which
`python -m jaxlm.tune` writes and which counts first.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
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
    """A backend of attention; hashable, so that it can be part of a model.

    Attributes:
        name: one of NAMES.
        block_q, block_k: rows of a block of queries and of keys in a Pallas kernel; None: the kernel's own.
    """

    name: str
    block_q: int | None = None
    block_k: int | None = None

    def __str__(self) -> str:
        return self.name if self.block_q is None else f"{self.name} (blocks of {self.block_q} x {self.block_k})"


@dataclasses.dataclass(frozen=True)
class ShapeKey:
    """Where attention runs, and on what: what a measurement is looked up by.

    Attributes:
        platform: 'cpu', 'gpu' or 'tpu'.
        device_kind: e.g. 'NVIDIA H200', 'TPU v5e', 'cpu'.
        capability: compute capability of a GPU, e.g. '9.0'; None elsewhere.
        dtype: compute dtype.
        length: number of tokens in a row.
        head_dim, heads, kv_heads: the model's.
        packed: whether rows have segment ids.
        window: that of sliding-window attention; None for none.
        soft_cap: that of the scores; None for none.
        alibi: whether scores sink with distance.
        relative_bias: whether scores have a trained bias by distance.
        prefix: whether the first tokens of a text see each other.
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
    soft_cap: float | None = None
    alibi: bool = False
    relative_bias: bool = False
    prefix: bool = False

    @property
    def device(self) -> str:
        """The device in words."""
        return self.device_kind if self.capability is None else f"{self.device_kind} ({self.capability})"

    @property
    def bucket(self) -> int:
        """The length, up to the next power of two: one class of lengths."""
        return 1 << max(0, self.length - 1).bit_length()

    @property
    def shape_class(self) -> str:
        """What is measured once, such as 'h128 g4 packed'."""
        window = "" if self.window is None or self.window >= self.length else f" window{self.window}"
        packed = " packed" if self.packed else ""
        capped = "" if self.soft_cap is None else " capped"
        alibi = " alibi" if self.alibi else ""
        relative = " relative" if self.relative_bias else ""
        prefix = " prefix" if self.prefix else ""
        return f"h{self.head_dim} g{self.heads // self.kv_heads}{packed}{window}{capped}{alibi}{relative}{prefix}"


def shape_key(attention: AttentionSpec, dtype: str, length: int, packed: bool, device: Any = None) -> ShapeKey:
    """The shape key of a model's attention on a device.

    Args:
        attention: of the model's layers.
        device: None: the first of JAX's.
    """
    import jax  # on use: commands that look at tables and names start without it

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
        soft_cap=attention.soft_cap,
        alibi=attention.alibi,
        relative_bias=attention.relative_bias is not None,
        prefix=attention.prefix is not None,
    )


# What cannot serve ------------------------------------------------------------------------


def _not_pallas(backend: Literal["tpu", "gpu"], key: ShapeKey) -> str | None:
    from jaxlm.kernels import flash_attention  # on use: it loads Pallas

    return flash_attention.unsupported(
        backend, dtype=key.dtype, head_dim=key.head_dim, heads=key.heads, kv_heads=key.kv_heads
    )


def _not_pallas_tpu(key: ShapeKey) -> str | None:
    return "needs a TPU" if key.platform != "tpu" else _not_pallas("tpu", key)


def _not_pallas_gpu(key: ShapeKey) -> str | None:
    if key.platform != "gpu" or key.capability != "9.0":
        return "needs a Hopper GPU (compute capability 9.0)"
    return _not_pallas("gpu", key)


def _not_cudnn(key: ShapeKey) -> str | None:
    if key.platform != "gpu":
        return "needs an NVIDIA GPU"
    version = tuple(int(part) for part in (key.capability or "0").split("."))
    if version < (8, 0):
        return "needs compute capability 8.0"
    if key.dtype != "bfloat16":
        return f"computes in bfloat16, not {key.dtype}"
    most = 256 if version >= (9, 0) else 128
    if key.head_dim > most or key.head_dim % 8:
        return f"takes head dims up to {most} that 8 divides, not {key.head_dim}"
    return None


_LACKS: Mapping[str, Callable[[ShapeKey], str | None]] = {
    "pallas_tpu": _not_pallas_tpu,
    "pallas_gpu": _not_pallas_gpu,
    "cudnn": _not_cudnn,
    "xla": lambda key: None,
    "reference": lambda key: None,
}


def unserved_scores(
    name: str, soft_cap: float | None, alibi: bool, relative_bias: bool, prefix: bool = False
) -> str | None:
    """What of the scores an implementation does not compute, in words; None if nothing. All of them take any scale."""
    if soft_cap is not None and name == "cudnn":
        return "has no soft cap on scores"
    if alibi and name == "cudnn":
        return "has no ALiBi"
    if relative_bias and name not in ("xla", "reference"):
        return "has no relative bias"
    if prefix and name not in ("xla", "reference"):
        return "has no prefix that is seen from both sides"
    return None


def why_not(name: str, key: ShapeKey) -> str | None:
    """Why an implementation cannot serve, in words; None if it can."""
    return _LACKS[name](key) or unserved_scores(name, key.soft_cap, key.alibi, key.relative_bias, key.prefix)


# Tables -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest backend for a shape key, as it was measured.

    Attributes:
        backend: the fastest one.
        milliseconds: time for values and gradients, by implementation; each with its best blocks.
        length: number of tokens in the rows that were measured.
        made: with what it was measured, and when, e.g. 'jax 0.10.2, 2026-11-21'.
    """

    backend: AttentionBackend
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
    """Reads a table; it is empty when there is no such file.

    Raises:
        UserError: for a file that is not a table.
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
            backend = AttentionBackend(row["implementation"], row["block_q"], row["block_k"])
            if backend.name not in NAMES:
                raise ValueError(f"implementation {backend.name!r}")
            entry = Entry(backend, row["milliseconds"], row["length"], row["made"])
            table.setdefault(key, {})[row["bucket"]] = entry
        return table
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; set {TABLE_ENV} to another file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a table of tuned kernels ({error!r}); delete it and run {TUNE}") from None


def write_table(path: Path, table: Table) -> None:
    """Writes a table; a reader sees the old or the new one, never half of it."""
    rows = [
        {
            **dict(zip(("device_kind", "dtype", "shape_class"), key, strict=True)),
            "bucket": bucket,
            "length": entry.length,
            "implementation": entry.backend.name,
            "block_q": entry.backend.block_q,
            "block_k": entry.backend.block_k,
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
    """The tables that count, in their order, each with its name for messages."""
    return [(str(user_table()), read_table(user_table())), ("jaxlm's table", read_table(SHIPPED))]


def measured(key: ShapeKey) -> tuple[Entry, str] | None:
    """What was measured for a shape key, or for the nearest length, and the name of its table; None: nothing was."""
    for origin, table in _tables():
        buckets = table.get((key.device_kind, key.dtype, key.shape_class), {})
        usable = {length: entry for length, entry in buckets.items() if why_not(entry.backend.name, key) is None}
        if usable:
            nearest = min(usable, key=lambda length: abs(math.log2(length / key.bucket)))
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


def _rule(key: ShapeKey) -> tuple[str, str]:
    """Where nothing was measured: by platform."""
    if key.platform == "tpu" and why_not("pallas_tpu", key) is None:
        return "pallas_tpu", "skips what the mask empties"
    if key.platform == "gpu":
        if not key.packed and why_not("cudnn", key) is None:
            return "cudnn", f"{key.dtype} rows of one document on a GPU"
        if why_not("pallas_gpu", key) is None:
            return "pallas_gpu", "skips what the mask empties"
    return "xla", f"the fused form for {key.platform}" if key.platform == "cpu" else "no kernel can serve here"


def choose_attention(requested: str, key: ShapeKey) -> tuple[AttentionBackend, str]:
    """The backend that runs, and the start-up line that says so in a few words; `attention_details` says the rest.

    Args:
        requested: the config's `model.attention`: 'auto' or one of NAMES.
        key: where it runs, and on what.

    Raises:
        UserError: when the one asked for cannot serve, or a table is broken.
    """
    if requested != "auto":
        lack = why_not(requested, key)
        if lack is not None:
            raise UserError(
                f"model.attention: {requested!r} cannot serve: {lack}; this is {key.device}; use 'auto' or 'xla'"
            )
        note = f"; {SLOWER['cudnn']}: right, but slow" if requested == "cudnn" and key.packed else ""
        return AttentionBackend(requested), f"{requested}: as configured{note}"
    measurement = measured(key)
    if measurement is None:
        name, why = _rule(key)
        return AttentionBackend(name), f"{name}: {why}"
    entry, _ = measurement
    time = entry.milliseconds[entry.backend.name]
    return entry.backend, f"{entry.backend}: the fastest measured, {time:.3g} ms at length {entry.length:,}"


def choose_for_layers(
    requested: str, layers: Iterable[AttentionSpec], dtype: str, length: int, packed: bool, device: Any = None
) -> tuple[AttentionBackend, str, ShapeKey]:
    """The backend of a model whose layers may differ: one that serves them all.

    Args:
        requested: as `choose_attention`.
        layers: the attention of every kind of layer; the first that the others agree with is chosen for.
        dtype, length, packed, device: as `shape_key`.

    Returns:
        As `choose_attention`, and the shape key that it was chosen for.

    Raises:
        UserError: when the one asked for cannot serve all layers, or a table is broken.
    """
    keys = list(dict.fromkeys(shape_key(layer, dtype, length, packed, device) for layer in layers))
    choices = [(*choose_attention(requested, key), key) for key in keys]
    for choice in choices:
        if all(why_not(choice[0].name, key) is None for key in keys):
            return choice
    # Each kind of layer has a backend of its own, which another kind cannot use; XLA serves every one.
    return AttentionBackend("xla"), "xla: serves every kind of layer of this model", keys[0]


def attention_details(backend: AttentionBackend, key: ShapeKey) -> str:
    """One line on what the choice rests on, and on why none of the other backends was chosen."""
    measurement = measured(key)
    times: Mapping[str, float] = {}
    if measurement is None:
        known = any(row[0] == key.device_kind for _, table in _tables() for row in table)
        what = f"{key.dtype} {key.shape_class} was not measured" if known else "not measured"
        basis = f"{what} on this device kind, {key.device_kind}; run {TUNE}"
    else:
        entry, origin = measurement
        basis = f"measured: {entry.made}; {origin}"
        if backend == entry.backend:
            times = entry.milliseconds
    others = []
    for name in NAMES:
        if name != backend.name:
            lack = why_not(name, key)
            slower = f"{times[name] / times[backend.name]:.1f} times slower" if name in times else SLOWER[name]
            others.append(f"{name} ({lack or slower})")
    return f"{basis}; not {', '.join(others)}"
