"""Guesses by lookup in the serving engine (`--speculate`): answers that repeat their prompts, and answers that do not.

    python benchmarks/serve_speculate.py [--rounds 5] [--guesses 3 7] [--clients 1 8]

A 110 M LLaMA in float32, whose embeddings make it answer as an extraction would: behind each token comes the next one
of a fixed order of the vocabulary, whatever else it computes. A prompt holds passages of that order, shuffled; of an
answer's tokens three quarters stand in them, in runs of 12, and the rest nowhere. Prompts of the other kind hold
nothing of the answer. Engines without guesses and with some answer in turn, in one process; the ratio of each round is
taken.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import time
from typing import Any

import jax
import numpy as np
from decode_gpu import RandomModel
from serve import by_clients
from train_cpu import SHAPE

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.inference.model import load_weights
from jaxlm.inference.paged.requests import Piece, Query
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.inference.rows import DeviceModel
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import read_config

ROWS, CONTEXT, RUN, GAP = 16, 512, 12, 4


class Ordered(RandomModel):
    """Random leaves, but for a head that names the token that comes next in `order`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        rng = np.random.default_rng(0)
        self.order = rng.permutation(np.arange(3, config.vocab_size))
        embedding = rng.standard_normal((config.vocab_size, config.hidden_size), np.float32)
        head = np.zeros_like(embedding)
        head[np.roll(self.order, -1)] = embedding[self.order]
        scale = np.ones(config.hidden_size, np.float32)
        self.made = {"embed_tokens/embedding": 4 * embedding, "lm_head/kernel": head, "norm/scale": scale}


def prompt(order: np.ndarray, start: int, new: int, repeats: bool) -> list[int]:
    """Passages in another order, then the token behind which the answer begins."""
    passages = [order[at : at + RUN] for at in range(start, start + new, RUN + GAP)]
    if not repeats:
        passages = [order[-1 - at : -1 - at - RUN : -1] for at in range(start, start + new, RUN + GAP)]
    shuffled = np.random.default_rng(start).permutation(len(passages))
    return [*np.concatenate([passages[number] for number in shuffled]).tolist(), int(order[start])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guesses", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer")
    arguments = parser.parse_args()
    config = read_config({"architectures": ["LlamaForCausalLM"], **SHAPE, "tie_word_embeddings": False})
    source, decoder, mesh = Ordered(config), Decoder(config), make_mesh(MeshConfig(), jax.devices()[:1])
    engines = {}
    for guesses in (0, *arguments.guesses):
        model = DeviceModel(decoder, load_weights(decoder, mesh, source), mesh, [])
        engines[guesses] = PagedEngine(model, ROWS, pages=ROWS * CONTEXT // 16, context=CONTEXT, speculate=guesses)
        while len(set(engines[guesses].ready())) > 1:
            time.sleep(0.05)

    def seconds(engine: PagedEngine, asked: list[tuple[list[int], int]], clients: int) -> float:
        def answer(ids: list[int], new: int) -> list[float]:
            pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
            engine.submit(Query(tuple(ids), Decoding(max_new_tokens=new)), pieces.put)
            times, tokens = [], []
            while True:
                piece = pieces.get()
                assert isinstance(piece, Piece), piece
                times += [time.perf_counter()] * len(piece.ids)
                tokens += piece.ids
                if piece.finish is not None:
                    start = int(np.flatnonzero(source.order == ids[-1])[0]) + 1
                    assert tokens == source.order[start : start + new].tolist()
                    return times

        started = time.perf_counter()
        by_clients(asked, clients, answer)
        return time.perf_counter() - started

    start = 0
    for clients in arguments.clients:
        for repeats in (True, False):
            took: dict[int, list[float]] = {guesses: [] for guesses in engines}
            before = {guesses: engine.stats() for guesses, engine in engines.items()}
            for turn in range(arguments.rounds + 1):
                starts = range(start, start + clients * 200, 200)
                start = (start + clients * 200) % 20000
                asked = [(prompt(source.order, at, arguments.new, repeats), arguments.new) for at in starts]
                for guesses, engine in engines.items():
                    elapsed = seconds(engine, asked, clients)
                    if turn:  # the first round warms up
                        took[guesses].append(elapsed)
            for guesses, engine in engines.items():
                stats, tokens = engine.stats(), clients * arguments.new
                ratios = [a / b for a, b in zip(took[0], took[guesses], strict=True)]
                accepted = stats.accepted_total - before[guesses].accepted_total
                guessed = stats.guessed_total - before[guesses].guessed_total
                print(
                    f"{clients:2} clients, answers {'that repeat' if repeats else 'of their own'}, {guesses} guesses: "
                    f"{tokens / statistics.median(took[guesses]):6.1f} tokens/s; ratio to none "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
                    f"{accepted} of {guessed} guesses right",
                    flush=True,
                )


if __name__ == "__main__":
    main()
