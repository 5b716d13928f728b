"""Routers: which experts of a feed-forward layer a token uses, each with its own k for every modality.

- activation: the k experts whose neurons' activations, silu(gate) * up, sum highest. No gradient goes through the
  scores, and gate and up must be computed in full: only the down projection can skip anything.
- activation_released: what SciMind's published code computes. A token's scores are zeroed for the modalities it does
  not belong to, and top-k of zeros picks the first experts: so every token also uses experts 0 to k' - 1 of the other
  modalities' k'. Ties go to the lowest index; a product with zero would leave -0.0, which JAX sorts below 0.0.
- learned: a linear router on the layer's input. The output of a layer that was divided (`ExpertsSpec.weights` k_times)
  is weighted by k times the softmax over the chosen, so that a router that does not discriminate gives the plain sum.
  With k = 1 that would be 1 whatever the router says, and the task could not train it: there the weight is the chosen
  one's share of the softmax over all experts, as in the Switch Transformer (arXiv:2101.03961, equation 2). Models that
  come with experts have the softmax over the chosen (normalised), or their shares of that over all (shares).
- modality: a fixed set for each modality: the shared experts, and others of its own.

Shapes: E experts, k experts of a token; ... dims of the tokens, [B, T] as a rule: rows and lengths may lie on different
mesh axes, and only inside of `shard_map` can they become one dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.modalities import PADDING
from jaxlm.nn.dispatch import Routing, best_experts
from jaxlm.nn.feed_forward import LINEARS
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import ExpertsSpec


def modality_ids(experts: ExpertsSpec, input_ids: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """The modality of each token, int32 in the shape of `input_ids`; PADDING where segment_ids are 0."""
    ids = jnp.zeros(input_ids.shape, jnp.int32)
    for number, (start, stop) in enumerate(experts.ranges, 1):
        ids = jnp.where((input_ids >= start) & (input_ids < stop), number, ids)
    return ids if segment_ids is None else jnp.where(segment_ids == 0, PADDING, ids)


def _own_k(experts: ExpertsSpec, modality: jax.Array) -> jax.Array:
    """k of each token; 0 for padding."""
    return jnp.array([*experts.top_k, 0])[modality]  # PADDING, -1, is the last one


def route_by_scores(experts: ExpertsSpec, scores: jax.Array, modality: jax.Array) -> Routing:
    """The k best experts of each token by `scores` [..., E]; ties go to the lowest index."""
    best = best_experts(scores, experts.max_top_k)
    return Routing(best, jnp.arange(experts.max_top_k) < _own_k(experts, modality)[..., None], None)


def released_mask(experts: ExpertsSpec, scores: jax.Array, modality: jax.Array) -> jax.Array:
    """[..., E] float32 of `activation_released`: the union of every modality's top-k."""
    mask = jnp.zeros(scores.shape, bool)
    for number, k in enumerate(experts.top_k):
        own = jnp.where((modality == number)[..., None], scores, 0.0)  # never a product: see the module's text
        best = best_experts(own, k)
        mask |= jax.nn.one_hot(best, experts.num_experts, dtype=bool).any(axis=-2)
    return (mask & (modality != PADDING)[..., None]).astype(jnp.float32)


def experts_of_modalities(experts: ExpertsSpec) -> np.ndarray:
    """[modalities, k] int32: the fixed sets of the router `modality`, for the largest k.

    The shared experts come first. The others are dealt in turn, and from the start again when there are not enough.
    """
    own = list(range(experts.shared, experts.num_experts)) or [0]
    table = np.zeros((len(experts.modalities), experts.max_top_k), np.int32)
    at = 0
    for number, k in enumerate(experts.top_k):
        dealt = [own[(at + step) % len(own)] for step in range(k - experts.shared)]
        at += k - experts.shared
        table[number, :k] = [*range(experts.shared), *dealt]
    return table


def route_by_modality(experts: ExpertsSpec, modality: jax.Array) -> Routing:
    """The fixed experts of each token's modality."""
    fixed = jnp.asarray(experts_of_modalities(experts))[jnp.maximum(modality, 0)]
    return Routing(fixed, jnp.arange(experts.max_top_k) < _own_k(experts, modality)[..., None], None)


