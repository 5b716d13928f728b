"""All experts in one loop, against the plain steps one after the other: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.expert_loop import loop_experts
from jaxlm.nn.dispatch import make_dispatch

N, I, O, F, E = 50, 6, 5, 4, 3


def problem(k: int, dead: float, dtype: Any) -> tuple[list[jax.Array], Any, Any, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(k)
    experts = np.stack([rng.permutation(E)[:k] for _ in range(N)]).astype(np.int32)
    live = rng.random((N, k)) >= dead
    weights = rng.normal(size=(N, k)) * live
    shapes = (N, I), (E, I, 2 * F), (E, F, O)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes] + [jnp.asarray(weights, jnp.float32)]
    return arrays, experts, live, *(rng.normal(size=(N, O)).astype(np.float32) for _ in range(2))


ACTIVATIONS: list[Callable[[jax.Array], jax.Array]] = [jax.nn.silu, jax.nn.gelu]


def plain(
    x: Any,
    gate_up: Any,
    down: Any,
    weights: Any,
    experts: np.ndarray,
    live: np.ndarray,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> Any:
    """Every token through every one of its experts, by whole matrices."""
    x, gate_up, down = (a.astype(jnp.float32) for a in (x, gate_up, down))
    both = jnp.einsum("ni,nkif->nkf", x, gate_up[experts])
    h = activation(both[..., :F]) * both[..., F:]
    return jnp.einsum("nkf,nkfo,nk->no", h, down[experts], weights * live)


@pytest.mark.parametrize(("k", "dead", "activation"), [(1, 0.0, 0), (2, 0.4, 0), (E, 0.0, 0), (2, 1.0, 0), (2, 0.4, 1)])
def test_values_and_gradients(k: int, dead: float, activation: int) -> None:
    arrays, experts, live, target, _ = problem(k, dead, jnp.float32)
    moves, groups = make_dispatch(jnp.asarray(experts), jnp.asarray(live), E, N * k)
    # Unused blocks at the end, or the loop's bound is not tested; and blocks that are not full.
    assert groups.live < len(groups.owner) and (np.asarray(moves.token) == N).any()

    def fast(*arrays: Any) -> Any:
        return loop_experts(*arrays, moves.token, moves.slot, groups, ACTIVATIONS[activation])

    def slow(*arrays: Any) -> Any:
        return plain(*arrays, experts, live, ACTIVATIONS[activation])

    np.testing.assert_allclose(jax.jit(fast)(*arrays), jax.jit(slow)(*arrays), rtol=1e-5, atol=1e-5)
    every = (0, 1, 2, 3)
    found, expected = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * target), argnums=every))(*arrays)  # type: ignore[misc]
        for f in (fast, slow)
    )
    for name, a, b in zip(("x", "gate_up", "down", "weights"), found, expected, strict=True):
        # A row that is not live has no gradient here, as its weight is never read.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
    assert dead == 1 or all(np.abs(a).max() > 0.1 for a in found)


def shapes_of_products(jaxpr: Any) -> set[tuple[int, ...]]:
    """Of the results of all products in a program, inner ones too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(equation.outvars[0].aval.shape)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jax.extend.core.ClosedJaxpr)):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= shapes_of_products(inner)
    return found


@pytest.mark.parametrize("trains", ["", "gate_up", "down", "gate_up down"])
def test_further_rows_and_columns(trains: str) -> None:
    """As of joined matrices, whichever of them train; of those that do not, no gradient is formed."""
    arrays, experts, live, _, _ = problem(2, 0.3, jnp.float32)
    x, gate_up, down, weights = arrays
    rng = np.random.default_rng(1)
    shapes = {"x": (N, I + 3), "more_gate_up": (E, 3, 2 * F), "more_down": (E, F, 2), "target": (N, O + 2)}
    drawn = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    target, x = drawn.pop("target"), drawn.pop("x")
    moves, groups = make_dispatch(jnp.asarray(experts), jnp.asarray(live), E, N * 2)
    given = {"x": x, "gate_up": gate_up, "down": down, "weights": weights, **drawn}
    names = [name for name in given if name not in ("gate_up", "down") or name in trains.split()]

    def fast(gate_up: Any, down: Any, x: Any, weights: Any, **more: Any) -> Any:
        return jnp.sum(loop_experts(x, gate_up, down, weights, moves.token, moves.slot, groups, **more) * target)

    def slow(gate_up: Any, down: Any, x: Any, weights: Any, more_gate_up: Any, more_down: Any) -> Any:
        both = jnp.concatenate([gate_up, more_gate_up], axis=1), jnp.concatenate([down, more_down], axis=2)
        return jnp.sum(plain(x, *both, weights, experts, live) * target)

    def gradients(loss: Any) -> Any:
        return jax.grad(lambda some: loss(**given | some))

    some = {name: given[name] for name in names}
    found, expected = (jax.jit(gradients(loss))(some) for loss in (fast, slow))
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
        assert np.abs(found[name]).max() > 0.1
    products = shapes_of_products(jax.make_jaxpr(gradients(fast))(some).jaxpr)
    # Gradients of the matrices: of all rows and columns together, or of the further ones alone.
    whole = {(I + 3, 2 * F): "gate_up" in trains, (F, O + 2): "down" in trains}
    few = {(3, 2 * F): "gate_up" not in trains, (F, 2): "down" not in trains}
    assert {shape: shape in products for shape in whole | few} == whole | few


def test_an_expert_without_tokens() -> None:
    arrays, _, live, target, _ = problem(1, 0.0, jnp.float32)
    experts = np.full((N, 1), 1, np.int32)
    moves, groups = make_dispatch(jnp.asarray(experts), jnp.asarray(live), E, N)
    grad = jax.grad(
        lambda w: jnp.sum(loop_experts(arrays[0], w, *arrays[2:], moves.token, moves.slot, groups) * target)
    )
    found = grad(arrays[1])
    assert np.abs(found[1]).max() > 0.1 and not np.abs(found[0]).any() and not np.abs(found[2]).any()


def test_bfloat16() -> None:
    arrays, experts, live, _, target = problem(2, 0.2, jnp.bfloat16)
    moves, groups = make_dispatch(jnp.asarray(experts), jnp.asarray(live), E, N * 2)

    def loss(*arrays: Any) -> Any:
        out = loop_experts(*arrays, moves.token, moves.slot, groups)
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32) * target)

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)
    slow = jax.jit(jax.grad(lambda *a: jnp.sum(plain(*a, experts, live) * target), argnums=(0, 1, 2, 3)))
    expected = slow(*arrays)
    for a, b, array in zip(found, expected, arrays, strict=True):
        assert a.dtype == array.dtype
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        assert np.abs(a - b).max() < 0.03 * np.abs(b).max()
