"""The serving engine with a 110 M LLaMA in float32, beside transformers' continuous batching and llama.cpp's server.

    python benchmarks/serve.py [--rounds 3] [--clients 1 8 32] [--llama_server PATH]

Clients ask one question after the other, each as soon as its answer before is there (prompts of 16 to 128 tokens,
answers of up to 64, greedy, the same for all sides). Every side is a process of its own that works when told to; they
do so in turn, so that a busy machine slows all, and the ratio of each round is taken. jaxlm and transformers are asked
in their processes, llama.cpp through HTTP on the loopback, where it adds well below a millisecond to a token. Weights
are random, so texts mean nothing. With 'llama-server' (from llama.cpp, or built of llama-cpp-python's sources) and the
package gguf, llama.cpp takes part.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from train_cpu import SHAPE

ROWS, CONTEXT, PAGE = 32, 512, 16
# When each token of an answer came, in seconds; of each answer.
Times = list[list[float]]
# Answers questions: (token ids, number of new tokens), by a number of clients.
Asked = list[tuple[list[int], int]]


def questions(clients: int, each: int, longest: int) -> Asked:
    rng = np.random.default_rng(clients)
    count = each * clients
    sizes = zip(rng.choice([16, 32, 64, 128], count), rng.integers(longest // 4, longest + 1, count), strict=True)
    return [(rng.integers(300, 32000, prompt).tolist(), int(new)) for prompt, new in sizes]


def by_clients(asked: Asked, clients: int, answer: Callable[[list[int], int], list[float]]) -> Times:
    """Each client in a thread; `answer` returns when each token came."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(asked)):
        left.put(number)
    times: Times = [[] for _ in asked]

    def client() -> None:
        while True:
            try:
                number = left.get_nowait()
            except queue.Empty:
                return
            started = time.perf_counter()
            times[number] = [started, *answer(*asked[number])]

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(come) == 1 + new for come, (_, new) in zip(times, asked, strict=True))
    return times


def jax_side(directory: str) -> Callable[[Asked, int], Times]:
    import jax

    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    from decode_gpu import RandomModel

    from jaxlm.config import Decoding, MeshConfig
    from jaxlm.devices.mesh import make_mesh
    from jaxlm.inference.model import load_weights
    from jaxlm.inference.paged.requests import Piece, Query
    from jaxlm.inference.paged.thread import PagedEngine
    from jaxlm.inference.rows import DeviceModel
    from jaxlm.models.decoder import Decoder
    from jaxlm.models.families import read_config

    config = read_config({"architectures": ["LlamaForCausalLM"], **SHAPE})
    decoder, mesh = Decoder(config), make_mesh(MeshConfig())
    model = DeviceModel(decoder, load_weights(decoder, mesh, RandomModel(config)), mesh, [])
    engine = PagedEngine(model, ROWS, context=CONTEXT, slots=PAGE)
    while len(set(engine.ready())) > 1:
        time.sleep(0.05)

    def answer(prompt: list[int], new: int) -> list[float]:
        pieces: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        engine.submit(
            Query(tuple(prompt), Decoding(max_new_tokens=new)), lambda piece: pieces.put((time.perf_counter(), piece))
        )
        times: list[float] = []
        while True:
            when, piece = pieces.get()
            if not isinstance(piece, Piece):
                raise piece
            times += [when] * len(piece.ids)
            if piece.finish is not None:
                return times

    return lambda asked, clients: by_clients(asked, clients, answer)


