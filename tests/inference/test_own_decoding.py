"""How a model's own generation_config.json decodes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.loading import own_decoding
from jaxlm.weights.leaves import ParamSource


def source(directory: Path, values: dict[str, Any] | None) -> ParamSource:
    file = directory / "generation_config.json"
    if values is not None:
        file.write_text(json.dumps(values))
    return cast(ParamSource, SimpleNamespace(tokenizer_files=[file] if values is not None else []))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, Decoding()),
        ({"eos_token_id": [1, 2], "transformers_version": "4.51"}, Decoding()),
        # Qwen3's
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_length": 9},
            Decoding(temperature=0.6, top_p=0.95, top_k=20),
        ),
        ({"do_sample": True, "top_p": 0.9}, Decoding(temperature=1.0, top_p=0.9)),
        (
            {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3},
            Decoding(repetition_penalty=1.3),
        ),
        ({"temperature": 0.4, "top_k": -1, "max_new_tokens": 99}, Decoding(temperature=0.4, max_new_tokens=99)),
        ({"num_beams": 4, "length_penalty": 0.6, "temperature": 1.0}, Decoding(num_beams=4, length_penalty=0.6)),
        ({"num_beams": 1, "length_penalty": 0.6}, Decoding()),
    ],
)
def test_the_models_own_settings_are_read(tmp_path: Path, values: dict[str, Any] | None, expected: Decoding) -> None:
    assert own_decoding(source(tmp_path, values)) == expected


@pytest.mark.parametrize(
    ("values", "words"), [({"temperature": "hot"}, "temperature"), ({"temperature": 1, "top_p": 3}, "top_p: 3")]
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"generation_config\.json.*{words}"):
        own_decoding(source(tmp_path, values))
