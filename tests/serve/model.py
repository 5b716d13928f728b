"""A small tokenizer, and a server around the fake engine."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.inference.paged.requests import EngineThread, Query
from jaxlm.inference.prompts import Prompter
from jaxlm.serve.app import make_app
from jaxlm.serve.served import Served
from jaxlm.serve.server import Server, make_server
from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tests.serve.fake import FakeEngine, Script

WORDS = """the crust of the earth is made of rock and more rock
Granite is an igneous rock: quartz, feldspar and mica. **Basalt** is darker.
{"name": "look_up", "arguments": {"rock": "granite"}}
"""
ANSWER = (
    "**Granite** is an igneous rock: quartz, feldspar and mica.\n\n花岗岩 is its name in 中文 🌍.\n\n"
    "- the crust of the earth is made of rock\n"
)
CHAT = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def small_tokenizer() -> Tokenizer:
    """Pieces of a few words, bytes for the rest, and a chat template."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(WORDS * 40)
        train_sentencepiece([text], 400, Path(folder) / "model")
        tokenizer = load_tokenizer(Path(folder) / "model")
    tokenizer.chat_template = CHAT
    return tokenizer


def told(tokenizer: Tokenizer, text: str = ANSWER) -> Script:
    """Writes this text, from a word on that the seed chooses."""
    words = text.split(" ")

    def script(query: Query, sample: int) -> Sequence[int]:
        start = 0 if query.options.temperature == 0 else (query.options.seed + sample) % len(words)
        return tokenizer.encode(" ".join(words[start:])).ids

    return script


def fake_engine(tokenizer: Tokenizer, text: str = ANSWER, **settings: Any) -> FakeEngine:
    assert tokenizer.eos_id is not None
    return FakeEngine(told(tokenizer, text), tokenizer.vocab_size, tokenizer.eos_id, **settings)


def served(tokenizer: Tokenizer, engine: EngineThread, template: str = "chat", **settings: Any) -> Served:
    """A model `tiny` with an adapter `rock`."""
    prompter = Prompter(template, tokenizer)
    assert tokenizer.eos_id is not None
    values: dict[str, Any] = dict(
        name="tiny",
        created=1,
        engine=engine,
        tokenizer=tokenizer,
        prompter=lambda adapter: prompter,
        adapters=lambda: ["rock"],
        context=512,
        vocab_size=tokenizer.vocab_size,
        stop_ids=(tokenizer.eos_id,),
        embed=lambda texts: np.array([[len(ids), sum(ids), 0.5] for ids in texts], np.float32),
    )
    return Served(**(values | settings))


@contextlib.contextmanager
def running(model: Served, port: int = 0, **settings: Any) -> Iterator[tuple[str, Server]]:
    """A server in a thread; its address and itself."""
    server = make_server(make_app(model, **settings), "127.0.0.1", port, 5)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    assert server.started
    address = server.servers[0].sockets[0].getsockname()
    try:
        yield f"http://127.0.0.1:{address[1]}", server
    finally:
        server.should_exit = True
        thread.join()