def torch_side(directory: str) -> Callable[[Asked, int], Times]:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    del directory
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).eval()
    options = GenerationConfig(max_new_tokens=96, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(page_size=PAGE, num_blocks=ROWS * CONTEXT // PAGE, max_batch_tokens=256 + ROWS)
    manager = model.init_continuous_batching(generation_config=options, continuous_batching_config=sizes)
    manager.start()

    def run(asked: Asked, clients: int) -> Times:
        times: Times = [[] for _ in asked]
        left = list(range(len(asked)))
        under_way: dict[str, int] = {}

        def ask() -> None:
            if left:
                number = left.pop(0)
                prompt, new = asked[number]
                times[number] = [time.perf_counter()]
                name = manager.add_request(prompt, max_new_tokens=new, streaming=True, eos_token_id=-1)
                under_way[name] = number

        for _ in range(clients):
            ask()
        while under_way:
            result = manager.get_result(timeout=60)
            assert result is not None and result.error is None, result
            number = under_way[result.request_id]
            missing = len(result.generated_tokens) + 1 - len(times[number])
            times[number] += [time.perf_counter()] * missing
            if result.is_finished():
                del under_way[result.request_id]
                ask()
        assert all(len(come) == 1 + new for come, (_, new) in zip(times, asked, strict=True))
        return times

    return run


def write_gguf(path: Path) -> None:
    """The 110 M model with random weights and a vocabulary of made-up words."""
    import gguf

    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    d, f, v, layers = (SHAPE[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    heads = SHAPE["num_attention_heads"]
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(f)
    writer.add_head_count(heads)
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_rope_dimension_count(d // heads)
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    kinds = gguf.TokenType
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words + [f"w{n}" for n in range(v - len(words))])
    writer.add_token_scores([0.0] * v)
    writer.add_token_types(types + [kinds.NORMAL] * (v - len(types)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int) -> None:
        values = np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.02, shape)
        writer.add_tensor(name, values.astype(np.float32))

    add("token_embd.weight", v, d)
    add("output_norm.weight", d)
    for n in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{n}.{name}.weight", d)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{n}.{name}.weight", d, d)
        for name, shape in (("ffn_gate", (f, d)), ("ffn_up", (f, d)), ("ffn_down", (d, f))):
            add(f"blk.{n}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_side(directory: str, program: str) -> Callable[[Asked, int], Times]:
    path, port = Path(directory) / "model.gguf", 8179
    write_gguf(path)
    command = [program, "-m", path, "--port", port, "-c", ROWS * CONTEXT, "-np", ROWS, "-t", 2, "--no-webui"]
    with Path(directory, "llama.log").open("w") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)

    def call(method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse()

    while True:
        assert server.poll() is None, Path(directory, "llama.log").read_text()[-2000:]
        try:
            if call("GET", "/health").status == 200:
                break
        except OSError:
            pass
        time.sleep(0.2)

    def answer(prompt: list[int], new: int) -> list[float]:
        body = dict(prompt=prompt, n_predict=new, ignore_eos=True, stream=True, temperature=0, cache_prompt=False)
        response, times, count = call("POST", "/completion", json.dumps(body)), [], 0
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: "):
                content = json.loads(line[6:])
                tokens = len(content.get("tokens", [])) if not content.get("stop") else 0
                times += [time.perf_counter()] * tokens
                if content.get("stop"):
                    count = content["tokens_predicted"]
                    break
        response.close()
        assert count == new, (count, new)
        return [*times, *[time.perf_counter()] * (new - len(times))][:new]

    def run(asked: Asked, clients: int) -> Times:
        return by_clients(asked, clients, answer)

    run.close = server.terminate  # type: ignore[attr-defined]
    return run


def serve(side: str, directory: str, program: str) -> None:
    """Answers the questions of as many clients as each line on stdin says; with a line of JSON."""
    run = {
        "jaxlm": lambda: jax_side(directory),
        "transformers": lambda: torch_side(directory),
        "llama.cpp": lambda: llama_cpp_side(directory, program),
    }[side]()
    print("{}", flush=True)
    for line in sys.stdin:
        clients, each, longest = map(int, line.split())
        asked = questions(clients, each, longest)
        started = time.perf_counter()
        times = run(asked, clients)
        seconds = time.perf_counter() - started
        first = [come[1] - come[0] for come in times]
        between = [b - a for come in times for a, b in itertools.pairwise(come[1:])]
        result = {"tokens": sum(new for _, new in asked), "seconds": seconds, "first": first, "between": between}
        print(json.dumps(result), flush=True)
    getattr(run, "close", lambda: None)()


class Side:
    def __init__(self, side: str, directory: str, program: str) -> None:
        command = [sys.executable, __file__, "--serve", side, directory, program]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit("a side of the benchmark ended; its message stands above")
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer

    def run(self, clients: int, each: int, longest: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{clients} {each} {longest}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def percentiles(seconds: list[float]) -> str:
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    return f"{p50:.0f} / {p95:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--each", type=int, default=3, help="questions of a client")
    parser.add_argument(
        "--longest", type=int, default=64, help="tokens of the longest answer; the shortest has a quarter"
    )
    parser.add_argument("--sides", nargs="+", default=["jaxlm", "transformers"])
    parser.add_argument("--llama_server", default="", help="path of llama.cpp's llama-server; it then takes part")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    names = [*arguments.sides, *(["llama.cpp"] if arguments.llama_server else [])]
    speeds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        sides = {name: Side(name, directory, arguments.llama_server) for name in names}
        for side in sides.values():
            side.run(2, 1, 8)  # warm-up
        for clients in arguments.clients:
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
            for _ in range(arguments.rounds):
                for name, side in sides.items():
                    results[name].append(side.run(clients, arguments.each, arguments.longest))
            for name, found in results.items():
                speeds[name, clients] = [each["tokens"] / each["seconds"] for each in found]
                ratios = [a / b for a, b in zip(speeds["jaxlm", clients], speeds[name, clients], strict=True)]
                first, between = ([value for each in found for value in each[key]] for key in ("first", "between"))
                print(
                    f"{clients:3} clients, {name:13} {statistics.median(speeds[name, clients]):7.1f} tokens/s; "
                    f"ms p50 / p95 to the first token {percentiles(first)}, between tokens {percentiles(between)}; "
                    f"jaxlm / this: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )
        for side in sides.values():
            side.close()
    for clients in arguments.clients[1:]:
        alone = speeds["jaxlm", arguments.clients[0]]
        ratios = [a / b for a, b in zip(speeds["jaxlm", clients], alone, strict=True)]
        print(f"jaxlm, {clients} clients / {arguments.clients[0]}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
