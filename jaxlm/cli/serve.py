"""`python -m jaxlm.serve --model DIR`: a model behind HTTP."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.hub import download_all, with_commits
from jaxlm.cli.parser import parse_config_and_flags
from jaxlm.cli.words import Flag
from jaxlm.config import InferenceModelConfig, ServeConfig
from jaxlm.errors import UserError, exit_status

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.cli.opening import OpenModel
    from jaxlm.inference.best_of import Judge
    from jaxlm.inference.generator import Generator
    from jaxlm.inference.paged.followers import Orders
    from jaxlm.inference.paged.schedule import Shape
    from jaxlm.inference.prompts import Prompter
    from jaxlm.processes.distributed import Hosts
    from jaxlm.serve.served import Served
    from jaxlm.weights.leaves import AdapterSource

DESCRIPTION = (
    "Serves a model: OpenAI's routes (/v1/chat/completions, /v1/completions, ...), KnowLM's /generate, and a page. "
    "Takes a Hugging Face directory, a converted one, a run directory or checkpoint, and LoRA adapters beside it."
)
# What the systems that jaxlm follows call these keys.
ALIASES = {
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "lora_weights": "model.adapter",
    "quantize": "model.quantize",
    "load_8bit": "model.quantize=int8",
    "load_4bit": "model.quantize=nf4",
    "dtype": "model.dtype",
    "prompt_template": "template",
    "server_name": "host",
    "served_model_name": "name",
    **{name: f"distributed.{name}" for name in ("coordinator", "num_processes", "process_id")},
}
FLAGS = {
    "plan": Flag("say how many programs are compiled and what keys and values take, and exit"),
    "json": Flag("with --plan: as one JSON object"),
}
KEY = "JAXLM_API_KEY"
INTERRUPTED = "interrupted before the server was there"
ADAPTER_SECONDS = 5.0
JUDGED = 8  # answers that a reward model reads together


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.serve") -> int:
    """Exit status: 0 ended by SIGTERM or Ctrl-C, 2 a mistake in the input."""
    return exit_status(lambda: _main(sys.argv[1:] if argv is None else argv, prog), interrupted=INTERRUPTED)


def _main(argv: Sequence[str], prog: str) -> int:
    config, flags = parse_config_and_flags(
        argv, ServeConfig, prog=prog, description=DESCRIPTION, aliases=ALIASES, flags=FLAGS
    )
    key = config.api_key if config.api_key is not None else os.environ.get(KEY)
    _check(config, key)
    if "json" in flags and "plan" not in flags:
        raise UserError("--json: it is --plan's answer that can be JSON; a server's figures are at /metrics")
    try:
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'jaxlm[serve]'") from None
    return _serve(config, key, "plan" in flags, "json" in flags)


def _check(config: ServeConfig, key: str | None) -> None:
    """Checks what can be known without the model."""
    import math

    from jaxlm.serve.loopback import is_loopback

    if config.model.path is None and config.model.adapter is None:
        raise UserError("model: name one, e.g. --model out/run")
    if key is not None and not (key.strip() == key and key.isascii() and key.isprintable() and key):
        raise UserError(f"api_key: must be visible ASCII letters without blanks at its ends (or unset ${KEY})")
    if key is not None and config.no_api_key:
        raise UserError(f"no_api_key: there is an api_key too (or ${KEY}); leave one of them out")
    if not is_loopback(config.host) and key is None and not config.no_api_key:
        raise UserError(
            f"host: {config.host} can be reached from other machines; give --api_key KEY (or ${KEY}), which clients "
            "must send, or --no_api_key if whoever reaches it may ask"
        )
    for origin in config.cors_origin:
        scheme, _, rest = origin.partition("://")
        if scheme not in ("http", "https") or not rest or "/" in rest or "*" in rest:
            raise UserError(f"cors_origin: {origin!r} must be like https://lab.example: scheme, host, port if any")
    ranges = [
        ("port", config.port, 0, 65535),
        ("rows", config.rows, 1, 4096),
        ("pages", config.pages, 1, 1 << 31),
        ("context", config.context, 2, 1 << 31),
        ("speculate", config.speculate, 0, 4095),
        ("max_adapters", config.max_adapters, 1, 1024),
        ("max_queue", config.max_queue, 1, 1 << 20),
        ("timeout_s", config.timeout_s, 0.1, 1e6),
    ]
    for name, value, low, high in ranges:
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"{name}: {value} must be between {low:g} and {high:g}")
    for word in config.adapter:
        if not all(word.partition("=")):
            raise UserError(f"adapter: expected NAME=PATH, found {word!r}")


def _serve(config: ServeConfig, key: str | None, only_plan: bool, as_json: bool) -> int:
    # JAX and everything above it is imported only here: --help and mistakes in the words answer at once.
    from rich.console import Console

    from jaxlm.cli.opening import open_judge, open_model
    from jaxlm.cli.start import quiet_logs, use_compilation_cache
    from jaxlm.inference.loading import own_decoding
    from jaxlm.inference.paged.followers import Orders, follow
    from jaxlm.processes.distributed import start
    from jaxlm.serve import page
    from jaxlm.serve.app import make_app
    from jaxlm.serve.server import make_server, serve

    terminal = Console(stderr=True, soft_wrap=True, highlight=False)
    quiet_logs()
    # A start waits for a dozen small programs too.
    use_compilation_cache(config.compilation_cache, least_seconds=0.0)
    with start(config.distributed, terminal.print) as hosts:
        console = hosts.console(terminal)
        config = with_commits(config, console.print, hosts)
        download_all([config], hosts)
        model = config.model
        opened = open_model(model, config.tokenizer, config.template, config.add_bos, config.mesh, console)
        if only_plan:
            _plan(config, opened, console, as_json and not hosts.process)
            return 0
        generator, orders = opened.load(hosts, console, config.verbose), None
        if hosts.coordination is not None:
            orders = Orders(hosts.coordination, hosts.process, hosts.processes)
        beside = _Beside(config, opened, generator, hosts, console) if config.adapter or config.adapter_dir else None
        judge = None
        if config.reward_model is not None:
            judge = open_judge(config.reward_model, model, opened, config.mesh, JUDGED, console)
        if orders is not None and hosts.process:
            follow(generator, orders, partial(_acts, config, generator, beside, judge, orders))
            return 0
        served, drain = _engine(config, opened, generator, beside, judge, orders, console)
        app = make_app(
            served,
            host=config.host,
            api_key=key,
            origins=config.cors_origin,
            timeout_s=config.timeout_s,
            pages=page.routes(served, own_decoding(opened.placed.files.merged)),
        )
        server = make_server(app, config.host, config.port, config.timeout_s)

        def started(url: str) -> None:
            console.print(f"serving    {', '.join(served.models)} at {url} (a page at {url}/)", markup=False)

        serve(server, drain, started)
        console.print("ended      every answer was given", markup=False)
    return 0


def _plan(config: ServeConfig, opened: OpenModel, console: Console, as_json: bool) -> None:
    """Says what an engine of these settings would compile and keep."""
    from jaxlm.inference.paged.programs import CHUNK, check_served, choose_shape, programs_in_words, step_sizes
    from jaxlm.inference.rows import DeviceModel
    from jaxlm.models.unrolled import cache_bytes
    from jaxlm.units import memory_size

    placed = opened.placed
    model = DeviceModel(placed.decoder, {}, placed.mesh, ())
    check_served(model)
    shape = choose_shape(model, config.rows, None, config.pages, CHUNK, config.context, config.speculate)
    size = shape.pages * cache_bytes(opened.spec, 1, shape.slots, placed.decoder.dtype)
    if as_json:
        sizes = step_sizes(opened.spec, shape.rows, shape.chunks)
        facts = {
            "programs": 1 + len(sizes),
            "steps": [
                {"rows": rows, "prompts": number, "prompt_tokens": number * each} for number, each, rows in sizes
            ],
            "rows": shape.rows,
            "pages": shape.pages,
            "page_tokens": shape.slots,
            "pages_bytes": size,
            "longest_text_pages": shape.table,
        }
        print(json.dumps(facts, indent=1))
        return
    console.print(f"programs   {programs_in_words(opened.spec, shape.rows, shape.chunks)}", markup=False)
    console.print(
        f"pages      up to {shape.pages:,} of {shape.slots} tokens, {memory_size(size)}; the longest text has "
        f"{shape.table:,}",
        markup=False,
    )


def _acts(
    config: ServeConfig,
    generator: Generator,
    beside: _Beside | None,
    judge: Judge | None,
    orders: Orders,
    shape: Shape,
) -> dict[str, Callable[..., Any]]:
    """What a process that follows does beside the engine's steps."""
    from jaxlm.inference.embedding import Embedder
    from jaxlm.inference.paged.beams import Search
    from jaxlm.inference.paged.programs import longest_served

    embedder = Embedder(generator, longest_served(generator.decoder.spec, shape, config.context))
    return {
        **embedder.acts(),
        **Search(generator).acts(),
        **({} if beside is None else beside.adapters.acts(beside.open, orders)),
        **({} if judge is None else judge.acts()),
    }


