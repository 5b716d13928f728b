"""Grouped products against the plain twin: values, gradients, and groups of any size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul
from jaxlm.kernels.groups import make_groups

HERE = [name for name in IMPLEMENTATIONS if not name.startswith("pallas")]  # those have tests of their own
I, O = 5, 3


def problem(counts: list[int], block: int, spare: int, seed: int) -> tuple[Any, Any, Any, np.ndarray]:
    """Rows, matrices, groups, and the true rows as (row, group) pairs."""
    rng = np.random.default_rng(seed)
    groups, starts, rows = make_groups(jnp.array(counts), sum(counts) + spare, block)
    x = np.zeros((rows, I), np.float32)
    owners = []
    for group, (start, count) in enumerate(zip(np.asarray(starts), counts, strict=True)):
        assert start % block == 0 and start + count <= rows
        x[start : start + count] = rng.normal(size=(count, I))
        owners += [(start + k, group) for k in range(count)]
    return x, rng.normal(size=(len(counts), I, O)).astype(np.float32), groups, np.array(owners, np.int64).reshape(-1, 2)


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    block=st.sampled_from([1, 4, 8]),
    spare=st.integers(0, 9),
    seed=st.integers(0, 9),
)
@settings(max_examples=6)
def test_values_and_gradients(counts: list[int], block: int, spare: int, seed: int) -> None:
    x, w, groups, owners = problem(counts, block, spare, seed)
    expected = np.zeros((len(x), O), np.float32)
    for row, group in owners:
        expected[row] = x[row] @ w[group]
    weights = np.random.default_rng(seed + 1).normal(size=expected.shape).astype(np.float32)
    grad_x, grad_w = np.zeros_like(x), np.zeros_like(w)
    for row, group in owners:
        grad_x[row] = w[group] @ weights[row]
        grad_w[group] += np.outer(x[row], weights[row])
    live = np.zeros(len(x), bool)
    live[owners[:, 0]] = True
    for name in HERE:

        def loss(x: Any, w: Any, name: str = name) -> Any:
            return jnp.sum(grouped_matmul(x, w, groups, name) * weights)

        found = grouped_matmul(jnp.asarray(x), jnp.asarray(w), groups, name)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
        found_x, found_w = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(w))
        np.testing.assert_allclose(found_x[live], grad_x[live], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found_w, grad_w, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", HERE)
def test_bfloat16_accumulates_in_float32(name: str) -> None:
    counts = [64, 0, 64]
    groups, starts, rows = make_groups(jnp.array(counts), 128, 64)
    x = np.ones((rows, 512), np.float32)
    w = np.full((3, 512, 1), 1 + 2**-7, np.float32)
    found = grouped_matmul(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), groups, name)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found[:64], np.float32), 516.0)
    assert list(np.asarray(starts)) == [0, 64, 64]
