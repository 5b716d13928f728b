"""The serving engine at LLaMA-7B shape on one GPU: one command, one table, within four minutes.

Clients ask one question after the other, each as soon as its answer before is there (prompts of 16 to 128 tokens, the
questions of `serve.py`, greedy). Weights are random, in bfloat16. "of the limit": tokens/s beside what the memory's
bandwidth would allow if every step read all weights once and nothing else were to be done. A case that would not end in
time is left out, and said to be.

    python benchmarks/serve_gpu.py [--shape llama-2-7b] [--clients 1 8 32 64] [--bandwidth 4.8e12] [--seconds 230]
"""

from __future__ import annotations

import argparse
import itertools
import queue
import time
from pathlib import Path
from typing import Any

import jax
from decode_gpu import RandomModel
from serve import by_clients, percentiles, questions

from jaxlm.cli.start import use_compilation_cache
from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.inference.model import load_weights, weight_bytes
from jaxlm.inference.paged.requests import Piece, Query
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.inference.rows import DeviceModel
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import load_shape


def answered(engine: PagedEngine, prompt: list[int], new: int) -> list[float]:
    """When each token of an answer came."""
    pieces: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
    query = Query(tuple(prompt), Decoding(max_new_tokens=new), ignore_stop_ids=True)
    engine.submit(query, lambda piece: pieces.put((time.perf_counter(), piece)))
    times: list[float] = []
    while True:
        when, piece = pieces.get()
        if not isinstance(piece, Piece):
            raise piece
        times += [when] * len(piece.ids)
        if piece.finish is not None:
            return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rows", type=int, default=64, help="answers at a time")
    parser.add_argument("--each", type=int, default=3, help="questions of a client")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest answer")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second; default: H200")
    parser.add_argument("--seconds", type=float, default=230, help="for all")
    parser.add_argument("--cache", type=Path, help="the compilation cache; default: jaxlm's own")
    arguments = parser.parse_args()
    started = time.perf_counter()
    use_compilation_cache(None if arguments.cache is None else str(arguments.cache))
    config = load_shape(arguments.shape)
    decoder = Decoder(config, dtype="bfloat16", param_dtype="bfloat16")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = DeviceModel(decoder, load_weights(decoder, mesh, RandomModel(config)), mesh, [])
    size, loaded = weight_bytes(model.weights), time.perf_counter()
    engine = PagedEngine(model, arguments.rows, context=arguments.context)
    while len(set(engine.ready())) > 1:
        time.sleep(0.05)
    ready = time.perf_counter()
    print(
        f"{jax.devices()[0].device_kind}, {arguments.shape}, bfloat16, {arguments.rows} rows, "
        f"{engine.stats().pages:,} pages; made in {loaded - started:.0f} s, {engine.ready()[1]} programs compiled in "
        f"{ready - loaded:.0f} s"
    )
    print("clients | tokens/s | of the limit | ms to the first token, p50 / p95 | between tokens, p50 / p95")

    def answer(prompt: list[int], new: int) -> list[float]:
        return answered(engine, [token % config.vocab_size for token in prompt], new)

    by_clients(questions(2, 1, 4), 2, answer)  # warm-up
    slowest = 0.0
    for clients in arguments.clients:
        begin = time.perf_counter()
        if begin - started + 1.5 * slowest > arguments.seconds:
            print(f"{clients:7} | left out: {begin - started:.0f} of {arguments.seconds:.0f} s are over")
            continue
        asked = questions(clients, arguments.each, arguments.longest)
        times = by_clients(asked, clients, answer)
        slowest = time.perf_counter() - begin
        speed = sum(new for _, new in asked) / slowest
        first = [come[1] - come[0] for come in times]
        between = [b - a for come in times for a, b in itertools.pairwise(come[1:])]
        share = speed * size / (arguments.bandwidth * min(clients, arguments.rows))
        print(
            f"{clients:7} | {speed:8.1f} | {share:12.1%} | {percentiles(first):>32} | {percentiles(between):>25}",
            flush=True,
        )
    engine.drain()


if __name__ == "__main__":
    main()
