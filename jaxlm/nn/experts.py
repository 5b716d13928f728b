"""The feed-forward layer divided into experts, of which tokens of different modalities use different numbers.

The F neurons of a gated dense layer are E contiguous blocks (`convert moefy` puts them in that order), so that with
all experts on it is the dense layer. Source of the idea: MoEfication (arXiv:2110.01786) and SciMind (langmol 2024).
Which experts a token uses is said in `nn.routers`, how tokens come to them in `nn.dispatch`.

Shapes: B rows, T length, D model, F neurons, E experts, f = F / E, R rank; ... dims of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.expert_loop import Activation
from jaxlm.nn.dispatch import (
    Matrices,
    Routing,
    by_expert,
    entering,
    leave_experts,
    outputs_first,
    over_devices,
    over_tensor,
    run_experts,
)
from jaxlm.nn.feed_forward import ACTIVATIONS
from jaxlm.nn.linear import Linear, LinearParts, WithLinears
from jaxlm.nn.lora import FUSED, LoraSpec
from jaxlm.nn.routers import released_mask, route_by_modality, route_by_scores, route_learned, router_losses
from jaxlm.spec import ExpertsSpec, FeedForwardSpec

_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


class _PerExpert:
    """Makes the adapter of a linear layer one for each expert.

    The adapters of E experts are one of their ranks together, whose factor on the side of the neurons is zero where a
    neuron and a rank are not of the same expert; so is its gradient.
    """

    def _init_a(self: Any, key: Any, spec: LoraSpec, layer: jax.Array) -> jax.Array:
        if not self._enters_by_neurons:
            return super()._init_a(key, spec, layer)  # type: ignore[misc]
        a = self._fresh_a(key, spec, layer, math.prod(self.in_dims) // spec.experts)
        return _own_ranks(a, spec, layer, 0).reshape(*self.in_dims, spec.rank)

    def _factors(self: Any, spec: LoraSpec, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = super()._factors(spec, layer)  # type: ignore[misc]
        return (_own_ranks(a, spec, layer, 0), b) if self._enters_by_neurons else (a, _own_ranks(b, spec, layer, 1))

    def _own_factor(self: Any, spec: LoraSpec, layer: jax.Array) -> jax.Array:
        return _own_ranks(super()._own_factor(spec, layer), spec, layer, 1)  # type: ignore[misc]

    @property
    def _enters_by_neurons(self: Any) -> bool:
        return bool(self.in_axes == ("mlp",))


def _own_ranks(factor: jax.Array, spec: LoraSpec, layer: jax.Array, neurons: int) -> jax.Array:
    """A factor with neurons along the dim `neurons`, zero where a neuron and a rank are not of the same expert."""
    per_expert = jnp.asarray(spec.ranks)[layer] // spec.experts
    expert = jax.lax.broadcasted_iota(jnp.int32, factor.shape, neurons) * spec.experts // factor.shape[neurons]
    owner = jax.lax.broadcasted_iota(jnp.int32, factor.shape, 1 - neurons) // jnp.maximum(per_expert, 1)
    return jnp.where(expert == owner, factor, 0.0)


def _owners(neurons: int, experts: int) -> jax.Array:
    """int32 [F]: the expert of each neuron."""
    return jax.lax.broadcasted_iota(jnp.int32, (experts, neurons // experts), 0).reshape(-1)


def sums_by_expert(h: jax.Array, experts: int) -> jax.Array:
    """Neurons [..., F] -> float32 [..., E], the sum over each expert's."""

    def add(h: jax.Array) -> jax.Array:
        return h.reshape(*h.shape[:-1], experts, -1).astype(jnp.float32).sum(axis=-1)

    return cast(jax.Array, jax.lax.platform_dependent(h, tpu=partial(sums_by_product, experts=experts), default=add))


def sums_by_product(h: jax.Array, experts: int) -> jax.Array:
    """`sums_by_expert` for a TPU, which would lay neurons out anew to add up parts of a row (benchmarks/README.md)."""
    is_own = jax.nn.one_hot(_owners(h.shape[-1], experts), experts, dtype=h.dtype)
    precision = jax.lax.Precision.HIGHEST if h.dtype == jnp.float32 else None  # a TPU's default is bfloat16
    return jnp.einsum("...f,fe->...e", h, is_own, precision=precision, preferred_element_type=jnp.float32)


