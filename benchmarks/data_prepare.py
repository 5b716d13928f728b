"""The steps of `jaxlm prepare`, in milliseconds of a core for a document of 300 words; rules beside datatrove's.

Rules are timed in turn with datatrove's filters, which are given the words that jaxlm finds. Then whole steps on one
process, reading and writing files.

    python benchmarks/data_prepare.py [--documents 1000] [--rounds 5] [--step 4000] [--tokenizer FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_dedup import make_texts

from jaxlm.config.prepare import (
    C4Config,
    DedupConfig,
    DocumentsConfig,
    EngineConfig,
    FilterConfig,
    FineWebConfig,
    GopherConfig,
    PrepareConfig,
    RepetitionConfig,
)
from jaxlm.data.prepare import rules
from jaxlm.data.prepare.pipeline import Share, run_steps

Side = Callable[[str], Any]
LOOSE = GopherConfig(min_stop_words=0)


def sentences_of(text: str) -> str:
    """A text of words as lines of sentences, so that no rule ends early."""
    words = text.split(" ")
    lines = [" ".join(words[at : at + 15]).capitalize() + "." for at in range(0, len(words), 15)]
    return "\n".join(lines)


def sides() -> dict[str, tuple[Side, Side | None]]:
    """Each rule, jaxlm's and datatrove's."""
    own: dict[str, Side] = {
        "gopher": lambda text: rules.gopher(rules.Text(text), LOOSE),
        "repetition": lambda text: rules.repetition(rules.Text(text), RepetitionConfig()),
        "c4": lambda text: rules.c4(text, C4Config(code=True)),
        "fineweb": lambda text: rules.fineweb(rules.Text(text), FineWebConfig()),
    }
    try:
        from datatrove.data import Document
        from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter
        from datatrove.pipeline.filters import gopher_repetition_filter as repetition
    except ImportError:
        print("datatrove is not installed")
        return {name: (side, None) for name, side in own.items()}
    for module in (gopher_quality_filter, repetition, fineweb_quality_filter):
        module.split_into_words = lambda text, _: rules.Text(text).words
    c4_filters.split_into_sentences = lambda text, _: rules._SENTENCE_END.findall(text)
    filters = {
        "gopher": gopher_quality_filter.GopherQualityFilter(min_stop_words=0),
        "repetition": repetition.GopherRepetitionFilter(),
        "c4": c4_filters.C4QualityFilter(),
        "fineweb": fineweb_quality_filter.FineWebQualityFilter(),
    }

    def theirs(name: str) -> Side:
        return lambda text: filters[name].filter(Document(text=text, id="0"))

    return {name: (side, theirs(name)) for name, side in own.items()}


def seconds_of(side: Side, texts: Sequence[str]) -> float:
    """Seconds of a core for all texts."""
    started = time.process_time()
    for text in texts:
        side(text)
    return time.process_time() - started


def time_steps(texts: Sequence[str], tokenizer: str | None) -> None:
    """Prints what whole steps take."""
    every = FilterConfig(
        gopher=LOOSE,
        repetition=RepetitionConfig(),
        c4=C4Config(),
        fineweb=FineWebConfig(),
        languages=(),
        email="mask",
        phone="mask",
        identifier="mask",
    )
    cases: list[tuple[str, dict[str, Any]]] = [
        ("filter, repairs alone", {"steps": ("filter",)}),
        ("filter, all rules and masks", {"steps": ("filter",), "filter": every}),
        ("dedup", {"steps": ("dedup",), "dedup": DedupConfig(min_kept=0.0)}),
    ]
    if tokenizer is not None:
        cases += [(name, {"steps": (name,), "tokenizer": tokenizer}) for name in ("split", "build")]
    with tempfile.TemporaryDirectory() as folder:
        for file in range(8):
            lines = (json.dumps({"text": text}) for text in texts[file::8])
            Path(folder, f"{file}.jsonl").write_text("\n".join(lines) + "\n")
        for number, (name, values) in enumerate(cases):
            config = PrepareConfig(
                sources=(DocumentsConfig(path=f"{folder}/*.jsonl", name="texts"),),
                output_dir=f"{folder}/{number}",
                engine=EngineConfig(workers=1),
                **values,
            )
            started = time.process_time()
            numbers = run_steps(config, None, Share(), lambda *_: None)[0].counts.numbers["texts"]
            seconds = time.process_time() - started
            tokens = f", {numbers['tokens'] / seconds / 1e6:.2f} M tokens/s" if numbers["tokens"] else ""
            print(f"step {name}: {seconds / len(texts) * 1e3:.3f} ms a document{tokens}")


def main() -> None:
    """Prints milliseconds a document, and ratios of rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", type=int, default=4000)
    parser.add_argument("--tokenizer", help="a tokenizer, for split and build")
    options = parser.parse_args()
    texts = [sentences_of(text) for text in make_texts(max(options.documents, options.step))]
    for name, (own, theirs) in sides().items():
        pairs = []
        for _ in range(options.rounds):
            mine = seconds_of(own, texts[: options.documents])
            pairs.append((mine, seconds_of(theirs, texts[: options.documents]) if theirs is not None else mine))
        ratio = statistics.median(other / mine for mine, other in pairs)
        milliseconds = statistics.median(mine for mine, _ in pairs) / options.documents * 1e3
        print(f"{name:11} {milliseconds:.3f} ms a document, datatrove {ratio:.2f} times that")
    time_steps(texts[: options.step], options.tokenizer)


if __name__ == "__main__":
    main()