def _engine(
    config: ServeConfig,
    opened: OpenModel,
    generator: Generator,
    beside: _Beside | None,
    judge: Judge | None,
    orders: Orders | None,
    console: Console,
) -> tuple[Served, Callable[[], None]]:
    """The engine that writes with a model and its adapters, and what stands beside it; and what ends them in order."""
    from jaxlm.inference.embedding import Embedder
    from jaxlm.inference.paged.layout import in_words
    from jaxlm.inference.paged.thread import PagedEngine
    from jaxlm.serve.served import Served

    engine = PagedEngine(
        generator,
        config.rows,
        pages=config.pages,
        context=config.context,
        queue=config.max_queue,
        adapters=None if beside is None else beside.adapters,
        speculate=config.speculate,
        orders=orders,
    )
    console.print(
        f"engine     {config.rows} answers at a time, {engine.stats().pages:,} pages of keys and values, "
        f"{engine.ready()[1]} programs; texts of at most {engine.max_length:,} tokens",
        markup=False,
    )
    if products := in_words(generator.weights):
        console.print(f"products   {products}", markup=False)

    if beside is not None:
        beside.follow_directory(orders)

    embedder = Embedder(generator, engine.max_length, engine.wait, orders)

    def drain() -> None:
        embedder.cancel()
        engine.drain()

    served = Served(
        name=config.name or model_id(config.model),
        created=int(time.time()),
        engine=engine,
        tokenizer=opened.prompts.tokenizer,
        prompter=lambda name: opened.prompter if name is None or beside is None else beside.prompter(name),
        adapters=lambda: () if beside is None else beside.adapters.names,
        context=engine.max_length,
        vocab_size=opened.spec.vocab_size,
        stop_ids=generator.stop_ids,
        queue=config.max_queue,
        embed=embedder,
        judge=None if judge is None else judge.in_all(orders),
    )
    return served, drain


