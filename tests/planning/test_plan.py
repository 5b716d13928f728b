"""`python -m jaxlm.plan` as a user meets it, and its parts that need no compiler."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.plan import main, model_shape
from jaxlm.config import MeshConfig, ModelConfig, MoeRunConfig, RunConfig
from jaxlm.devices.chips import parse_topology, peak_flops
from jaxlm.devices.compiler_options import compiler_options
from jaxlm.devices.operations import Operation, table
from jaxlm.devices.program import memory_bytes, read_program
from jaxlm.errors import UserError
from jaxlm.models.families import SHAPES, write_config
from jaxlm.models.resolve import resolve_experts
from jaxlm.planning.compiled import compile_step
from jaxlm.planning.cost import estimate_cost
from jaxlm.planning.memory import estimate_memory
from jaxlm.training.report import flops_per_token
from jaxlm.training.setup import set_up
from jaxlm.weights.names import num_params
from tests.planning.test_memory import LARGER, SMALL, run

OFFLOAD = ("--lora.rank", "8", "--model.offload", "frozen")


def plan_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    status = main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def small_model(tmp_path: Path) -> Path:
    """A model directory without weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(write_config(LARGER, "float32")))
    return tmp_path / "model"


def test_a_model_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model.path", str(small_model(tmp_path)), "--topology", "v5e:4x4", "--train.micro_batch_size", "8")
    status, found = plan_of(capsys, *words)
    assert status == 0 and found["fits"]
    assert found["parameters"] == found["trained"] == num_params(LARGER)
    assert found["devices"]["fsdp"] == 16 and found["micro_batch"] == 8 and found["accumulation"] == 1
    assert found["memory"]["parameters"] == pytest.approx(4 * num_params(LARGER) / 16, rel=0.01)
    assert found["chip"]["flops"] == 197e12
    assert found["cost"]["tokens"] == 128 * 512
    main(list(words))
    shown = capsys.readouterr().out
    assert "jaxlm serve with 16 answers at a time compiles programs at its start, " in shown
    assert "fits: " in shown and "█" in shown and "MFU" in shown and "faster --model.remat" in shown


def test_an_optimizers_state_in_bytes_is_a_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.shape", "llama-2-7b", "--topology", "v5e:4x4"]
    plain, coded = (
        plan_of(capsys, *words, "--optimizer.name", name)[1]["memory"]["optimizer"] for name in ("adamw", "adamw_8bit")
    )
    assert coded == pytest.approx(plain * (2 + 8 / 256) / 8, rel=0.01)


