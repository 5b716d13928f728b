"""Attention on one Hopper GPU: our kernel beside cuDNN's, JAX's own Mosaic GPU kernel and PyTorch's.

Causal, 32 heads of 128, bfloat16; 16,384 tokens in all (rows of 1,024 to 16,384), forward and forward + backward; then
rows of 8,192 that hold eight documents of 1,024, where cuDNN is given a dense mask. TFLOP/s count the visible half of
the square: 2 H h T^2 a row forward, 3.5 times that with the gradients. Every result is compared with ours before it is
timed. One call, a few minutes (PyTorch only where it is installed with CUDA):

    python benchmarks/attention_gpu.py [--lengths 1024,2048,4096,8192,16384] [--rounds 7] [--json OUT]
    python benchmarks/attention_gpu.py --check     # every mask and head dim beside the plain form, and repeated runs
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
from jaxlm.nn.attention import MaskSpec, cudnn_attention, reference_attention
from jaxlm.nn.positions import alibi_slopes

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
    q, k, v, grad = (torch.from_dlpack(a).clone().transpose(1, 2).requires_grad_() for a in arrays)

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
        a = jnp.from_dlpack(a.detach().contiguous()) if hasattr(a, "detach") else a
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        worst = max(worst, float(jnp.abs(a - b).max() / jnp.abs(b).max()))
    return worst


# (H, K, h, T, options): head dims, shared heads, lengths that blocks do not divide, and every mask.
CHECKS: tuple[tuple[int, int, int, int, dict[str, Any]], ...] = (
    (4, 4, 128, 1000, {}),
    (8, 2, 64, 777, {"documents": 5}),
    (4, 1, 128, 1500, {"documents": 3, "window": 300}),
    (4, 4, 128, 900, {"soft_cap": 30.0}),
    (2, 2, 256, 640, {"documents": 2}),
    (4, 2, 80, 500, {"documents": 4}),
    (8, 8, 128, 1024, {"documents": 2, "alibi": True}),
    (4, 4, 96, 700, {"causal": False}),
)


def check_all() -> bool:
    """Values and gradients beside the plain form in float32; False where one is wrong or changes between two runs."""
    fine = True
    for heads, kv_heads, dim, length, options in CHECKS:
        keys = jax.random.split(jax.random.key(1), 4)
        shapes = [(2, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
        exact = [jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True)]
        exact = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in exact]
        arrays = [a.astype(jnp.bfloat16) for a in exact]
        settings = dict(options)
        documents, alibi = settings.pop("documents", 0), settings.pop("alibi", False)
        ids = None
        if documents:  # of unlike lengths, with padding behind the last
            cuts = np.sort(np.random.default_rng(2).choice(np.arange(1, length - 40), documents, replace=False))
            row = np.searchsorted(cuts, np.arange(length), side="right") + 1
            ids = jnp.asarray(np.where(row > documents, 0, row)[None].repeat(2, 0), jnp.int32)
        slopes = jnp.asarray(alibi_slopes(heads)) if alibi else None
        mask = MaskSpec(ids, alibi=alibi, **settings)
        ours = jax.jit(
            with_gradients(
                lambda q, k, v, ids=ids, slopes=slopes, settings=settings: flash_attention(
                    q, k, v, ids, slopes=slopes, backend="gpu", **settings
                )[0]
            )
        )

        def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec = mask, ids: Any = ids) -> jax.Array:
            out = reference_attention(q, k, v, mask)
            return out if ids is None else jnp.where((ids == 0)[:, :, None, None], 0.0, out)

        with jax.default_matmul_precision("highest"):
            expected = jax.jit(with_gradients(plain))(*exact)
        found = [ours(*arrays) for _ in range(3)]
        errors = [
            float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
            for a, b in zip(found[0], expected, strict=True)
        ]
        same = all(bool((a == b).all()) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        right = all(e < 0.01 for e in errors)
        fine &= right and same
        verdict = ("right" if right else "WRONG") + ("" if same else ", CHANGES BETWEEN RUNS")
        shown = " ".join(f"{name} {e:.1e}" for name, e in zip(("out", "dq", "dk", "dv"), errors, strict=True))
        print(f"H {heads} K {kv_heads} h {dim} T {length} {options}: {shown}: {verdict}", flush=True)
    return fine


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
            print(f"  {name:<12} not run: {str(reason).splitlines()[0][:120]}")
            continue
        if name != "ours" and "ours" in ready:
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
        ratios = sorted(theirs / ours for theirs, ours in zip(taken, times.get("ours", taken), strict=True))
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
    parser.add_argument("--check", action="store_true", help="only compare with the plain form; exit status 1: wrong")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.error(f"this needs a Hopper GPU, JAX sees {device.device_kind}")
    print(f"{device.device_kind}, JAX {jax.__version__}, H {HEADS}, h {DIM}, bfloat16, medians of {arguments.rounds}")
    if arguments.check:
        raise SystemExit(0 if check_all() else 1)
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