def route_learned(experts: ExpertsSpec, logits: jax.Array, noise: jax.Array | None, modality: jax.Array) -> Routing:
    """The k best experts by logits [..., E] (plus noise, when training), weighted as `ExpertsSpec.weights` says.

    With k_times, for tokens whose k is 1, the softmax is over all experts, so that its gradient is not zero.
    """
    routing = route_by_scores(experts, logits if noise is None else logits + noise, modality)

    def of_all() -> jax.Array:
        return jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), routing.experts, axis=-1)

    if experts.weights == "shares":
        return routing.replace(weights=jnp.where(routing.live, of_all(), 0.0))  # type: ignore[attr-defined]
    chosen = jnp.where(routing.live, jnp.take_along_axis(logits, routing.experts, axis=-1), -jnp.inf)
    # Padding has no live expert: a softmax over nothing must not become NaN, nor its gradient.
    largest = jnp.max(jnp.where(routing.live, chosen, -1e30), axis=-1, keepdims=True)
    powers = jnp.where(routing.live, jnp.exp(jnp.where(routing.live, chosen, 0.0) - largest), 0.0)
    shares = powers / jnp.maximum(powers.sum(axis=-1, keepdims=True), 1e-30)
    if experts.weights == "normalised":
        return routing.replace(weights=shares)  # type: ignore[attr-defined]
    own_k = _own_k(experts, modality)[..., None]
    if 1 in experts.top_k:
        shares = jnp.where(own_k == 1, jnp.where(routing.live, of_all(), 0.0), shares)
    return routing.replace(weights=shares * own_k)  # type: ignore[attr-defined]


def router_losses(
    experts: ExpertsSpec, logits: jax.Array, routing: Routing, modality: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Load-balance loss (1 when experts are used evenly; arXiv:2101.03961) and z loss (arXiv:2202.08906), means."""
    valid = (modality != PADDING).astype(jnp.float32)
    tokens, dims = jnp.maximum(valid.sum(), 1.0), tuple(range(valid.ndim))
    used = Routing(routing.experts, routing.live, None).mask(experts.num_experts).sum(dims)
    share = used / jnp.maximum(used.sum(), 1.0)
    probability = (jax.nn.softmax(logits, axis=-1) * valid[..., None]).sum(dims) / tokens
    balance = experts.num_experts * jnp.sum(jax.lax.stop_gradient(share) * probability)
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * valid) / tokens
    return balance, z


def choose_compute(
    requested: str, device: Any, experts: ExpertsSpec, adapters: Mapping[str, LoraSpec], dtype: str
) -> tuple[str, str]:
    """How a model's experts compute (see `nn.experts`), and why, for the start-up line.

    Args:
        requested: 'auto', 'dense', 'loop', 'ragged', 'pallas_tpu' or 'pallas_gpu'.
        device: a device of JAX's, or a chip of `devices.chips`: what computes.
        dtype: that it computes in.

    Raises:
        UserError: when the one asked for cannot serve.
    """
    platform = device.platform
    no_hopper = (
        "" if platform == "gpu" and device.compute_capability == "9.0" else "a Hopper GPU (compute capability 9.0)"
    )
    scored = experts.router.startswith("activation")
    # With a router that scores activations only the down projection can skip anything.
    names = ("down_proj",) if scored else (*LINEARS, "gate_up_proj")
    touched = [adapters[name] for name in names if name in adapters]
    why_dense = ""
    if any(spec.dora for spec in touched):
        why_dense = "DoRA scales whole columns of the weights"
    elif "down_proj" in adapters and adapters["down_proj"].dropout > 0:
        why_dense = "dropout on the adapter of down_proj falls on all neurons"
    if requested == "auto":
        if why_dense:
            return "dense", why_dense
        if scored and max(experts.top_k) * 2 > experts.num_experts:
            return (
                "dense",
                f"the router {experts.router} takes gate and up in full; with these k there is little to skip",
            )
        what = "what is used of down_proj, as the router takes gate and up in full; " if scored else ""
        if platform == "cpu":
            return "loop", f"{what}blocks of rows on a CPU"
        if platform == "tpu":
            return "pallas_tpu", f"{what}grouped products in Pallas (XLA's gradient multiplies with all experts)"
        if not no_hopper and dtype != "float32":
            return "pallas_gpu", f"{what}grouped products in Pallas (XLA's multiply with all experts)"
        return (
            "dense",
            f"XLA's grouped product multiplies with all experts on this {platform}, so that skipping costs more",
        )
    if requested == "pallas_tpu" and platform != "tpu":
        raise UserError(f"moe.compute: 'pallas_tpu' needs a TPU, this is {platform}; use 'auto', 'ragged' or 'loop'")
    if requested == "pallas_gpu" and (no_hopper or dtype == "float32"):
        lack = no_hopper or "a 16-bit model.dtype, not float32"
        raise UserError(f"moe.compute: 'pallas_gpu' needs {lack}; this is {platform}; use 'auto', 'ragged' or 'loop'")
    if requested != "dense" and why_dense:
        raise UserError(f"moe.compute: {requested!r} cannot serve: {why_dense}; use 'auto' or 'dense'")
    return requested, "as configured"
