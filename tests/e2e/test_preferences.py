"""Preference tuning as a whole command."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.cli.train import main as train
from tests.e2e.conftest import SHAPE, WORDS, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def words(rng: random.Random, most: int) -> str:
    return "".join(f" {rng.choice(WORDS)}" for _ in range(rng.randint(1, most)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    records = [{"prompt": words(rng, 5).strip(), "chosen": words(rng, 4), "rejected": words(rng, 5)} for _ in range(40)]
    file = tmp_path_factory.mktemp("pairs") / "pairs.json"
    file.write_text(json.dumps(records))
    return file


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_two_parts_is_that_in_one(
    pairs: Path, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed, on eight devices; the reference is that of the first step, and a run does not go on without it."""
    data = {"train": [{"path": str(pairs)}], "validation": 8, "sequence_length": 64}
    changes: dict[str, Any] = {
        "objective": "preference",
        "data": data,
        "optimizer": {"schedule": "constant", "warmup_steps": 0},
    }
    mesh = {"data": 2, "fsdp": 4}
    config = write_config(tmp_path / "a", base_config, **changes, mesh=mesh, train={"steps": 4, "save_every": 2})
    out = tmp_path / "straight"
    assert train(["--config", str(config), "--output_dir", str(out)]) == 0
    straight = [line for line in lines(out) if "loss" in line]
    assert straight[0]["loss"] == pytest.approx(math.log(2), abs=1.2e-7)  # two ulps: a sum over 8 devices
    assert straight[-1]["rewards/margins"] > 0.01 and straight[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert (out / "preference.png").stat().st_size > 1000
    validated = [line for line in lines(out) if "validation_loss" in line]
    assert validated[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {"validation_rewards/accuracies", "validation_logps/chosen"} <= validated[-1].keys()

    halves = tmp_path / "halves"
    command = ["--config", str(config), "--output_dir", str(halves)]
    assert train([*command, "--train.steps", "2"]) == 0
    assert train(command) == 0
    exact = ("loss", "grad_norm", "rewards/margins")
    assert [[line[key] for key in exact] for line in lines(halves) if "loss" in line] == [
        [line[key] for key in exact] for line in straight
    ]
    (halves / "reference.npy").unlink()
    capsys.readouterr()
    assert train([*command, "--train.steps", "6"]) == 2
    assert "reference.npy: is missing" in " ".join(capsys.readouterr().err.split())


def test_a_live_reference_is_the_stored_one(pairs: Path, base_config: dict[str, Any], tmp_path: Path) -> None:
    """A fresh adapter, with its dropout, on a base; refused where all parameters train."""
    data = {"train": [{"path": str(pairs)}], "validation": 0, "sequence_length": 64}
    base = tmp_path / "base"
    first = write_config(tmp_path / "b", base_config, train={"steps": 1, "eval_every": 0, "save_every": 0})
    assert train(["--config", str(first), "--output_dir", str(base)]) == 0
    changes = {"objective": "preference", "data": data, "lora": {"rank": 2, "targets": ["q_proj", "down_proj"]}}
    model = {"path": str(base), "shape": None, "dtype": "float32"}
    settings = {"steps": 3, "eval_every": 0, "save_every": 0, "compilation_cache": "none", "global_batch_size": 8}
    config = write_config(tmp_path / "l", base_config | {"model": model, "train": settings}, **changes, tokenizer=None)
    found = []
    for reference in ("stored", "live"):
        out = tmp_path / reference
        command = ["--config", str(config), "--output_dir", str(out), "--preference.reference", reference]
        assert train(command) == 0
        found.append([line["loss"] for line in lines(out) if "loss" in line])
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[1][0] == pytest.approx(math.log(2), abs=1.2e-7)
    assert found[0][2] < found[0][0] - 5e-4
    full = write_config(tmp_path / "f", base_config, objective="preference", data=data)
    assert train(["--config", str(full), "--output_dir", str(tmp_path / "no"), "--preference.reference", "live"]) == 2


@pytest.mark.nightly
def test_five_steps_are_those_of_trl(pairs: Path, inputs: Path, base_config: dict[str, Any], tmp_path: Path) -> None:
    """DPOTrainer of TRL 1.16, which is not among the requirements: it is run where it is installed."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'jaxlm[peers]'")
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "architectures"}, bos_token_id=1))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(inputs / "tokenizer" / "tokenizer.json"), **special)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")  # TRL opens its reference by the same path
    records = json.loads(pairs.read_text())
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(records),
        max_steps=5,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        max_grad_norm=1.0,
        disable_dropout=True,
        save_strategy="no",
        beta=0.5,
    )
    trainer = trl.DPOTrainer(
        model=model, args=settings, train_dataset=datasets.Dataset.from_list(records), processing_class=tokenizer
    )
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    data = {"train": [{"path": str(pairs)}], "validation": 0, "sequence_length": 96, "packing": False}
    changes = {"objective": "preference", "data": data, "model": {"path": str(tmp_path / "model"), "shape": None}}
    steps = {"steps": 5, "global_batch_size": len(records), "micro_batch_size": 5, "eval_every": 0, "save_every": 0}
    optimizer = {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
    config = write_config(tmp_path / "run", base_config, **changes, train=steps, optimizer=optimizer, tokenizer=None)
    out = tmp_path / "out"
    assert train(["--config", str(config), "--output_dir", str(out), "--preference.beta", "0.5"]) == 0
    mine = [line for line in lines(out) if "loss" in line]
    for ours, other in zip(mine, theirs, strict=True):
        assert ours["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-5)
        for key in ("rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert ours[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), key


def test_rewards_are_learned_from_answers_that_the_trained_weights_draw(
    inputs: Path, base_config: dict[str, Any], tmp_path: Path
) -> None:
    """Answers with as many e as possible: more of them in the end; the ratio is 1; in two parts it is the same run."""
    reward = tmp_path / "mine.py"
    reward.write_text("def es(prompts, answers, right):\n    return [min(a.count('e'), 5) for a in answers]\n")
    grpo = {"rewards": [f"{reward}:es"], "group": 4, "max_new_tokens": 8, "kl": 0.001, "loss": "grpo"}
    data = {"train": [{"path": str(inputs / "records.json"), "template": "alpaca_short"}], "sequence_length": 64}
    steps = {"steps": 12, "global_batch_size": 32, "micro_batch_size": 2, "save_every": 6, "eval_every": 0}
    optimizer = {"learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0}
    changes = {"objective": "grpo", "grpo": grpo, "data": data, "optimizer": optimizer}
    config = write_config(
        tmp_path / "c", base_config | {"data": {}}, **changes, train=steps, mesh={"data": 4, "fsdp": 2}
    )
    out, halves = tmp_path / "straight", tmp_path / "halves"
    assert train(["--config", str(config), "--output_dir", str(out)]) == 0
    found = [line for line in lines(out) if "loss" in line]
    assert np.mean([line["reward"] for line in found[-3:]]) > 1.5 * np.mean([line["reward"] for line in found[:3]])
    for line in found:
        assert abs(line["ratio/min"] - 1) < 1e-4 and abs(line["ratio/max"] - 1) < 1e-4 and line["clipped"] == 0
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[-1]["kl"] > 1e-3
    command = ["--config", str(config), "--output_dir", str(halves)]
    assert train([*command, "--train.steps", "6"]) == 0
    assert train(command) == 0
    exact = ("loss", "reward", "grad_norm")
    assert [[line[key] for key in exact] for line in lines(halves)] == [[line[key] for key in exact] for line in found]
