"""Sorting tokens to experts, and to the devices that have them, so that only what is used is computed.

Nothing is dropped and nothing is approximate: buffers have room for the worst case, loops and exchanges do what there
is. Both directions of every move are gathers: XLA's scatter-add is slow on every platform.

Shapes: N tokens of a device, ... all tokens ([B, T] as a rule), D model, I and O a product's inputs and outputs, E
experts, f = F / E neurons of one, k experts of a token, S devices along the mesh axis `expert`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxlm.kernels.expert_loop import Activation, joined, loop_experts, with_slope
from jaxlm.kernels.grouped_matmul import grouped_matmul
from jaxlm.kernels.groups import BLOCK, Groups, make_groups
from jaxlm.nn.linear import Parts
from jaxlm.sharding import EXPERT, TENSOR

# The experts' kernels, and rows or columns behind them for adapters and biases, beside which kernels may be frozen.
Matrices = tuple[jax.Array, jax.Array | None]


@flax.struct.dataclass
class Routing:
    """Which experts each token uses.

    Attributes:
        experts: [..., k] int32, for the largest k.
        live: [..., k] bool; False behind the token's own k.
        weights: [..., k] float32, factors of the experts' outputs; None: all 1.
    """

    experts: jax.Array
    live: jax.Array
    weights: jax.Array | None

    def mask(self, experts: int) -> jax.Array:
        """[..., E] float32: the weight of each expert, 0 where it is not used."""
        values = self.live.astype(jnp.float32)
        if self.weights is not None:
            values = values * self.weights
        return jnp.einsum("...k,...ke->...e", values, jax.nn.one_hot(self.experts, experts, dtype=jnp.float32))


@flax.struct.dataclass
class Moves:
    """Which token goes to which rows of a buffer.

    Attributes:
        slot: [..., k] int32, the rows that a token goes to; `rows`, the size of the buffer, for none.
        token: [rows] int32, the token in each row, counted over all dims of tokens; N where there is none.
    """

    slot: jax.Array
    token: jax.Array


def block_rows(pairs: int, experts: int, implementation: str = "") -> int:
    """Rows of a block: large ones multiply faster, small ones waste less when experts have few tokens each."""
    size = 8
    if implementation == "pallas_gpu":
        from jaxlm.kernels.grouped_matmul_gpu import TILE  # on use, see `grouped_matmul`

        size = TILE
    while size < BLOCK and size * 2 * experts <= pairs:
        size *= 2
    return size


def make_dispatch(
    experts: jax.Array, live: jax.Array, count: int, likely: int, implementation: str = ""
) -> tuple[Moves, Groups]:
    """Sorts the pairs of token and expert by expert, in blocks of rows, stable in the order of tokens.

    Args:
        experts: [..., k] int32, in 0 .. count - 1 where live.
        live: [..., k] bool.
        count: E.
        likely: about the number of live pairs.
        implementation: what will multiply the rows.
    """
    k = experts.shape[-1]
    tokens = experts.size // k
    flat = jnp.where(live, experts, count).reshape(-1)
    counts = jnp.bincount(flat, length=count + 1)[:count]
    groups, starts, rows = make_groups(counts, tokens * k, block_rows(likely, count, implementation))
    order = jnp.argsort(flat, stable=True)
    first = jnp.cumsum(counts) - counts
    expert = jnp.minimum(flat[order], count - 1)
    place = starts[expert] + jnp.arange(tokens * k) - first[expert]
    place = jnp.where(flat[order] < count, place, rows).astype(jnp.int32)
    slot = jnp.zeros(tokens * k, jnp.int32).at[order].set(place)
    token = jnp.full(rows, tokens, jnp.int32).at[slot].set(jnp.arange(tokens * k, dtype=jnp.int32) // k, mode="drop")
    return Moves(slot.reshape(experts.shape), token), groups


@jax.custom_vjp
def to_experts(x: jax.Array, moves: Moves) -> jax.Array:
    """x [..., I] -> [rows, I]: each pair's token; any token in the padding."""
    return jnp.take(x.reshape(-1, x.shape[-1]), moves.token, axis=0, mode="clip")


