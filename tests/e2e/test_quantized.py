"""KnowLM's QLoRA recipe in small, as a user runs it: on weights rounded while reading or before, merged, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert.commands.main import main as convert
from jaxlm.cli.generate import main as generate
from jaxlm.cli.train import main as train
from tests.convert.tiny import make_hf_model
from tests.e2e.conftest import SHAPE

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("quantized")]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.nightly
def test_a_recipe_on_four_bits(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {key: value for key, value in SHAPE.items() if key not in ("architectures", "model_type")}
    make_hf_model(**shape).save_pretrained(tmp_path / "base")
    for file in (inputs / "tokenizer").iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    words: dict[str, Any] = {
        "data.train": str(inputs / "records.json"),
        "data.train.template": "alpaca_short",  # the recipe's own takes more tokens than this model has positions
        "data.validation": 10,
        "data.sequence_length": 64,
        "train.save_every": 2,
        "train.compilation_cache": "none",
    }

    def run(base: str, out: str, steps: int, **more: Any) -> int:
        given = words | {"model.path": tmp_path / base, "output_dir": tmp_path / out, "train.steps": steps} | more
        flat = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        return train(["--config", "knowlm/qlora", *flat])

    assert convert(["quantize", str(tmp_path / "base"), str(tmp_path / "small")]) == 0
    assert run("base", "whole", 4) == 0
    assert run("base", "halves", 2) == 0
    # On what was rounded before, and from the host's memory.
    assert run("small", "halves", 4, **{"model.quantize": "null", "model.offload": "frozen"}) == 0
    assert len(losses(tmp_path / "whole")) == 4 and losses(tmp_path / "halves") == losses(tmp_path / "whole")
    capsys.readouterr()

    make_hf_model(seed=9, **shape).save_pretrained(tmp_path / "other")
    for base, changes, said in (
        ("base", {"model.quantize": "int8"}, "its rounding: was nf4-1, is int8-1"),
        ("base", {"model.quantize": "null"}, "its rounding: was nf4-1, is not quantised"),
        ("small", {"model.quantize": "int8"}, "numbers that are rounded once are not rounded again"),
    ):
        assert run(base, "whole", 6, **changes) == 2
        assert said in capsys.readouterr().err, said
    assert train(["--config", "knowlm/qlora", "--model.path", str(tmp_path / "base"), "--lora", "null"]) == 2
    assert "model.quantize: nf4 keeps weights that nothing trains" in capsys.readouterr().err

    assert convert(["merge", str(tmp_path / "small"), str(tmp_path / "whole"), str(tmp_path / "merged")]) == 0
    assert convert(["merge", str(tmp_path / "other"), str(tmp_path / "whole"), str(tmp_path / "out")]) == 2
    assert "was trained on another model" in capsys.readouterr().err
    answers = []
    for model in ("small", "base"):
        words_of = ["--model", str(tmp_path / model), "--adapter", str(tmp_path / "whole"), "--prompt", "rock sand"]
        more = ["--load_4bit"] if model == "base" else []
        assert generate([*words_of, *more, "--max_new_tokens", "6", "--compilation_cache", "none"]) == 0
        captured = capsys.readouterr()
        assert "linear layers in nf4" in captured.err
        answers.append(captured.out)
    assert answers[0] == answers[1]
