"""An engine and those who ask it, for tests."""

from __future__ import annotations

from typing import Any

import pytest

from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.models.decoder import Decoder
from tests.inference.paged.asking import QUERIES, ask, content
from tests.inference.test_generation import CONFIG, generator, params


@pytest.fixture(scope="session")
def engine() -> PagedEngine:
    """Few pages, so that texts are retracted, and short chunks."""
    return PagedEngine(generator(Decoder(CONFIG), params()), 2, pages=24, slots=8, chunk=16)


@pytest.fixture(scope="session")
def alone(engine: PagedEngine) -> list[Any]:
    """What each query is given when nobody else asks."""
    return [content(ask(engine, [query])[0]) for query in QUERIES]
