"""A small corpus with duplicates, and runs over it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config.files import build
from jaxlm.config.prepare import PrepareConfig
from jaxlm.config.reading import unfold_paths
from jaxlm.data.prepare.pipeline import Share, StepReport, run_steps

WORDS = [
    "granite",
    "basalt",
    "the",
    "of",
    "rock",
    "is",
    "and",
    "that",
    "have",
    "cools",
    *(f"word{i}" for i in range(200)),
]


def text_of(rng: random.Random, sentences: int = 10) -> str:
    return " ".join(" ".join(rng.choices(WORDS, k=8)).capitalize() + "." for _ in range(sentences))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of 40 documents; a tenth are copies, a tenth copies with a word changed."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts: list[str] = []
    for number in range(4):
        lines = []
        for _ in range(40):
            draw = rng.random()
            text = text_of(rng)
            if texts and draw < 0.1:
                text = rng.choice(texts)
            elif texts and draw < 0.2:
                words = rng.choice(texts).split(" ")
                words[len(words) // 2] = "changed"
                text = " ".join(words)
            texts.append(text)
            lines.append(json.dumps({"text": text}))
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def config_of(values: Mapping[str, Any]) -> PrepareConfig:
    common = {"engine": {"workers": 1}, "filter": {"repair": False}, "dedup": {"minhash": "numpy"}}
    return build(unfold_paths({**common, **values}, PrepareConfig), PrepareConfig)


def run(values: Mapping[str, Any], only: str | None = None, share: Share | None = None) -> list[StepReport]:
    return run_steps(config_of(values), only, share or Share(), lambda *_: None)


def files_of(folder: Path) -> dict[str, bytes]:
    """What a run wrote for its readers."""
    files = [*folder.rglob("part-*"), *folder.rglob("report.json"), *folder.rglob("examples.jsonl")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def documents() -> Callable[[Path], list[str]]:
    """The texts that a step wrote."""

    def read(folder: Path) -> list[str]:
        parts = sorted(folder.glob("part-*.jsonl"))
        return [json.loads(line)["text"] for part in parts for line in part.read_text(encoding="utf-8").splitlines()]

    return read
