"""The feed-forward layer in which every token uses all neurons."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax

from jaxlm.kernels.expert_loop import Activation
from jaxlm.nn.linear import WithLinears
from jaxlm.spec import FeedForwardSpec

LINEARS = ("gate_proj", "up_proj", "down_proj")  # the names that it, and the layer of experts, give to their linears
ACTIVATIONS: dict[str, Activation] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class FeedForward(WithLinears):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202), or down(activation(up(x))).

    Attributes:
        spec: number of neurons, activation, gate and biases.
    """

    spec: FeedForwardSpec

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, T, D] -> [B, T, D]; `layer` is this layer's index."""
        d, f = {"embed": self.hidden_size}, {"mlp": self.spec.size}
        entered = self._entered("gate_up_proj", d, x, layer, deterministic)
        # In this order a TPU's compiler makes the activation part of the gate's product when it is computed again, and
        # keeps the weights near (docs/kernels.md, "Shapes of products").
        up = self._linear("up_proj", d, f, self.spec.bias)(x, layer, deterministic, entered)
        activation = ACTIVATIONS[self.spec.activation]
        if self.spec.gated:
            gate = self._linear("gate_proj", d, f, self.spec.bias)(x, layer, deterministic, entered)
            h = activation(gate) * up
        else:
            h = activation(up)
        h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
        out: jax.Array = self._linear("down_proj", f, d, self.spec.bias)(h, layer, deterministic)
        return out
