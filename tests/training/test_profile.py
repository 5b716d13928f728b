"""Traces of steps: which steps are in them, what they are called, and how their time is told."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.cli.plan import main as plan
from jaxlm.cli.train import main
from jaxlm.config import ProfileConfig, RunConfig, TrainConfig
from jaxlm.devices.operations import Place, place
from jaxlm.devices.trace import PROGRAM, _Run, _shares, measure, read_trace
from jaxlm.errors import UserError
from jaxlm.training.profile import Profile, check_profile, profile_warnings
from tests.e2e.conftest import base_config, inputs, write_config

__all__ = ["base_config", "inputs"]  # fixtures

SCAN = "jit(step)/{}/Decoder.hidden/while/body/closed_call"


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        (
            f"{SCAN.format('jvp(Decoder.loss)')}/layers/layers.attend/self_attn/q_proj/cond/branch_0_fun/dot_general",
            Place("layers/self_attn/q_proj", "forward", "dot_general"),
        ),
        (
            f"{SCAN.format('transpose(jvp(Decoder.loss))')}/checkpoint/rematted_computation/layers/mlp/jit(silu)/mul",
            Place("layers/mlp", "recomputed", "mul"),
        ),
        (
            f"{SCAN.format('transpose(jvp(Decoder.loss))')}/checkpoint/layers/layers.attend/self_attn/"
            "bkgqd,bksd->bkgqs/dot_general",
            Place("layers/self_attn", "backward", "dot_general"),
        ),
        ("jit(step)/jvp(Decoder.loss)/while/body/closed_call/dot_general", Place("loss", "forward", "dot_general")),
        (
            "jit(step)/jvp(Decoder.loss)/Decoder.hidden/Decoder._normed/Decoder.last_states/norm/mul",
            Place("norm", "forward", "mul"),
        ),
        (
            "jit(step)/transpose(jvp(Decoder.loss))/Decoder.hidden/while/body/jit(dynamic_index_in_dim)/dynamic_slice",
            Place("hidden", "backward", "dynamic_slice"),
        ),
        ("jit(step)/optimizer/cond/branch_0_fun/cond/branch_1_fun/add", Place("optimizer", "", "add")),
        ("reduce_sum", Place("", "", "reduce_sum")),
    ],
)
def test_operations_have_the_names_of_modules(op_name: str, expected: Place) -> None:
    assert place(op_name) == expected


def test_time_in_which_several_run_is_divided() -> None:
    at = Place("", "", "mul")
    # Alone for 2, with the second for 2, nothing for 1, alone for 3.
    runs = [_Run(0, 4, at), _Run(2, 4, at), _Run(5, 8, at)]
    assert _shares(runs) == pytest.approx([3, 1, 3])
    # One begins while two run: 1 + 1/2 + 1/3 | 1/2 + 1/3 | 1/3 + 2.
    assert _shares([_Run(0, 3, at), _Run(1, 3, at), _Run(2, 5, at)]) == pytest.approx([11 / 6, 5 / 6, 7 / 3])


def test_a_measured_step_has_the_time_of_each_operation() -> None:
    def step(x: jax.Array) -> jax.Array:
        with jax.named_scope("large"):
            y = x @ x
        with jax.named_scope("small"):
            return y[:8, :8] @ x[:8, :8] + 1

    x = jnp.ones((512, 512))
    compiled = jax.jit(step).lower(x).compile()
    trace = measure(lambda: compiled(x).block_until_ready(), compiled.as_text(), steps=3)
    assert trace.steps == 3 and 0 < trace.busy <= trace.seconds
    # Which of the two took longer is the machine's matter: a process may be put off in the middle of either.
    by_name = {op.name: op for op in trace.operations if op.kind == "dot_general"}
    assert by_name.keys() == {"large", "small"} and all(op.count == 1 and op.cost > 0 for op in by_name.values())
    assert [op.cost for op in trace.operations] == sorted((op.cost for op in trace.operations), reverse=True)
    assert sum(op.cost for op in trace.operations) == pytest.approx(trace.busy)
    heading, _, *rows = trace.lines()
    costliest = trace.operations[0]
    assert " ms a step, by 3 steps; in " in heading and rows[0].endswith(f"{costliest.name}: {costliest.kind}")


def run_config(tmp_path: Path, **profile: int) -> RunConfig:
    return RunConfig(train=TrainConfig(profile=ProfileConfig(**profile)), output_dir=str(tmp_path / "run"))


def test_which_steps_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path, start=3, steps=2)
    hosts: Any = SimpleNamespace(processes=1, process=0)
    monkeypatch.setattr("jaxlm.training.profile.start_trace", lambda folder, for_perfetto: None)
    monkeypatch.setattr("jaxlm.training.profile.stop_trace", lambda folder, text: None)

    def traced(done: int, last: int) -> tuple[list[int], list[str]]:
        profile, begun, said = Profile(config, hosts, done, lambda: ""), [], []
        for step in range(done + 1, last + 1):
            if profile.begins_with(step):
                profile.begin(step)
                begun.append(step)
            if profile.ends_with(step):
                said.append(str(profile.end(step)).partition(":")[0])
        return begun, [*said, *([str(profile.end(last)).partition(":")[0]] if last == 3 else [])]

    assert traced(0, 9) == ([3], ["trace of steps 3 to 4"])
    assert traced(3, 9) == ([4], ["trace of step 4"])  # a resumed run, in the middle
    assert traced(0, 3) == ([3], ["trace of step 3"])  # a run that is ended early
    assert traced(4, 9) == ([], []) and profile_warnings(config, 3) == []
    assert "steps 3 to 4 are not traced; set train.profile.start to 6 or later" in profile_warnings(config, 4)[0]
    check_profile(config, 3)
    with pytest.raises(UserError, match=r"train.profile.start: 3 comes after the run's last step, 2"):
        check_profile(config, 2)
    two: Any = SimpleNamespace(processes=2, process=1)
    assert Profile(config, two, 0, lambda: "").folder == tmp_path / "run" / "profile" / "process-01"


def test_bad_profiles_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts: Any = SimpleNamespace(processes=1, process=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("")
    with pytest.raises(UserError, match=r"train.profile: .*run/profile cannot be made \(File exists\)"):
        Profile(run_config(tmp_path), hosts, 0, lambda: "")
    with pytest.raises(UserError, match=r"holds no trace; train.profile makes one"):
        read_trace(tmp_path)
    for words, message in (
        (["--train.profile.start", "0"], "train.profile.start: 0 must be at least 1"),
        (["--train.profile", "{start: 5, steps: 0}"], "train.profile.steps: 0 must be between 1 and 100"),
        (["--train.profile.begin", "5"], "unknown key 'train.profile.begin'"),
    ):
        assert main([*words, "--model.shape", "llama-2-7b"]) == 2
        assert message in capsys.readouterr().err
    for words, message in (
        (["--topology", "v5e:4x4", "--by-op"], "--by_op: goes with --compile"),
        (["--topology", "cpu:1", "--by-op", "--compile"], "--by_op: cpu:1: only a TPU's compiler says"),
    ):
        assert plan([*words, "--model.shape", "llama-2-7b"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.xdist_group("train")
def test_a_run_leaves_a_trace(base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path, base_config, train={"steps": 4, "eval_every": 2, "profile": {"start": 2, "steps": 2}}
    )
    assert main(["--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "profile"
    assert f"trace of steps 2 to 3: {folder}" in capsys.readouterr().out
    trace = read_trace(folder)
    assert trace.steps == 2 and trace.busy > 0
    named = {(op.name, op.step_pass) for op in trace.operations}
    for module in ("layers/self_attn/q_proj", "layers/mlp/up_proj"):
        assert {(module, "forward"), (module, "backward")} <= named
    assert ("optimizer", "") in named
    # The evaluation in between is another program.
    assert "another program" in {op.kind for op in trace.operations}
    # What Perfetto opens.
    (events,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    with gzip.open(events, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("train") == 2
    with gzip.open(folder / PROGRAM, "rt") as file:
        assert file.readline().startswith("HloModule jit_step")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (part of the extra `test`), no TPU"
)
def test_where_a_tpus_compiler_expects_the_cycles(
    base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(write_config(tmp_path, base_config)), "--topology", "v5e:2x2", "--compile", "--by-op"]
    assert plan([*words, "--json"]) == 0
    program = json.loads(capsys.readouterr().out)["compiled"]["program"]
    assert sum(op["cost"] for op in program["operations"]) == pytest.approx(program["cycles"])
    costs = {(op["name"], op["step_pass"]): op["cost"] for op in program["operations"] if op["kind"] == "dot_general"}
    assert costs["layers/mlp/up_proj", "forward"] > 0 and costs["layers/mlp/up_proj", "backward"] > 0