@jax.custom_vjp
def from_experts(y: jax.Array, moves: Moves) -> jax.Array:
    """y [rows, O] -> [..., O]: the sum over each token's pairs, in float32."""
    # One gather for each of the k: a TPU would write all pairs to memory, and read them, to add them up. In the dims
    # that tokens have outside: behind a reshape what is added to the sum would be another pass over it.
    total = _rows(y, moves.slot[..., 0]).astype(jnp.float32)
    for j in range(1, moves.slot.shape[-1]):
        total += _rows(y, moves.slot[..., j]).astype(jnp.float32)
    return total.astype(y.dtype)


def _rows(y: jax.Array, slot: jax.Array) -> jax.Array:
    return jnp.take(y, slot, axis=0, mode="fill", fill_value=0)


# Each is the gradient of the other, but for the padding.
to_experts.defvjp(lambda x, moves: (to_experts(x, moves), moves), lambda moves, dy: (from_experts(dy, moves), None))
from_experts.defvjp(lambda y, moves: (from_experts(y, moves), moves), lambda moves, dx: (to_experts(dx, moves), None))


@jax.custom_vjp
def row_factors(weights: jax.Array, moves: Moves) -> jax.Array:
    """weights [..., k] -> [rows]: each pair's; zeros in the padding."""
    return jnp.zeros(moves.token.shape, weights.dtype).at[moves.slot].set(weights, mode="drop")


