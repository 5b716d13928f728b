"""Which attention runs, what is said about it, and the tables that decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.kernels import backend, flash_attention
from jaxlm.kernels.backend import (
    AttentionBackend,
    Entry,
    ShapeKey,
    attention_details,
    choose_attention,
    choose_for_layers,
    measured,
    read_table,
    shape_key,
    write_table,
)
from jaxlm.models.families import SHAPES
from jaxlm.nn import attention as attention_module
from jaxlm.nn.attention import IMPLEMENTATIONS, MaskSpec, attention, reference_attention
from jaxlm.spec import AttentionSpec, RelativeBiasSpec

CPU = ShapeKey("cpu", "cpu", None, "float32", 512, 128, 32, 32, True)
H200 = dataclasses.replace(CPU, platform="gpu", device_kind="NVIDIA H200", capability="9.0", dtype="bfloat16")
A100 = dataclasses.replace(H200, device_kind="NVIDIA A100-SXM4-80GB", capability="8.0")
V5E = dataclasses.replace(CPU, platform="tpu", device_kind="TPU v5 lite", dtype="bfloat16")


def single(case: ShapeKey, **changes: Any) -> ShapeKey:
    return dataclasses.replace(case, packed=False, **changes)


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table would be, and kernels that take head dims up to 256."""

    def unsupported(backend: str, *, dtype: str, head_dim: int, heads: int, kv_heads: int) -> str | None:
        if backend == "gpu" and dtype != "bfloat16":
            return f"computes in bfloat16, not {dtype}"
        return f"takes head dims up to 256, not {head_dim}" if head_dim > 256 else None

    monkeypatch.setattr(flash_attention, "unsupported", unsupported)
    monkeypatch.setenv("JAXLM_TUNED", str(tmp_path / "mine" / "tuned.json"))
    monkeypatch.setattr(backend, "SHIPPED", tmp_path / "shipped.json")
    yield tmp_path / "mine" / "tuned.json"


@pytest.mark.parametrize(
    ("case", "chosen"),
    [
        (CPU, "xla"),
        (V5E, "pallas_tpu"),
        (single(V5E), "pallas_tpu"),
        (dataclasses.replace(V5E, head_dim=512), "xla"),
        (single(H200), "cudnn"),
        (single(H200, head_dim=256), "cudnn"),
        (single(A100, head_dim=256), "xla"),
        (single(H200, dtype="float32"), "xla"),
        (H200, "pallas_gpu"),
        (A100, "xla"),
        (single(A100), "cudnn"),
        (dataclasses.replace(H200, head_dim=512), "xla"),
        (single(H200, soft_cap=30.0), "pallas_gpu"),
        (single(A100, soft_cap=30.0), "xla"),
        (dataclasses.replace(V5E, soft_cap=30.0), "pallas_tpu"),
        (dataclasses.replace(V5E, alibi=True), "pallas_tpu"),
        (dataclasses.replace(H200, alibi=True), "pallas_gpu"),
        (single(H200, alibi=True), "pallas_gpu"),
        (single(A100, alibi=True), "xla"),
        (dataclasses.replace(CPU, alibi=True), "xla"),
        (dataclasses.replace(V5E, relative_bias=True), "xla"),
        (single(H200, relative_bias=True), "xla"),
    ],
)
def test_rules_where_nothing_was_measured(case: ShapeKey, chosen: str) -> None:
    found, line = choose_attention("auto", case)
    assert found == AttentionBackend(chosen)
    assert line.startswith(f"{chosen}: ")
    assert len(line) < 72 and ";" not in line
    line = attention_details(found, case)
    assert f"not measured on this device kind, {case.device_kind}; run python -m jaxlm.tune" in line
    others = line.split("; not ")[1]
    assert all((f"{name} (" in others) == (name != chosen) for name in backend.NAMES)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("requested", "case", "message"),
    [
        ("pallas_tpu", CPU, "'pallas_tpu' cannot serve: needs a TPU; this is cpu; use 'auto' or 'xla'"),
        (
            "pallas_tpu",
            dataclasses.replace(V5E, head_dim=512),
            "'pallas_tpu' cannot serve: takes head dims up to 256, not 512",
        ),
        ("pallas_gpu", V5E, "'pallas_gpu' cannot serve: needs a Hopper GPU .*; this is TPU v5 lite; use"),
        (
            "pallas_gpu",
            A100,
            r"'pallas_gpu' cannot serve: needs a Hopper GPU .*; this is NVIDIA A100-SXM4-80GB \(8.0\)",
        ),
        ("pallas_gpu", dataclasses.replace(H200, capability="10.0"), r".* this is NVIDIA H200 \(10.0\)"),
        ("cudnn", CPU, "'cudnn' cannot serve: needs an NVIDIA GPU; this is cpu"),
        (
            "cudnn",
            dataclasses.replace(A100, capability="7.5"),
            r"'cudnn' cannot serve: needs compute capability 8.0; this is NVIDIA A100-SXM4-80GB \(7.5\)",
        ),
        (
            "cudnn",
            dataclasses.replace(H200, dtype="float32"),
            "'cudnn' cannot serve: computes in bfloat16, not float32",
        ),
        (
            "cudnn",
            single(A100, head_dim=256),
            "'cudnn' cannot serve: takes head dims up to 128 that 8 divides, not 256",
        ),
        (
            "cudnn",
            single(H200, head_dim=100),
            "'cudnn' cannot serve: takes head dims up to 256 that 8 divides, not 100",
        ),
        ("cudnn", single(H200, soft_cap=30.0), "'cudnn' cannot serve: has no soft cap on scores"),
        ("cudnn", single(H200, alibi=True), "'cudnn' cannot serve: has no ALiBi"),
        (
            "pallas_gpu",
            dataclasses.replace(H200, relative_bias=True),
            "'pallas_gpu' cannot serve: has no relative bias",
        ),
        ("pallas_tpu", dataclasses.replace(V5E, relative_bias=True), "'pallas_tpu' cannot serve: has no relative bias"),
    ],
)
def test_what_cannot_serve_is_refused(requested: str, case: ShapeKey, message: str) -> None:
    with pytest.raises(UserError, match=f"model.attention: {message}"):
        choose_attention(requested, case)