def test_a_base_in_the_hosts_memory_is_none_of_a_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA-2-13B in bfloat16, 26 GB, on a chip of 16; its embedding, head and norms stay there."""
    words = ["--model.shape", "llama-2-13b", "--model.param_dtype", "bfloat16", "--topology", "v5e:1x1", *OFFLOAD]
    status, found = plan_of(capsys, *words, "--train.micro_batch_size", "1")
    shape = SHAPES["llama-2-13b"]
    outside = 2 * shape.vocab_size * shape.hidden_size + (2 * shape.num_layers + 1) * shape.hidden_size
    assert status == 0 and found["memory"]["host"] == 2 * (num_params(shape) - outside)
    assert found["memory"]["parameters"] == 2 * outside + 4 * found["trained"]
    main(words)
    assert "frozen layers, for each device" in capsys.readouterr().out


def test_what_does_not_fit_comes_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model.shape", "llama-2-7b", "--topology", "v5e:4x4", "--train.global_batch_size", "64")
    status, found = plan_of(capsys, *words, "--model.remat", "none", "--data.sequence_length", "2048")
    assert status == 1 and found["fits"] is False
    changes = found["suggestions"][0]["changes"]
    assert list(changes) == ["model.remat"]  # the fewest changes
    again = [word for key, value in changes.items() for word in (f"--{key}", value)]
    status, found = plan_of(capsys, *words, "--data.sequence_length", "2048", *again)
    assert status == 0 and found["fits"] is True


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model.shape", "llama-2-70b", "--topology", "v5e:2x2", "--train.global_batch_size", "4"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit, by" in shown and "more devices" in shown


def test_a_card_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    """Its memory is said by hand: whether the run fits is known then, how fast it is is not."""
    words = ("--model.shape", "llama-2-7b", "--lora.rank", "8", "--train.global_batch_size", "16", "--topology")
    status, found = plan_of(capsys, *words, "gpu:2", "--memory", "24")
    assert status == 0 and found["fits"] and found["time"] is None
    assert found["chip"]["memory"] == 0.75 * 24 * 2**30
    status, found = plan_of(capsys, *words, "gpu:2", "--memory", "12")
    assert status == 1 and found["suggestions"][0]["changes"] == {"model.quantize": "int8"}
    status, found = plan_of(capsys, *words, "gpu:1", "--memory", "9")
    assert status == 1 and found["suggestions"][0]["changes"]["model.quantize"] == "nf4"
    again = "--model.quantize", "nf4", "--train.micro_batch_size", "1"
    status, found = plan_of(capsys, *words, "gpu:1", "--memory", "9", *again)
    assert status == 0 and 3.9e9 < found["memory"]["parameters"] - 4 * found["trained"] < 4.5e9
    assert main([*words, "gpu:2", "--memory", "24"]) == 0
    assert "fits: " in capsys.readouterr().out


def test_a_stage_has_the_shape_of_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {shape: llama-2-7b}\n"
        "stages: [{name: first}, {name: second, lora: {rank: 8}}, {name: third, lora: {rank: 16}}]\n"
    )
    words = ("--config", str(tmp_path / "run.yaml"), "--topology", "cpu:8", "--output_dir", str(tmp_path))
    status, found = plan_of(capsys, *words)
    assert status == 0
    stages = found["stages"]
    trained = [stage["trained"] for stage in stages]
    assert trained[0] == stages[1]["parameters"] == num_params(SHAPES["llama-2-7b"])
    assert trained[2] == 2 * trained[1]


@pytest.mark.slow
def test_slices_sum_gradients_over_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    def figures(topology: str, rows: int, *more: str) -> Any:
        words = ("--model.shape", "llama-2-7b", "--topology", topology, "--train.global_batch_size", str(rows), *more)
        return plan_of(capsys, *words)[1]

    one, two = figures("v5e:4x4", 64), figures("2*v5e:4x4", 128, "--mesh.data", "2")
    assert two["topology"] == "2*v5e:4x4" and two["devices"]["data"] == 2
    assert one["cost"]["network_bytes"] == one["time"]["network"] == 0
    # Each chip has its shard of the gradients in float32, and its share of what a host of 8 sends, 200 Gbit/s.
    shard = 4 * 6_738_415_616 / 16
    assert two["cost"]["network_bytes"] == pytest.approx(shard, rel=1e-3)
    assert two["time"]["network"] == pytest.approx(shard / 3.125e9, rel=1e-3)
    assert two["cost"]["link_bytes"] == one["cost"]["link_bytes"]


def test_flops_of_a_step() -> None:
    """Of the products alone XLA counts, in the compiled 7B step of 4,096 tokens a chip, 2.036e14 (v5e:4x4)."""
    shape = SHAPES["llama-2-7b"]
    setup = set_up(run(2, 16, length=2048), shape, parse_topology("v5e:4x4"))
    initializer = setup.initializer(setup.schedule(10))
    cost = estimate_cost(setup, initializer, estimate_memory(setup, initializer))
    scores = 2 * shape.num_layers * shape.attention.num_heads * shape.attention.head_dim * 2048 * 4096
    assert cost.hardware_flops - 4.5 * scores == pytest.approx(2.036e14, rel=0.005)
    # Weights in bfloat16, twice; gradients in float32, once. The compiler has 26.4 GB of gathers (its own part of each
    # counted too), and 53.9 GB of all-reduces in place of reduce-scatters.
    assert cost.link_bytes == pytest.approx((2 * 2 + 4) * num_params(shape) * 15 / 16, rel=0.001)


@pytest.mark.parametrize(("name", "active"), [("qwen3-30b-a3b", 3.3e9), ("qwen3-235b-a22b", 22e9)])
def test_only_experts_that_a_token_uses_count(name: str, active: float) -> None:
    """The parameters that a token activates are published; of the embedding it looks one row up."""
    shape = SHAPES[name]
    looked_up = shape.vocab_size * shape.hidden_size
    attention = 6 * sum(layer.attention.num_heads * layer.attention.head_dim for layer in shape.layers())
    flops = flops_per_token(shape, 1, full=True)
    assert flops - attention == pytest.approx(6 * (active - looked_up), rel=0.015)
    assert flops_per_token(shape, 1, full=False) == pytest.approx((flops - attention) * 2 / 3 + attention)


def test_neurons_that_are_masked_are_computed() -> None:
    """Half of the neurons are used: a step that masks the others computes what one of the dense model does."""

    def hardware(**more: Any) -> tuple[float, float]:
        config = dataclasses.replace(run(2, 16, length=2048), **more)
        shape = resolve_experts(SHAPES["llama-2-7b"], config.moe, fresh=True)
        setup = set_up(config, shape, parse_topology("v5e:4x4"))
        initializer = setup.initializer(setup.schedule(10))
        cost = estimate_cost(setup, initializer, estimate_memory(setup, initializer))
        return cost.model_flops, cost.hardware_flops

    half: dict[str, Any] = dict(experts=8, router="modality", top_k={"text": 4})
    dense, masked = hardware(), hardware(moe=MoeRunConfig(**half, compute="dense"))
    sparse = hardware(moe=MoeRunConfig(**half, compute="ragged"))
    assert masked[0] == sparse[0] < 0.7 * dense[0]
    assert masked[1] == pytest.approx(dense[1], rel=1e-3) and sparse[1] < 0.7 * dense[1]


def test_the_learning_rate_is_drawn_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without devices, and for each of several lengths that a run can have."""
    words = ["--model.shape", "llama-2-7b", "--schedule", str(tmp_path / "rates.png"), "--optimizer.end_ratio", "0.1"]
    assert main([*words, "--optimizer.warmup_steps", "10", "--train.steps", "50"]) == 0
    said = capsys.readouterr().err
    assert "from 0.00e+00 at step 1 to 3.00e-04 at step 11, then cosine to 3.0" in said and "at step 50; mean" in said
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--optimizer.schedule", "constant"]) == 0
    assert "learning rate 3.00e-04 to step 1,000; mean 3.00e-04 (1,000 steps are assumed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5p-64"], "v5p-64 is v5p:2x4x4"),
        (["--topology", "v5litepod-256"], "v5litepod-256 is v5e:16x16"),
        (["--topology", "v5e:4x4x4"], "slices have 2 dims.*v5e-64 is v5e:8x8"),
        (["--topology", "h201:8"], "unknown chip 'h201'.*did you mean 'h200'"),
        (["--topology", "h200:0"], "has no devices"),
        ([], "--topology: say for which devices"),
        (["--topology", "2*h200:8"], "only TPUs come in slices"),
        (["--topology", "2*v5e:4x4"], "mesh.data: 1 is not a multiple of the 2 slices"),
        (["--topology", "v5e:4x4", "--mesh.tensor", "3"], "16 devices cannot be divided by 3"),
        (["--topology", "v5e:4x4", "--mesh.data", "2", "--mesh.fsdp", "4"], "asks for 8 devices, the topology has 16"),
        (["--topology", "v5e:4x4", "--train.global_batch_size", "20"], "20 rows cannot be shared by 16 groups"),
        (["--topology", "v5e:4x4", "--data.sequence_length", "99999"], "more than the 4096 positions"),
        (["--topology", "v5e:4x4", "--model.attention", "cudnn"], "cannot serve: needs an NVIDIA GPU"),
        (
            ["--topology", "v5e:4x4", "--mesh.sequence", "4", "--data.sequence_length", "510"],
            "4 does not divide rows of",
        ),
        (["--topology", "v5e:8x8", "--mesh.sequence", "64"], "64 times mesh.tensor 1 does not divide.* 32 heads"),
        (["--topology", "v5e:3x3"], r"v5e has no such slice.* v5e:2x4 \(8 chips\) and v5e:4x4"),
        (["--topology", "gpu:8", "--memory", "much"], "--memory: 'much' is not a number"),
        (["--topology", "v4:4x4x4", "--compile"], "a v4 chip as two devices"),
        (["--topology", "b200:8", "--compile"], "has no description of b200"),
        (["--schedule", "rates.pdf"], "--schedule: rates.pdf: name a .png file"),
        (["--topology", "v5e:4x4", "--train.micro_batch", "1"], "did you mean 'train.micro_batch_size'"),
        (["--topology", "v5e:4x4", "--model.quantize", "nf4"], "nf4 keeps weights that nothing trains"),
        (["--topology", "v5e:4x4", "--model.offload", "frozen"], "without lora all are trained"),
        (["--topology", "v5e:4x4", *OFFLOAD, "--model.remat", "none"], "model.remat: none keeps the weights"),
        (["--topology", "h100:8", *OFFLOAD, "--compile"], "h100:8: JAX knows no hosts' memory beside GPUs"),
        (
            ["--topology", "v5e:4x4", *OFFLOAD, "--train.sample_prompts", "[a]"],
            "train.sample_prompts: with model.offload",
        ),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model.shape", "llama-2-7b", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--topology", "cpu:8"]) == 2
    assert "give --model.shape" in capsys.readouterr().err
    assert main(["--topology", "cpu:8", "--model.path", "nowhere"]) == 2
    assert "nowhere: no such directory; a plan needs only the model's shape" in capsys.readouterr().err


