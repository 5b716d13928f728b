"""All experts in one loop, against the plain steps one after the other: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
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