def model_id(model: InferenceModelConfig) -> str:
    """What clients call a model that was given no name: the last part of its path; a checkpoint has its run's."""
    named = str(model.path or model.adapter)
    *before, last = Path(named.partition("@")[0] if named.startswith("hf://") else Path(named).absolute()).parts
    return before[-2] if len(before) > 1 and before[-1] == "checkpoints" else last


class _Beside:
    """Adapters beside a base: those that are named, and those of a directory, which is looked at again and again.

    Raises:
        UserError: one of them cannot be opened, or not be served beside others.
    """

    def __init__(
        self, config: ServeConfig, opened: OpenModel, generator: Generator, hosts: Hosts, console: Console
    ) -> None:
        from jaxlm.inference.paged.adapters import Adapters, Followed, Places, named_paths

        self._config, self._base, self._console = config, opened.placed.files.path, console
        self._prompters: dict[Path, Prompter] = {}
        self._paths = named_paths(config.adapter, config.adapter_dir)
        sources = {name: self.open(path) for name, path in self._paths.items()}
        places = Places.holding(generator.decoder, sources, config.max_adapters)
        hosts.agree("adapters", {"names": list(sources), "places": str(places)})
        self.adapters = Adapters(generator, places)
        self._followed = Followed(self.adapters, self.open, config.adapter, config.adapter_dir)
        for error in self._followed.update().values():
            raise error

    def follow_directory(self, orders: Orders | None) -> None:
        """Loads from now on what comes into the directory, and drops what goes; the others are told by orders."""
        if orders is not None:
            self.adapters.lead(orders)
        if self._config.adapter_dir is not None:
            threading.Thread(target=self._follow, name="jaxlm-adapters", daemon=True).start()

    def prompter(self, name: str) -> Prompter:
        """Makes prompts as the adapter was trained with them."""
        return self._prompters[self._paths[name]]

    def open(self, path: Path) -> AdapterSource:
        """Opens an adapter of the base."""
        from convert.source import open_with_adapter
        from jaxlm.inference.loading import prompt_settings

        files = open_with_adapter(str(self._base), str(path))
        assert files.adapter is not None
        config = self._config
        self._prompters[path] = prompt_settings(files, config.tokenizer, config.template, config.add_bos).prompter()
        return files.adapter

    def _follow(self) -> None:
        from jaxlm.inference.paged.adapters import named_paths

        while True:
            time.sleep(ADAPTER_SECONDS)
            before = self.adapters.names
            try:
                paths = named_paths(self._config.adapter, self._config.adapter_dir)
                self._paths = {**self._paths, **paths}
                problems = [str(error) for error in self._followed.update().values()]
            except (UserError, OSError) as error:  # a directory that is being written
                problems = [str(error)]
            for problem in problems:
                self._console.print(f"warning    {problem}", markup=False)
            if self.adapters.names != before:
                self._console.print(f"adapters   {', '.join(self.adapters.names) or 'none'}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
