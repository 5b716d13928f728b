"""Attention and the whole train step compiled for TPUs, without a TPU: what the compiler itself says they cost.

    python benchmarks/tpu_aot.py kernels [--chips v5e v5p v6e]
    python benchmarks/tpu_aot.py step [--attention pallas_tpu splash xla] [--topology v5e:4x4] [--rows 2]

Needs libtpu (`pip install libtpu`), on any x86-64 Linux machine. `kernels`: instruction bundles of the code of a tile,
i.e. cycles if nothing stalls, with and without ALiBi, beside those of JAX's splash attention. `step`: LLaMA-2-7B, full
fine-tuning with AdamW, FSDP over all chips, packed rows: bytes per chip, the scheduler's estimated cycles (bodies of
loops times their trips; it gives none for Pallas kernels, which are counted) and collectives. Yardsticks for two
programs on one topology, not predictions of seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.devices.program import read_program
from jaxlm.kernels.flash_attention import flash_attention
from jaxlm.nn import attention as attention_module
from jaxlm.nn.positions import alibi_slopes
from jaxlm.sharding import BATCH, ROW_AXES

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def splash_attention(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """JAX's splash attention with blocks of 512, rows over the mesh."""
    length, heads = q.shape[1], q.shape[2]
    block = min(512, length)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    causal = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(causal, head_shards=1, q_seq_shards=1, block_sizes=sizes)

    def run(q: Any, k: Any, v: Any, ids: Any) -> Any:
        q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(q.shape[-1]), k, v))
        return jax.vmap(lambda q, k, v, i: kernel(q, k, v, splash.SegmentIds(i, i)))(q, k, v, ids).swapaxes(1, 2)

    ids = mask.segment_ids if mask.segment_ids is not None else jnp.zeros(q.shape[:2], jnp.int32)
    if not jax.sharding.get_abstract_mesh().empty:
        rows = P(ROW_AXES)
        run = jax.shard_map(run, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)
    return run(q, k, v, ids)


# Kernels


def compile_kernel(chip: str, which: str, length: int, heads: int, kv_heads: int) -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]

    def abstract(n: int) -> Any:
        return jax.ShapeDtypeStruct((1, length, n, 128), jnp.bfloat16, sharding=SingleDeviceSharding(device))

    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=SingleDeviceSharding(device))

    def run(q: Any, k: Any, v: Any, ids: Any) -> Any:
        mask = attention_module.MaskSpec(ids)
        slopes = jnp.asarray(alibi_slopes(heads)) if which == "pallas_tpu_alibi" else None
        ours = which != "splash"
        call = (
            (lambda *a: flash_attention(*a, ids, slopes=slopes)[0]) if ours else (lambda *a: splash_attention(*a, mask))
        )
        out, back = jax.vjp(call, q, k, v)
        return out, back(out)

    started = time.perf_counter()
    args = abstract(heads), abstract(kv_heads), abstract(kv_heads), ids
    compiled = jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"compiled in {time.perf_counter() - started:.1f} s, temporaries {temp:.0f} MiB", flush=True)


def bundles(folder: Path) -> dict[str, list[int]]:
    """For each kernel the bundles of its longest straight pieces (the code of a tile), longest first."""
    found = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        name = re.search(r"(flash_attention_\w+ward|splash_mha_[a-z]+)", path.name)
        if name is None or "schedule" in path.name:
            continue
        lines = [m for m in (re.match(r"\s*(0x[0-9a-f]+)\s+(\w\w:)?", line) for line in path.open()) if m]
        cuts = [int(m[1], 16) for m in lines if m[2] or "sbr.rel" in m.string]
        pieces = sorted((b - a for a, b in zip(cuts, [*cuts[1:], len(lines)], strict=True)), reverse=True)
        found[name[1]] = [piece for piece in pieces if piece > 400][:2]
    return found


