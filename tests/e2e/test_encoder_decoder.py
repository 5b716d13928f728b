"""A T5 through the commands: trained in full and padded or packed, asked, planned, converted; held to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from convert.commands.main import main as convert
from jaxlm.cli.generate import main as generate
from jaxlm.cli.plan import main as plan
from jaxlm.cli.train import main as train
from jaxlm.errors import UserError
from tests.e2e.conftest import write_config
from tests.t5 import records, write_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.e2e
RECORDS = records(16)
VALIDATION = records(20)[16:]


def prompt_of(record: dict[str, str]) -> str:
    return f"### Instruction:\n{record['instruction']}\n\n### Response:\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder-decoder") / "model"
    write_model(directory)
    for name, content in (("train", RECORDS), ("validation", VALIDATION)):
        (directory.parent / f"{name}.json").write_text(json.dumps(content))
    return directory


def settings(model: Path, folder: Path, **changes: Any) -> Path:
    source = {"template": "alpaca_short"}
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": [{"path": str(model.parent / "train.json"), **source}],
            "validation": [{"path": str(model.parent / "validation.json"), **source}],
            "sequence_length": 32,
            "encoder_length": 64,
        },
        "optimizer": {"learning_rate": 0.01, "clip_norm": 0.0},
        "train": {
            "epochs": 1,
            "eval_every": 1,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "compilation_cache": "none",
        },
        "mesh": {"data": 2, "fsdp": 4},
        "output_dir": str(folder / "run"),
    }
    return write_config(folder, config, **changes)


def mean_loss(module: Any, tokenizer: Any, content: list[dict[str, str]]) -> Any:
    """transformers' loss of all target tokens, each pair alone."""
    total, count = torch.zeros(()), 0
    for record in content:
        source, labels = (torch.tensor([tokenizer(text).input_ids]) for text in (prompt_of(record), record["output"]))
        total = total + module(input_ids=source, labels=labels).loss * labels.numel()
        count += labels.numel()
    return total / count


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_is_that_of_transformers(model: Path, tmp_path: Path, packing: bool) -> None:
    """Loss and norm of the gradient of a step of AdamW on all pairs, and the validation loss behind it."""
    assert train(["--config", str(settings(model, tmp_path, data={"packing": packing}))]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    module = transformers.T5ForConditionalGeneration.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert [line["step"] for line in steps] == [1]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for line in steps:
        optimizer.zero_grad()
        loss = mean_loss(module, tokenizer, RECORDS)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
        np.testing.assert_allclose([line["loss"], line["grad_norm"]], [loss.item(), norm.item()], rtol=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = line["learning_rate"]
        optimizer.step()
    with torch.no_grad():
        wanted = mean_loss(module, tokenizer, VALIDATION).item()
    before, after = (line["validation_loss"] for line in lines if "validation_loss" in line)
    np.testing.assert_allclose(after, wanted, rtol=1e-3)
    assert before > after + 0.05  # the step was one


def test_a_file_of_questions(model: Path, tmp_path: Path) -> None:
    """Each is answered as it is by itself, and what cannot be asked is said in its place."""
    lines = [json.dumps({"instruction": record["instruction"]}) for record in RECORDS[:3]]
    (tmp_path / "questions.jsonl").write_text("\n".join([*lines, "not json"]) + "\n")
    words = ["--model.path", str(model), "--predict_data", str(tmp_path / "questions.jsonl")]
    words += ["--save_file", str(tmp_path / "answers.json"), "--max_new_tokens", "8", "--template", "alpaca_short"]
    assert generate([*words, "--batch_size", "2"]) == 1
    rows = json.loads((tmp_path / "answers.json").read_text())
    loaded = jaxlm.load(model, template="alpaca_short")
    alone = [loaded.generate([record["instruction"]], max_new_tokens=8)[0].text for record in RECORDS[:3]]
    assert [row.get("answer") for row in rows] == [*(text.strip() for text in alone), None] and "error" in rows[3]
    assert len({*alone}) > 1


def test_it_is_asked_converted_and_planned(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, module = (
        cls.from_pretrained(model) for cls in (transformers.AutoTokenizer, transformers.T5ForConditionalGeneration)
    )
    question = RECORDS[0]["instruction"]
    prompt = torch.tensor([tokenizer(question).input_ids])
    with torch.no_grad():
        text = module.generate(prompt, max_new_tokens=10, do_sample=False)[0]
        logits = module(input_ids=prompt, labels=text[None, 1:]).logits[0]
    loaded = jaxlm.load(model)
    (answer,) = loaded.generate([question], max_new_tokens=10)
    wanted = text[1:].tolist()
    assert [*answer.ids, 1][: len(wanted)] == wanted
    assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert loaded.prompt_ids(question) == prompt[0].tolist()
    scores = loaded.log_probs(prompt[0].tolist(), wanted)
    np.testing.assert_allclose(
        scores, torch.log_softmax(logits, -1)[range(len(wanted)), wanted].numpy(), rtol=1e-4, atol=1e-4
    )
    ids = tokenizer("gas heat", add_special_tokens=False).input_ids
    np.testing.assert_array_equal(loaded.log_probs(question, "gas heat"), loaded.log_probs(prompt[0].tolist(), ids))
    for refused in (loaded.logits, loaded.embed):
        with pytest.raises(UserError, match="a t5 model has an encoder"):
            refused([[5, 6]] if refused == loaded.embed else [5, 6])

    capsys.readouterr()
    words = ["--model.path", str(model), "--prompt", question, "--max_new_tokens", "10", "--num_beams", "2"]
    assert generate(words) == 0
    assert capsys.readouterr().out.strip()
    file = settings(model, tmp_path)
    assert plan(["--config", str(file), "--topology", "cpu:1", "--mesh.data", "1", "--mesh.fsdp", "1", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["memory"]["parameters"] == 4 * sum(p.numel() for p in module.parameters())
    assert convert(["inspect", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "encoder: L 2; the decoder begins with token 0" in shown and "distances in 8 buckets" in shown
    assert train(["--config", str(file), "--preview", "1"]) == 0
    assert "the encoder reads" in capsys.readouterr().out


@pytest.mark.slow
def test_an_adapter_is_trained_asked_and_given_to_peft(model: Path, tmp_path: Path) -> None:
    """Names of T5's own; the run's answers, on the fly and merged, are those of PEFT's files in transformers."""
    peft = pytest.importorskip("peft")
    lora = {"rank": 2, "alpha": 8, "targets": ["q", "v", "wi_0", "wo"], "rank_pattern": {"encoder.block.1.*": 3}}
    changes: dict[str, Any] = {"lora": lora, "optimizer": {"learning_rate": 0.1}, "data": {"validation": 0}}
    assert train(["--config", str(settings(model, tmp_path, **changes)), "--train.epochs", "4"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert convert(["jax-to-peft", str(tmp_path / "run"), str(tmp_path / "peft")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    base = transformers.T5ForConditionalGeneration.from_pretrained(model)
    question = tokenizer(RECORDS[1]["instruction"]).input_ids
    before = base.generate(torch.tensor([question]), max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    module = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    with torch.no_grad():
        wanted = module.generate(input_ids=torch.tensor([question]), max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    assert wanted != before
    for merge in (False, True):
        (answer,) = jaxlm.load(tmp_path / "run", merge_adapter=merge).generate([question], max_new_tokens=8)
        assert [*answer.ids, 1][: len(wanted)] == wanted
