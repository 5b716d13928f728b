"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.spec import NormSpec


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dim, in float32 (arXiv:1910.07467).

    Attributes:
        spec: what is added to the mean square.
        dtype: of the result.
        param_dtype: of the scale.
    """

    spec: NormSpec
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale: Any = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            (x.shape[-1],),
            self.param_dtype,
        )
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.spec.eps)
        return (normed * scale.astype(jnp.float32)).astype(self.dtype)