def test_as_configured() -> None:
    assert choose_attention("reference", H200) == (AttentionBackend("reference"), "reference: as configured")
    found, line = choose_attention("cudnn", H200)
    assert found == AttentionBackend("cudnn") and line.endswith(
        "packed segments reach it as a dense mask: right, but slow"
    )
    assert choose_attention("cudnn", single(H200))[1] == "cudnn: as configured"


def table(case: ShapeKey, *rows: tuple[int, AttentionBackend, dict[str, float]]) -> backend.Table:
    entries = {bucket: Entry(found, times, bucket - 1, "jax 0.10.2, 2026-11-21") for bucket, found, times in rows}
    return {(case.device_kind, case.dtype, case.shape_class): entries}


def test_what_was_measured_counts(no_tables: Path) -> None:
    fast, slow = AttentionBackend("pallas_gpu", 128, 64), AttentionBackend("xla")
    write_table(
        no_tables, table(H200, (512, fast, {"pallas_gpu": 2.0, "xla": 7.0}), (8192, slow, {"xla": 5.0, "cudnn": 6.0}))
    )
    found, line = choose_attention("auto", H200)
    assert found == fast
    assert line == "pallas_gpu (blocks of 128 x 64): the fastest measured, 2 ms at length 511"
    line = attention_details(found, H200)
    assert line.startswith("measured: jax 0.10.2, 2026-11-21; ")
    assert str(no_tables) in line and "xla (3.5 times slower)" in line and "pallas_tpu (needs a TPU)" in line
    # The nearest length that was measured; another device, dtype or shape was not.
    assert choose_attention("auto", dataclasses.replace(H200, length=1500))[0] == fast
    assert choose_attention("auto", dataclasses.replace(H200, length=3000))[0] == slow
    for other in (
        dataclasses.replace(H200, head_dim=64),
        dataclasses.replace(H200, kv_heads=8),
        dataclasses.replace(H200, window=64),
        dataclasses.replace(H200, relative_bias=True),
        single(H200),
    ):
        line = attention_details(choose_attention("auto", other)[0], other)
        assert line.startswith(f"bfloat16 {other.shape_class} was not measured on this device kind, NVIDIA H200")
    # Of one that was asked for the table's times are of no interest: other block sizes were measured.
    assert "xla (" in attention_details(AttentionBackend("pallas_gpu", 64, 64), H200)
    assert "times slower" not in attention_details(AttentionBackend("pallas_gpu", 64, 64), H200)
    assert measured(dataclasses.replace(H200, window=512)) == measured(H200)
    assert measured(A100) is None


