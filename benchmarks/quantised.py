"""A base in few bits: the error of the rounding, memory and time of a step on it, and what a TPU's compiler says.

    python benchmarks/quantised.py error            beside qwix (pip install qwix)
    python benchmarks/quantised.py step             110 M on a CPU, beside PEFT on PyTorch
    python benchmarks/quantised.py products         of LLaMA-2-7B's layers, compiled for TPUs (libtpu; no TPU needed)
    python benchmarks/quantised.py tpu              the step of 7B, 13B, 70B, compiled for TPUs
    python benchmarks/quantised.py offload          7B and 13B with frozen layers in the host's memory, compiled
    python benchmarks/quantised.py ratio v5e 16     cycles of 7B's step over those on a bfloat16 base, with 16 layers
    python benchmarks/quantised.py read MODEL       peak memory of `convert quantize` of a model

`error`: root mean square of the error over that of the weights, 2048 x 2048, for Gauss and Student's t with 5 degrees
of freedom. `step`: LoRA of rank 64 on all linear layers, float32, one process for each form; PEFT's base is the plain
float32 one, and one whose linear layers hold bitsandbytes' codes and dequantise at every product. `tpu`: KnowLM's
recipe (`configs/knowlm/qlora.yaml`) on rows of 2,048 tokens. `products`: the compiler's cycles, and for the kernel the
instruction bundles of a tile times the number of tiles, or what the matrix units need where that is more; with 2,048
rows. `offload`: as `tpu` on a base in bfloat16, and for a GPU by JAX's CUDA plug-in (no GPU needed). `ratio`: as `tpu`,
without dropout, with the compiler's full effort, for which a small kernel stands in for the real one (with it,
compiling takes more than ten minutes); what the real one takes is added to the compiler's cycles, which count no
kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

GIB = 2**30
SMALL = dict(hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12, num_kv_heads=12, vocab_size=32000)
RANK, ROWS, LENGTH, STEPS = 64, 2, 256, 4
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- error ------------------------------------------------------------------------------------------------------------


def _relative(found: np.ndarray, weights: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - weights) ** 2) / np.mean(weights**2)))


def _qwix(weights: np.ndarray, kind: str, tile: int | None) -> float | None:
    """The error of qwix for [in, out] weights, a scale for each output or for each tile of inputs; None without it."""
    try:
        import jax.numpy as jnp
        from qwix._src.core import qarray
    except ImportError:
        return None
    tiles = {} if tile is None else {0: tile}
    how = qarray.HowToQuantize(qtype=kind, channelwise_axes=(1,), tiled_axes=tiles)
    rounded = qarray.dequantize(qarray.quantize(jnp.asarray(weights), how))
    return _relative(np.asarray(rounded, np.float32), weights)


def error() -> None:
    from jaxlm.nn.rounding import dequantize, quantize

    rng = np.random.default_rng(0)
    shapes = {"Gauss": rng.normal(size=(2048, 2048)), "Student t5": rng.standard_t(5, (2048, 2048))}
    print("| | bits a weight | " + " | ".join(shapes) + " |\n|---|---|---|---|")
    rows: dict[str, list[Any]] = {}
    times: dict[str, float] = {}
    for weights in (value.astype(np.float32) for value in shapes.values()):
        for kind in ("nf4", "int8"):
            started = time.perf_counter()
            parts = quantize(kind, weights, 1)
            times[kind] = 1e9 * (time.perf_counter() - started) / weights.size
            bits = 8 * sum(part.nbytes for part in parts.values()) / weights.size
            found = _relative(dequantize(kind, parts, weights.shape, 1), weights)
            rows.setdefault(f"jaxlm {kind}", [f"{bits:.2f}"]).append(found)
        for kind, tile, bits in (("nf4", None, 4.02), ("nf4", 256, 4.13), ("nf4", 64, 4.5), ("int8", None, 8.02)):
            found = _qwix(weights, kind, tile)
            if found is not None:
                rows.setdefault(f"qwix {kind}, {f'tiles of {tile}' if tile else 'by output'}", [f"{bits}"]).append(
                    found
                )
    for name, (bits, *errors) in rows.items():
        print(f"| {name} | {bits} | {' | '.join(f'{value:.4f}' for value in errors)} |")
    print("rounding, ns a weight:", ", ".join(f"{kind} {value:.1f}" for kind, value in times.items()))


# --- a step on a CPU --------------------------------------------------------------------------------------------------


def _peak() -> int:
    """Largest resident size of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def _batch() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SMALL["vocab_size"], (ROWS, LENGTH)).astype(np.int32)


