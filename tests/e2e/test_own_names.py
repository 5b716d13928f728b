"""LoRA on a family whose linear layers have names of their own and are stored as one: trained, exported, continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from convert.commands.main import main as convert
from jaxlm.cli.train import main as train
from tests.e2e.conftest import write_config
from tests.models.small import hf_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = [1, 5, 9, 30, 7, 8, 100, 20, 21, 22, 23]


@pytest.mark.slow
def test_bloom_is_tuned_under_blooms_names(
    inputs: Path, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_model("bloom", vocab_size=320, hidden_size=32).save_pretrained(tmp_path / "base")
    for file in (inputs / "tokenizer").iterdir():
        shutil.copyfile(file, tmp_path / "base" / file.name)
    lora = {
        "rank": 2,
        "alpha": 6,
        "targets": ["query_key_value", "dense"],
        "rank_pattern": {"self_attention.dense": 3},
        "modules_to_save": ["word_embeddings", "ln_f"],
    }
    config = dict(base_config, model={"path": str(tmp_path / "base"), "dtype": "float32"}, lora=lora)
    config["train"] = dict(config["train"], steps=3)
    file = write_config(tmp_path, config)
    run = tmp_path / "run"
    assert train(["--config", str(file), "--output_dir", str(run)]) == 0
    assert "LoRA rank 2 on query_key_value, dense, word_embeddings and ln_f in full" in capsys.readouterr().out

    assert convert(["jax-to-peft", str(run), str(tmp_path / "peft")]) == 0
    assert "| saved in full | word_embeddings, ln_f" in (tmp_path / "peft" / "README.md").read_text()
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["query_key_value", "dense"]
    assert written["modules_to_save"] == ["word_embeddings", "ln_f", "lm_head"]
    assert convert(["verify", str(run), str(tmp_path / "peft")]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(jaxlm.load(run).logits(IDS), expected, rtol=0, atol=2e-4)

    # The same layers by jaxlm's names go on from there; another rank does not.
    names = dict(
        lora, targets=["qkv_proj", "o_proj"], rank_pattern={"o_proj": 3}, modules_to_save=["norm", "embed_tokens"]
    )
    again = write_config(tmp_path, dict(config, lora=dict(names, init_from=str(tmp_path / "peft"))))
    assert train(["--config", str(again), "--output_dir", str(tmp_path / "again")]) == 0
    first = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in first)
    assert train(["--config", str(again), "--output_dir", str(tmp_path / "other"), "--lora.rank", "4"]) != 0