def test_the_users_table_before_the_shipped_one(no_tables: Path) -> None:
    write_table(backend.SHIPPED, table(CPU, (512, AttentionBackend("reference"), {"reference": 1.0})))
    assert choose_attention("auto", CPU)[0] == AttentionBackend("reference")
    write_table(no_tables, table(CPU, (512, AttentionBackend("xla"), {"xla": 2.0})))
    assert choose_attention("auto", CPU)[0] == AttentionBackend("xla")
    # What cannot serve here is passed over, wherever it was measured.
    write_table(no_tables, table(CPU, (512, AttentionBackend("cudnn"), {"cudnn": 2.0})))
    assert choose_attention("auto", CPU)[0] == AttentionBackend("reference")


def test_tables_there_and_back(no_tables: Path) -> None:
    written = table(H200, (512, AttentionBackend("pallas_gpu", 128, 64), {"pallas_gpu": 2.0, "xla": 7.0}))
    write_table(no_tables, written)
    assert read_table(no_tables) == written
    assert [path.name for path in no_tables.parent.iterdir()] == ["tuned.json"]
    assert read_table(no_tables.with_name("none.json")) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a table of tuned kernels"),
        ("[]", "not a table of tuned kernels"),
        ('{"format": 2, "entries": []}', "a table of format 2, this jaxlm reads 1; delete it and run python -m jaxlm"),
        ('{"format": 1, "entries": [{"device_kind": "cpu"}]}', r"not a table of tuned kernels \(KeyError\('dtype'\)\)"),
        ('{"format": 1, "entries": [1]}', "not a table of tuned kernels"),
    ],
)
def test_broken_tables(content: str, message: str, no_tables: Path) -> None:
    no_tables.parent.mkdir()
    no_tables.write_text(content)
    with pytest.raises(UserError, match=message):
        choose_attention("auto", CPU)
    assert choose_attention("xla", CPU)[0] == AttentionBackend("xla")


def test_the_shipped_table_can_be_read() -> None:
    assert read_table(Path(backend.__file__).with_name("tuned.json")) == {}  # nothing was measured yet


def test_here() -> None:
    case = shape_key(SHAPES["llama-2-7b"].attention, "bfloat16", 4096, True)
    assert case == ShapeKey("cpu", jax.devices()[0].device_kind, None, "bfloat16", 4096, 128, 32, 32, True, None)
    assert (case.bucket, dataclasses.replace(case, length=4097).bucket, dataclasses.replace(case, length=1).bucket) == (
        4096,
        8192,
        1,
    )


def test_all_can_be_run() -> None:
    assert set(IMPLEMENTATIONS) == set(backend.NAMES)


def test_blocks_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 2, 4)), jnp.float32)
    seen: list[dict[str, Any]] = []

    def kernel(q: Any, k: Any, v: Any, ids: Any, **options: Any) -> Any:
        seen.append(options)
        return reference_attention(q, k, v, MaskSpec(ids)), None

    monkeypatch.setattr(attention_module, "flash_attention", kernel)
    attention(q, q, q, MaskSpec(), AttentionBackend("pallas_tpu", 256, 512))
    attention(q, q, q, MaskSpec(), "pallas_gpu")
    attention(q, q, q, MaskSpec(), AttentionBackend("pallas_gpu", 64, 128))
    assert [(options["block_q"], options["block_k"]) for options in seen] == [(256, 512), (None, None), (64, 128)]
    assert [options["backend"] for options in seen] == ["tpu", "gpu", "gpu"]


def test_layers_that_differ_share_a_backend_that_serves_them_all() -> None:
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    plain = AttentionSpec(8, 8, 128)
    window = dataclasses.replace(plain, window=512)
    alibi = dataclasses.replace(plain, rope=None, alibi=True)
    relative = dataclasses.replace(plain, rope=None, relative_bias=RelativeBiasSpec())
    chosen = [
        choose_for_layers("auto", layers, "bfloat16", 2048, True, tpu)[0].name
        for layers in ((plain, window, alibi), (plain, relative), (relative, plain))
    ]
    assert chosen == ["pallas_tpu", "xla", "xla"]
    with pytest.raises(UserError, match="'pallas_tpu' cannot serve"):
        choose_for_layers("pallas_tpu", (plain, relative), "bfloat16", 2048, True, tpu)
