"""One server around the fake engine for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from jaxlm.tokenizer import Tokenizer
from tests.serve.fake import FakeEngine
from tests.serve.model import fake_engine, running, served, small_tokenizer


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return fake_engine(tokenizer, chunk=3)


@pytest.fixture(scope="module")
def url(tokenizer: Tokenizer, engine: FakeEngine) -> Iterator[str]:
    with running(served(tokenizer, engine)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