row_factors.defvjp(
    lambda weights, moves: (row_factors(weights, moves), moves), lambda moves, grad: (_rows(grad, moves.slot), None)
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def weighted_neurons(hidden: jax.Array, factors: jax.Array, is_row: jax.Array, activation: Activation) -> jax.Array:
    """hidden [M, 2 f] -> [M, f] in its dtype: activation(gate) * up * factors [M], zeros in other than `is_row` [M].

    Computed in float32, with a gradient of its own, so that a TPU reads rows once for all that comes of them.
    """
    gate, up = (half.astype(jnp.float32) for half in jnp.split(hidden, 2, axis=-1))
    return jnp.where(is_row[:, None], activation(gate) * up * factors[:, None], 0).astype(hidden.dtype)


def _weighted_neurons_fwd(
    hidden: jax.Array, factors: jax.Array, is_row: jax.Array, activation: Activation
) -> tuple[jax.Array, Any]:
    return weighted_neurons(hidden, factors, is_row, activation), (hidden, factors, is_row)


def _weighted_neurons_bwd(activation: Activation, residuals: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    hidden, factors, is_row = residuals
    gate, up = (half.astype(jnp.float32) for half in jnp.split(hidden, 2, axis=-1))
    value, slope = with_slope(activation, gate)
    grad = grad.astype(jnp.float32)
    back = grad * factors[:, None]
    # Zeros by selection: in the padding is a token that may be too large for an expert that it does not use.
    halves = (jnp.where(is_row[:, None], half, 0) for half in (back * up * slope, back * value))
    both = jnp.concatenate(list(halves), axis=-1).astype(hidden.dtype)
    return both, (grad * value * up).sum(axis=-1), None


weighted_neurons.defvjp(_weighted_neurons_fwd, _weighted_neurons_bwd)


def by_expert(matrix: jax.Array, experts: int, dim: int) -> jax.Array:
    """[I, F] (dim 1) or [F, O] (dim 0) -> [E, I, f] or [E, f, O]."""
    if dim == 0:
        return matrix.reshape(experts, -1, matrix.shape[1])
    return matrix.reshape(matrix.shape[0], experts, -1).swapaxes(0, 1)


def entering(
    x: jax.Array, gate: Parts, up: Parts, experts: int, drop: Any, shared: jax.Array | None = None
) -> tuple[jax.Array, Matrices]:
    """Inputs [..., I + R] and matrices [E, I + R, 2 f] whose product is (gate, up), adapters and biases included.

    An adapter is further inputs x A and further rows B; a bias is an input of ones. So one product does it all.

    Args:
        shared: x A of an adapter that both share.
    """
    kernels = jnp.concatenate([by_expert(p.kernel, experts, 1) for p in (gate, up)], axis=-1)
    inputs, rows = [x], []
    for part, before in ((gate, True), (up, False)):
        extra = []
        if part.a is not None and part.b is not None:
            inputs.append(jnp.dot(drop(x, part.dropout), part.a.astype(x.dtype)))
            extra.append(part.b)
        if part.bias is not None:
            inputs.append(jnp.ones((*x.shape[:-1], 1), x.dtype))
            extra.append(part.bias[None])
        for matrix in extra:
            half = by_expert(matrix.astype(x.dtype), experts, 1)
            both = (half, jnp.zeros_like(half)) if before else (jnp.zeros_like(half), half)
            rows.append(jnp.concatenate(both, axis=-1))
    if shared is not None:
        own = [by_expert(p.b.astype(x.dtype), experts, 1) for p in (gate, up) if p.b is not None]
        inputs.append(shared)
        rows.append(jnp.concatenate(own, axis=-1))
    return jnp.concatenate(inputs, axis=-1), (kernels, jnp.concatenate(rows, axis=1) if rows else None)


def outputs_first(implementation: str) -> bool:
    """Whether the matrices that lead out of the experts are [E, O, f] instead of [E, f, O].

    Devices along `fsdp` have parts of O. Gathered as columns they would be laid out anew for a TPU's kernel, which can
    as well read rows.
    """
    return implementation == "pallas_tpu"


def run_experts(
    x: jax.Array,
    routing: Routing,
    gate_up: Matrices,
    down: Matrices,
    offset: jax.Array | int,
    experts: int,
    implementation: str,
    activation: Activation,
) -> jax.Array:
    """Inputs [..., I] through some of the E `experts`, those from `offset` on: the weighted sum [..., O] of outputs.

    Args:
        gate_up: [E, I, 2 f].
        down: [E, f, O], or [E, O, f] (see `outputs_first`).
    """
    count = gate_up[0].shape[0]
    local = routing.experts - offset
    live = routing.live & (local >= 0) & (local < count)
    weights = live.astype(jnp.float32)
    if routing.weights is not None:
        weights = weights * routing.weights
    if count < live.shape[-1]:
        # No token has more pairs than there are experts on this device: smaller buffers.
        first = jnp.argsort(~live, axis=-1, stable=True)[..., :count]
        local, live, weights = (jnp.take_along_axis(each, first, axis=-1) for each in (local, live, weights))
    moves, groups = make_dispatch(local, live, count, max(1, routing.experts.size * count // experts), implementation)
    if implementation == "loop":
        (kernels, more), (down_kernels, more_down) = gate_up, down
        flat, weights, slot = (each.reshape(-1, each.shape[-1]) for each in (x, weights, moves.slot))
        y = loop_experts(flat, kernels, down_kernels, weights, moves.token, slot, groups, activation, more, more_down)
        return y.reshape(*x.shape[:-1], -1)
    hidden = grouped_matmul(to_experts(x, moves), joined(*gate_up, 1), groups, implementation)
    # Weights before the last product, so that outputs need not be kept or computed again for their gradient; and zeros
    # in the padding here, where rows are narrowest. Their gradient is zero too, so neither matrix gets any of it.
    is_row = moves.token < live.size // live.shape[-1]
    h = weighted_neurons(hidden, row_factors(weights, moves), is_row, activation)
    return from_experts(_leave(h, down, groups, implementation), moves)


def _leave(h: jax.Array, down: Matrices, groups: Groups, implementation: str) -> jax.Array:
    """Rows [M, f] times the matrices that lead out of their experts: [M, O]."""
    transposed = outputs_first(implementation)
    return grouped_matmul(h, joined(*down, 1 if transposed else 2), groups, implementation, transposed)


def leave_experts(h: jax.Array, used: jax.Array, down: Matrices, implementation: str) -> jax.Array:
    """Neurons [..., E, f] through the down projections of the experts that are used [..., E]: [..., O].

    Args:
        down: [E, f, O], or [E, O, f] (see `outputs_first`).
    """
    count, neurons = h.shape[-2:]
    tokens = used.size // count
    experts = jnp.broadcast_to(jnp.arange(count), used.shape)
    moves, groups = make_dispatch(experts, used, count, max(1, used.size // 2), implementation)
    block = moves.token.shape[0] // groups.owner.shape[0]
    owner = jnp.repeat(groups.owner, block, total_repeat_length=moves.token.shape[0])
    pair = jnp.where(moves.token < tokens, moves.token * count + owner, tokens * count)
    rows = to_experts(h.reshape(-1, neurons), Moves(moves.slot.reshape(-1, 1), pair))
    rows = jnp.where((moves.token < tokens)[:, None], rows, 0)
    if implementation == "loop":  # one after the other: only what trains has a gradient formed
        parts = [grouped_matmul(rows, part, groups, implementation) for part in down if part is not None]
        y = jnp.concatenate(parts, axis=1)
    else:
        y = _leave(rows, down, groups, implementation)
    return from_experts(y, moves)


# --- over devices -----------------------------------------------------------------------------------------------------


def over_devices(run: Callable[..., jax.Array], experts: int) -> Callable[..., jax.Array]:
    """`run` (see `run_experts`) on tokens [B, T, ...], split over the mesh's axes of rows and lengths, and experts over
    those of neurons.

    Along `expert` every device has tokens and experts of its own: tokens go to the devices that have their experts
    (once to each, however many of its experts they use), and what comes of them goes back. Along `tensor` devices have
    the same tokens, each does those of its experts, and the results are added up.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return lambda x, routing, gate_up, down: run(x, routing, gate_up, down, 0)
    groups = mesh.shape[EXPERT]

    def local(x: jax.Array, routing: Routing, gate_up: Matrices, down: Matrices) -> jax.Array:
        offset = jax.lax.axis_index((EXPERT, TENSOR)) * gate_up[0].shape[0]
        if groups == 1:
            out = run(x, routing, gate_up, down, offset)
        else:
            out = _at_their_devices(run, _flat(x), _flat(routing), gate_up, down, offset, experts // groups, groups)
            out = out.reshape(*x.shape[:2], -1)
        return _over_tensor(out, mesh)

    def split(x: jax.Array, *others: Any) -> jax.Array:
        token, matrix = P(*_token_axes(x, mesh), None), P((EXPERT, TENSOR), None, None)
        specs = (token, token, matrix, matrix)
        return jax.shard_map(local, in_specs=specs, out_specs=token, check_vma=False)(x, *others)

    return split


def over_tensor(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run` (see `leave_experts`) on tokens [B, T, ...], split over the axes of rows and lengths, and experts over
    `tensor`.

    Neurons that are computed for all experts are where their tokens are, so matrices come there, also along `expert`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run

    def local(h: jax.Array, used: jax.Array, down: Matrices) -> jax.Array:
        return _over_tensor(run(h, used, down), mesh)

    def split(h: jax.Array, *others: Any) -> jax.Array:
        tokens = _token_axes(h, mesh)
        specs = P(*tokens, TENSOR, None), P(*tokens, TENSOR), P(TENSOR, None, None)
        return jax.shard_map(local, in_specs=specs, out_specs=P(*tokens, None), check_vma=False)(h, *others)

    return split


def _over_tensor(y: jax.Array, mesh: AbstractMesh) -> jax.Array:
    return jax.lax.psum(y, TENSOR) if mesh.shape[TENSOR] > 1 else y


def best_experts(scores: jax.Array, k: int) -> jax.Array:
    """The k experts of highest score from [..., E]: [..., k] int32, the best first; ties go to the lowest index.

    Each device looks at its own tokens: XLA would gather the scores of all of them on every device for a top-k.
    """

    def best(scores: jax.Array) -> jax.Array:
        return jax.lax.top_k(scores, k)[1]

    scores, mesh = jax.lax.stop_gradient(scores), jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return best(scores)
    token = P(*_token_axes(scores, mesh), None)
    return jax.shard_map(best, in_specs=token, out_specs=token, check_vma=False)(scores)


def _token_axes(x: jax.Array, mesh: AbstractMesh) -> tuple[Any, ...]:
    """Mesh axes that the dims [B, T] of x are split over; none where they do not divide: the one row of `init`."""

    def size(names: Any) -> int:
        return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))

    axes = tuple(nn.logical_to_mesh_axes(("batch", "length")))  # type: ignore[arg-type]
    return tuple(names if dim % size(names) == 0 else None for dim, names in zip(x.shape, axes, strict=False))


def _flat(tree: Any) -> Any:
    """[B, T, ...] -> [B T, ...] for every leaf."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _at_their_devices(
    run: Callable[..., jax.Array],
    x: jax.Array,
    routing: Routing,
    gate_up: Matrices,
    down: Matrices,
    offset: jax.Array,
    per_group: int,
    groups: int,
) -> jax.Array:
    """x [N, I] of this device through all its experts, wherever along `expert` they are: [N, O]."""
    tokens = x.shape[0]
    experts = jnp.where(routing.live, routing.experts, -1)
    wanted = (experts[..., None] // per_group == jnp.arange(groups)).any(axis=1)  # [N, S]; -1 // n is -1
    # Room for all tokens at every device, of which the first `counts` are used.
    place = jnp.cumsum(wanted, axis=0) - 1 + tokens * jnp.arange(groups)
    slot = jnp.where(wanted, place, groups * tokens).astype(jnp.int32)
    token = jnp.full(groups * tokens, tokens, jnp.int32)
    token = token.at[slot].set(jnp.arange(tokens, dtype=jnp.int32)[:, None], mode="drop")
    moves = Moves(slot, token)
    counts = wanted.sum(axis=0, dtype=jnp.int32)
    arriving = _all_to_all(counts, groups)

    arrived = exchange(to_experts(x, moves), counts, arriving)
    experts = _all_to_all(jnp.take(experts, token, axis=0, mode="fill", fill_value=-1), groups)
    weights = routing.weights
    if weights is not None:
        weights = _all_to_all(to_experts(weights, moves), groups)
    y = run(arrived, Routing(experts, experts >= 0, weights), gate_up, down, offset)
    back = exchange(y, arriving, counts)
    return from_experts(back, moves)


def _all_to_all(blocks: jax.Array, groups: int) -> jax.Array:
    """[S n, ...]: block s goes to device s along `expert`; what comes from device s is block s."""
    parts = blocks.reshape(groups, -1, *blocks.shape[1:])
    return jax.lax.all_to_all(parts, EXPERT, 0, 0).reshape(blocks.shape)


@jax.custom_vjp
def exchange(rows: jax.Array, sizes: jax.Array, arriving: jax.Array) -> jax.Array:
    """[S n, I] -> [S n, I] over `expert`: the first sizes[s] rows of block s become block `self` at device s.

    GPU and TPU move only these rows (ragged all-to-all); a CPU, whose XLA has no such thing, moves whole blocks. Rows
    behind them are zero or never read.

    Args:
        sizes: [S] int32.
        arriving: [S] int32, what the devices send to this one.
    """
    return jax.lax.platform_dependent(rows, sizes, arriving, cpu=_exchange_blocks, default=_exchange_ragged)


def _exchange_blocks(rows: jax.Array, sizes: jax.Array, arriving: jax.Array) -> jax.Array:
    return _all_to_all(rows, sizes.shape[0])


def _exchange_ragged(rows: jax.Array, sizes: jax.Array, arriving: jax.Array) -> jax.Array:
    groups = sizes.shape[0]
    block = rows.shape[0] // groups
    begins = jnp.arange(groups, dtype=jnp.int32) * block
    mine = jnp.full(groups, jax.lax.axis_index(EXPERT) * block, jnp.int32)
    return jax.lax.ragged_all_to_all(rows, jnp.zeros_like(rows), begins, sizes, mine, arriving, axis_name=EXPERT)


def _exchange_fwd(rows: jax.Array, sizes: jax.Array, arriving: jax.Array) -> tuple[jax.Array, Any]:
    return exchange(rows, sizes, arriving), (sizes, arriving)


def _exchange_bwd(residuals: Any, grad: jax.Array) -> tuple[jax.Array, None, None]:
    sizes, arriving = residuals
    return exchange(grad, arriving, sizes), None, None


exchange.defvjp(_exchange_fwd, _exchange_bwd)