def _ours(kind: str) -> dict[str, float]:
    import functools

    import jax

    from jaxlm.config import LoraConfig, MeshConfig, OptimizerConfig
    from jaxlm.devices.mesh import make_mesh, put_batch, use_mesh
    from jaxlm.models.adapters import resolve_lora
    from jaxlm.models.decoder import Decoder
    from jaxlm.spec import uniform_decoder
    from jaxlm.training.objectives.cross_entropy import CrossEntropy
    from jaxlm.training.optimizer import make_optimizer, make_schedule
    from jaxlm.training.state import Initializer, bytes_per_device
    from jaxlm.training.step import make_train_step
    from jaxlm.weights.leaves import LeafInfo
    from jaxlm.weights.names import leaf_shapes

    spec = uniform_decoder("llama", head_dim=64, **SMALL)

    class Source:
        def __init__(self) -> None:
            float32 = np.dtype(np.float32)
            self.leaves = {path: LeafInfo(shape, float32) for path, shape in leaf_shapes(spec).items()}

        def read(self, path: str, index: Any) -> np.ndarray:
            empty = np.broadcast_to(np.float32(0), self.leaves[path].shape)[index]
            return np.random.default_rng(len(path)).normal(0, 0.02, empty.shape).astype(np.float32)

    lora = LoraConfig(rank=RANK, alpha=16, targets=LINEARS)
    options = OptimizerConfig()
    schedule = make_schedule(options, 100)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = Decoder(spec, resolve_lora(spec, lora), attention="xla", remat="full")
    make = functools.partial(make_optimizer, options, schedule)
    initializer = Initializer(model, lora, mesh, make, None if kind == "plain" else kind)  # type: ignore[arg-type]
    base = initializer.load_params(Source())
    state = initializer.new_state({"lora": initializer.init_lora(base, 0)}, 0)
    step = make_train_step(CrossEntropy(model), initializer.optimizer, schedule, 1.0)
    ids = _batch()[None]
    fields = {"input_ids": ids, "loss_mask": np.ones(ids.shape, bool), "segment_ids": np.ones_like(ids)}
    fields["positions"] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    with use_mesh(mesh):
        batch = put_batch(fields, mesh)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(initializer.state_shardings, None))
        compiled = jitted.lower(state, {"params": base}, batch).compile()
        times = []
        for _ in range(STEPS):
            started = time.perf_counter()
            state, figures = compiled(state, {"params": base}, batch)
            float(figures["loss"])
            times.append(time.perf_counter() - started)
    memory = compiled.memory_analysis()
    weights = bytes_per_device(initializer.params, initializer.params_shardings)
    step_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"seconds": float(np.median(times[1:])), "weights": weights, "step": step_bytes, "peak": _peak()}


def _torch_linear(linear: Any) -> Any:
    """A torch.nn.Linear whose weight is bitsandbytes' nf4 by its definition, dequantised at every product."""
    import torch

    from jaxlm.nn.rounding import NF4, dynamic_map, quantize

    parts = quantize("nf4", linear.weight.detach().numpy().T, 1)

    class Dequantised(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, module: Any) -> Any:
            ctx.module = module
            return x @ module.dense().T

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad @ ctx.module.dense(), None

    class Nf4Linear(torch.nn.Linear):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
            self.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            half = parts["codes"].transpose(2, 0, 1)
            codes = np.concatenate([half >> 4, half & 15], axis=2).reshape(-1)
            self.codes = torch.tensor(codes[::2] << 4 | codes[1::2])
            self.absmax = torch.tensor(np.ascontiguousarray(parts["absmax"].T).reshape(-1))
            self.nested, self.offset = torch.tensor(parts["nested_absmax"]), float(parts["nested_offset"][0])

        def dense(self) -> Any:
            values, of_absmax = torch.tensor(NF4), torch.tensor(dynamic_map())
            codes = torch.stack([self.codes >> 4, self.codes & 15], dim=1).reshape(-1, 64)
            absmax = of_absmax[self.absmax.int()] * self.nested.repeat_interleave(256)[: len(self.absmax)] + self.offset
            return (values[codes.int()] * absmax[:, None]).reshape(self.out_features, self.in_features)

        def forward(self, x: Any) -> Any:
            return Dequantised.apply(x, self)

    return Nf4Linear()


