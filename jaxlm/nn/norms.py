"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.spec import NormSpec


class Norm(nn.Module):
    """The norm over the last dim that a spec describes, in float32.

    Attributes:
        spec: kind, what is added below the root, offset and bias.
        dtype: of the result.
        param_dtype: of the scale and the bias.
    """

    spec: NormSpec
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        x32 = x.astype(jnp.float32)
        if self.spec.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.spec.eps)
        out = normed
        if self.spec.scale:
            scale: Any = self._vector("scale", x.shape[-1], zeros if self.spec.offset else ones).astype(jnp.float32)
            out = normed * (scale + self.spec.offset if self.spec.offset else scale)
        if self.spec.bias:
            out = out + self._vector("bias", x.shape[-1], zeros).astype(jnp.float32)
        return out.astype(self.dtype)

    def _vector(self, name: str, size: int, init: Any) -> Any:
        return self.param(name, nn.with_logical_partitioning(init, ("norm",)), (size,), self.param_dtype)
