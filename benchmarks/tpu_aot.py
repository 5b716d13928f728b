"""Attention and the whole train step compiled for TPUs, without a TPU: what the compiler itself says they cost.

    python benchmarks/tpu_aot.py kernels [--chips v5e v5p v6e]
    python benchmarks/tpu_aot.py step [--attention pallas_tpu splash xla] [--topology v5e:4x4] [--rows 2]

Needs libtpu (`pip install libtpu`), on any x86-64 Linux machine. `kernels`: instruction bundles of the code of a tile,
i.e. cycles if nothing stalls, beside those of JAX's splash attention. `step`: LLaMA-2-7B, full fine-tuning with AdamW,
FSDP over all chips, packed rows: bytes per chip, the scheduler's estimated cycles (bodies of loops times their trips;
it gives none for Pallas kernels, which are counted) and collectives. Yardsticks for two programs on one topology, not
predictions of seconds.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import subprocess
import sys
import tempfile
import time
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

from jaxlm.kernels.flash_attention import flash_attention
from jaxlm.models import attention as attention_module
from jaxlm.parallel.mesh import BATCH, ROW_AXES, make_mesh, use_mesh

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s16": 2, "u16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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
        ours = which == "pallas_tpu"
        call = (lambda *a: flash_attention(*a, ids)[0]) if ours else (lambda *a: splash_attention(*a, mask))
        out, back = jax.vjp(call, q, k, v)
        return out, back(out)

    started = time.perf_counter()
    args = abstract(heads), abstract(kv_heads), abstract(kv_heads), ids
    compiled = jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"compiled in {time.perf_counter() - started:.1f} s, temporaries {temp:.0f} MiB", flush=True)


def bundles(folder: Path) -> dict[str, list[int]]:
    """Of each kernel, the bundles of its longest straight pieces (the code of a tile), longest first."""
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


def shape_bytes(text: str) -> int:
    dims = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return sum(SIZES.get(kind, 0) * math.prod(int(n) for n in size.split(",") if n) for kind, size in dims)


def costs(text: str) -> tuple[float, dict[str, float], dict[str, int]]:
    """(estimated cycles, bytes of each kind of collective, runs of each Pallas kernel) of a compiled program."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        elif " = " in line:
            lines.append(line)
    cycles = 0.0
    moved: dict[str, float] = collections.defaultdict(float)
    runs: dict[str, int] = collections.Counter()

    seen: set[str] = set()

    def trips(line: str) -> int:
        known = re.search(r"known_trip_count\W+n\W+(\d+)", line)
        if known:
            return int(known[1])
        condition, body = (bodies[re.search(rf"{key}=%?([\w.\-]+)", line)[1]] for key in ("condition", "body"))  # type: ignore[index]
        end = max((int(n) for one in condition for n in re.findall(r"constant\((\d+)\)", one)), default=1)
        # An unrolled loop counts in steps: the constant that is added to the counter, one of the root's operands.
        index = next(
            (int(n) for one in condition for n in re.findall(r"[su]32\[\].*get-tuple-element.*index=(\d+)", one)), 0
        )
        root = next(one for one in body if "ROOT" in one)
        counter = re.findall(r"%([\w.\-]+)", root.split("tuple(")[1])[index]
        sum_ = next((one for one in body if re.match(rf"\s*%{re.escape(counter)} = .* add\(", one)), "")
        for name in re.findall(r"%([\w.\-]+)", sum_.split(" add(")[-1]):
            for one in body:
                step = re.match(rf"\s*%{re.escape(name)} = [su]32.* constant\((\d+)\)", one)
                if step:
                    return -(-end // int(step[1]))
        return end

    def collectives(line: str, times: int) -> None:
        op = re.search(r" = (.*?) (" + "|".join(COLLECTIVES) + r")(-start)?\(", line)
        channel = re.search(r"channel_id=(\d+)", line)
        if op and channel and channel[1] in seen:
            return  # one that is split over several fusions
        if op:
            seen.update(channel.groups() if channel else ())
            # A started one returns its operand beside the result.
            size = shape_bytes(op[1]) / (2 if op[3] and op[2] != "all-gather" else 1)
            moved[op[2]] += times * size * (2 if op[2] == "all-reduce" else 1)

    def walk(name: str, times: int) -> None:
        nonlocal cycles
        for line in bodies[name]:
            loop = re.search(r"\bwhile\(.*body=%?([\w.\-]+)", line)
            if loop:
                walk(loop[1], times * trips(line))
                continue
            inner_code = re.search(r"\b(call|conditional)\(", line)
            estimate = None if inner_code else re.search(r'"estimated_cycles":"(\d+)"', line)
            cycles += times * int(estimate[1]) if estimate else 0
            if 'custom_call_target="tpu_custom_call"' in line:
                kernel = re.match(r"\s*(?:ROOT )?%?([\w\-]+)", line)
                runs[kernel[1] if kernel else "?"] += times
            collectives(line, times)
            called = re.search(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line)
            if called and called[1] in bodies:
                if inner_code:
                    walk(called[1], times)
                elif "fusion(" in line or "async-start" in line:
                    for inner in bodies[called[1]]:
                        collectives(inner, times)

    walk(entry, 1)
    return cycles, dict(moved), dict(runs)


def step(which: str, topology: str, rows: int, length: int, layers: int | None, dump: str | None) -> None:
    import dataclasses

    from jaxlm.config import MeshConfig, OptimizerConfig, TrainConfig
    from jaxlm.models.llama import Llama
    from jaxlm.models.shapes import SHAPES
    from jaxlm.training.optimizer import make_optimizer, make_schedule
    from jaxlm.training.state import Initializer
    from jaxlm.training.step import make_train_step

    attention_module.IMPLEMENTATIONS["splash"] = splash_attention
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = make_mesh(MeshConfig(fsdp=-1), list(devices.flat))
    config = SHAPES["llama-2-7b"]
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    model = Llama(config, dtype=jnp.bfloat16, attention=which, remat="full")
    schedule = make_schedule(OptimizerConfig(), 1000)
    optimizer = make_optimizer(OptimizerConfig(), schedule)
    plain = Llama(config, dtype=jnp.bfloat16)
    setup = Initializer(plain, None, mesh, optimizer)
    train_step = make_train_step(model, optimizer, schedule, TrainConfig(), 1.0, rows)
    place = NamedSharding(mesh, BATCH)
    shape = (1, rows * devices.size, length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
        for name in ("input_ids", "positions", "segment_ids")
    }
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=place)
    started = time.perf_counter()
    with use_mesh(mesh):
        jitted = jax.jit(train_step, out_shardings=(setup.state_shardings, None), donate_argnums=0)
        compiled = jitted.trace(setup.abstract_state(), {}, batch).lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    cycles, moved, runs = costs(compiled.as_text())
    if dump:
        Path(dump, f"{topology.replace(':', '_')}_{which}.txt").write_text(compiled.as_text())
    gib = 2**30
    print(
        f"{topology} {which}, {rows} x {length} a chip: compiled in {seconds:.0f} s; per chip peak "
        f"{memory.peak_memory_in_bytes / gib:.2f} GiB, arguments {memory.argument_size_in_bytes / gib:.2f}, "
        f"temporaries {memory.temp_size_in_bytes / gib:.2f}; {cycles / 1e9:.3f} G cycles outside Pallas kernels"
    )
    print(
        f"    collectives, GB: { {kind: round(size / 1e9, 2) for kind, size in moved.items()} }; kernels: {runs}",
        flush=True,
    )


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
