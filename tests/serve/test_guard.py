"""What the server keeps out, and whom it does not wait for, tried with bare sockets: no client sends such things."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from jaxlm.inference.paged.requests import AnswerFailed
from jaxlm.serve import guard, server
from jaxlm.tokenizer import Tokenizer
from tests.serve.fake import FakeEngine
from tests.serve.model import fake_engine, running, served

ASK = {"model": "tiny", "prompt": "rock", "max_tokens": 400, "temperature": 0}
ROOT = Path(__file__).parents[2]


def raw(url: str, data: bytes, wait: float = 5.0) -> bytes:
    """What comes back until the server closes the connection, or nothing more comes."""
    with connected(url) as connection:
        connection.settimeout(wait)
        connection.sendall(data)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except (TimeoutError, ConnectionResetError):
            pass
    return b"".join(parts)


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def request(url: str, body: bytes, path: str = "/v1/completions", length: int | None = None, **headers: str) -> bytes:
    named = {"host": url.removeprefix("http://"), "content-type": "application/json", "connection": "close"}
    named |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines = [f"POST {path} HTTP/1.1", *(f"{key}: {value}" for key, value in named.items())]
    lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


def soon(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it holds within some seconds."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.fixture
def slow(tokenizer: Tokenizer) -> Iterator[tuple[str, FakeEngine]]:
    """A server whose answers take a quarter of a minute."""
    engine = fake_engine(tokenizer, "rock " * 300, step=0.05, rows=2, queue=2)
    with running(served(tokenizer, engine)) as (url, _):
        yield url, engine


# Who may ask ------------------------------------------------------------------------------------


def test_every_reply_has_the_headers_that_bind_a_browser(url: str) -> None:
    replies = [httpx2.get(f"{url}{path}") for path in ("/health", "/v1/models", "/nothing", "/v1/completions")]
    replies.append(httpx2.post(f"{url}/v1/completions", content=b"{", headers={"content-type": "application/json"}))
    assert [reply.status_code for reply in replies] == [200, 200, 404, 405, 400]
    for reply in replies:
        assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["x-frame-options"] == "DENY"
        policy = reply.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
        assert "access-control-allow-origin" not in reply.headers and "server" not in reply.headers
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_key_is_asked_for_everywhere_but_health_and_the_page(tokenizer: Tokenizer, engine: FakeEngine) -> None:
    with running(served(tokenizer, engine), api_key="s3cret") as (url, _):
        wrong = [{}, {"authorization": "Bearer s3cre"}, {"authorization": "Basic s3cret"}, {"authorization": "s3cret"}]
        for headers in wrong:
            for path in ("/v1/models", "/metrics", "/tokenizer_info", "/nothing"):
                reply = httpx2.get(url + path, headers=headers)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert httpx2.post(f"{url}/v1/completions", json=ASK, headers=headers).status_code == 401
        assert httpx2.get(f"{url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret")
        assert client.completions.create(model="tiny", prompt="rock").choices[0].text


def test_pages_of_the_web_cannot_use_a_server_at_loopback(url: str) -> None:
    body = json.dumps(ASK).encode()
    assert status(raw(url, request(url, body))) == 200
    assert status(raw(url, request(url, body, host="evil.example"))) == 403
    assert status(raw(url, request(url, body, origin="http://evil.example"))) == 403
    assert status(raw(url, request(url, body, origin=url))) == 200
    assert status(raw(url, request(url, body, content_type="text/plain"))) == 415


def test_origins_that_are_named_may_ask(tokenizer: Tokenizer, engine: FakeEngine) -> None:
    with running(served(tokenizer, engine), origins=["https://lab.example"]) as (url, _):
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        for origin, is_named in (("https://lab.example", True), ("https://evil.example", False)):
            reply = httpx2.options(f"{url}/v1/completions", headers={"origin": origin, **asks})
            assert (reply.headers.get("access-control-allow-origin") == origin) == is_named
            reply = httpx2.post(f"{url}/v1/completions", json=ASK, headers={"origin": origin})
            assert (reply.status_code == 200) == is_named


# What is too large, and what does not come --------------------------------------------------------


def test_a_body_beyond_a_mebibyte_is_refused(url: str) -> None:
    assert status(raw(url, request(url, b"{", length=(1 << 20) + 1), 1)) == 413
    head = request(url, b"", transfer_encoding="chunked").replace(b"content-length: 0\r\n", b"")
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    assert status(raw(url, head + chunk * 17, 1)) == 413
    padded = json.dumps(ASK).encode()
    assert status(raw(url, request(url, padded + b" " * ((1 << 20) - len(padded))))) == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"prompt": NaN}',
        b'{"prompt": "\\ud83d"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000,
    ],
    ids=["empty", "list", "open", "nan", "surrogate", "bytes", "deep", "digits"],
)
def test_malformed_bodies_are_the_clients_mistake(url: str, body: bytes) -> None:
    assert status(raw(url, request(url, body))) == 400


def test_nobody_is_waited_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers that come byte by byte, a body of which half comes, and one behind a reply that did not wait for it."""
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with connected(url) as connection:
        for byte in b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" * 100:  # 40 s of it
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.01)
        else:
            pytest.fail("headers were read for 40 s")
    reply = raw(url, request(url, b'{"prompt": ', length=100))
    assert status(reply) == 408
    with connected(url) as connection:
        connection.sendall(request(url, b"{", length=1 << 19, connection="keep-alive", content_type="x/y"))
        connection.settimeout(3)
        assert connection.recv(65536).startswith(b"HTTP/1.1 415")
        with pytest.raises((ConnectionError, BrokenPipeError)):
            for _ in range(200):
                connection.sendall(b" ")
                time.sleep(0.01)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut(
    slow: tuple[str, FakeEngine], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine = slow
    word = tokenizer.encode("a rock").ids[-1]  # no byte: a row of bytes is held back to its end
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.2)
    engine.step, engine.chunk, engine.context = 0.05, 50, 100_000  # 50 s for the whole answer
    engine.script = lambda query, sample: [word] * 50_000
    with connected(url) as connection:
        # Alternatives of every token are many bytes: more than the system's buffers take.
        body = {**ASK, "max_tokens": 50_000, "logprobs": 20, "stream": True}
        connection.sendall(request(url, json.dumps(body).encode()))
        assert soon(lambda: engine.stats().running == 1)
        assert soon(lambda: engine.stats().running == 0, 100)
    assert engine._tokens[1] < 40_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(slow: tuple[str, FakeEngine], stream: bool) -> None:
    url, engine = slow
    with connected(url) as connection:
        connection.sendall(request(url, json.dumps({**ASK, "stream": stream}).encode()))
        assert soon(lambda: engine.stats().running == 1)
    assert soon(lambda: engine.stats().running == 0)