def test_the_worker_tells_mistakes_as_they_are() -> None:
    config = dataclasses.replace(run(1, 8), model=ModelConfig(attention="pallas_tpu"), mesh=MeshConfig(fsdp=8))
    with pytest.raises(UserError, match=r"model.attention: 'pallas_tpu' cannot serve: needs a TPU"):
        compile_step(config, SMALL, parse_topology("cpu:8"))


def test_an_option_that_the_compiler_does_not_have() -> None:
    config = dataclasses.replace(run(1, 1), train=dataclasses.replace(run(1, 1).train, compiler_options={"xla_no": 1}))
    with pytest.raises(UserError, match=r"train.compiler_options: .*No such compile option: 'xla_no'"):
        compile_step(config, dataclasses.replace(SMALL, num_layers=1), parse_topology("cpu:1"))


def test_compiler_options_by_devices() -> None:
    rings, memory = "xla_jf_spmd_threshold_for_windowed_einsum_mib", "xla_tpu_scoped_vmem_limit_kib"
    assert compiler_options("TPU v5 lite", 16) == {rings: 1000000, memory: 32768}
    assert compiler_options("TPU v5 lite", 256) == {memory: 32768}
    assert compiler_options("TPU v6 lite", 16) == {rings: 1000000}
    assert compiler_options("TPU v6 lite", 256) == {}
    assert compiler_options("cpu", 8) == {}
    config = dataclasses.replace(RunConfig(), train=dataclasses.replace(run(1, 8).train, compiler_options={"a": 1}))
    assert set_up(config, SMALL).compiler_options() == {"a": 1}


