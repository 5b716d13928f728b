"""A server that needs no model: `python -m tests.serve.fake_server --port 8001`."""

from __future__ import annotations

import argparse

from jaxlm.config import Decoding
from jaxlm.serve import page
from jaxlm.serve.app import make_app
from jaxlm.serve.server import make_server, serve
from tests.serve.model import fake_engine, served, small_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--api_key")
    parser.add_argument("--step", type=float, default=0.03, help="seconds between two tokens")
    parser.add_argument("--template", default="chat")
    options = parser.parse_args()
    tokenizer = small_tokenizer()
    engine = fake_engine(tokenizer, step=options.step)
    model = served(tokenizer, engine, options.template)
    app = make_app(model, api_key=options.api_key, pages=page.routes(model, Decoding()))
    server = make_server(app, "127.0.0.1", options.port, 30)
    serve(server, engine.drain, lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