def _peft(kind: str) -> dict[str, float]:
    import peft
    import torch
    import transformers

    names = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    config = transformers.LlamaConfig(**{names.get(key, key): value for key, value in SMALL.items()}, use_cache=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if kind == "nf4":
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name in LINEARS:
                    if hasattr(block, name):
                        setattr(block, name, _torch_linear(getattr(block, name)))
    tensors = [*model.parameters()]
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    weights = sum(tensor.nbytes for tensor in tensors)
    lora = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=[*LINEARS], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    wrapped.enable_input_require_grads()
    wrapped.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 3e-4)
    ids = torch.tensor(_batch()).long()
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return {"seconds": float(np.median(times[1:])), "weights": weights, "step": 0, "peak": _peak()}


def step() -> None:
    print("| | s a step | weights, MB | peak of the process, MB |\n|---|---|---|---|")
    found = {}
    for who, kind in (("jaxlm", "plain"), ("jaxlm", "int8"), ("jaxlm", "nf4"), ("peft", "plain"), ("peft", "nf4")):
        call = [sys.executable, __file__, "_one", who, kind]
        done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        if done.returncode:
            print(f"| {who} {kind}: {done.stderr.strip().splitlines()[-1]} |")
            continue
        found[who, kind] = one = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {who} {kind} | {one['seconds']:.2f} | {one['weights'] / 1e6:.0f} | {one['peak'] / 1e6:.0f} |",
            flush=True,
        )
    for kind in ("plain", "nf4"):
        if ("jaxlm", kind) in found and ("peft", kind) in found:
            ours, theirs = found["jaxlm", kind], found["peft", kind]
            ratios = ", ".join(f"{key} {ours[key] / theirs[key]:.2f}" for key in ("seconds", "weights", "peak"))
            print(f"{kind}: jaxlm over PEFT: {ratios}")
    if ("jaxlm", "plain") in found and ("jaxlm", "nf4") in found:
        ratio = found["jaxlm", "nf4"]["seconds"] / found["jaxlm", "plain"]["seconds"]
        print(f"nf4 over plain, jaxlm: {ratio:.2f} in time")


# --- a TPU's compiler -------------------------------------------------------------------------------------------------

TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
TOKENS = 2048


