"""Tiny PyTorch models and their weights as jaxlm trees, independent of `convert`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxlm.models.families import read_config
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import DecoderSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

BASE: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
)


def parent_of(linear: str) -> str:
    """The module that a linear layer belongs to, in transformers and here."""
    return "self_attn" if linear in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def build(architecture: str = "LlamaForCausalLM", seed: int = 0, **options: Any) -> tuple[Any, DecoderSpec]:
    """A random float32 model in which every tensor matters, and its jaxlm config read from HF's own config.json."""
    cls = getattr(transformers, architecture)
    config = cls.config_class(**(BASE | options))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = cls(config).float()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # HF starts biases at zero and norms at one: errors in them would not show.
            if name.endswith("bias"):
                tensor.normal_(0.0, 0.3)
            elif "norm" in name:
                tensor.normal_(1.0, 0.2)
    model.eval()
    return model, read_config({**config.to_dict(), "architectures": [architecture]})


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def linear(weight: np.ndarray, name: str, c: DecoderSpec) -> np.ndarray:
    """HF's [out, in] as jaxlm's [*in, *out]."""
    attention = c.attention
    heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads, "v_proj": attention.num_kv_heads}
    if name in heads:
        return weight.T.reshape(c.hidden_size, heads[name], attention.head_dim)
    if name == "o_proj":
        return weight.T.reshape(attention.num_heads, attention.head_dim, c.hidden_size)
    return weight.T


def params(tensors: dict[str, Any], c: DecoderSpec) -> dict[str, Any]:
    """HF names -> tensors (weights or gradients) as the tree of the collection `params`."""
    attention = c.attention

    def stack(name: str, layout: Any = lambda a: a) -> np.ndarray:
        return np.stack([layout(_array(tensors[f"model.layers.{i}.{name}"])) for i in range(c.num_layers)])

    layers: dict[str, Any] = {
        norm: {"scale": stack(f"{norm}.weight")} for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        parent = parent_of(name)
        leaf = {"kernel": stack(f"{parent}.{name}.weight", lambda w, name=name: linear(w, name, c))}
        if f"model.layers.0.{parent}.{name}.bias" in tensors:
            bias = stack(f"{parent}.{name}.bias")
            leaf["bias"] = (
                bias.reshape(c.num_layers, -1, attention.head_dim) if name in ("q_proj", "k_proj", "v_proj") else bias
            )
        layers.setdefault(parent, {})[name] = leaf
    for name in ("q_norm", "k_norm"):
        if f"model.layers.0.self_attn.{name}.weight" in tensors:
            layers["self_attn"][name] = {"scale": stack(f"self_attn.{name}.weight")}
    tree = {
        "embed_tokens": {"embedding": _array(tensors["model.embed_tokens.weight"])},
        "layers": layers,
        "norm": {"scale": _array(tensors["model.norm.weight"])},
    }
    if not c.tied_head:
        tree["lm_head"] = {"kernel": _array(tensors["lm_head.weight"])}
    return tree


def weights(model: Any, c: DecoderSpec) -> dict[str, Any]:
    return params(dict(model.named_parameters()), c)


def gradients(model: Any, c: DecoderSpec) -> dict[str, Any]:
    return params({name: p.grad for name, p in model.named_parameters()}, c)


def adapter(model: Any, c: DecoderSpec, specs: dict[str, LoraSpec], grad: bool = False) -> dict[str, Any]:
    """A PEFT model's factors (or their gradients) as the collection `lora`, zero padded to the common rank."""
    attention = c.attention
    tree: dict[str, Any] = {}
    layers = model.get_base_model().model.layers
    for name, spec in specs.items():
        parts: dict[str, list[np.ndarray]] = {}
        for i in range(c.num_layers):
            module = getattr(getattr(layers[i], parent_of(name)), name)

            def value(p: Any) -> np.ndarray:
                return _array(p.grad if grad else p)

            a, b = value(module.lora_A["default"].weight), value(module.lora_B["default"].weight)
            pad = spec.rank - a.shape[0]
            a, b = np.pad(a, ((0, pad), (0, 0))).T, np.pad(b, ((0, 0), (0, pad))).T
            heads_out = name in ("q_proj", "k_proj", "v_proj")
            parts.setdefault("lora_A", []).append(
                a.reshape(attention.num_heads, attention.head_dim, -1) if name == "o_proj" else a
            )
            parts.setdefault("lora_B", []).append(b.reshape(spec.rank, -1, attention.head_dim) if heads_out else b)
            if spec.dora:
                magnitude = value(module.lora_magnitude_vector["default"].weight).reshape(-1)
                parts.setdefault("magnitude", []).append(
                    magnitude.reshape(-1, attention.head_dim) if heads_out else magnitude
                )
        tree.setdefault(parent_of(name), {})[name] = {key: np.stack(value) for key, value in parts.items()}
    return {"layers": tree}
