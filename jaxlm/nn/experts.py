"""The feed-forward layer divided into experts, of which tokens of different modalities use different numbers.

The F neurons of a dense SwiGLU layer are E contiguous blocks (`convert moefy` puts them in that order), so that with
all experts on it is the dense layer. Source of the idea: MoEfication (arXiv:2110.01786) and SciMind (langmol 2024).

Routers, each with its own k for every modality:

- activation: the k experts whose neurons' activations, silu(gate) * up, sum highest. No gradient goes through the
  scores, and gate and up must be computed in full: only the down projection can skip anything.
- activation_released: what SciMind's published code computes. A token's scores are zeroed for the modalities it does
  not belong to, and top-k of zeros picks the first experts: so every token also uses experts 0 to k' - 1 of the other
  modalities' k'. Ties go to the lowest index; a product with zero would leave -0.0, which JAX sorts below 0.0.
- learned: a linear router on the layer's input; the output is weighted by k times the softmax over the chosen, so that
  a router that does not discriminate gives the plain sum. With k = 1 that would be 1 whatever the router says, and the
  task could not train it: there the weight is the chosen one's share of the softmax over all experts, as in the Switch
  Transformer (arXiv:2101.03961, equation 2).
- modality: a fixed set for each modality: the shared experts, and others of its own.

Shapes: B rows, T length, D model, F neurons, E experts, f = F / E, k experts of a token; ... dims of the tokens, [B, T]
as a rule: rows and lengths may lie on different mesh axes, and only inside of `shard_map` can they become one dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlm.errors import UserError
from jaxlm.modalities import PADDING
from jaxlm.nn.dispatch import (
    Routing,
    best_experts,
    by_expert,
    entering,
    leave_experts,
    over_devices,
    over_tensor,
    run_experts,
)
from jaxlm.nn.linear import Linear, LinearParts
from jaxlm.nn.lora import MLP_LINEARS, LoraSpec
from jaxlm.spec import DecoderSpec, ExpertsSpec


def modality_ids(moe: ExpertsSpec, input_ids: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """The modality of each token, int32 in the shape of `input_ids`; PADDING where segment_ids are 0."""
    found = jnp.zeros(input_ids.shape, jnp.int32)
    for number, (start, stop) in enumerate(moe.ranges, 1):
        found = jnp.where((input_ids >= start) & (input_ids < stop), number, found)
    return found if segment_ids is None else jnp.where(segment_ids == 0, PADDING, found)


def _own_k(moe: ExpertsSpec, modality: jax.Array) -> jax.Array:
    """k of each token; 0 for padding."""
    return jnp.array([*moe.top_k, 0])[modality]  # PADDING, -1, is the last one


def route_by_scores(moe: ExpertsSpec, scores: jax.Array, modality: jax.Array) -> Routing:
    """The k best experts of each token by `scores` [..., E]; ties go to the lowest index."""
    experts = best_experts(scores, moe.max_top_k)
    return Routing(experts, jnp.arange(moe.max_top_k) < _own_k(moe, modality)[..., None], None)


def released_mask(moe: ExpertsSpec, scores: jax.Array, modality: jax.Array) -> jax.Array:
    """[..., E] float32 of `activation_released`: the union of every modality's top-k."""
    mask = jnp.zeros(scores.shape, bool)
    for number, k in enumerate(moe.top_k):
        own = jnp.where((modality == number)[..., None], scores, 0.0)  # never a product: see the module's text
        best = best_experts(own, k)
        mask |= jax.nn.one_hot(best, moe.num_experts, dtype=bool).any(axis=-2)
    return (mask & (modality != PADDING)[..., None]).astype(jnp.float32)


def experts_of_modalities(moe: ExpertsSpec) -> np.ndarray:
    """[modalities, k] int32: the fixed sets of the router `modality`, for the largest k.

    The shared experts come first. The others are dealt in turn, and from the start again when there are not enough.
    """
    own = list(range(moe.shared, moe.num_experts)) or [0]
    table = np.zeros((len(moe.modalities), moe.max_top_k), np.int32)
    at = 0
    for number, k in enumerate(moe.top_k):
        dealt = [own[(at + step) % len(own)] for step in range(k - moe.shared)]
        at += k - moe.shared
        table[number, :k] = [*range(moe.shared), *dealt]
    return table


def route_by_modality(moe: ExpertsSpec, modality: jax.Array) -> Routing:
    """The fixed experts of each token's modality."""
    experts = jnp.asarray(experts_of_modalities(moe))[jnp.maximum(modality, 0)]
    return Routing(experts, jnp.arange(moe.max_top_k) < _own_k(moe, modality)[..., None], None)


