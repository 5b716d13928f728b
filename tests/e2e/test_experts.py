"""A dense model divided into experts, trained, asked, and made dense again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from convert.commands.main import main as convert
from convert.source import open_model
from jaxlm.cli.generate import main as generate
from jaxlm.cli.train import main as train
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("experts")]


def test_from_dense_to_experts_and_back(
    base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"steps": 2, "eval_every": 0, "save_every": 0}
    config = write_config(tmp_path / "a", base_config, train=short)
    assert train(["--config", str(config), "--output_dir", str(tmp_path / "dense")]) == 0
    options = ["--experts", "4", "--top-k", "text=2,salt=1", "--range", "salt=300:320"]
    assert convert(["moefy", str(tmp_path / "dense"), str(tmp_path / "moe"), *options]) == 0
    model = {"path": str(tmp_path / "moe"), "shape": None}
    config = write_config(tmp_path / "b", base_config, train=short, model=model, tokenizer=None)
    assert train(["--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["expert_share"]["text"] for line in lines if "expert_share" in line]
    assert len(shares) == 2 and all(abs(sum(share) - 2) < 1e-2 for share in shares)
    capsys.readouterr()
    ask = ["--prompt", "rock sand", "--max_new_tokens", "4", "--compilation_cache", "none"]
    assert generate(["--model", str(tmp_path / "run"), *ask]) == 0
    assert "4 written" in capsys.readouterr().err

    # The run's checkpoint kept the order of the neurons: dense again, it is what training made of each.
    assert convert(["demoefy", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    trained, back = open_model(tmp_path / "run"), open_model(tmp_path / "back")
    order = np.load(tmp_path / "moe" / "jaxlm" / "partition.npy")
    assert (order != np.arange(order.shape[1])).any()
    for layer, row in enumerate(order):
        for name in ("gate_proj", "up_proj"):
            path = f"layers/mlp/{name}/kernel"
            np.testing.assert_array_equal(back.read(path, ())[layer][:, row], trained.read(path, ())[layer])
        path = "layers/mlp/down_proj/kernel"
        np.testing.assert_array_equal(back.read(path, ())[layer][row], trained.read(path, ())[layer])
    assert back.config == open_model(tmp_path / "dense").config
    assert generate(["--model", str(tmp_path / "back"), "--template", "alpaca_short", *ask]) == 0


@pytest.mark.slow
def test_a_model_that_comes_with_experts_in_some_of_its_layers(
    base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its config.json through training and back: transformers computes the same with it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 128,
        "eos_token_id": 2,
    }
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    model = {"shape": str(tmp_path / "shape.json")}
    short = {"steps": 2, "eval_every": 0, "save_every": 0}
    config = write_config(tmp_path / "a", base_config, train=short, model=model, moe={"balance_loss": 0.01})
    assert train(["--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [round(sum(line["expert_share"]["text"])) for line in lines if "expert_share" in line] == [3, 3]
    assert convert(["jax-to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    how = {"experts_implementation": "eager"}  # PyTorch's grouped product takes no experts as narrow as these
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **how).eval()
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    tokens = np.arange(10, 22)[None]
    ours = jaxlm.load(tmp_path / "hf", dtype="float32")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)).logits.numpy()[0]
        wanted = theirs.generate(torch.from_numpy(tokens), max_new_tokens=6, do_sample=False)
    found = ours.logits(tokens[0].tolist())
    np.testing.assert_allclose(found, logits, atol=2e-5 * np.abs(logits).max())
    (answer,) = ours.generate(tokens.tolist(), max_new_tokens=6)
    assert [*answer.ids] == [token for token in wanted[0, 12:].tolist() if token != 2]
