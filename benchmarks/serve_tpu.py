"""The serving engine's decode step of an 8B model on TPUs, by their compiler: bytes, cycles, and a roofline's tokens/s.

    python benchmarks/serve_tpu.py [--shape llama-3-8b] [--topology v6e:2x2] [--rows 16 64] [--context 1024]

Needs libtpu (`pip install libtpu`) on x86-64 Linux and no TPU. bfloat16 weights and cache, heads over all chips, every
row at the given context. Bytes are those between a chip's memory and the chip: operands and results of the compiled
program's operations, kernels by the pages that they fetch. The roofline is the sum of four times, as if nothing
overlapped: bytes over the chip's bandwidth, bytes of collectives over its links, and fixed times for each collective
and for each row of a kernel.
Products take less time than the weights that they read, until there are some hundred rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from typing import Any

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.devices.chips import parse_topology
from jaxlm.devices.mesh import make_mesh, tree_shardings, use_mesh
from jaxlm.devices.program import memory_bytes, read_program
from jaxlm.inference.model import abstract_weights
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import SHAPES
from jaxlm.models.unrolled import head_params, next_states
from jaxlm.sharding import TENSOR, WHOLE_IF_UNEVEN

# Time of a collective of a few kilobytes over a slice's links: start-up and hops, by assumption.
COLLECTIVE_SECONDS = 5e-6
# Time of a step of a kernel's grid, beside what it computes and moves, by assumption.
STEP_SECONDS = 0.35e-6


def step(decoder: Decoder, weights: Any, pages: Any, tokens: Any, places: Any, tables: Any) -> Any:
    """One new token for each row, greedily."""
    x, pages = next_states(decoder, weights, pages, tokens, places, tables, jnp.zeros(0, jnp.int32))
    logits = decoder.apply({"params": head_params(weights["params"])}, x, method="head")
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), places + 1, pages


def measure(shape: str, topology: str, rows: int, context: int, page: int, layers: int | None) -> None:
    where = parse_topology(topology)
    devices = list(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices).flat)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=len(devices)), devices)
    spec = SHAPES[shape]
    whole_layers = spec.num_layers
    if layers:
        spec = dataclasses.replace(spec, num_layers=layers)
    decoder = Decoder(spec, {}, "bfloat16", "bfloat16", "pallas_tpu")

    def abstract(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    boxed = abstract_weights(decoder)
    weights = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        tree_shardings(boxed, mesh, WHOLE_IF_UNEVEN),
    )
    each = -(-context // page)
    attention = spec.period[0].attention
    chips = len(devices)
    page_bytes = 2 * page * attention.head_dim * attention.num_kv_heads // chips * 2  # of one layer, on one chip
    # As many pages as there is memory for, in the whole model.
    count = int((0.85 * where.chip.memory - 16.1e9 / chips) / (whole_layers * page_bytes))
    cache = (count, attention.num_kv_heads, page, attention.head_dim)
    pages = [(abstract(cache, jnp.bfloat16, None, TENSOR),) * 2 for _ in range(spec.num_layers)]
    numbers = abstract((rows,), jnp.int32)
    started = time.perf_counter()
    with use_mesh(mesh):
        jitted = jax.jit(step, static_argnums=0, donate_argnums=2)
        traced = jitted.trace(decoder, weights, pages, numbers, numbers, abstract((rows, each), jnp.int32))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - started
    program, chip = read_program(compiled.as_text()), where.chip
    # Pages that are fetched, and queries and answers; of each row a tile of 16 slots, to the chip and back.
    heads = attention.num_heads // chips * attention.head_dim * 2
    kernels = {
        "paged_attention": float(rows * (each * page_bytes + 2 * heads)),
        "write_pages": float(rows * 2 * page_bytes * 16 / page),
    }
    read = memory_bytes(compiled.as_text(), kernels)
    # A step reads every weight but the embedding, of which it looks up a row for each token.
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    table = weights["params"]["embed_tokens"]["embedding"]
    size -= 0 if spec.tied_head else table.size * table.dtype.itemsize
    live = rows * context * spec.num_layers * 2 * attention.num_kv_heads * attention.head_dim * 2
    needed = (size + live) / chips
    moved = sum(collective.bytes for collective in program.collectives)
    count = sum(collective.count for collective in program.collectives)
    times = read / chip.bandwidth, moved / chip.link, count * COLLECTIVE_SECONDS
    steps = rows * spec.num_layers * -(-context // 1024)
    times = *times, steps * STEP_SECONDS
    memory = compiled.memory_analysis()
    print(
        f"| {rows} x {context}{'' if layers is None else f', {layers} of {whole_layers} layers'} "
        f"| {read / 1e9:.2f} | {size / chips / 1e9:.2f} + {live / chips / 1e9:.2f} | {read / needed:.2f} "
        f"| {' + '.join(f'{1e3 * each:.2f}' for each in times)} | {rows / sum(times):,.0f} "
        f"| {(program.cycles or 0) / 1e6:.2f} | {memory.peak_memory_in_bytes / 2**30:.1f} | {seconds:.0f} s |",
        flush=True,
    )
    collectives = {each.kind: (each.count, round(each.bytes / 1e6, 2)) for each in program.collectives}
    print(f"    collectives (number, MB): {collectives}; kernels: {program.kernels}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--topology", default="v6e:2x2")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--page", type=int, default=128, help="slots of a page")
    parser.add_argument("--layers", type=int, help="fewer layers, to compile in less time")
    arguments = parser.parse_args()
    print(
        "| rows x context | GB moved a chip | weights + live cache | ratio | ms: memory, links, collectives, kernels "
        "| tokens/s | Mcycles outside of kernels | GiB a chip | compiled in |\n|---|---|---|---|---|---|---|---|---|"
    )
    for rows in arguments.rows:
        measure(arguments.shape, arguments.topology, rows, arguments.context, arguments.page, arguments.layers)


if __name__ == "__main__":
    main()
