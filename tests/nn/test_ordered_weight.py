"""Products whose bits do not depend on the number of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.matmul import matmul
from jaxlm.nn.ordered_weight import GROUP, MANY, WHOLE, OrderedWeight, block_of, ordered_product

INPUTS, OUTPUTS, ROWS = 384, 256, (2, GROUP, 24, MANY + GROUP)


@pytest.fixture(scope="module")
def block() -> int:
    found = block_of(INPUTS, OUTPUTS, ROWS)
    if found is None:
        pytest.skip("this machine has no such order; the engine lays such matrices out [out, in]")
    return found


def test_products_do_not_depend_on_the_number_of_rows(block: int) -> None:
    rng = np.random.default_rng(5)
    x, kernel = rng.standard_normal((ROWS[-1], 4, INPUTS // 4), np.float32), rng.standard_normal((4, 96, 16, 16))
    weight = OrderedWeight(jnp.asarray(kernel, jnp.float32), 2, block)
    assert weight.array_shape == kernel.shape
    np.testing.assert_array_equal(weight.dense(jnp.float32), weight.values)
    whole = jax.jit(lambda x: weight.times(x, jnp.float32))(x)
    expected = matmul(jnp.asarray(x), weight.values, 2, jnp.float32)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)
    for rows in (*ROWS[:-1], 3, 20):
        np.testing.assert_array_equal(jax.jit(lambda x: weight.times(x, jnp.float32))(x[:rows]), whole[:rows])


def test_an_order_is_refused_where_bits_differ(block: int) -> None:
    """A machine that needs no help has the order of whole products, and no other is tried."""
    x, matrix = np.random.default_rng(6).standard_normal((ROWS[-1], INPUTS), np.float32), np.ones((INPUTS, OUTPUTS))
    matrix = np.random.default_rng(7).standard_normal(matrix.shape, np.float32)
    few = jax.jit(ordered_product, static_argnums=2)(x[:2], matrix, WHOLE)
    many = jax.jit(ordered_product, static_argnums=2)(x, matrix, WHOLE)[:2]
    assert np.array_equal(few, many) == (block == WHOLE)


@pytest.mark.parametrize("rows", [GROUP, MANY - 3, MANY])
def test_blocks_are_added_one_after_the_other(rows: int) -> None:
    """Also where no machine needs it: many rows are the sum of as many products as there are blocks, in order."""
    rng = np.random.default_rng(8)
    x, matrix = rng.standard_normal((rows, 96), np.float32), rng.standard_normal((96, 7), np.float32)
    product = ordered_product(jnp.asarray(x), jnp.asarray(matrix), 32)
    expected = (x[:, :32] @ matrix[:32] + x[:, 32:64] @ matrix[32:64]) + x[:, 64:] @ matrix[64:]
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)


def test_columns_are_embeddings() -> None:
    table = np.random.default_rng(9).standard_normal((5, 11), np.float32)
    ids = jnp.array([[3, 10], [0, 3]])
    weight = OrderedWeight(jnp.asarray(table), 1)
    np.testing.assert_array_equal(weight.columns(ids, jnp.float32), table.T[np.asarray(ids)])
