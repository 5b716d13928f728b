"""`python -m jaxlm.tune` on a CPU: what it times, what may win, what it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.cli import tune
from jaxlm.cli.tune import Candidate, candidates, check, fastest, main, measure, tensors
from jaxlm.kernels.backend import AttentionBackend, ShapeKey, attention_details, choose_attention, read_table
from jaxlm.nn import attention as attention_module

KIND = jax.devices()[0].device_kind
CASE = ShapeKey("cpu", KIND, None, "float32", 48, 8, 4, 2, True)
SMALL = ["--heads", "4", "--kv_heads", "2", "--head_dim", "8", "--dtype", "float32", "--rounds", "2"]


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXLM_TUNED", str(tmp_path / "cache" / "tuned.json"))
    monkeypatch.setattr(tune, "LEAST_SAMPLE", 0.001)
    return tmp_path / "cache" / "tuned.json"


def test_tuning_fills_the_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--lengths", "48", "100"]) == 0
    printed = capsys.readouterr().out
    assert "1 x 48 tokens, 4 heads on 2 of 8, float32, packed rows" in printed and "needs a TPU" in printed
    assert f"from {table}" in printed
    written = read_table(table)[(KIND, "float32", "h8 g2 packed")]
    assert written.keys() == {64, 128} and written[128].length == 100
    for entry in written.values():
        assert entry.milliseconds.keys() == {"xla", "reference"}
        assert entry.backend.name == min(entry.milliseconds, key=lambda name: entry.milliseconds[name])
        assert entry.made.startswith(f"jax {jax.__version__}, 20")
    found, line = choose_attention("auto", CASE)
    assert found == written[64].backend and line.endswith(" ms at length 48")
    assert attention_details(found, CASE).startswith(f"measured: jax {jax.__version__}")
    # Another case beside it, and the same again.
    assert main([*SMALL, "--lengths", "48", "--single"]) == 0
    assert main([*SMALL, "--lengths", "48", "--dry_run", "--window", "7"]) == 0
    assert len(read_table(table)) == 2
    assert [path.name for path in table.parent.iterdir()] == ["tuned.json"]


def test_a_configuration_says_which_shapes_are_tuned(tmp_path: Path) -> None:
    model = tmp_path / "model.json"
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 64}
    sizes = {"hidden_size": 48, "intermediate_size": 64, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    model.write_text(json.dumps({**heads, **sizes}))
    config = tmp_path / "run.yaml"
    stages = [{"name": "a", "model": {"shape": str(model)}}, {"name": "b", "data": {"packing": False}}]
    config.write_text(json.dumps({"data": {"sequence_length": 96}, "model": {"dtype": "float32"}, "stages": stages}))

    def found(*words: str) -> list[ShapeKey]:
        seen: list[ShapeKey] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "_tune", lambda case, options: seen.append(case))
            assert main(["--config", str(config), *words]) == 0
        return seen

    base = ShapeKey("cpu", KIND, None, "float32", 96, 8, 6, 2, True)
    # The second stage starts from what the first has not written yet.
    assert found() == [base, ShapeKey("cpu", KIND, None, "float32", 96, 8, 6, 2, False)]
    assert found("--packed", "--lengths", "32", "--dtype", "bfloat16", "--data.sequence_length", "7") == [
        ShapeKey("cpu", KIND, None, "bfloat16", 32, 8, 6, 2, True)
    ]


def test_only_right_results_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the wrong one would be by far the fastest."""
    right = attention_module.IMPLEMENTATIONS["xla"]
    assert check(CASE, AttentionBackend("xla")) == ""
    for wrong, what in (
        (lambda q, k, v, mask: q, "output"),
        (lambda q, k, v, mask: right(q, jax.lax.stop_gradient(k), v, mask), "dk"),
        (lambda q, k, v, mask: right(q, k, v, mask) * jnp.nan, "output differs from the plain form by nan"),
        (lambda q, k, v, mask: right(q, k, v, attention_module.MaskSpec(None, window=mask.window)), "output"),
    ):
        monkeypatch.setitem(attention_module.IMPLEMENTATIONS, "xla", wrong)
        found = measure(CASE, 1, 2, lambda what: None)
        problem = next(one.problem for one in found if one.choice.name == "xla")
        assert problem.startswith(f"wrong: {what}")
        assert fastest(found)[0].choice == AttentionBackend("reference")


def test_a_relative_bias_is_part_of_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(CASE, relative_bias=True)
    right = attention_module.IMPLEMENTATIONS["xla"]
    assert check(case, AttentionBackend("xla")) == ""

    def without(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return right(q, k, v, mask.replace(bias=None))

    monkeypatch.setitem(attention_module.IMPLEMENTATIONS, "xla", without)
    assert check(case, AttentionBackend("xla")).startswith("wrong: output")


def test_a_trial_that_does_not_fit_in_memory_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nand more")

    monkeypatch.setitem(attention_module.IMPLEMENTATIONS, "xla", full)
    found = measure(CASE, 1, 2, lambda what: None)
    assert [one.problem for one in found if one.choice.name == "xla"] == ["RESOURCE_EXHAUSTED: no room"]


def test_blocks_are_tried_that_a_row_is_long_enough_for() -> None:
    def tried(length: int) -> list[AttentionBackend]:
        case = ShapeKey("tpu", "TPU v5 lite", None, "bfloat16", length, 128, 32, 32, True)
        return [one.choice for one in candidates(case) if one.choice.name == "pallas_tpu" and not one.problem]

    assert len(tried(4096)) == 1 + 9
    assert tried(200) == [AttentionBackend("pallas_tpu"), AttentionBackend("pallas_tpu", 256, 256)]


def test_times_are_ratios_within_a_round() -> None:
    """A machine that was three times slower in one round."""
    xla = Candidate(AttentionBackend("xla"), seconds=[1.0, 3.0, 1.0])
    slow = Candidate(AttentionBackend("pallas_tpu"), seconds=[2.0, 6.0, 2.0])
    quick = Candidate(AttentionBackend("pallas_tpu", 256, 512), seconds=[0.5, 1.5, 0.5])
    winner, times = fastest([slow, xla, quick, Candidate(AttentionBackend("cudnn"), problem="needs an NVIDIA GPU")])
    assert winner is quick and times == {"xla": 1000.0, "pallas_tpu": 500.0}


def test_packed_rows_hold_several_documents() -> None:
    ids = tensors(CASE, 2, 4, 2)[4]
    assert ids.shape == (2, 48) and set(ids[0].tolist()) == set(range(1, 9))
    assert len(set(tensors(ShapeKey("cpu", "cpu", None, "float32", 3, 8, 4, 2, True), 1, 4, 2)[4][0].tolist())) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model to tune for: give --config FILE with a model, or --heads N"),
        (["--heads", "4", "--kv_heads", "3"], "--kv_heads: 3 does not divide 4 query heads"),
        (["--heads", "4", "--lengths", "8", "0"], "--lengths: 0 must be at least 1"),
        (["--heads", "4", "--headdim", "8"], "unknown key 'headdim'"),
        (["--config", "none.yaml"], "none.yaml: no such file"),
        (["--model.shape", "llama-9"], "model.shape: 'llama-9' is neither"),
    ],
)
def test_mistakes_are_refused_by_flag(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], table: Path
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not table.exists()
