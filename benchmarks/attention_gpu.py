"""Attention on one Hopper GPU: our kernel beside cuDNN's, JAX's own Mosaic GPU kernel and PyTorch's.

Causal, 32 heads of 128, bfloat16; 16,384 tokens in all (rows of 1,024 to 16,384), forward and forward + backward; then
rows of 8,192 that hold eight documents of 1,024, where cuDNN is given a dense mask. TFLOP/s count the visible half of
the square: 2 H h T^2 a row forward, 3.5 times that with the gradients. Every result is compared with ours before it is
timed. One call, a few minutes (PyTorch only where it is installed with CUDA):

    python benchmarks/attention_gpu.py [--lengths 1024,2048,4096,8192,16384] [--rounds 7] [--json OUT]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.flash_attention import flash_attention
from jaxlm.nn.attention import MaskSpec, cudnn_attention

HEADS, DIM, TOKENS = 32, 128, 16384
PACKED, DOCUMENT = 8192, 1024
CALLS = 10  # between two looks at the clock
Step = Callable[[], Any]


def flops(rows: int, length: int, backward: bool) -> float:
    return rows * 2 * HEADS * DIM * length**2 * (3.5 if backward else 1)


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
        out, back = jax.vjp(attend, q, k, v)
        return (out, *back(grad))

    return run


def of_jax(attend: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], backward: bool) -> Step:
    run = jax.jit(with_gradients(attend)) if backward else jax.jit(lambda q, k, v, _: attend(q, k, v))
    return lambda: run(*arrays)


def mosaic(arrays: tuple[jax.Array, ...], backward: bool) -> Step | str:
    """JAX's kernel takes float16 alone; its backward pass knows no causal mask."""
    if backward:
        return "no causal gradient"
    try:
        from jax.experimental.pallas.ops.gpu import attention_mgpu
    except SyntaxError as error:
        return f"cannot be imported by this Python: {error}"
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    scale = 1 / np.sqrt(DIM)  # it does not scale
    halves = tuple(a.astype(jnp.float16) for a in arrays)
    return of_jax(lambda q, k, v: attention_mgpu.attention(q * jnp.float16(scale), k, v, config), halves, False)


def of_torch(arrays: tuple[jax.Array, ...], backward: bool) -> Step | str:
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "PyTorch has no CUDA here"
    tensors = [
        torch.from_numpy(np.asarray(a, np.float32)).cuda().bfloat16().transpose(1, 2).requires_grad_() for a in arrays
    ]
    q, k, v, grad = tensors

    def step() -> Any:
        with torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            found = (out, *torch.autograd.grad(out, (q, k, v), grad)) if backward else (out,)
        torch.cuda.synchronize()
        return [x.transpose(1, 2) for x in found]

    return step


def wait(result: Any) -> None:
    jax.block_until_ready([x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)])


def seconds(step: Step) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(CALLS):
        result = step()
    wait(result)
    return (time.perf_counter() - start) / CALLS


def error(found: Any, ours: Any) -> float:
    """Largest difference, of the largest value."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(ours), strict=True):
        a = a.detach().float().cpu().numpy() if hasattr(a, "detach") else np.asarray(a, np.float32)
        b = np.asarray(b, np.float32)
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst


def compare(title: str, steps: dict[str, Step | str], work: float, rounds: int) -> list[dict[str, Any]]:
    """Times all in turn; prints and returns a line for each."""
    print(f"\n{title}")
    ready: dict[str, Step] = {}
    differences: dict[str, float] = {}
    for name, step in steps.items():
        if isinstance(step, str):
            print(f"  {name:<12} not run: {step}")
            continue
        try:
            result = step()  # compiles
            wait(result)
        except (RuntimeError, ValueError) as reason:  # what libraries raise when they cannot serve
            if name == "ours":
                raise
            print(f"  {name:<12} not run: {str(reason).splitlines()[0][:120]}")
            continue
        if name != "ours":
            differences[name] = error(result, ready["ours"]())
            if differences[name] > 0.03:
                print(f"  {name:<12} not timed: differs from ours by {differences[name]:.3f} of the largest value")
                continue
        ready[name] = step
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, step in ready.items():
            times[name].append(seconds(step))
    lines = []
    for name, taken in times.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(taken, times["ours"], strict=True))
        line = {
            "case": title,
            "name": name,
            "ms": 1e3 * statistics.median(taken),
            "tflops": work / statistics.median(taken) / 1e12,
            "ours_is_faster_by": statistics.median(ratios),
            "difference": differences.get(name, 0.0),
        }
        lines.append(line)
        speed = f"{line['ms']:8.3f} ms {line['tflops']:7.1f} TFLOP/s"
        ratio = f"ours is {line['ours_is_faster_by']:.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"  {name:<12} {speed}   {ratio}, differs by {line['difference']:.4f}", flush=True)
    return lines


def tensors(rows: int, length: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, (rows, length, HEADS, DIM), jnp.bfloat16) for key in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the lines there")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.error(f"this needs a Hopper GPU, JAX sees {device.device_kind}")
    print(f"{device.device_kind}, JAX {jax.__version__}, H {HEADS}, h {DIM}, bfloat16, medians of {arguments.rounds}")
    ours = functools.partial(flash_attention, backend="gpu")
    lines = []
    for length in map(int, arguments.lengths.split(",")):
        arrays = tensors(TOKENS // length, length)
        for backward in (False, True):
            steps: dict[str, Step | str] = {
                "ours": of_jax(lambda q, k, v: ours(q, k, v)[0], arrays, backward),
                "cudnn": of_jax(lambda q, k, v: cudnn_attention(q, k, v, MaskSpec()), arrays, backward),
                "jax mosaic": mosaic(arrays, backward),
                "torch sdpa": of_torch(arrays, backward),
            }
            title = f"T {length}, {TOKENS // length} rows, {'forward + backward' if backward else 'forward'}"
            lines += compare(title, steps, flops(TOKENS // length, length, backward), arguments.rounds)
    rows = TOKENS // PACKED
    arrays = tensors(rows, PACKED)
    ids = jnp.repeat(jnp.arange(1, PACKED // DOCUMENT + 1, dtype=jnp.int32), DOCUMENT)[None].repeat(rows, 0)
    for backward in (False, True):
        steps = {
            "ours": of_jax(lambda q, k, v: ours(q, k, v, ids)[0], arrays, backward),
            "cudnn, mask": of_jax(lambda q, k, v: cudnn_attention(q, k, v, MaskSpec(ids)), arrays, backward),
        }
        title = f"packed: {PACKED // DOCUMENT} documents of {DOCUMENT}, {rows} rows, "
        work = flops(rows * PACKED // DOCUMENT, DOCUMENT, backward)
        lines += compare(title + ("forward + backward" if backward else "forward"), steps, work, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
