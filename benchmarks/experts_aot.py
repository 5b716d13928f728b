"""Grouped products of a layer of experts, compiled for TPUs: XLA's `ragged_dot` beside the Pallas kernels.

What the compiler counts for one pass over sorted rows (gate and up as one product): FLOPs, bytes between chip and
memory, temporaries. Of 8192 tokens with 4 of 16 experts each, LLaMA-2-7B's layer. Needs libtpu, but no TPU:

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost python benchmarks/experts_aot.py
    … --cycles v5e --tokens 4096 --experts 8 --k 2      # cycles of each run of a kernel (see bundles.py), as JSON

Cycles are those of the blocks that hold rows, half a block of each expert empty; of a block at least what the matrix
units need for its FLOPs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from bundles import dump_options, straight_pieces
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxlm.devices.chips import parse_topology
from jaxlm.kernels.grouped_matmul import grouped_matmul
from jaxlm.kernels.grouped_matmul_tpu import column_tiles, matrix_tiles
from jaxlm.kernels.groups import BLOCK, Groups

# A pass's kernel, by its name in a compiled program.
KERNELS = {
    "forward": "grouped_matmul",
    "gradient of rows": "grouped_matmul_x_gradient",
    "gradient of matrices": "grouped_matmul_w_gradient",
}


def passes(implementation: str, transposed: bool) -> dict[str, Any]:
    def forward(x: Any, w: Any, grad: Any, groups: Groups) -> Any:
        return grouped_matmul(x, w, groups, implementation, transposed)

    def of_rows(x: Any, w: Any, grad: Any, groups: Groups) -> Any:
        return jax.vjp(lambda x: forward(x, w, grad, groups), x)[1](grad)

    def of_matrices(x: Any, w: Any, grad: Any, groups: Groups) -> Any:
        return jax.vjp(lambda w: forward(x, w, grad, groups), w)[1](grad)

    return {"forward": forward, "gradient of rows": of_rows, "gradient of matrices": of_matrices}


def compiled(
    topology: str, implementation: str, name: str, tokens: int, k: int, dims: tuple[int, int, int], transposed: bool
) -> Any:
    """A pass over sorted rows, compiled.

    Args:
        dims: E, I, O.
        transposed: the matrices are [E, O, I] instead of [E, I, O].
    """
    experts, inner, columns = dims
    place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])

    def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    blocks = tokens * k // BLOCK + experts
    groups = Groups(*(shape(*dims, dtype=jnp.int32) for dims in ((experts,), (blocks,), ())))
    matrices = shape(experts, columns, inner) if transposed else shape(experts, inner, columns)
    rows = shape(blocks * BLOCK, inner), matrices, shape(blocks * BLOCK, columns)
    run = passes(implementation, transposed)[name]
    return jax.jit(run).trace(*rows, groups).lower(lowering_platforms=("tpu",)).compile()


def kernel_cycles(chip: str, name: str, tokens: int, k: int, dims: tuple[int, int, int], transposed: bool) -> float:
    """Cycles of a run of a pass's kernel, by its code and by the matrix units; see `compiled`."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = (tokens, k, *dims, int(transposed))
        call = [sys.executable, __file__, "--compile", name, f"{chip}:2x2", *map(str, sizes)]
        subprocess.run(
            call, check=True, capture_output=True, env=os.environ | {"LIBTPU_INIT_ARGS": dump_options(folder)}
        )
        pieces = straight_pieces(Path(folder), KERNELS[name])
    (experts, inner, columns), device = dims, parse_topology(f"{chip}:2x2").chip
    blocks, product = tokens * k // BLOCK + experts // 2, max(pieces)
    if name == "gradient of matrices":
        down, across = matrix_tiles(BLOCK, *((columns, inner) if transposed else (inner, columns)), 2)
        tiles = down * across
        # Zeros before a group's first block, and its matrix after the last.
        once = sum(pieces) - product
    else:
        turned = name == "gradient of rows"
        tiles = column_tiles(BLOCK, columns if turned else inner, inner if turned else columns, 2)
        once = 0
    units = 2 * BLOCK * inner * columns / tiles / (device.flops / device.clock)
    return tiles * (blocks * max(product, units) + experts * once)


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        name, topology, *sizes = sys.argv[2:]
        tokens, k, experts, inner, columns, transposed = map(int, sizes)
        compiled(topology, "pallas_tpu", name, tokens, k, (experts, inner, columns), bool(transposed))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--cycles", metavar="CHIP", help="v5e or v6e")
    arguments = parser.parse_args()
    tokens, k, experts, hidden = arguments.tokens, arguments.k, arguments.experts, arguments.hidden
    neurons = arguments.neurons // experts
    if arguments.cycles is not None:
        # Gate and up; down, whose matrices are transposed (see `nn.dispatch.outputs_first`).
        both = ((experts, hidden, 2 * neurons), False), ((experts, neurons, hidden), True)
        found = {
            kernel: [round(kernel_cycles(arguments.cycles, name, tokens, k, *which)) for which in both]
            for name, kernel in KERNELS.items()
        }
        print(json.dumps(found))
        return
    for topology in ("v5e:2x2", "v6e:2x2"):
        for implementation in ("ragged", "pallas_tpu"):
            for name in KERNELS:
                program = compiled(topology, implementation, name, tokens, k, (experts, hidden, 2 * neurons), False)
                cost: Any = program.cost_analysis()
                print(
                    f"{topology}  {implementation:10}  {name:20}  {cost['flops'] / 1e9:7,.0f} GFLOP  "
                    f"{cost['bytes accessed'] / 1e9:5.2f} GB  temporaries "
                    f"{program.memory_analysis().temp_size_in_bytes / 2**20:4.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