def keep_used(h: jax.Array, used: jax.Array) -> jax.Array:
    """Neurons [..., F], with zeros for those of experts that are not used, bool [..., E]."""
    experts = used.shape[-1]
    words = [used[..., start : start + 32] for start in range(0, experts, 32)]
    bits = [jnp.where(word, _BITS[: word.shape[-1]], 0).sum(axis=-1, dtype=jnp.uint32)[..., None] for word in words]
    # Bits, not a mask of h's shape or h in parts: a TPU reads them beside h, and lays nothing out anew.
    owners = _owners(h.shape[-1], experts)
    chosen = bits[0]
    for number, word in enumerate(bits[1:], 1):
        chosen = jnp.where(owners >= 32 * number, word, chosen)
    return jnp.where((chosen >> (owners % 32).astype(jnp.uint32)) & 1 == 1, h, jnp.zeros((), h.dtype))


class PerExpertLinear(_PerExpert, Linear):
    """A linear layer of the experts with an adapter for each of them."""


class PerExpertLinearParts(_PerExpert, LinearParts):
    """The same parameters as `PerExpertLinear`, handed out instead of applied."""


class ExpertsFeedForward(WithLinears):
    """Gated feed-forward of which every token uses some experts; the parameters are those of the dense layer.

    Attributes:
        spec: number of neurons, biases and experts.
        compute: 'dense' computes all neurons and masks; the others compute the used ones, by grouped products
            (see `kernels.grouped_matmul` and `choose_compute`). With routers by activation that is down_proj alone.
        noise: standard deviation of noise on a learned router's logits while training.
    """

    spec: FeedForwardSpec
    compute: str = "dense"
    noise: float = 0.0

    @property
    def experts(self) -> ExpertsSpec:
        assert self.spec.experts is not None
        return self.spec.experts

    @property
    def _activation(self) -> Activation:
        return ACTIVATIONS[self.spec.activation]

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, deterministic: bool, modality: jax.Array) -> jax.Array:
        """x [B, T, D], modality [B, T] integers (see `modality_ids`) -> [B, T, D]."""
        experts, count = self.experts, self.experts.num_experts
        if experts.router == "learned":
            router: Any = self.param(
                "router",
                nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ("embed", "experts")),
                (self.hidden_size, count),
                self.param_dtype,
            )
            logits = jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32))
            noise = None
            if self.noise > 0 and not deterministic:
                noise = self.noise * jax.random.normal(self.make_rng("dropout"), logits.shape)
            routing = route_learned(experts, logits, noise, modality)
            balance, z = router_losses(experts, logits, routing, modality)
            self._note("balance_loss", balance)
            self._note("z_loss", z)
        elif experts.router == "modality":
            routing = route_by_modality(experts, modality)
        else:
            return self._by_activation(x, layer, deterministic, modality)
        self._count(Routing(routing.experts, routing.live, None).mask(count) > 0, modality)
        if self.compute == "dense":
            return self._masked(x, layer, deterministic, routing.mask(count))
        return self._sparse(x, layer, deterministic, routing)

    def _projection(self, name: str, parts: bool = False) -> Any:
        """A linear layer, to apply or to take apart, whose adapter is one for each expert where its spec says so."""
        adapter = self.adapters.get("gate_up_proj" if name in FUSED["gate_up_proj"] else name, self.adapters.get(name))
        per_expert = adapter is not None and adapter.experts > 1
        if parts:
            linear_type: type[Linear] = PerExpertLinearParts if per_expert else LinearParts
        else:
            linear_type = PerExpertLinear if per_expert else Linear
        d, f = {"embed": self.hidden_size}, {"mlp": self.spec.size}
        inputs, outputs = (f, d) if name == "down_proj" else (d, f)
        return self._linear(name, inputs, outputs, self.spec.bias, linear_type)

    def _hidden(self, x: jax.Array, layer: jax.Array, deterministic: bool) -> jax.Array:
        entered = self._entered("gate_up_proj", {"embed": self.hidden_size}, x, layer, deterministic)
        up = self._projection("up_proj")(x, layer, deterministic, entered)  # before gate, as in `FeedForward`
        gate = self._projection("gate_proj")(x, layer, deterministic, entered)
        return nn.with_logical_constraint(self._activation(gate) * up, ("batch", "length", "mlp"))

    def _masked(self, x: jax.Array, layer: jax.Array, deterministic: bool, mask: jax.Array) -> jax.Array:
        """All neurons, times mask [..., E] of their experts: the plain twin of `_sparse`."""
        h = self._hidden(x, layer, deterministic)
        blocks = h.reshape(*mask.shape, -1) * mask[..., None].astype(h.dtype)
        return self._projection("down_proj")(blocks.reshape(h.shape), layer, deterministic)

    def _by_activation(self, x: jax.Array, layer: jax.Array, deterministic: bool, modality: jax.Array) -> jax.Array:
        experts = self.experts
        h = self._hidden(x, layer, deterministic)
        scores = sums_by_expert(jax.lax.stop_gradient(h), experts.num_experts)
        if experts.router == "activation_released":
            mask = released_mask(experts, scores, modality)
        else:
            mask = route_by_scores(experts, scores, modality).mask(experts.num_experts)
        self._count(mask > 0, modality)
        if self.compute == "dense":
            out: jax.Array = self._projection("down_proj")(keep_used(h, mask > 0), layer, deterministic)
            return out
        leave = over_tensor(partial(leave_experts, implementation=self.compute))
        leaving, finish = self._leaving(layer, deterministic)
        return finish(leave(h.reshape(*mask.shape, -1), mask > 0, leaving))

    def _sparse(self, x: jax.Array, layer: jax.Array, deterministic: bool, routing: Routing) -> jax.Array:
        """Only the pairs of token and expert that there are."""
        count = self.experts.num_experts
        entered = self._entered("gate_up_proj", {"embed": self.hidden_size}, x, layer, deterministic)
        gate, up = (self._projection(name, parts=True)(layer, entered) for name in ("gate_proj", "up_proj"))

        def drop(value: jax.Array, rate: float) -> jax.Array:
            dropped: jax.Array = nn.Dropout(rate)(value, deterministic=deterministic)
            return dropped

        x = x.astype(self.dtype)
        leaving, finish = self._leaving(layer, deterministic)
        inputs, gate_up = entering(x, gate, up, count, drop, None if entered is None else entered.product)
        run = over_devices(
            partial(run_experts, experts=count, implementation=self.compute, activation=self._activation), count
        )
        return finish(run(inputs, routing, gate_up, leaving))

    def _leaving(self, layer: jax.Array, deterministic: bool) -> tuple[Matrices, Callable[[jax.Array], jax.Array]]:
        """Matrices [E, f, D + R], or as `outputs_first` says, and what makes the layer's output of their product."""
        down, count = self._projection("down_proj", parts=True)(layer), self.experts.num_experts

        def matrices(matrix: jax.Array) -> jax.Array:
            each = by_expert(matrix, count, 0)
            return each.swapaxes(1, 2) if outputs_first(self.compute) else each

        leaving: Matrices = (matrices(down.kernel), None)
        if down.a is not None:
            # h A beside h W; dropout on h is not to be had here, as h never exists for all neurons.
            assert deterministic or down.dropout == 0, "dropout on down_proj's adapter needs the dense form"
            leaving = (leaving[0], matrices(down.a.astype(self.dtype)))

        def finish(y: jax.Array) -> jax.Array:
            out = y[..., : self.hidden_size]
            if down.b is not None:
                out = out + jnp.dot(y[..., self.hidden_size :], down.b.astype(self.dtype))
            if down.bias is not None:
                out = out + down.bias.astype(self.dtype)
            return out

        return leaving, finish

    def _note(self, name: str, value: jax.Array) -> None:
        if not self.is_initializing():
            self.sow("moe", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)

    def _count(self, used: jax.Array, modality: jax.Array) -> None:
        """Notes the number of tokens of each modality that used each expert [modalities, E], and of all its tokens."""
        experts = self.experts
        if not self.is_mutable_collection("moe") or self.is_initializing():
            return
        kinds = jax.nn.one_hot(modality, len(experts.modalities), dtype=jnp.float32)  # none for padding
        self._note("used", jnp.einsum("btm,bte->me", kinds, used.astype(jnp.float32)))
        self._note("tokens", kinds.sum(axis=(0, 1)))