def _product(chip: str, inputs: int, outputs: int, way: str, form: str) -> None:
    """Compiles one product of 2,048 rows, forward or backward, and says what it takes."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from jaxlm.devices.program import read_program
    from jaxlm.nn import nf4
    from jaxlm.nn.matmul import product, product_transposed

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    place = SingleDeviceSharding(device)
    weight: Any = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16, sharding=place)
    if form != "bfloat16":
        weight = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            nf4.Nf4Weight.of_shape((inputs, outputs), 1),
        )
    if form == "plain":
        nf4.why_plain = lambda *args: "asked for"
    rows = jax.ShapeDtypeStruct((TOKENS, outputs if way == "backward" else inputs), jnp.bfloat16, sharding=place)

    def run(x: Any, weight: Any) -> Any:
        if form == "bfloat16":
            return (product_transposed if way == "backward" else product)(x, weight, 1, jnp.bfloat16)
        return weight.transposed_times(x, jnp.bfloat16) if way == "backward" else weight.times(x, jnp.bfloat16)

    compiled = jax.jit(run).trace(rows, weight).lower(lowering_platforms=("tpu",)).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    cycles = read_program(compiled.as_text()).cycles or 0.0
    print(json.dumps({"cycles": cycles, "temporaries": temporaries}))


def _compiled_product(chip: str, inputs: int, outputs: int, way: str, form: str) -> dict[str, float]:
    """`_product` in a process of its own; for the kernel with the cycles of its own code."""
    import tempfile

    from bundles import dump_options, straight_pieces

    from jaxlm.devices.chips import parse_topology
    from jaxlm.kernels.nf4_matmul_tpu import BLOCKS, OUTPUTS

    with tempfile.TemporaryDirectory() as folder:
        dump = dump_options(folder) if form == "kernel" else ""
        call = [sys.executable, __file__, "_product", chip, str(inputs), str(outputs), way, form]
        environment = {**os.environ, **TPU, "LIBTPU_INIT_ARGS": dump}
        done = subprocess.run(call, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        if form == "kernel":
            tiles = -(-outputs // OUTPUTS) * -(-inputs // (64 * BLOCKS))
            device = parse_topology(CHIPS[chip]).chip
            units = 2 * TOKENS * inputs * outputs / (device.flops / device.clock)
            found["kernel"] = max(max(straight_pieces(Path(folder), "nf4_product")) * tiles, units)
            found["cycles"] += found["kernel"]
    return found


def products(chips: list[str]) -> None:
    print("| chip, inputs x outputs | bfloat16, Mcycles | nf4 by XLA, MB written beside | nf4 by the kernel |")
    print("|---|---|---|---|")
    for chip in chips:
        totals = dict.fromkeys(("bfloat16", "plain", "kernel"), 0.0)
        for inputs, outputs, times in ((4096, 4096, 4), (4096, 11008, 2), (11008, 4096, 1)):
            # Forward twice, as under full remat.
            for way, count in (("forward", 2), ("backward", 1)):
                found = {}
                for form in totals:
                    found[form] = _compiled_product(chip, inputs, outputs, way, form)
                    totals[form] += times * count * found[form]["cycles"]
                cells = [f"{found['bfloat16']['cycles'] / 1e6:.3f}"]
                cells.append(f"{found['plain']['cycles'] / 1e6:.3f}, {found['plain']['temporaries'] / 1e6:.0f}")
                cells.append(f"{found['kernel']['cycles'] / 1e6:.3f}, {found['kernel']['temporaries'] / 1e6:.0f}")
                print(f"| {chip}, {inputs} x {outputs}, {way} | {' | '.join(cells)} |", flush=True)
        ratios = [f"{totals[form] / totals['bfloat16']:.2f}" for form in totals]
        print(f"| {chip}, all products of a layer in a step, ratio | {' | '.join(ratios)} |", flush=True)


def _recipe(kind: str, rows: int, mesh: dict[str, int]) -> Any:
    """KnowLM's recipe on packed rows, one on each device that has rows of its own."""
    from jaxlm.cli.parser import parse_run

    words = ["--config", "knowlm/qlora", "--model.path", ".", "--model.quantize", kind, "--data.packing", "true"]
    words += ["--data.sequence_length", str(TOKENS), "--train.global_batch_size", str(rows)]
    words += [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", str(size))]
    return parse_run([*words, "--train.micro_batch_size", "1"], prog="", description="").configs[0]


def tpu(only: str | None) -> None:
    from jaxlm.devices.chips import parse_topology
    from jaxlm.models.families import SHAPES
    from jaxlm.planning.compiled import compile_step
    from jaxlm.planning.memory import estimate_memory
    from jaxlm.training.setup import set_up

    jobs: list[tuple[str, str, dict[str, int]]] = [
        ("llama-2-7b", "v5e:1x1", {}),
        ("llama-2-13b", "v6e:1x1", {}),
        ("llama-2-70b", "v5e:4x4", {}),
        ("llama-2-70b", "v5e:4x4", {"fsdp": 4, "tensor": 4}),
        ("llama-2-70b", "v5e:4x4", {"fsdp": 4, "sequence": 4}),
    ]
    print("| model, devices | GiB a chip: arguments, temporaries, peak | planned | kernel's calls |\n|---|---|---|---|")
    for model, topology, mesh in jobs:
        name = f"{model}, {' '.join([topology, *(f'{axis} {size}' for axis, size in mesh.items())])}"
        if only is not None and only not in name:
            continue
        devices = parse_topology(topology)
        rows = devices.count // mesh.get("tensor", 1) // mesh.get("sequence", 1)
        config = _recipe("nf4", rows, mesh)
        setup = set_up(config, SHAPES[model], devices)
        planned = estimate_memory(setup, setup.initializer(setup.schedule(1000))).peak / GIB
        done = compile_step(config, SHAPES[model], devices, quick=True)
        if done.program is None:
            print(f"| {name} | does not fit: {done.refused} | {planned:.2f} | |")
            continue
        sizes = ", ".join(f"{size / GIB:.2f}" for size in (done.arguments, done.temporaries, done.peak))
        calls = done.program.kernels.get("nf4_product", 0)
        print(f"| {name} | {sizes} | {planned:.2f} | {calls:,} |", flush=True)


def _offloaded_on_gpu(model: str, topology: str) -> None:
    """What `compile_step` refuses: a step for a GPU, lowered for a CPU, as JAX knows where its arrays lie."""
    import dataclasses

    import jax
    from jax._src import compiler
    from jaxlib import _jax

    from jaxlm.devices.chips import parse_topology
    from jaxlm.devices.mesh import make_mesh
    from jaxlm.models.families import SHAPES
    from jaxlm.planning.compiled import topology_devices
    from jaxlm.training.setup import set_up

    config, devices = _offload_recipe("frozen"), topology_devices(parse_topology(topology))
    assert len(devices) == 1
    setup = set_up(config, SHAPES[model], devices)
    setup = dataclasses.replace(setup, mesh=make_mesh(config.mesh, jax.devices("cpu")[:1]))
    schedule = setup.schedule(1000)
    initializer = setup.initializer(schedule)
    state, frozen = initializer.abstract_state(), setup.abstract_frozen(initializer)
    program = setup.lower_train_step(initializer, schedule, state, frozen, "cuda").compiler_ir("stablehlo")
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    compiled: Any = devices[0].client.compile(program, _jax.DeviceList(tuple(devices)), options)
    memory = compiled.get_compiled_memory_stats()
    host = memory.host_argument_size_in_bytes
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes - host, host
    print(json.dumps(sizes))


def _offload_recipe(kept: str | None) -> Any:
    import dataclasses

    config = _recipe("null", 1, {})
    return dataclasses.replace(config, model=dataclasses.replace(config.model, offload=kept))


def offload(only: str | None) -> None:
    from jaxlm.devices.chips import parse_topology
    from jaxlm.models.families import SHAPES
    from jaxlm.planning.compiled import compile_step
    from jaxlm.planning.memory import estimate_memory
    from jaxlm.training.setup import set_up

    print("| model, device | GiB: arguments, temporaries, peak | in the host's memory | planned: peak, host |")
    print("|---|---|---|---|")
    for topology in ("v5e:1x1", "v6e:1x1", "h100:1"):
        for model in ("llama-2-7b", "llama-2-13b"):
            for kept in (None, "frozen"):
                name = f"{model}, {topology}{', offloaded' if kept else ''}"
                if only is not None and only not in name:
                    continue
                config, devices = _offload_recipe(kept), parse_topology(topology)
                setup = set_up(config, SHAPES[model], devices)
                planned = estimate_memory(setup, setup.initializer(setup.schedule(1000)))
                if kept and devices.chip.platform == "gpu":
                    call = [sys.executable, __file__, "_offloaded", model, topology]
                    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **TPU})
                    assert done.returncode == 0, done.stderr[-2000:]
                    sizes = json.loads(done.stdout.splitlines()[-1])
                else:
                    found = compile_step(config, SHAPES[model], devices, quick=True)
                    sizes = [found.arguments, found.temporaries, found.peak, found.host]
                    if found.refused:
                        print(f"| {name} | {found.refused} | | {planned.peak / GIB:.2f} |", flush=True)
                        continue
                *on_device, host = (f"{size / GIB:.2f}" for size in sizes)
                shown = f"{', '.join(on_device)} | {host} | {planned.peak / GIB:.2f}, {planned.host / GIB:.2f}"
                print(f"| {name} | {shown} |", flush=True)