def test_a_full_queue_says_when_to_come_back(slow: tuple[str, FakeEngine]) -> None:
    url, engine = slow
    with connected(url) as first, connected(url) as second:
        for connection in (first, second):
            body = json.dumps({**ASK, "prompt": ["rock"] * 2}).encode()
            connection.sendall(request(url, body))
            assert soon(lambda: engine.stats().running + engine.stats().waiting == 2)
            time.sleep(0.05)
        assert soon(lambda: engine.stats().waiting == 2)
        reply = httpx2.post(f"{url}/v1/completions", json=ASK)
    assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert soon(lambda: engine.stats().running + engine.stats().waiting == 0)


def test_an_answer_may_not_take_for_ever(tokenizer: Tokenizer) -> None:
    engine = fake_engine(tokenizer, "rock " * 300, step=0.01)
    with running(served(tokenizer, engine), timeout_s=0.2) as (url, _):
        reply = httpx2.post(f"{url}/v1/completions", json=ASK)
        assert reply.status_code == 504 and "0.2 s" in reply.json()["error"]["message"]
        lines = httpx2.post(f"{url}/v1/completions", json={**ASK, "stream": True}).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert soon(lambda: engine.stats().running == 0)


# Its own state -----------------------------------------------------------------------------------


def test_health_tells_programs_and_the_end_of_the_engine(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = fake_engine(tokenizer)
    engine.programs = (2, 5)
    with running(served(tokenizer, engine)) as (url, _):
        reply = httpx2.get(f"{url}/health")
        assert reply.status_code == 503 and reply.json() == {
            "status": "compiling",
            "programs_compiled": 2,
            "programs": 5,
        }
        reply = httpx2.post(f"{url}/v1/completions", json=ASK)
        assert reply.status_code == 503 and "2 of 5" in reply.json()["error"]["message"]
        engine.programs = (5, 5)
        assert httpx2.get(f"{url}/health").status_code == 200
        engine.error = AnswerFailed("the beam search")
        reply = httpx2.post(f"{url}/v1/completions", json=ASK)
        assert reply.status_code == 500 and httpx2.get(f"{url}/health").status_code == 200  # others are answered
        assert "AnswerFailed: the beam search" in caplog.text
        engine.error = RuntimeError("the device is gone")
        assert httpx2.post(f"{url}/v1/completions", json=ASK).status_code == 500
        reply = httpx2.get(f"{url}/health")
        assert reply.status_code == 503 and reply.json()["status"] == "failed"
        assert "the engine has ended" in caplog.text and "the device is gone" in caplog.text


def test_metrics_have_the_names_that_dashboards_ask_for(url: str) -> None:
    httpx2.post(f"{url}/v1/completions", json={**ASK, "max_tokens": 5})
    text = httpx2.get(f"{url}/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total"):
        assert f"\njaxlm:{name} " in text
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert f"\njaxlm:{name}_bucket" in text
    assert 'jaxlm:request_success_total{finished_reason="length"}' in text


@pytest.mark.slow
def test_sigterm_answers_what_was_begun_and_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.serve.fake_server", "--port", "0", "--step", "0.02"]
    process: Any = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        url = process.stdout.readline().strip()
        replies: list[Any] = []
        body = {**ASK, "max_tokens": 60}
        thread = threading.Thread(target=lambda: replies.append(httpx2.post(f"{url}/v1/completions", json=body)))
        thread.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        thread.join(20)
        assert process.wait(20) == 0
        assert replies[0].status_code == 200 and replies[0].json()["usage"]["completion_tokens"] == 60
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")
    finally:
        process.kill()
