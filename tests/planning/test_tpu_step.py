"""The train step of a 7B model, compiled for whole TPU slices; and the table of benchmarks/tpu_step.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import tpu_step
from benchmarks.bundles import straight_pieces
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


CODE = """
PF: predicated region fallthrough

     0   :  { %s1 = smov [#allocation3] /* materialized constant */ }
   0x1   :  { %s3 = smov 0 }
   0x2 LB: > { %s4 = sadd.s32 4294967295, %s3  ;;  %s3 = sphi %s5, %s3 /* phi copy */ }
   0x3   : > { %p1 = scmp.ge.s32.totalorder %s3, 40 }
   0x4   : > { %244 = sbr.rel (%p1) target = $region28  ;;  %s6 = sand.u32 (!%p1), 1, %s3 }
            s7 = a bundle's second line
   0x5   : > { %v1 = vld [vmem:[%s6] sm:$0xff] }
   0x6   : > { %v2 = vmatmul.bf16.gmra.mxu0 %v1 }
   0x7   : > { %v3 = vpop.f32.mrf.mxu0 }
   0x8 PF: > { %s8 = sld [smem:[#allocation4]] }
   0x9   :  { %1173 = vsyncpa [#allocation7 + $0x1], 1 } /* exit bundle: %product.1 = custom-call */
"""


def test_the_pieces_of_a_kernels_code(tmp_path: Path) -> None:
    (tmp_path / "17-product.1-03-final_bundles.txt").write_text(CODE)
    (tmp_path / "17-product.1-02-schedule-analysis_final_bundles.txt").write_text("0x1 : {}")
    (tmp_path / "18-other.1-03-final_bundles.txt").write_text("0x1 LB: {}")
    assert straight_pieces(tmp_path, "product") == [2, 4, 2]
    with pytest.raises(ValueError, match="0 files with the code of sum"):
        straight_pieces(tmp_path, "sum")


@pytest.mark.slow
@compiles
def test_a_step_compiles_to_the_figures_kept() -> None:
    case = next(case for case in tpu_step.CASES if "LoRA" in case.name)
    assert tpu_step.differences(tpu_step.read_figures()[case.name], tpu_step.compiled(case)) == []