def test_peaks_by_device_kind() -> None:
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None


PROGRAM = """HloModule step

%fused (p: bf16[8,64]) -> bf16[8,32] {
  %p = bf16[8,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} constant({...})
  ROOT %conv = bf16[8,32]{1,0} convolution(%p, %w), metadata={op_name="jit(step)/jvp(D.loss)/mlp/mul"}
}

%body (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = bf16[8,64]{1,0} get-tuple-element(%t), index=1
  %start = (bf16[8,16]{1,0}, bf16[8,64]{1,0}) all-gather-start(%part), channel_id=1, dimensions={1}
  %part = bf16[8,16]{1,0} slice(%x), slice={[0:8], [0:16]}
  %done = bf16[8,64]{1,0} all-gather-done(%start)
  %f = bf16[8,32]{1,0} fusion(%done), calls=%fused, metadata={op_name="a/b"}, backend_config={"estimated_cycles":"100"}
  %kernel.3 = bf16[8,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], bf16[8,64]{1,0}) tuple(%next, %x)
}

%condition (t.1: (s32[], bf16[8,64])) -> pred[] {
  %t.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %end = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,64])) -> f32[4] {
  %a = (s32[], bf16[8,64]{1,0}) parameter(0)
  %loop = (s32[], bf16[8,64]{1,0}) while(%a), condition=%condition, body=%body
  %g = f32[4]{0} constant({1,2,3,4})
  %part.1 = f32[2]{0} reduce-scatter(%g), channel_id=1, dimensions={0}
  %part.2 = f32[1]{0} reduce-scatter(%part.1), channel_id=1, dimensions={0}
  ROOT %sum = f32[4]{0} all-reduce(%g), channel_id=2, backend_config={"estimated_cycles":"7"}
}
"""


