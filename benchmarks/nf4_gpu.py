"""Products with a weight in four bits on a GPU: jaxlm's kernel beside XLA, which writes the dense weight to memory.

Both are compared with a product in float32, the kernel with itself too (the same bits twice), and timed in turn,
forward and for the gradient of the rows. `nn.nf4.MOST_ROWS` should be the rows from which on the kernel is the slower.

    python benchmarks/nf4_gpu.py [--sizes 4096x4096,4096x11008] [--rows 1,16,128,512,1024,2048,8192]
    python benchmarks/nf4_gpu.py --compile      # no GPU: bytes that an H100's program needs beside its arrays
    python benchmarks/nf4_gpu.py --sizes 128x200 --rows 24      # on a CPU: the kernel interpreted, no times
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.matmul import product, product_transposed
from jaxlm.nn.nf4 import Nf4Weight

CALLS = 20  # between two looks at the clock
WAYS = ("forward", "backward")


def forms(way: str, interpret: bool = False) -> dict[str, Callable[[jax.Array, Nf4Weight], jax.Array]]:
    """The products by name: (rows, weight) -> rows."""
    transposed = way == "backward"

    def kernel(x: jax.Array, weight: Nf4Weight) -> jax.Array:
        return weight.by_kernel(x, jnp.bfloat16, None, transposed, "gpu", interpret)

    def plain(x: jax.Array, weight: Nf4Weight, dtype: Any = jnp.bfloat16) -> jax.Array:
        return (product_transposed if transposed else product)(x.astype(dtype), weight.dense(dtype), 1, dtype)

    return {"kernel": kernel, "plain": plain, "exact": functools.partial(plain, dtype=jnp.float32)}


def seconds(run: Callable[..., jax.Array], *arguments: Any) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(CALLS):
        result = run(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / CALLS


def compare(weight: Nf4Weight, rows: int, rounds: int) -> bool:
    """A line of the table for each way; False where the kernel is wrong or changes between two runs."""
    on_gpu, rng, fine = jax.devices()[0].platform == "gpu", np.random.default_rng(rows), True
    inputs, outputs = weight.dims
    for way in WAYS:
        x = jnp.asarray(rng.normal(size=(rows, outputs if way == "backward" else inputs)), jnp.bfloat16)
        run = {name: jax.jit(form) for name, form in forms(way, not on_gpu).items()}
        with jax.default_matmul_precision("highest"):
            exact = run["exact"](x, weight)
        found = {name: run[name](x, weight) for name in ("kernel", "plain")}
        errors = [float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)) for y in found.values()]
        same = bool((run["kernel"](x, weight) == found["kernel"]).all())
        right = errors[0] < max(0.005, 1.5 * errors[1])
        fine &= right and same
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(rounds if on_gpu else 0):
            for name in times:
                times[name].append(seconds(run[name], x, weight))
        shown = "not timed"
        if on_gpu:
            ratio = statistics.median(a / b for a, b in zip(times["kernel"], times["plain"], strict=True))
            taken = " ".join(f"{name} {1e3 * statistics.median(each):.3f} ms" for name, each in times.items())
            shown = f"{taken}, ratio {ratio:.2f}"
        verdict = ("right" if right else "WRONG") + ("" if same else ", CHANGES BETWEEN RUNS")
        off = " ".join(f"{name} {error:.1e}" for name, error in zip(found, errors, strict=True))
        print(f"{inputs} x {outputs}, {rows} rows, {way}: {shown}; off by {off}: {verdict}", flush=True)
    return fine


def compile_both(inputs: int, outputs: int, rows: int) -> None:
    """A line for each way, with what an H100's program needs beside its arguments and its result."""
    from jax.sharding import SingleDeviceSharding

    from jaxlm.devices.chips import parse_topology
    from jaxlm.planning.compiled import topology_devices

    place = SingleDeviceSharding(topology_devices(parse_topology("h100:1"))[0])

    def placed(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    weight = jax.tree.map(lambda leaf: placed(leaf.shape, leaf.dtype), Nf4Weight.of_shape((inputs, outputs), 1))
    for way in WAYS:
        x = placed((rows, outputs if way == "backward" else inputs), jnp.bfloat16)
        sizes = {}
        for name, form in forms(way).items():
            if name != "exact":
                compiled: Any = jax.jit(form).trace(x, weight).lower(lowering_platforms=("cuda",)).compile()
                sizes[name] = compiled.memory_analysis().temp_size_in_bytes
        shown = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
        print(f"{inputs} x {outputs}, {rows} rows, {way}: written beside the result: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4096x4096,4096x11008", help="inputs x outputs")
    parser.add_argument("--rows", default="1,16,128,512,1024,2048,8192")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    fine = True
    for size in arguments.sizes.split(","):
        inputs, outputs = map(int, size.split("x"))
        all_rows = [int(rows) for rows in arguments.rows.split(",")]
        if arguments.compile:
            for rows in all_rows:
                compile_both(inputs, outputs, rows)
            continue
        numbers = np.random.default_rng(0).standard_normal((inputs, outputs), np.float32)
        weight = jax.tree.map(jnp.asarray, Nf4Weight.of_array(numbers, 1))
        for rows in all_rows:
            fine &= compare(weight, rows, arguments.rounds)
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
