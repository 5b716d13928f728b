"""Tiny models and adapters saved by the systems that jaxlm converts from and to."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

BASE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make_hf_model(architecture: str = "Llama", dtype: str = "float32", seed: int = 0, **changes: Any) -> Any:
    """A small transformers model with every parameter random (biases and norms too)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**(BASE | changes))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(getattr(torch, dtype)).eval()


def save_torch(model: Any, directory: Path, shards: int = 1) -> None:
    """The model as transformers 4 did with safe_serialization=False."""
    torch = pytest.importorskip("torch")
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # one storage, two names, as they did
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name].clone() for name in names[shard::shards]}
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def logits(model: Any) -> Any:
    """Logits of a fixed batch, as numpy in float32."""
    torch = pytest.importorskip("torch")
    tokens = torch.arange(24).reshape(2, 12) * 7 % 37
    with torch.no_grad():
        return model(tokens).logits.float().numpy()


def make_adapter(base: Any, directory: Path, seed: int = 1, **config: Any) -> Any:
    """A PEFT adapter with every factor random, saved; returns the PEFT model."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    values = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**values))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(directory)
    return model.eval()
