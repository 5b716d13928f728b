"""The fused output layer and loss against the plain one and against PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.kernels import cross_entropy
from jaxlm.kernels.cross_entropy import linear_cross_entropy, reference_cross_entropy, token_cross_entropy
from jaxlm.sharding import ROW_AXES

V, D = 53, 16


def inputs(batch: int, length: int, vocab: int = V, dim: int = D, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, dim)).astype(np.float32)
    head = rng.normal(size=(vocab, dim)).astype(np.float32)
    labels = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    weights = (rng.random((batch, length)) * (rng.random((batch, length)) > 0.3)).astype(np.float32)
    return x, head, labels, weights


def both(fn: Any, args: tuple[np.ndarray, ...], **options: Any) -> tuple[Any, ...]:
    def loss(x: Any, head: Any) -> Any:
        out = fn(x, head, *args[2:], **options)
        return 1.7 * out.loss, out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*args[:2])
    return out.loss, grads, out.correct


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_TOKENS", 8)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_TOKENS_HEAD", 8)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 1)


@pytest.mark.parametrize(
    ("batch", "length", "soft_cap"),
    [(2, 12, None), (3, 31, None), (1, 1, None), (16, 3, None), (2, 50, None), (3, 31, 2.5)],
)
def test_against_reference(batch: int, length: int, soft_cap: float | None, small_chunks: None) -> None:
    args = inputs(batch, length)
    loss, grads, correct = both(linear_cross_entropy, args, accuracy=True, soft_cap=soft_cap)
    expected_loss, expected, expected_correct = both(reference_cross_entropy, args, soft_cap=soft_cap)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))
    assert correct == expected_correct
    # Evaluation takes another path than training.
    plain = jax.jit(lambda *a: linear_cross_entropy(*a, soft_cap=soft_cap).loss)(*args)
    np.testing.assert_allclose(plain, expected_loss, rtol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 2.5])
def test_against_torch(soft_cap: float | None, small_chunks: None) -> None:
    torch = pytest.importorskip("torch")
    x, head, labels, weights = inputs(2, 12)
    tx, th = torch.tensor(x, requires_grad=True), torch.tensor(head, requires_grad=True)
    logits = tx @ th.T
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    each = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), torch.tensor(labels).reshape(-1).long(), reduction="none"
    )
    total = (each * torch.tensor(weights).reshape(-1)).sum()
    (1.7 * total).backward()
    loss, grads, _ = both(linear_cross_entropy, (x, head, labels, weights), soft_cap=soft_cap)
    np.testing.assert_allclose(loss, total.item(), rtol=1e-5)
    np.testing.assert_allclose(grads[0], tx.grad.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(grads[1], th.grad.numpy(), rtol=0, atol=1e-5)


def test_weights_of_zero_hide_tokens(small_chunks: None) -> None:
    x, head, labels, weights = inputs(2, 12)
    weights[0] = 0
    clean = both(linear_cross_entropy, (x, head, labels, weights), accuracy=True)
    assert not np.any(clean[1][0][0]) and np.any(clean[1][0][1])
    other = labels.copy()
    other[0] = (labels[0] + 1) % V
    changed = both(linear_cross_entropy, (x, head, other, weights), accuracy=True)
    jax.tree.map(np.testing.assert_array_equal, clean, changed)
    nothing = both(linear_cross_entropy, (x, head, labels, np.zeros_like(weights)), accuracy=True)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_accuracy_counts_what_weighs() -> None:
    _, head, labels, _ = inputs(2, 12)
    # Large multiples of the label's own row: the largest logit is the label, except in the row turned round.
    head = head / np.linalg.norm(head, axis=1, keepdims=True)
    x = 5 * head[labels]
    x[1, :4] *= -1
    weights = np.ones_like(labels, np.float32)
    weights[0, :5] = 0
    out = linear_cross_entropy(x, head, labels, weights, accuracy=True)
    assert out.correct == 24 - 4 - 5
    assert linear_cross_entropy(x, head, labels, weights).correct == 0


def test_large_logits_stay_finite() -> None:
    x, head, labels, weights = inputs(2, 12)
    loss, grads, _ = both(linear_cross_entropy, (1e3 * x, head, labels, weights))
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in grads)


def test_bfloat16(small_chunks: None) -> None:
    """Products of bfloat16 numbers are exact in float32, so the loss is the float32 loss of the rounded inputs.

    In the gradients, softmax minus one-hot is rounded once more: 2^-9 of each term.
    """
    x, head, labels, weights = inputs(2, 12)
    rounded = tuple(np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, head))
    loss, grads, _ = both(linear_cross_entropy, (x, head, labels, weights), dtype=jnp.bfloat16)
    expected_loss, expected, _ = both(reference_cross_entropy, (*rounded, labels, weights))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for a, b in zip(grads, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=2**-8 * np.abs(b).max())


def shapes_in(text: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16|f16|pred|s32)\[([\d,]+)\]", text)}


# 1021 is prime.
@pytest.mark.parametrize("length", [1024, 1021])
@pytest.mark.parametrize("accuracy", [False, True])
def test_never_all_logits(length: int, accuracy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, tokens = 211, 1024
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", tokens * vocab)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_TOKENS_HEAD", 8)

    def loss(x: Any, head: Any, labels: Any, weights: Any) -> Any:
        out = linear_cross_entropy(x, head, labels, weights, accuracy=accuracy)
        return out.loss, out.correct

    args = (
        jax.ShapeDtypeStruct((8, length, D), jnp.float32),
        jax.ShapeDtypeStruct((vocab, D), jnp.float32),
        jax.ShapeDtypeStruct((8, length), jnp.int32),
        jax.ShapeDtypeStruct((8, length), jnp.float32),
    )
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    shapes = shapes_in(step.lower(*args).compile().as_text())
    largest = max(int(np.prod(s)) for s in shapes if vocab in s)
    assert tokens // 2 * vocab < largest < 2 * tokens * vocab
    # The test sees what it looks for: the plain twin does hold them.
    plain = jax.jit(lambda *a: reference_cross_entropy(*a).loss).lower(*args).compile().as_text()
    assert max(int(np.prod(s)) for s in shapes_in(plain) if vocab in s) == 8 * length * vocab


@pytest.mark.parametrize("trains", [False, True])
def test_frozen_head_costs_no_gradient(trains: bool, small_chunks: None) -> None:
    args = inputs(2, 12)
    argnums = (0, 1) if trains else (0,)
    fn = jax.grad(lambda x, head: linear_cross_entropy(x, head, *args[2:]).loss, argnums=argnums)
    dots = re.findall(r"f32\[([\d,]+)\] = dot_general", str(jax.make_jaxpr(fn)(*args[:2])))
    assert (f"{V},{D}" in dots) == trains
    compiled = jax.jit(fn).lower(*args[:2]).compile().as_text()
    # The carry [V, D] of the scan is gone with it.
    outputs = re.findall(rf"= f32\[{V},{D}\]\S* (\w[\w-]*)\(", compiled)
    assert any(op not in ("parameter", "get-tuple-element", "copy") for op in outputs) == trains


def mesh_of(**sizes: int) -> Mesh:
    """Over the first devices; sizes as in the configuration."""
    config = MeshConfig(**{"fsdp": 1, **sizes})
    return make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config))], experts=8)


def on_mesh(mesh: Mesh, vocab: int, argnums: tuple[int, ...] = (0, 1), **options: Any) -> Any:
    """(x, head, labels, weights) -> loss, correct and gradients, all laid out as in training; jitted."""
    split = vocab % mesh.shape["tensor"] == 0
    rows, head = NamedSharding(mesh, P(ROW_AXES)), NamedSharding(mesh, P("tensor" if split else None, "fsdp"))

    def run(*args: Any) -> Any:
        def loss(x: Any, head: Any) -> Any:
            out = linear_cross_entropy(x, head, *args[2:], **options)
            return 1.7 * out.loss, out

        (_, out), grads = jax.value_and_grad(loss, argnums=argnums, has_aux=True)(*args[:2])
        return out.loss, grads, out.correct

    grads = tuple((rows, head)[index] for index in argnums)
    return jax.jit(run, in_shardings=(rows, head, rows, rows), out_shardings=(None, grads, None))


MESHES = [dict(tensor=8), dict(fsdp=2, tensor=4), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, expert=2), dict(fsdp=8)]


@pytest.mark.parametrize("soft_cap", [None, 40.0], ids=["", "capped"])
@pytest.mark.parametrize("vocab", [56, 53], ids=["even", "uneven"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_on_a_mesh(sizes: dict[str, int], vocab: int, soft_cap: float | None, small_chunks: None) -> None:
    """The same values and gradients as on one device, ties of the largest logit included."""
    x, head, labels, weights = inputs(8, 31, vocab)
    head[vocab - 1] = head[0]
    labels[:, :9] = 0
    x[:, :9] = 5 * head[0]
    mesh = mesh_of(**sizes)
    with use_mesh(mesh):
        loss, grads, correct = on_mesh(mesh, vocab, accuracy=True, soft_cap=soft_cap)(x, head, labels, weights)
    arguments = x, head, labels, weights
    expected_loss, expected, expected_correct = both(reference_cross_entropy, arguments, soft_cap=soft_cap)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert correct == expected_correct > 0
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2, tensor=4), dict(data=2, fsdp=2, expert=2)], ids=str)
def test_what_each_token_adds(sizes: dict[str, int], small_chunks: None) -> None:
    """To the sums, which have the bits that they have without it; on one device and on meshes."""
    x, head, labels, weights = inputs(8, 31, 53)
    labels[:, :9] = np.argmax(x[:, :9] @ head.T, axis=-1)
    weights[3, 4] = 1.0
    rows = [jnp.asarray(each) for each in (x, head, labels, weights)]

    def run(fn: Any, **options: Any) -> Any:
        with use_mesh(mesh_of(**sizes)) if sizes else contextlib.nullcontext():
            return jax.jit(lambda *args: fn(*args, **options))(*rows)

    sums, tokens = run(token_cross_entropy, soft_cap=2.5)
    plain = run(linear_cross_entropy, soft_cap=2.5, accuracy=True)
    assert sums.loss == plain.loss and sums.correct == plain.correct
    for row, place in ((0, 0), (3, 4), (7, 30)):
        one = np.zeros_like(weights)
        one[row, place] = weights[row, place]
        alone = reference_cross_entropy(x, head, labels, one, soft_cap=2.5)
        np.testing.assert_allclose(tokens.loss[row, place], alone.loss, rtol=1e-5)
        assert tokens.correct[row, place] == alone.correct
    np.testing.assert_allclose(tokens.loss.sum(), plain.loss, rtol=1e-5)
    assert tokens.correct.sum() == plain.correct > 20


def collectives(text: str) -> set[tuple[str, str]]:
    """(kind, largest shape) of each collective in a compiled program."""
    found = re.findall(r" = (\S.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\w*\(", text)
    return {(kind, max(re.findall(r"\[([\d,]*)\]", shape), key=len)) for shape, kind in found}


@pytest.mark.parametrize("trains", [False, True])
def test_what_devices_tell_each_other(trains: bool, small_chunks: None) -> None:
    """Over `tensor` some numbers a token and the gradient of x; never logits, nor the head."""
    vocab, length, chunk = 56, 32, 8
    mesh = mesh_of(fsdp=2, tensor=4)
    rows = 8 // 2
    shapes = [(8, length, D), (vocab, D), (8, length), (8, length)]
    args = [
        jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32,) * 2 + (jnp.int32, jnp.float32), strict=True)
    ]
    with use_mesh(mesh):
        run = on_mesh(mesh, vocab, (0, 1) if trains else (0,), accuracy=True)
        text = run.lower(*args).compile().as_text()
    expected = {
        ("all-gather", f"{vocab // 4},{D}"),  # over fsdp, once
        ("all-reduce", f"{chunk}"),
        ("all-reduce", f"{chunk},{D}"),
        ("all-reduce", ""),
    }
    if trains:
        # Parts of its gradient, by rows; then columns for rows, of the parts.
        expected |= {("reduce-scatter", f"1,{vocab // 4 // 2},{D}"), ("all-to-all", f"{vocab // 4 // 2},{D // 2}")}
    assert rows * length > chunk and collectives(text) == expected
    loop = re.search(r"body=%?([\w.\-]+)", text)
    assert loop and "all-gather" not in text.split(f"%{loop[1]} ")[1].split("\n}")[0]


def test_chunks_are_counted_per_device(small_chunks: None) -> None:
    def chunks() -> int:
        jaxpr = jax.make_jaxpr(lambda *args: linear_cross_entropy(*args).loss)(*inputs(8, 64))
        return int(re.findall(r"length=(\d+)", str(jaxpr))[0])

    assert chunks() == 64
    with use_mesh(mesh_of(data=2, fsdp=4)):
        assert chunks() == 8


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2, tensor=4)], ids=str)
def test_what_each_token_adds_has_a_gradient(sizes: dict[str, int], small_chunks: None) -> None:
    """Any function of the tokens' losses, against the same of all logits at once; a frozen head has none."""
    x, head, labels, weights = (jnp.asarray(each) for each in inputs(8, 31, 53))
    pull = jnp.asarray(np.random.default_rng(1).normal(size=weights.shape), jnp.float32)

    def plain(x: jax.Array, head: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(2.5 * jnp.tanh(jnp.einsum("btd,vd->btv", x, head) / 2.5))
        losses = -jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0] * weights
        return jnp.square(jnp.sum(losses * pull)) + 0.1 * losses.sum()

    def fused(x: jax.Array, head: jax.Array) -> jax.Array:
        sums, tokens = token_cross_entropy(x, head, labels, weights, soft_cap=2.5, accuracy=False)
        return jnp.square(jnp.sum(tokens.loss * pull)) + 0.1 * sums.loss

    expected = jax.grad(plain, (0, 1))(x, head)
    with use_mesh(mesh_of(**sizes)) if sizes else contextlib.nullcontext():
        found = jax.jit(jax.grad(fused, (0, 1)))(x, head)
        alone = jax.jit(jax.grad(fused))(x, head)
    for mine, theirs in zip((*found, alone), (*expected, expected[0]), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 * float(jnp.abs(theirs).max()))
