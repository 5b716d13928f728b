"""The train command as a user runs it, in this process; eight fake devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from convert.commands.main import main as convert
from jaxlm.cli.prepare import main as prepare
from jaxlm.cli.train import main
from jaxlm.runs.events import read_events
from jaxlm.runs.overview import Observer
from tests.e2e.conftest import SHAPE, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("train")]


def read(output: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def full_run(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    config = write_config(folder, base_config, train={"steps": 8})
    assert main(["--config", str(config), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_leaves_what_the_docs_say(full_run: Path) -> None:
    assert (full_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    start, *_, end = read_events(full_run / "events.jsonl")
    assert (start["event"], start["step"], start["total"]) == ("start", 0, 8) and "model" in start["facts"]
    assert (end["event"], end["step"], end["complete"]) == ("end", 8, True) and start["data"]
    assert Observer(full_run).look().state == "complete" and min(read(full_run, "host_memory")) > 1 << 20
    assert yaml.safe_load((full_run / "config.yaml").read_text())["train"]["steps"] == 8
    assert len(read(full_run, "loss")) == 8
    validation = read(full_run, "validation_loss")
    assert validation[-1] < validation[0] - 0.5
    checkpoint = full_run / "checkpoints" / "8"
    assert json.loads((checkpoint / "jaxlm" / "model.json").read_text())["model"]["hidden_size"] == 64
    assert (checkpoint / "jaxlm" / "tokenizer" / "tokenizer.model").is_file()


def test_mesh_and_accumulation_do_not_change_the_losses(
    base_config: dict[str, Any], full_run: Path, tmp_path: Path
) -> None:
    # 2 x 2 rows groups x tensor 2, and twice the micro-steps: the same global batches, sums in another order.
    config = write_config(
        tmp_path,
        base_config,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        train={"steps": 8, "save_every": 0},
    )
    assert main(["--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    np.testing.assert_allclose(read(tmp_path / "run", "loss"), read(full_run, "loss"), rtol=2e-5)


@pytest.mark.slow
def test_lora_run_continues_from_an_adapter_and_exports(
    base_config: dict[str, Any], full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lora(name: str, **settings: Any) -> Path:
        config = write_config(
            tmp_path / name,
            base_config,
            model={"path": str(full_run), "shape": None},
            tokenizer=None,
            lora={"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"], **settings},
            train={"steps": 4, "sample_prompts": ["rock sand"], "sample_tokens": 4},
        )
        assert main(["--config", str(config), "--output_dir", str(tmp_path / name / "run")]) == 0
        return tmp_path / name / "run"

    first = lora("first")
    text = capsys.readouterr().out
    assert "> rock sand" in text
    assert "convert jax-to-peft" in text
    second = lora("second", init_from=str(first))
    # Weights carry over, the optimizer does not: the second begins where the first ended.
    np.testing.assert_allclose(read(second, "validation_loss")[0], read(first, "validation_loss")[-1], rtol=1e-5)
    assert convert(["jax-to-peft", str(second), str(tmp_path / "peft")]) in (0, None)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["r"] == 4
    third = lora("third", init_from=str(tmp_path / "peft"))
    np.testing.assert_allclose(read(third, "validation_loss")[0], read(second, "validation_loss")[-1], rtol=1e-5)
    # Merging into the base gives the model that was evaluated: a full run from it starts at the same loss.
    assert convert(["merge", str(full_run), str(third), str(tmp_path / "merged"), "--format", "hf"]) in (0, None)
    config = write_config(
        tmp_path / "check",
        base_config,
        model={"path": str(tmp_path / "merged"), "shape": None},
        tokenizer=None,
        train={"steps": 1, "save_every": 0},
    )
    assert main(["--config", str(config), "--output_dir", str(tmp_path / "check" / "run")]) == 0
    merged = read(tmp_path / "check" / "run", "validation_loss")[0]
    np.testing.assert_allclose(merged, read(third, "validation_loss")[-1], rtol=1e-5)


def test_a_complete_run_is_left_alone(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in full_run.rglob("*") if path.name != "config.yaml"}
    assert main(["--config", str(full_run / "config.yaml")]) == 0
    assert "is step 8 of 8" in capsys.readouterr().out
    assert before.items() <= {path: path.stat().st_mtime_ns for path in full_run.rglob("*")}.items()


def test_result_opens_in_transformers_and_peft(full_run: Path, tmp_path: Path, inputs: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert convert(["jax-to-hf", str(full_run), str(tmp_path / "hf")]) in (0, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    # The validation loss, computed again by PyTorch on text tokenised by transformers.
    validation = validation_texts(full_run)
    total = count = 0.0
    for prompt, answer in validation:
        prompt_ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        ids = [tokenizer.bos_token_id, *tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]]
        ids = [*ids, tokenizer.eos_token_id][: SHAPE["max_position_embeddings"] // 2]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(len(prompt_ids), len(ids)):
            total -= float(log_probs[position - 1, ids[position]])
            count += 1
    assert count > 50
    np.testing.assert_allclose(total / count, read(full_run, "validation_loss")[-1], rtol=1e-4)


def validation_texts(run: Path) -> list[tuple[str, str]]:
    """The held-out records of a run as (prompt, answer)."""
    from jaxlm.config.files import load_run_yaml
    from jaxlm.data.loader import build_data
    from jaxlm.tokenizer import load_tokenizer

    config = load_run_yaml((run / "config.yaml").read_text(), "config.yaml")
    tokenizer = load_tokenizer(run / "checkpoints" / "8" / "jaxlm" / "tokenizer")
    data = build_data(config.data, tokenizer, seed=config.train.seed, vocab_size=320, max_positions=128)
    held_out = {bytes(data.validation[i].input_ids) for i in range(len(data.validation))}  # type: ignore[arg-type,index]
    pairs = []
    for record in json.loads(Path(config.data.train[0].path).read_text()):
        prompt = f"### Instruction:\n{record['instruction']}\n\n### Response:\n"
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt + record["output"]).ids, tokenizer.eos_id][:64]
        if np.asarray(ids, np.int32).tobytes() in held_out:
            pairs.append((prompt, record["output"]))
    assert len(pairs) == len(held_out) == 10
    return pairs


def test_preview_shows_text_and_trains_nothing(
    base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, base_config)
    assert main(["--config", str(config), "--output_dir", str(tmp_path / "run"), "--preview", "1"]) == 0
    text = capsys.readouterr().out
    assert "### Response:" in text
    assert not (tmp_path / "run").exists()


def test_help_and_print_config_answer_without_jax(tmp_path: Path) -> None:
    def said(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "jaxlm.train", *words],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "| jax\n" not in done.stderr, "JAX was imported"
        return done.stdout

    text = said("--help")
    assert "--optimizer.learning_rate: float = 0.0003" in text
    text = said("--config", "configs/quickstart.yaml", "--print_config", "--train.seed", "7")
    stages = list(yaml.safe_load_all(text))
    assert [stage["output_dir"] for stage in stages] == ["out/quickstart/pretrain", "out/quickstart/sft"]
    assert stages[1]["model"]["path"] == "out/quickstart/pretrain"
    assert all(stage["train"]["seed"] == 7 for stage in stages)


def test_each_stage_starts_where_the_one_before_it_ended(tmp_path: Path) -> None:
    from jaxlm.cli.parser import parse_run

    file = tmp_path / "stages.yaml"
    adapter = "lora: {rank: 2}"
    file.write_text(
        "output_dir: o\nmodel: {path: start}\nstages:\n"
        f"  - {{name: pre}}\n  - {{name: one, {adapter}}}\n  - {{name: two, {adapter}}}\n"
        f"  - {{name: other, model: {{path: elsewhere}}, {adapter}}}\n"
    )
    configs = parse_run(["--config", str(file)], prog="", description="").configs
    found = [(c.model.path, c.lora.init_from if c.lora else None) for c in configs]
    assert found == [("start", None), ("o/pre", None), ("o/pre", "o/one"), ("elsewhere", None)]
    configs = parse_run(["--config", str(file), "--stage", "two"], prog="", description="").configs
    assert [(c.model.path, c.output_dir) for c in configs] == [("o/pre", "o/two")]


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*/*.yaml")), ids=str)
def test_recipes_are_valid(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        if file.parent.name == "prepare":
            prepare(["--config", str(file), "--print_config"])
        else:
            main(["--config", str(file), "--model.path", "somewhere", "--print_config"])
    assert end.value.code == 0
    assert "output_dir" in capsys.readouterr().out


@pytest.fixture(scope="module")
def expert_run(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    moe = {"experts": 4, "router": "learned", "top_k": {"text": 2, "rare": 1}, "ranges": {"rare": [200, 320]}}
    config = write_config(folder, base_config, moe=moe, mesh={"data": 2, "fsdp": 1, "expert": 2, "tensor": 2})
    assert main(["--config", str(config), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_model_of_experts_trains_and_tells_which_are_used(expert_run: Path) -> None:
    losses = read(expert_run, "loss")
    assert losses[-1] < losses[0] - 0.3
    share = read(expert_run, "expert_share")[-1]
    assert [len(share[name]) for name in ("text", "rare")] == [4, 4]  # type: ignore[index]
    np.testing.assert_allclose([sum(share["text"]), sum(share["rare"])], [2, 1], atol=1e-3)  # type: ignore[index]
    assert read(expert_run, "dropped") == [0] * 6
    assert all(0 < entropy["text"] <= 1 for entropy in read(expert_run, "router_entropy"))  # type: ignore[index]
    assert read(expert_run, "router_balance")[0] > 0
    assert (expert_run / "experts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_model_of_experts_goes_on_and_writes(
    expert_run: Path, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA run begins with it, without a section `moe`; the text is the same however the experts compute."""
    from jaxlm.cli.generate import main as generate

    lora = {"rank": 2, "targets": ["q_proj", "up_proj", "down_proj"], "per_expert": True}
    model = {"path": str(expert_run), "dtype": "float32", "shape": None}
    config = write_config(tmp_path, base_config, lora=lora, model=model, tokenizer=None, train={"steps": 2})
    assert main(["--config", str(config), "--output_dir", str(tmp_path / "lora")]) == 0
    capsys.readouterr()
    words = ["--prompt", "rock sand", "--max_new_tokens", "8", "--compilation_cache", "none"]
    assert generate(["--model", str(expert_run), *words]) == 0
    said = capsys.readouterr()
    assert "4, router learned; loop" in said.err
    assert generate(["--model", str(tmp_path / "lora"), *words, "--mesh.data", "8", "--mesh.fsdp", "1"]) == 0
    adapted = capsys.readouterr().out
    assert convert(["merge", str(expert_run), str(tmp_path / "lora"), str(tmp_path / "merged")]) == 0
    assert convert(["jax-to-peft", str(tmp_path / "lora"), str(tmp_path / "peft")]) == 0
    assert convert(["merge", str(expert_run), str(tmp_path / "peft"), str(tmp_path / "again"), "--format", "jax"]) == 0
    for name in ("merged", "again"):
        capsys.readouterr()
        assert generate(["--model", str(tmp_path / name), *words, "--template", "alpaca_short"]) == 0
        assert capsys.readouterr().out == adapted, name
    assert convert(["jax-to-hf", str(expert_run), str(tmp_path / "hf")]) == 0
    assert "transformers computes all 4 for every token" in capsys.readouterr().out
    assert generate(["--model", str(tmp_path / "hf"), *words, "--template", "text"]) == 0
    assert "4, router learned; loop" in capsys.readouterr().err
    assert convert(["verify", str(tmp_path / "hf"), str(expert_run)]) == 0


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"experts": 7, "top_k": {"text": 1}}, "moe.experts: 7 does not divide the 128 neurons"),
        ({"experts": 4, "top_k": {"text": 5}}, "moe.top_k: text: 5"),
        ({"experts": 4, "top_k": {"text": 2, "smile": 1}}, "'smile' is not a modality"),
        ({"experts": 4, "top_k": {"text": 2}, "ranges": {"rare": [300, 330]}}, "say how many experts"),
        ({"experts": 4, "top_k": {"text": 2, "rare": 1}, "ranges": {"rare": [300, 330]}}, "ends at token 330"),
        ({"top_k": {"text": 2}}, "say into how many experts"),
    ],
    ids=str,
)
def test_experts_that_cannot_be(
    base_config: dict[str, Any],
    tmp_path: Path,
    moe: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, base_config, moe=moe)
    assert main(["--config", str(config), "--output_dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
