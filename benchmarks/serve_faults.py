"""What a server does under clients that are many, that go away, that send nonsense, or that never finish a sentence.

    python benchmarks/serve_faults.py http://127.0.0.1:8000 [--pid PID] [--seconds 60]

Bounded: it ends by itself, and asks a server at loopback only. Nothing but 4xx may answer nonsense, and afterwards the
server must be as before: no answers under way, no pages in use, no more threads, not much more memory (with --pid).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from urllib.parse import urlparse

HEAD = "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n"
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/embeddings", "/generate")
PIECES = [
    '"',
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "null",
    "true",
    "1e999",
    "-1",
    "\\ud800",
    "NaN",
    "\x00",
    "prompt",
    "é",
    " ",
]


class Server:
    """Where it listens, and what its process uses."""

    def __init__(self, url: str, pid: int | None) -> None:
        parts = urlparse(url)
        if parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.port is None:
            raise SystemExit("only a server at loopback, with its port, is asked")
        self.host, self.port, self._pid = parts.hostname, parts.port, pid

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    def request(self, path: str, body: bytes, length: int | None = None) -> bytes:
        size = len(body) if length is None else length
        return HEAD.format(path=path, host=f"{self.host}:{self.port}", length=size).encode() + b"\r\n" + body

    async def ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of a reply on a connection of its own; 0: none came."""
        reader, writer = await self.connect()
        try:
            writer.write(self.request(path, body).replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
            await writer.drain()
            reply = await asyncio.wait_for(reader.read(), 120)
        except (ConnectionError, TimeoutError):
            return 0, b""
        finally:
            writer.close()
        head, _, rest = reply.partition(b"\r\n\r\n")
        return (int(head.split(b" ", 2)[1]), rest) if head else (0, b"")

    async def figures(self) -> dict[str, float]:
        """What /metrics says of answers and pages, and what the system says of the process."""
        reader, writer = await self.connect()
        writer.write(f"GET /metrics HTTP/1.1\r\nhost: {self.host}:{self.port}\r\nconnection: close\r\n\r\n".encode())
        lines = (await reader.read()).decode().splitlines()
        writer.close()
        named = dict(line.rsplit(" ", 1) for line in lines if line.startswith("jaxlm:") and "{" not in line)
        wanted = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        result = {name: float(named[f"jaxlm:{name}"]) for name in wanted}
        if self._pid is not None:
            status = Path(f"/proc/{self._pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            result |= {"threads": float(fields["Threads"]), "MiB": float(fields["VmRSS"].split()[0]) / 1024}
            result["open files"] = float(len(list(Path(f"/proc/{self._pid}/fd").iterdir())))
        return result

    async def idle(self, seconds: float = 30) -> dict[str, float]:
        """Figures once nothing is under way."""
        end = time.monotonic() + seconds
        while (figures := await self.figures())["num_requests_running"] + figures["num_requests_waiting"]:
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.2)
        return figures


async def crowd(server: Server, seconds: float, clients: int = 64) -> dict[int, int]:
    """Clients that ask one thing after another; a full queue is an answer. Replies by status, below 0 if not as due."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            body = {"prompt": "rock " * draw.choice((1, 5, 40, 150)), "max_tokens": draw.choice((1, 8, 64))}
            body |= {"stream": draw.random() < 0.5, "seed": number, "n": draw.choice((1, 1, 2))}
            status, reply = await server.ask("/v1/completions", json.dumps(body).encode())
            # A small model refuses the longest prompt, and says so.
            done = status == 429 or b"finish_reason" in reply or (status == 400 and b"context_length_exceeded" in reply)
            statuses[status if done else -status] = statuses.get(status if done else -status, 0) + 1
            if status == 429:
                await asyncio.sleep(0.5)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return statuses


async def killed(server: Server, count: int = 200) -> None:
    """Clients that go away while they are answered, or while they ask."""
    body = json.dumps({"prompt": "rock", "max_tokens": 400, "stream": True}).encode()
    for number in range(count):
        _, writer = await server.connect()
        whole = server.request("/v1/completions", body)
        writer.write(whole if number % 2 else whole[: len(whole) // 2])
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.transport.abort()


async def slow(server: Server, count: int = 50) -> int:
    """Clients that send a header every second, or half a body; how many the server has cut after 45 seconds."""

    async def client(number: int) -> bool:
        reader, writer = await server.connect()
        start = b"POST /v1/completions HTTP/1.1\r\n" if number % 2 else server.request(PATHS[0], b"{", 100)
        try:
            writer.write(start)
            end = time.monotonic() + 45
            while time.monotonic() < end:
                try:
                    if not await asyncio.wait_for(reader.read(1 << 16), 1):
                        return True
                except TimeoutError:
                    writer.write(b"x: y\r\n" if number % 2 else b"")
        except ConnectionError:
            return True
        finally:
            writer.close()
        return False

    return sum(await asyncio.gather(*(client(number) for number in range(count))))


async def malformed(server: Server, count: int = 10_000) -> dict[int, int]:
    """Bodies that are not what a route takes: nonsense, and good bodies with a wrong piece; statuses.

    A few of the latter happen to be right, and are answered.
    """
    draw = random.Random(0)
    good = {"prompt": "rock", "messages": [{"role": "user", "content": "rock"}], "input": "a", "tokens": [1]}
    values = (None, -1, 1e400, "x", [], {}, [[]], [None], {"a": {"b": []}}, True, "\ud800", 10**30, [10**9])
    statuses: dict[int, int] = {}

    def body() -> bytes:
        if draw.random() < 0.4:
            return "".join(draw.choices(PIECES, k=draw.randrange(40))).encode()
        fields = {draw.choice((*good, "temperature", "n", "stop", "tools", "max_tokens", "x")): draw.choice(values)}
        fields = {**{key: good[key] for key in draw.sample(sorted(good), draw.choice((1, 2)))}, **fields}
        return json.dumps(fields).encode()

    async def client(number: int) -> None:
        for _ in range(number):
            status, _ = await server.ask(draw.choice(PATHS), body())
            statuses[status] = statuses.get(status, 0) + 1

    await asyncio.gather(*(client(count // 32 + (k < count % 32)) for k in range(32)))
    return statuses


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--seconds", type=float, default=60, help="how long the crowd asks")
    options = parser.parse_args()
    server = Server(options.url, options.pid)
    await crowd(server, 2)  # so that what is made once is there
    before = await server.idle()
    print("before    ", before)
    asked = await crowd(server, options.seconds)
    print("crowd     ", asked, "(status: replies)")
    await killed(server)
    print("killed    ", await server.idle())
    cut = await slow(server)
    print("slow      ", cut, "of 50 are cut")
    nonsense = await malformed(server)
    print("malformed ", nonsense, "(status: replies)")
    after = await server.idle()
    print("after     ", after)
    problems = [
        "the crowd met errors" if set(asked) - {200, 400, 429} else "",
        "slow clients stay" if cut < 50 else "",
        "nonsense is no 4xx" if any(status != 200 and not 400 <= status < 500 for status in nonsense) else "",
        "answers are left" if after["num_requests_running"] + after["num_requests_waiting"] else "",
        "pages are left" if after["kv_cache_usage_perc"] > before["kv_cache_usage_perc"] else "",
        "threads are left" if after.get("threads", 0) > before.get("threads", 0) + 2 else "",
        "files are left open" if after.get("open files", 0) > before.get("open files", 0) + 2 else "",
        "memory grows" if after.get("MiB", 0) > before.get("MiB", 0) + 64 else "",
    ]
    found = [problem for problem in problems if problem]
    print("as it must be" if not found else f"WRONG: {'; '.join(found)}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    asyncio.run(main())
