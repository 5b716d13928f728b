"""The train step of a 7B model, compiled for whole TPU slices; and the table of benchmarks/tpu_step.py."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import tpu_step
from jaxlm.config.files import load_run_yaml
from jaxlm.devices.chips import parse_topology
from jaxlm.models.families import load_shape
from jaxlm.planning.compiled import compile_step

compiles = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (part of the extra `test`), no TPU"
)

RUN = """
model: {{shape: llama-2-7b, dtype: bfloat16, remat: full, attention: pallas_tpu}}
data: {{train: [{{path: text.jsonl, template: text}}], sequence_length: 2048}}
train: {{global_batch_size: {rows}, micro_batch_size: {rows}, epochs: 1}}
output_dir: out
"""


@compiles
@pytest.mark.parametrize(
    ("topology", "arguments", "peak"),
    [
        pytest.param("v5e:4x4", 5.0, 9.2, marks=pytest.mark.slow),
        pytest.param("v6e:16x16", 0.4, 3.2, marks=pytest.mark.nightly),
    ],
)
def test_llama_2_7b(topology: str, arguments: float, peak: float) -> None:
    where = parse_topology(topology)
    run = load_run_yaml(RUN.format(rows=2 * where.count), "the test")
    found = compile_step(run, load_shape("llama-2-7b"), where, quick=True)
    assert found.refused is None and found.program is not None
    # Forward, the same again in the backward pass, and the gradient: the kernels run, on every layer.
    assert found.program.kernels == {"flash_attention_forward": 64, "flash_attention_backward": 32}
    assert found.involuntary == 0
    # 6.74e9 parameters and two moments in float32, over all chips.
    assert 12 * 6.738e9 / where.count / 2**30 < found.arguments / 2**30 < arguments
    assert found.peak / 2**30 < peak
    gathered = sum(one.bytes for one in found.program.collectives if one.kind == "all-gather")
    # Every layer's weights twice in bfloat16, embedding and head once; no logits.
    assert 2 * 2 * 6.5e9 * 0.9 < gathered < 2 * 2 * 6.74e9 * 1.1, gathered


def test_the_table_is_of_the_figures_kept() -> None:
    text = tpu_step.README.read_text(encoding="utf-8")
    assert tpu_step.with_table(text) == text
    assert set(tpu_step.read_figures()) == {case.name for case in tpu_step.CASES}


def test_a_figure_that_is_off_by_more_than_two_percent_is_told() -> None:
    kept = {"gib": 9.0, "gcycles": 2.0}
    assert tpu_step.differences(kept, {"gib": 9.1, "gcycles": 1.97}) == []
    assert tpu_step.differences(kept, {"gib": 9.46, "gcycles": 2.0}) == ["gib is 9.46, 9.0 is kept"]
    assert len(tpu_step.differences(kept, {"refused": "no room"})) == 2


@pytest.mark.slow
@compiles
def test_a_step_compiles_to_the_figures_kept() -> None:
    case = next(case for case in tpu_step.CASES if "LoRA" in case.name)
    assert tpu_step.differences(tpu_step.read_figures()[case.name], tpu_step.compiled(case)) == []
