"""Words and files to a configuration: sources as bare paths, shares, flags that need no value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli import Flags, parse_run
from jaxlm.config import DataConfig, RunConfig
from jaxlm.errors import UserError


def parsed(*words: str) -> tuple[RunConfig, dict[str, Any]]:
    flags = {"preview": Flags("rows", int, 3)}
    (config,), given = parse_run(list(words), prog="x", description="x", flags=flags)
    return config, given


def data_of(*words: str) -> DataConfig:
    return parsed(*words)[0].data


def paths(*words: str) -> list[str]:
    return [source.path for source in data_of(*words).train]


def test_sources_as_words() -> None:
    assert paths("--data.train", "my.json") == ["my.json"]
    assert paths("--data.train", "a.json", "b,c.json", "--model.shape", "x") == ["a.json", "b,c.json"]
    assert paths("--data.train", "a.json", "--data.train=b.json") == ["a.json", "b.json"]
    assert paths("--data.train", "[{path: a.json}, b.json]") == ["a.json", "b.json"]
    (source,) = data_of("--data.train", "{path: a.json, weight: 2.0}").train
    assert (source.path, source.weight) == ("a.json", 2.0)
    with pytest.raises(UserError, match=r"data\.train: expected keys and values, found 5"):
        paths("--data.train", "[5]")
    assert parsed("--lora.targets", "q_proj", "v_proj")[0].lora.targets == ("q_proj", "v_proj")  # type: ignore[union-attr]


def test_sources_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for train in ("my.json", "[my.json]", "{path: my.json}", "[{path: my.json}]"):
        file.write_text(f"model: some/where\ndata: {{train: {train}, validation: held.json}}\n")
        config, _ = parsed("--config", str(file))
        assert [source.path for source in config.data.train] == ["my.json"]
        assert [source.path for source in config.data.validation] == ["held.json"]  # type: ignore[union-attr]
        assert config.model.path == "some/where"
    file.write_text("stages: [{name: one, data: {train: my.json}}]\n")
    assert [source.path for source in parsed("--config", str(file))[0].data.train] == ["my.json"]


@pytest.mark.parametrize(("word", "value"), [("2000", 2000), ("0.1", 0.1), ("0", 0)])
def test_validation_as_number_or_share(tmp_path: Path, word: str, value: float) -> None:
    found = data_of("--data.validation", word).validation
    assert found == value and type(found) is type(value)
    (tmp_path / "a.yaml").write_text(f"data: {{validation: {word}}}\n")
    assert data_of("--config", str(tmp_path / "a.yaml")).validation == value


def test_validation_as_sources() -> None:
    validation = data_of("--data.validation", "a.json", "b.json").validation
    assert isinstance(validation, tuple) and [source.path for source in validation] == ["a.json", "b.json"]


def test_preview_without_a_number() -> None:
    assert parsed("--preview", "--data.train", "a.json")[1]["preview"] == 3
    assert parsed("--preview", "5")[1]["preview"] == 5
