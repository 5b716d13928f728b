"""The estimate of a device's memory, against what the compilers themselves say of the same step."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.plan_memory import SHAPES, estimated, read_table, row_config
from benchmarks.plan_memory import run_config as run
from jaxlm.config import LoraConfig
from jaxlm.devices.chips import parse_topology
from jaxlm.models.families import SHAPES as PUBLISHED
from jaxlm.planning.compiled import compile_step
from jaxlm.spec import uniform_decoder
from jaxlm.weights.names import num_params
from tests.kernels.ahead_of_time import libtpu_goes_with_jax

pytestmark = pytest.mark.slow

SMALL, LARGER = SHAPES["small"], SHAPES["larger"]


def test_steps_are_in_the_order_of_what_a_compiler_said() -> None:
    """What needs a quarter more than another step by the checked-in table is estimated to need more."""
    rows = [(row, estimated(row_config(row), SHAPES[row.shape], row.topology).peak) for row in read_table()]
    pairs = [(a, b) for a in rows for b in rows if a[0].peak_mib > 1.25 * b[0].peak_mib]
    assert len(pairs) > 100
    for (more, larger), (less, smaller) in pairs:
        assert larger > smaller, (more, less)


def test_a_step_is_compiled_as_it_is_estimated() -> None:
    libtpu_goes_with_jax()
    config = run(8, 4, remat="qkv_out", optimizer="lion")
    compiled = compile_step(config, SMALL, parse_topology("v5e:2x2"), quick=True)
    estimate = estimated(config, SMALL, "v5e:2x2")
    # The batch is all that is not in the estimate; what lies beside the state is a compiler's own decision.
    assert 0 <= compiled.arguments - estimate.resident < 1e6
    assert estimate.resident < compiled.memory < 2 * estimate.peak
    assert compiled.program is not None
    assert compiled.program.kernels["flash_attention_backward"] == SMALL.num_layers
    kinds = {one.kind for one in compiled.program.collectives}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert compiled.involuntary == 0


def test_frozen_layers_in_the_hosts_memory_take_none_of_a_devices() -> None:
    """The compiler fetches a layer at a time: what it needs does not grow with the number of layers' weights."""
    libtpu_goes_with_jax()
    config = run(2, 1, offload="frozen", param_dtype="bfloat16", lora=LoraConfig(rank=8))
    compiled = compile_step(config, LARGER, parse_topology("v5e:1x1"), quick=True)
    estimate = estimated(config, LARGER, "v5e:1x1")
    vocabulary = 2 * LARGER.vocab_size * LARGER.hidden_size
    matrices = num_params(LARGER) - vocabulary - (2 * LARGER.num_layers + 1) * LARGER.hidden_size
    assert compiled.host == estimate.host == 2 * matrices
    assert 0 <= compiled.arguments - estimate.resident < 1e6
    assert compiled.memory == pytest.approx(estimate.peak, rel=0.25)
    assert compiled.memory - compiled.arguments < compiled.host


def test_a_dense_weight_lies_beside_a_base_in_four_bits_where_no_kernel_multiplies() -> None:
    """Of 2,048 rows an H100 multiplies none by its kernel, a smaller GPU all (see `nn.nf4`)."""
    config = run(2, 2, length=1024, param_dtype="bfloat16", quantize="nf4", lora=LoraConfig(rank=8))
    gathered = {name: estimated(config, LARGER, name).gathered for name in ("v5e:1x1", "rtx4090:1", "h100:1", "t4:1")}
    dense = 2 * LARGER.hidden_size * max(layer.feed_forward.size for layer in LARGER.period)
    assert gathered == {"v5e:1x1": 0, "rtx4090:1": 0, "h100:1": dense, "t4:1": dense}


@pytest.mark.parametrize(("mesh", "gib"), [({"fsdp": 4, "tensor": 4}, 8.37), ({"fsdp": 16}, 14.01)])
def test_seventy_billion_parameters_in_four_bits(mesh: dict[str, int], gib: float) -> None:
    """LLaMA-2-70B on v5e:4x4; what libtpu said of the whole step stands in benchmarks/README.md."""
    lora = LoraConfig(rank=64, alpha=16, dropout=0.1, targets=("all-linear",))
    config = run(
        1,
        16,
        length=2048,
        mesh=mesh,
        param_dtype="bfloat16",
        quantize="nf4",
        remat="full",
        lora=lora,
    )
    assert estimated(config, PUBLISHED["llama-2-70b"], "v5e:4x4").peak == pytest.approx(gib * 2**30, rel=0.04)


@pytest.mark.nightly
def test_codes_are_gathered_without_a_copy_of_all_layers(tmp_path: Path) -> None:
    """A TPU's compiler would rather gather along the outermost dim, and lay out the whole stack anew for that."""
    libtpu_goes_with_jax()
    lora = LoraConfig(rank=8, targets=("q_proj",))
    config = run(1, 4, length=256, mesh={"fsdp": 2, "tensor": 2}, param_dtype="bfloat16", quantize="nf4", lora=lora)
    shape = uniform_decoder(
        "llama",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        head_dim=128,
    )
    program = tmp_path / "program.txt"
    compile_step(config, shape, parse_topology("v5e:2x2"), quick=True, text=str(program))
    lines = program.read_text(encoding="utf-8").splitlines()
    # The 4 blocks of a layer's 256 inputs come together; nothing is done to those of all three layers at once.
    assert any(re.search(r" = u8\[(1,)?4,32,\d+\]\S* all-gather\(", line) for line in lines)
    assert not [line[:120] for line in lines if re.search(r" = u8\[3,\d+,32,\d+\]\S* copy\(%param", line)]


def test_state_and_frozen_base_are_exact() -> None:
    """Of 8 CPU devices the compiler's arguments are the state, the frozen base and the batch: nothing is estimated."""
    config = run(2, 8, length=64, param_dtype="bfloat16", lora=LoraConfig(rank=8, modules_to_save=("lm_head",)))
    tiny = dataclasses.replace(SMALL, num_layers=2)
    compiled = compile_step(config, tiny, parse_topology("cpu:8"), quick=True)
    # The base's own output matrix lies there too, but the step has no use for it.
    unused = 2 * tiny.vocab_size * tiny.hidden_size // 8
    batch = 2 * 64 * (4 * 4 + 1)
    found = estimated(config, tiny, "cpu:8").resident
    assert compiled.arguments == pytest.approx(found - unused + batch, abs=4096)
    assert compiled.program is not None and compiled.program.cycles is None


def test_what_fits_where_everyone_knows_it() -> None:
    """LLaMA-2-7B in full, float32 and AdamW: 16 bytes a parameter are 100 GiB, so 4 chips of 16 GB cannot have it."""
    shape = PUBLISHED["llama-2-7b"]
    few = estimated(run(1, 4, length=2048), shape, "v5e:2x2")
    assert few.resident == pytest.approx(12 * num_params(shape) / 4, rel=0.001)
    assert few.peak > 15.75 * 2**30
    assert estimated(run(1, 16, length=2048), shape, "v5e:4x4").peak < 15.75 * 2**30
