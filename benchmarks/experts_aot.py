"""Grouped products of a layer of experts, compiled for TPUs: XLA's `ragged_dot` beside the Pallas kernels.

What the compiler counts for one pass over sorted rows (gate and up as one product): FLOPs, bytes between chip and
memory, temporaries. Of 8192 tokens with 4 of 16 experts each, LLaMA-2-7B's layer. Needs libtpu, but no TPU:

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost python benchmarks/experts_aot.py
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxlm.kernels.grouped_matmul import grouped_matmul
from jaxlm.kernels.groups import BLOCK, Groups


def passes(implementation: str) -> dict[str, Any]:
    def forward(x: Any, w: Any, grad: Any, groups: Groups) -> Any:
        return grouped_matmul(x, w, groups, implementation)

    def of_rows(x: Any, w: Any, grad: Any, groups: Groups) -> Any:
        return jax.vjp(lambda x: grouped_matmul(x, w, groups, implementation), x)[1](grad)

    def of_matrices(x: Any, w: Any, grad: Any, groups: Groups) -> Any:
        return jax.vjp(lambda w: grouped_matmul(x, w, groups, implementation), w)[1](grad)

    return {"forward": forward, "gradient of rows": of_rows, "gradient of matrices": of_matrices}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--k", type=int, default=4)
    arguments = parser.parse_args()
    experts, inner, columns = arguments.experts, arguments.hidden, 2 * arguments.neurons // arguments.experts
    blocks = arguments.tokens * arguments.k // BLOCK + experts
    for topology in ("v5e:2x2", "v6e:2x2"):
        place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])

        def shape(*dims: int, dtype: Any = jnp.bfloat16, place: Any = place) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

        groups = Groups(*(shape(*dims, dtype=jnp.int32) for dims in ((experts,), (blocks,), ())))
        rows = shape(blocks * BLOCK, inner), shape(experts, inner, columns), shape(blocks * BLOCK, columns)
        for implementation in ("ragged", "pallas_tpu"):
            for name, run in passes(implementation).items():
                compiled = jax.jit(run).trace(*rows, groups).lower(lowering_platforms=("tpu",)).compile()
                cost: Any = compiled.cost_analysis()
                print(
                    f"{topology}  {implementation:10}  {name:20}  {cost['flops'] / 1e9:7,.0f} GFLOP  "
                    f"{cost['bytes accessed'] / 1e9:5.2f} GB  temporaries "
                    f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:4.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