def route_learned(moe: ExpertsSpec, logits: jax.Array, noise: jax.Array | None, modality: jax.Array) -> Routing:
    """The k best experts by logits [..., E] (plus noise, when training), weighted by k times the softmax over them.

    For tokens whose k is 1 the softmax is over all experts, so that its gradient is not zero.
    """
    routing = route_by_scores(moe, logits if noise is None else logits + noise, modality)
    chosen = jnp.where(routing.live, jnp.take_along_axis(logits, routing.experts, axis=-1), -jnp.inf)
    # Padding has no live expert: a softmax over nothing must not become NaN, nor its gradient.
    largest = jnp.max(jnp.where(routing.live, chosen, -1e30), axis=-1, keepdims=True)
    powers = jnp.where(routing.live, jnp.exp(jnp.where(routing.live, chosen, 0.0) - largest), 0.0)
    shares = powers / jnp.maximum(powers.sum(axis=-1, keepdims=True), 1e-30)
    own_k = _own_k(moe, modality)[..., None]
    if 1 in moe.top_k:
        of_all = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), routing.experts, axis=-1)
        shares = jnp.where(own_k == 1, jnp.where(routing.live, of_all, 0.0), shares)
    return routing.replace(weights=shares * own_k)  # type: ignore[attr-defined]


