"""A learned router that chooses the experts which their activations would choose.

The teacher chooses for each token the k experts whose neurons' activations, h = act(gate) * up, sum highest (as the
router by activation) or whose |h| does, in every layer. A layer's W [D, E] is fitted so that softmax(x W) is even
over these experts and nothing elsewhere, by cross-entropy: a convex problem. The teacher's scores are sums of products,
not a linear function of x, so it is reached only in part; rows that were held out tell how far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.analysis.observe import Observed, by_expert, down, hidden, masked, walk
from convert.analysis.sample import Sample
from convert.transforms.experts import ROUTER
from jaxlm.errors import UserError
from jaxlm.nn.routers import route_by_scores, route_learned
from jaxlm.spec import ExpertsSpec
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from jaxlm.weights.leaves import DerivedSource, Index, LeafInfo, ParamSource, full_index, main_dtype, row_blocks
from jaxlm.weights.names import Entry, leaf_shapes

TEACHERS = ("activation", "magnitude")
# One row in this number is held out.
HELD_OUT = 8
# Half of it times the sum of squares of W is added to the loss; a tenth or ten times as much changes little.
PENALTY = 3e-3
_TINY = 1e-30


@dataclass(frozen=True)
class Distilled:
    """Routers, and what they reach on tokens that they were not trained on; figures are [L, modalities].

    Args:
        moe: the experts, with router learned.
        teacher: one of TEACHERS.
        routers: [L, D, E] in the model's dtype.
        tokens: held out, of each modality.
        before: recall of the teacher's experts by the router that the model had; by the first k if it had none.
        after: recall by the new router.
        error: the layer's output beside the one with the teacher's experts.
        losses: [L, 2], cross-entropy on the training rows before the first step and after the last.
    """

    moe: ExpertsSpec
    teacher: str
    routers: np.ndarray
    tokens: tuple[int, ...]
    before: np.ndarray
    after: np.ndarray
    error: np.ndarray
    losses: np.ndarray


class DistilledSource(DerivedSource):
    """A model of experts with router `learned` and the matrices given; all else is as it was.

    Args:
        routers: [L, D, E], of a dtype that weights are stored in.
    """

    def __init__(self, source: ParamSource, routers: np.ndarray) -> None:
        super().__init__(source)
        assert source.config.experts is not None
        self.config = source.config.with_experts(dataclasses.replace(source.config.experts, router="learned"))
        self._routers = routers
        known = {**source.leaves, ROUTER: LeafInfo(routers.shape, routers.dtype)}
        self.leaves = {path: known[path] for path in leaf_shapes(self.config)}

    def read(self, path: str, index: Index) -> np.ndarray:
        if path != ROUTER:
            return super().read(path, index)
        return self._routers[full_index(self._routers.shape, index)]

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        if entry.path != ROUTER:
            yield from super().blocks(entry)
            return
        assert entry.layer is not None, entry
        whole = entry.layout.to_stored(self._routers[entry.layer])
        for start, stop in row_blocks(entry.layout):
            yield whole[start:stop]


def distil(source: ParamSource, sample: Sample, steps: int, seed: int, teacher: str = "activation") -> Distilled:
    """Trains the routers of all layers, one after the other, in memory for one layer and the sample.

    Args:
        source: `config.experts` is not None.
        steps: number of steps of L-BFGS on the whole sample.
        seed: which rows are held out; the same gives the same.
        teacher: activation takes the experts with the largest sums of h, magnitude those with the largest of |h|.

    Raises:
        UserError: when the sample is too short to hold some of it out.
    """
    moe = source.config.experts
    assert moe is not None
    moe = dataclasses.replace(moe, router="learned")
    rows = sample.modality.reshape(-1, sample.modality.shape[-1])
    test = held_out(rows, seed)
    train = jnp.asarray(np.repeat(~np.isin(np.arange(len(rows)), test), rows.shape[1]))
    dtype = WEIGHT_DTYPES[main_dtype(source.leaves)]

    def teach(mlp: Any, seen: Observed) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h = jnp.abs(seen.h) if teacher == "magnitude" else seen.h
        scores = by_expert(h, moe.num_experts).sum(axis=-1)
        chosen = route_by_scores(moe, scores, seen.modality).mask(moe.num_experts)  # padding: none
        return down(mlp, masked(seen.h, chosen)), (seen.x, chosen)

    routers, figures, losses, activation = [], [], [], source.config.feed_forward.activation
    for _, mlp, found in walk(source, sample, teach, "distilling"):
        x, chosen = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        with jax.default_matmul_precision("highest"):
            fitted, loss = fit_router(x, chosen * train[:, None], steps)
            router = np.asarray(fitted).astype(dtype)
            new = jnp.asarray(router.astype(np.float32))  # rounded, as it will be used
            old = mlp.get("router", jnp.zeros_like(new))
            x, chosen = (part.reshape(len(rows), rows.shape[1], -1) for part in (x, chosen))
            judged = [
                _judge(moe, activation, mlp, old, new, x[row], chosen[row], jnp.asarray(rows[row])) for row in test
            ]
        routers.append(router)
        figures.append(np.sum([np.asarray(part, np.float64) for part in judged], axis=0))
        losses.append(np.asarray(loss))
    tokens = np.array([(rows[test] == number).sum() for number in range(len(moe.modalities))])
    with np.errstate(invalid="ignore"):
        before, after, error = np.moveaxis(np.array(figures), 1, 0) / tokens
    counts = tuple(int(count) for count in tokens)
    return Distilled(moe, teacher, np.stack(routers), counts, before, after, error, np.stack(losses))


def held_out(rows: np.ndarray, seed: int) -> np.ndarray:
    """The rows that are not trained on, sorted: one of HELD_OUT, drawn from those that have tokens.

    Args:
        rows: [R, T] modality ids, -1 where there is no token.

    Raises:
        UserError: when there are not two.
    """
    full = np.flatnonzero((rows >= 0).any(axis=1))
    if len(full) < 2:
        raise UserError(
            f"--sample: {(rows >= 0).sum()} tokens are one row of {rows.shape[1]}, and some are held out to see what "
            "was trained; give more data, or a larger --sample-tokens"
        )
    drawn = np.random.default_rng(seed).permutation(full)[: -(-len(full) // HELD_OUT)]
    test: np.ndarray = np.sort(drawn)
    return test


@partial(jax.jit, static_argnums=2)
def fit_router(x: jax.Array, chosen: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """The matrix W [D, E] whose softmax(x W) is nearest to even over the experts chosen.

    By L-BFGS from zero, on all tokens at once. Inputs are taken relative to their size, so that the few large ones of a
    LLaMA's hidden states do not set the pace; a small penalty on W keeps at zero what the tokens do not tell.

    Args:
        x: [N, D] float32.
        chosen: [N, E] float32, 1 for a token's experts; all 0 for one that is left out.
        steps: number of steps of L-BFGS.

    Returns:
        W; and the mean cross-entropy [2] with W = 0, and at the end.
    """
    count = chosen.sum(axis=1)
    kept = (count > 0).astype(jnp.float32)
    tokens = jnp.maximum(kept.sum(), 1.0)
    target = chosen / jnp.maximum(count, 1.0)[:, None]
    size = jnp.sqrt((jnp.square(x) * kept[:, None]).sum(axis=0) / tokens)
    scale = jnp.where(size > 0, 1.0 / jnp.maximum(size, _TINY), 0.0)[:, None]

    def entropy(scaled: jax.Array) -> jax.Array:
        return -(target * jax.nn.log_softmax(x @ (scaled * scale), axis=1)).sum() / tokens

    def loss(scaled: jax.Array) -> jax.Array:
        return entropy(scaled) + PENALTY / 2 * jnp.square(scaled).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        scaled, state = carry
        value, grad = value_and_grad(scaled, state=state)
        updates, state = optimizer.update(grad, state, scaled, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(scaled, updates), state), None

    start = jnp.zeros((x.shape[1], chosen.shape[1]), jnp.float32)
    (scaled, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return scaled * scale, jnp.stack([entropy(start), entropy(scaled)])


@partial(jax.jit, static_argnums=(0, 1))
def _judge(
    moe: ExpertsSpec,
    activation: str,
    mlp: Any,
    old: jax.Array,
    new: jax.Array,
    x: jax.Array,
    chosen: jax.Array,
    modality: jax.Array,
) -> jax.Array:
    """Sums over each modality's tokens, [3, modalities]: recall of `chosen` by both routers, error by the new one."""
    count = jnp.maximum(chosen.sum(axis=1), 1.0)
    recalls = []
    for router in (old, new):
        weights = route_learned(moe, x @ router, None, modality).mask(moe.num_experts)
        recalls.append(jnp.where(weights > 0, chosen, 0.0).sum(axis=1) / count)
    h = hidden(mlp, x, activation)
    expected, found = (down(mlp, masked(h, by)) for by in (chosen, weights))
    lost = jnp.linalg.norm(found - expected, axis=1) / jnp.maximum(jnp.linalg.norm(expected, axis=1), _TINY)
    kinds = jax.nn.one_hot(modality, len(moe.modalities))  # none for padding
    return jnp.stack([*recalls, lost]) @ kinds