def _step_without_kernel(kind: str, chip: str, layers: int) -> None:
    """Compiles a step of LLaMA-2-7B, cut to `layers`, with a kernel that copies one tile in the kernel's place."""
    import dataclasses

    import jax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from jaxlm.config.files import dump_yaml
    from jaxlm.models.families import SHAPES
    from jaxlm.nn import nf4
    from jaxlm.planning import compiled

    def stand_in(x: Any, codes: Any, absmax: Any, table: Any, transposed: bool = False, dtype: Any = None) -> Any:
        (rows, _), (blocks, _, outputs) = x.shape, codes.shape

        def kernel(x_ref: Any, codes_ref: Any, absmax_ref: Any, out_ref: Any, semaphore: Any) -> None:
            tile = pl.ds(0, 16), pl.ds(0, 128)
            copy = pltpu.make_async_copy(x_ref.at[tile], out_ref.at[tile], semaphore)
            copy.start()
            copy.wait()

        whole = pl.BlockSpec(memory_space=pl.ANY)
        shape = jax.ShapeDtypeStruct((rows, 64 * blocks if transposed else outputs), dtype or x.dtype)
        return pl.pallas_call(
            kernel,
            in_specs=[whole] * 3,
            out_specs=whole,
            out_shape=shape,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
            name="nf4_product",
        )(x, codes, absmax)

    nf4.nf4_product = lambda *args: stand_in(*args[:6])
    shape = dataclasses.replace(SHAPES["llama-2-7b"], num_layers=layers).to_dict()
    recipe = _recipe(kind, 1, {})
    assert recipe.lora is not None
    # Without dropout: its random bits take as many cycles on either base, and most of the compiler's time.
    recipe = dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, dropout=0.0))
    job = {"config": dump_yaml(recipe), "shape": shape, "topology": f"{chip}:1x1"}
    print(json.dumps(compiled._compile(job | {"quick": False, "text": None})))