def router_losses(
    moe: ExpertsSpec, logits: jax.Array, routing: Routing, modality: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Load-balance loss (1 when experts are used evenly; arXiv:2101.03961) and z loss (arXiv:2202.08906), means."""
    valid = (modality != PADDING).astype(jnp.float32)
    tokens, dims = jnp.maximum(valid.sum(), 1.0), tuple(range(valid.ndim))
    used = Routing(routing.experts, routing.live, None).mask(moe.num_experts).sum(dims)
    share = used / jnp.maximum(used.sum(), 1.0)
    probability = (jax.nn.softmax(logits, axis=-1) * valid[..., None]).sum(dims) / tokens
    balance = moe.num_experts * jnp.sum(jax.lax.stop_gradient(share) * probability)
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * valid) / tokens
    return balance, z


def choose_compute(
    requested: str, platform: str, moe: ExpertsSpec, adapters: Mapping[str, LoraSpec]
) -> tuple[str, str]:
    """How a model's experts compute (see `MoeMLP`), and why, for the start-up line.

    Args:
        requested: 'auto', 'dense', 'loop', 'ragged' or 'pallas_tpu'.
        platform: 'cpu', 'gpu' or 'tpu'.

    Raises:
        UserError: when the one asked for cannot serve.
    """
    scored = moe.router.startswith("activation")
    # Of a router that scores activations only the down projection can skip anything.
    touched = [adapters[name] for name in (("down_proj",) if scored else MLP_LINEARS) if name in adapters]
    why_dense = ""
    if any(spec.dora for spec in touched):
        why_dense = "DoRA scales whole columns of the weights"
    elif "down_proj" in adapters and adapters["down_proj"].dropout > 0:
        why_dense = "dropout on the adapter of down_proj falls on all neurons"
    if requested == "auto":
        if why_dense:
            return "dense", why_dense
        if scored and max(moe.top_k) * 2 > moe.num_experts:
            return "dense", f"the router {moe.router} takes gate and up in full; with these k there is little to skip"
        what = "what is used of down_proj, as the router takes gate and up in full; " if scored else ""
        if platform == "cpu":
            return "loop", f"{what}blocks of rows on a CPU"
        if platform == "tpu":
            return "pallas_tpu", f"{what}grouped products in Pallas (XLA's gradient multiplies with all experts)"
        return "ragged", f"{what}grouped products on {platform}"
    if requested == "pallas_tpu" and platform != "tpu":
        raise UserError(f"moe.compute: 'pallas_tpu' needs a TPU, this is {platform}; use 'auto', 'ragged' or 'loop'")
    if requested != "dense" and why_dense:
        raise UserError(f"moe.compute: {requested!r} cannot serve: {why_dense}; use 'auto' or 'dense'")
    return requested, "as configured"


class MoeMLP(nn.Module):
    """SwiGLU feed-forward of which every token uses some experts; the parameters are those of the dense layer.

    Attributes:
        compute: 'dense' computes all neurons and masks; the others compute the used ones, by grouped products
            (see `kernels.grouped_matmul` and `choose_compute`). With routers by activation that is down_proj alone.
        noise: standard deviation of noise on a learned router's logits while training.
    """

    config: DecoderSpec
    adapters: Mapping[str, LoraSpec]
    dtype: DTypeLike
    param_dtype: DTypeLike
    quantized: bool = False
    compute: str = "dense"
    noise: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, deterministic: bool, modality: jax.Array) -> jax.Array:
        """x [B, T, D], modality [B, T] integers (see `modality_ids`) -> [B, T, D]."""
        c, moe = self.config, self.config.experts
        assert moe is not None
        if moe.router == "learned":
            router: Any = self.param(
                "router",
                nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("embed", "experts")),
                (c.hidden_size, moe.num_experts),
                self.param_dtype,
            )
            logits = jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32))
            noise = None
            if self.noise > 0 and not deterministic:
                noise = self.noise * jax.random.normal(self.make_rng("dropout"), logits.shape)
            routing = route_learned(moe, logits, noise, modality)
            balance, z = router_losses(moe, logits, routing, modality)
            self._note("balance_loss", balance)
            self._note("z_loss", z)
        elif moe.router == "modality":
            routing = route_by_modality(moe, modality)
        else:
            return self._by_activation(x, layer, deterministic, modality)
        self._count(Routing(routing.experts, routing.live, None).mask(moe.num_experts) > 0, modality)
        if self.compute == "dense":
            return self._masked(x, layer, deterministic, routing.mask(moe.num_experts))
        return self._sparse(x, layer, deterministic, routing)

    def _linear(self, cls: type[Linear], name: str) -> Any:
        c = self.config
        entering = name != "down_proj"
        dims = (c.hidden_size,), (c.feed_forward.size,)
        axes = ("embed",), ("mlp",)
        return cls(
            *(dims if entering else dims[::-1]),
            *(axes if entering else axes[::-1]),
            use_bias=c.feed_forward.bias,
            adapter=self.adapters.get(name),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            init_std=c.initializer_range,
            quantized=self.quantized,
            name=name,
        )

    def _hidden(self, x: jax.Array, layer: jax.Array, deterministic: bool) -> jax.Array:
        gate = self._linear(Linear, "gate_proj")(x, layer, deterministic)
        up = self._linear(Linear, "up_proj")(x, layer, deterministic)
        return nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp"))

    def _masked(self, x: jax.Array, layer: jax.Array, deterministic: bool, mask: jax.Array) -> jax.Array:
        """All neurons, times mask [..., E] of their experts: the plain twin of `_sparse`."""
        h = self._hidden(x, layer, deterministic)
        return self._linear(Linear, "down_proj")(self._apply_mask(h, mask), layer, deterministic)

    def _apply_mask(self, h: jax.Array, mask: jax.Array) -> jax.Array:
        blocks = h.reshape(*mask.shape, -1) * mask[..., None].astype(h.dtype)
        return blocks.reshape(h.shape)

    def _by_activation(self, x: jax.Array, layer: jax.Array, deterministic: bool, modality: jax.Array) -> jax.Array:
        moe = self.config.experts
        assert moe is not None
        h = self._hidden(x, layer, deterministic)
        scores = jax.lax.stop_gradient(h).reshape(*modality.shape, moe.num_experts, -1).astype(jnp.float32).sum(axis=-1)
        if moe.router == "activation_released":
            mask = released_mask(moe, scores, modality)
        else:
            mask = route_by_scores(moe, scores, modality).mask(moe.num_experts)
        self._count(mask > 0, modality)
        if self.compute == "dense":
            out: jax.Array = self._linear(Linear, "down_proj")(self._apply_mask(h, mask), layer, deterministic)
            return out
        leave = over_tensor(partial(leave_experts, implementation=self.compute))
        leaving, finish = self._leaving(layer, deterministic)
        return finish(leave(h.reshape(*mask.shape, -1), mask > 0, by_expert(leaving, moe.num_experts, 0)))

    def _sparse(self, x: jax.Array, layer: jax.Array, deterministic: bool, routing: Routing) -> jax.Array:
        """Only the pairs of token and expert that there are."""
        moe = self.config.experts
        assert moe is not None
        gate, up = (self._linear(LinearParts, name)(layer) for name in ("gate_proj", "up_proj"))

        def drop(value: jax.Array, rate: float) -> jax.Array:
            dropped: jax.Array = nn.Dropout(rate)(value, deterministic=deterministic)
            return dropped

        x = x.astype(self.dtype)
        leaving, finish = self._leaving(layer, deterministic)
        inputs, gate_up = entering(x, gate, up, moe.num_experts, drop)
        run = over_devices(partial(run_experts, experts=moe.num_experts, implementation=self.compute), moe.num_experts)
        return finish(run(inputs, routing, gate_up, by_expert(leaving, moe.num_experts, 0)))

    def _leaving(self, layer: jax.Array, deterministic: bool) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """What neurons are multiplied with [F, D + R], and what makes the layer's output of the product."""
        down = self._linear(LinearParts, "down_proj")(layer)
        leaving = down.kernel
        if down.a is not None:
            # h A beside h W; dropout on h is not to be had here, as h never exists for all neurons.
            assert deterministic or down.dropout == 0, "dropout on down_proj's adapter needs the dense form"
            leaving = jnp.concatenate([leaving, down.a.astype(self.dtype)], axis=1)

        def finish(y: jax.Array) -> jax.Array:
            out = y[..., : self.config.hidden_size]
            if down.b is not None:
                out = out + jnp.dot(y[..., self.config.hidden_size :], down.b.astype(self.dtype))
            if down.bias is not None:
                out = out + down.bias.astype(self.dtype)
            return out

        return leaving, finish

    def _note(self, name: str, value: jax.Array) -> None:
        if not self.is_initializing():
            self.sow("moe", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)

    def _count(self, used: jax.Array, modality: jax.Array) -> None:
        """Notes how many tokens of each modality used each expert [modalities, E], and how many there were."""
        moe = self.config.experts
        assert moe is not None
        if not self.is_mutable_collection("moe") or self.is_initializing():
            return
        kinds = jax.nn.one_hot(modality, len(moe.modalities), dtype=jnp.float32)  # none for padding
        self._note("used", jnp.einsum("btm,bte->me", kinds, used.astype(jnp.float32)))
        self._note("tokens", kinds.sum(axis=(0, 1)))
