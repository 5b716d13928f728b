"""What `jaxlm serve` refuses before it opens a model."""

from __future__ import annotations

import pytest

from jaxlm.cli.serve import main, model_id
from jaxlm.config import InferenceModelConfig

REFUSED = [
    ("--host 0.0.0.0", "--api_key KEY (or $JAXLM_API_KEY)"),
    ("--host 192.168.1.5", "other machines"),
    ("--host 0.0.0.0 --api_key k --no_api_key", "leave one of them out"),
    ("--cors_origin *", "like https://lab.example"),
    ("--cors_origin https://lab.example/page", "like https://lab.example"),
    ("--adapter out/lora", "expected NAME=PATH"),
    ("--port 70000", "between 0 and 65535"),
    ("--rows 0", "between 1 and"),
    ("--speculate -1", "speculate: -1 must be between 0"),
    ("--timeout_s inf", "between 0.1"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_is_not_safe_or_cannot_be_meant_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAXLM_API_KEY", raising=False)
    assert main(["--model", "no/model", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_key_of_the_environment_opens_a_host(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXLM_API_KEY", "k")
    assert main(["--model", "no/model", "--host", "0.0.0.0"]) == 2
    assert "no/model: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("out/run", "run"),
        ("/a/run/", "run"),
        ("out/run/checkpoints/64", "run"),
        ("hf://owner/model-7b@main", "model-7b"),
        ("model.gguf", "model.gguf"),
    ],
)
def test_a_model_is_called_after_its_path(path: str, name: str) -> None:
    assert model_id(InferenceModelConfig(path=path)) == name
    assert model_id(InferenceModelConfig(adapter=path)) == name