def ratio(chip: str, layers: int) -> None:
    """Cycles of a step of LLaMA-2-7B, cut to `layers`, on a base in four bits and on one in bfloat16."""
    cycles = {}
    for kind in ("nf4", "null"):
        call = [sys.executable, __file__, "_step", kind, chip, str(layers)]
        done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **TPU})
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        if found["program"] is None:
            print(f"{chip}, {layers} layers, {kind}: does not fit: {found['refused']}")
            return
        calls, kernel = found["program"]["kernels"].get("nf4_product", 0), 0.0
        if kind == "nf4":
            # Under full remat a forward product runs twice, but for a layer's last, whose result no gradient needs.
            last = calls // layers - 19
            assert last in (1, 2) and calls % layers == 0, found["program"]["kernels"]
            for inputs, outputs, forward, backward in ((4096, 4096, 8, 4), (4096, 11008, 4, 2), (11008, 4096, last, 1)):
                for way, count in (("forward", forward), ("backward", backward)):
                    kernel += layers * count * _compiled_product(chip, inputs, outputs, way, "kernel")["kernel"]
        cycles[kind] = (found["program"]["cycles"] or 0.0) + kernel
        print(
            f"{chip}, {layers} layers, {'nf4' if calls else 'bfloat16'}: {cycles[kind] / 1e6:.1f} Mcycles, "
            f"{kernel / 1e6:.1f} of them in {calls} calls of the kernel; compiled in {found['seconds']:.0f} s",
            flush=True,
        )
    print(f"{chip}, {layers} layers: nf4 over bfloat16 {cycles['nf4'] / cycles['null']:.3f}")


def read(model: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir=Path(model).absolute().parent) as folder:
        call = [sys.executable, "-m", "convert", "quantize", model, f"{folder}/out"]
        subprocess.run(call, check=True)


def main() -> None:
    if sys.argv[1:2] == ["_product"]:
        chip, inputs, outputs, way, form = sys.argv[2:]
        _product(chip, int(inputs), int(outputs), way, form)
        return
    if sys.argv[1:2] == ["_offloaded"]:
        _offloaded_on_gpu(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["_step"]:
        _step_without_kernel(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    if sys.argv[1:2] == ["_one"]:
        print(json.dumps((_ours if sys.argv[2] == "jaxlm" else _peft)(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["error", "step", "products", "tpu", "offload", "ratio", "read"])
    parser.add_argument(
        "model", nargs="?", help="read: a directory; tpu, offload: a part of a row's name; others: a chip"
    )
    parser.add_argument("layers", nargs="?", type=int, default=16, help="ratio: of the model")
    arguments = parser.parse_args()
    if arguments.what == "read":
        read(arguments.model)
    elif arguments.what == "tpu":
        tpu(arguments.model)
    elif arguments.what == "offload":
        offload(arguments.model)
    elif arguments.what == "ratio":
        ratio(arguments.model or "v5e", arguments.layers)
    elif arguments.what == "products":
        products([arguments.model] if arguments.model else list(CHIPS))
    else:
        {"error": error, "step": step}[arguments.what]()


if __name__ == "__main__":
    main()
