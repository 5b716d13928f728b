"""Both ways of rotating against transformers' own, values and gradient; ALiBi's slopes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.positions import alibi_slopes, apply_rope, rotate_by_halves, rotate_by_product

torch = pytest.importorskip("torch")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")

Rotate = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@pytest.mark.parametrize("rotate", [rotate_by_halves, rotate_by_product, apply_rope])
@pytest.mark.parametrize(("dtype", "close"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-6)])
def test_rotation_and_gradient(rotate: Rotate, dtype: jnp.dtype, close: float) -> None:
    rng = np.random.default_rng(0)
    shape, half = (2, 5, 3, 16), 8
    x, grad = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    angles = rng.uniform(-3, 3, (2, 5, half)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    ours, back = jax.vjp(lambda x: rotate(x, jnp.asarray(cos), jnp.asarray(sin)), x)

    theirs = torch.tensor(np.asarray(x, np.float32), requires_grad=True)
    whole = [torch.tensor(np.concatenate([part, part], axis=-1)) for part in (cos, sin)]
    expected, _ = llama.apply_rotary_pos_emb(theirs, theirs, *whole, unsqueeze_dim=2)
    expected.backward(torch.tensor(np.asarray(grad, np.float32)))
    assert ours.dtype == dtype
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected.detach().numpy(), atol=close)
    np.testing.assert_allclose(np.asarray(back(grad)[0], np.float32), theirs.grad.numpy(), atol=close)


@pytest.mark.parametrize("heads", [4, 6, 12, 16, 32, 71])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    expected = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-6)


def test_swapping_by_a_product_loses_nothing() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 1, 64)) * 10.0 ** np.arange(-32, 32), jnp.float32)
    quarter = jnp.zeros((1, 1, 32)), jnp.ones((1, 1, 32))  # cos 0, sin 1: the halves change places
    np.testing.assert_array_equal(rotate_by_product(x, *quarter), rotate_by_halves(x, *quarter))