def test_a_program_is_read_with_its_loops() -> None:
    found = read_program(PROGRAM)
    trips = 3  # to 6 in steps of 2
    assert found.flops == pytest.approx(trips * 2 * 8 * 64 * 32)
    assert found.cycles == trips * 100 + 7
    assert found.kernels == {"kernel": trips}
    by_kind = {one.kind: one for one in found.collectives}
    gathered, summed = by_kind["all-gather"], by_kind["all-reduce"]
    assert (gathered.overlaps, gathered.count, gathered.bytes) == (True, trips, trips * 8 * 64 * 2)
    assert (summed.overlaps, summed.count, summed.bytes) == (False, 1, 2 * 16)
    scattered = by_kind["reduce-scatter"]  # two that share a channel
    assert (scattered.overlaps, scattered.count, scattered.bytes) == (False, 2, 16 + 8)
    assert found.collective_bytes(False) == 32 + 24
    assert type(found).from_dict(json.loads(json.dumps(found.to_dict()))) == found
    # A fusion is named after its product, and not after what it ends with.
    assert found.operations == (Operation("mlp", "forward", "mul", 300, 3), Operation("", "", "all-reduce", 7, 1))
    lines = [line.split() for line in table(found.operations, found.cycles, "cycles", 1, top=1)]
    assert lines[1:3] == [["300.000", "97.7%", "3", "forward", "mlp:", "mul"], ["7.000", "2.3%", "1", "others"]]
    assert " ".join(lines[3]) == "together: forward 97.7%, beside them 2.3%"


STRAIGHT = """HloModule step

ENTRY %main (w: bf16[64,32], t: bf16[100,64], k: bf16[9,16]) -> bf16[8,32] {
  %w = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %t = bf16[100,64]{1,0} parameter(1)
  %k = bf16[9,16]{1,0} parameter(2)
  %gather_fusion = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} fusion(%t, %ids), kind=kCustom, calls=%looked_up
  %copy-start = (bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,32]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %y = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} fusion(%gather_fusion, %copy-done), kind=kOutput, calls=%product
  %pages.3 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} custom-call(%y, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[8,32]{1,0} add(%pages.3, %y)
}
"""


def test_what_is_kept_on_the_chip_is_moved_once() -> None:
    """Rows that are looked up, a weight that is fetched ahead, a kernel that says what it moves, the result."""
    assert memory_bytes(STRAIGHT, {"pages": 1000.0}) == 2 * (8 * 64 + 64 * 32 + 8 * 32) + 1000
    with pytest.raises(KeyError, match="pages"):
        memory_bytes(STRAIGHT, {})


@pytest.mark.parametrize("weights", [True, False])
def test_a_directory_of_mixtral(weights: bool, tmp_path: Path) -> None:
    """Its shape is planned with the experts it has, whether or not the weights are there."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_local_experts=4)
    config = transformers.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    (transformers.MixtralForCausalLM(config) if weights else config).save_pretrained(tmp_path)
    if not weights:
        config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["MixtralForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_shape(RunConfig(model=ModelConfig(path=str(tmp_path))))
    assert shape.experts is not None and (shape.experts.num_experts, shape.feed_forward.size) == (4, 96)