def kernels(chips: list[str]) -> None:
    for chip in chips:
        for which, heads, kv_heads, length in (
            ("pallas_tpu", 32, 32, 2048),
            ("pallas_tpu_alibi", 32, 32, 2048),
            ("pallas_tpu", 64, 8, 4096),
            ("splash", 32, 32, 2048),
        ):
            with tempfile.TemporaryDirectory() as folder:
                dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
                call = [sys.executable, __file__, "_compile", chip, which, *map(str, (length, heads, kv_heads))]
                done = subprocess.run(
                    call, env={**os.environ, "LIBTPU_INIT_ARGS": dump}, capture_output=True, text=True
                )
                said = (done.stdout or done.stderr).strip()[-600:]
                print(f"{chip} {which} H {heads} K {kv_heads} h 128 T {length}: {said}")
                for name, pieces in bundles(Path(folder)).items():
                    print(f"    {name}: bundles of a 512 x 512 tile {pieces}", flush=True)


# The step


def step(which: str, topology: str, rows: int, length: int, layers: int | None, dump: str | None) -> None:
    import dataclasses

    from jaxlm.config import MeshConfig, OptimizerConfig
    from jaxlm.models.decoder import Decoder
    from jaxlm.models.families import SHAPES
    from jaxlm.training.objectives.cross_entropy import CrossEntropy
    from jaxlm.training.optimizer import make_optimizer, make_schedule
    from jaxlm.training.state import Initializer
    from jaxlm.training.step import make_train_step

    attention_module.IMPLEMENTATIONS["splash"] = splash_attention
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = make_mesh(MeshConfig(fsdp=-1), list(devices.flat))
    config = SHAPES["llama-2-7b"]
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    model = Decoder(config, dtype=jnp.bfloat16, attention=which, remat="full")
    schedule = make_schedule(OptimizerConfig(), 1000)
    plain = Decoder(config, dtype=jnp.bfloat16)
    initializer = Initializer(plain, None, mesh, partial(make_optimizer, OptimizerConfig(), schedule))
    train_step = make_train_step(CrossEntropy(model), initializer.optimizer, schedule, 1.0)
    place = NamedSharding(mesh, BATCH)
    shape = (1, rows * devices.size, length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
        for name in ("input_ids", "positions", "segment_ids")
    }
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=place)
    started = time.perf_counter()
    with use_mesh(mesh):
        jitted = jax.jit(train_step, out_shardings=(initializer.state_shardings, None), donate_argnums=0)
        compiled = jitted.trace(initializer.abstract_state(), {}, batch).lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    program = read_program(compiled.as_text())
    cycles = program.cycles or 0.0
    if dump:
        Path(dump, f"{topology.replace(':', '_')}_{which}.txt").write_text(compiled.as_text())
    gib = 2**30
    print(
        f"{topology} {which}, {rows} x {length} a chip: compiled in {seconds:.0f} s; per chip peak "
        f"{memory.peak_memory_in_bytes / gib:.2f} GiB, arguments {memory.argument_size_in_bytes / gib:.2f}, "
        f"temporaries {memory.temp_size_in_bytes / gib:.2f}; {cycles / 1e9:.3f} G cycles outside Pallas kernels"
    )
    moved = {
        f"{one.kind}{'' if one.overlaps else ', waited for'}": round(one.bytes / 1e9, 2) for one in program.collectives
    }
    print(f"    collectives, GB: {moved}; kernels: {program.kernels}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["_compile"]:
        chip, which, *sizes = sys.argv[2:]
        compile_kernel(chip, which, *map(int, sizes))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernels", "step"])
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--attention", nargs="+", default=["pallas_tpu", "splash", "xla"])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rows", type=int, default=2, help="rows per chip")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="fewer layers, to compile in less time")
    parser.add_argument("--dump", help="an existing folder for the compiled programs' text")
    arguments = parser.parse_args()
    if arguments.what == "kernels":
        kernels(arguments.chips)
        return
    for which in arguments.attention:
        step(which, arguments.topology, arguments.rows, arguments.length, arguments.layers, arguments.dump)


if __name__ == "__main__":
    main()
