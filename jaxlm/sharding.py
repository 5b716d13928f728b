"""Names: the axes of a mesh, and which of them each logical axis of a tensor is split over. No devices here."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import PartitionSpec as P

DATA, FSDP, EXPERT, SEQUENCE, TENSOR = AXES = ("data", "fsdp", "expert", "sequence", "tensor")
# What `fsdp` is on the mesh: an axis for each dim of a TPU slice's torus that it spans, as sums over devices are fast
# along one of them at a time (see `kernels.scatter`); elsewhere all but the first are 1.
FSDP_AXES = (FSDP, "fsdp_y", "fsdp_z")
MESH_AXES = (DATA, *FSDP_AXES, EXPERT, SEQUENCE, TENSOR)

# Mesh axes that rows are split over.
ROW_AXES = (DATA, *FSDP_AXES, EXPERT)
# Mesh axes that parameters and optimizer are split over and gathered along: devices with parts of the same rows need
# not each have all of them either.
SHARD_AXES = (*FSDP_AXES, SEQUENCE)
# Logical axis -> mesh axis. One place: parameters and activations are both named by these. Of two rules the first one
# whose mesh axes are free counts: activations that have rows over `expert` have neurons over `tensor` alone.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ROW_AXES),
    ("length", SEQUENCE),
    # Inside attention a row is whole and its heads are split instead.
    ("attention_length", None),
    ("attention_heads", (TENSOR, SEQUENCE)),
    ("act_embed", None),
    ("embed", SHARD_AXES),
    # Blocks of inputs of a weight in four bits, split as the inputs are (see `nn.nf4`).
    ("embed_blocks", SHARD_AXES),
    ("mlp_blocks", (EXPERT, TENSOR)),
    ("heads_blocks", TENSOR),
    ("heads", TENSOR),
    ("kv_heads", TENSOR),
    ("mlp", (EXPERT, TENSOR)),  # contiguous blocks: whole experts of an MoE
    ("mlp", TENSOR),
    ("experts", None),
    ("vocab", TENSOR),
    ("head_dim", None),
    ("norm", None),
    ("layers", None),
    ("lora_rank", None),
    ("buckets", None),
)

# Logical axes that are not split where that cannot be done evenly: a vocabulary of 32,001 rows (Alpaca's and Vicuna's),
# the one kv head of a multi-query layer, of which each device then uses all (see `nn.self_attention`), blocks of inputs
# (LLaMA-2-7B's 11,008 neurons are 172 blocks).
WHOLE_IF_UNEVEN = ("vocab", "kv_heads", "embed_blocks", "mlp_blocks", "heads_blocks")


def flat_dims(axes: Sequence[str | None]) -> tuple[tuple[str | None, ...], ...]:
    """The dims of one layer's tensor as a checkpoint of another framework stores it, each as its logical axes.

    'layers' is left out, and heads and their dim are one: a matrix has two dims, a bias, norm or magnitude has one.

    Args:
        axes: logical axes of a parameter, as its module declares them.
    """
    dims: list[tuple[str | None, ...]] = []
    for axis in axes:
        if axis == "head_dim" and dims and dims[-1] in (("heads",), ("kv_heads",)):
            dims[-1] = (*dims[-1], axis)
        elif axis != "layers":
            dims.append((axis,))
    return tuple(dims)


BATCH = P(None, ROW_AXES, SEQUENCE)  # [A, B, T]: micro-steps, rows, length
