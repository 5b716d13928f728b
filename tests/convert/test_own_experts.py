"""Files that hold the matrices of each expert, as Qwen3-MoE's do: there and back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convert.formats.peft import peft_tensors
from convert.source import open_model
from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from tests.models.small import SMALL, hf_model, small_spec, tree_of


def save(directory: Path, variant: str = "plain", stacked: bool = False, dtype: str = "bfloat16") -> Any:
    """A model as transformers saves it; or with the experts of a layer in one tensor, as it has them in memory."""
    model = hf_model("qwen3_moe", variant, dtype=dtype)
    model.save_pretrained(directory, save_original_format=not stacked)
    return model


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(directory / "model.safetensors"))


@pytest.mark.parametrize("variant", SMALL["qwen3_moe"])
@pytest.mark.parametrize("stacked", [False, True])
def test_files_there_and_back(variant: str, stacked: bool, tmp_path: Path, run: Callable[..., str]) -> None:
    """Through jaxlm's format; the experts go out one by one, as the published models have them."""
    model = save(tmp_path / "hf", variant, stacked)
    names = {name for name in tensors_of(tmp_path / "hf") if ".experts." in name}
    assert any(name.endswith("experts.gate_up_proj") for name in names) == stacked
    source = open_model(tmp_path / "hf")
    tree = tree_of(dict(model.named_parameters()), source.config)
    stack = "layers/1" if variant == "dense_layers" else "layers"
    at = tree
    for part in stack.split("/"):
        at = at[part]
    for name in ("gate_proj", "up_proj", "down_proj"):
        leaf = source.read(f"{stack}/mlp/{name}/kernel", ()).astype(np.float32)
        np.testing.assert_array_equal(leaf, at["mlp"][name]["kernel"])
        cut = (slice(1, None), slice(None, None, 3), slice(2, 9))
        np.testing.assert_array_equal(source.read(f"{stack}/mlp/{name}/kernel", cut).astype(np.float32), leaf[cut])
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    said = run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    assert "8, of which transformers computes" in said
    save(tmp_path / "plain", variant)
    first, second = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "back")
    assert first.keys() == second.keys()
    assert all(value.tobytes() == second[name].tobytes() for name, value in first.items())
    assert not (tmp_path / "back" / "jaxlm_experts").exists()
    assert open_model(tmp_path / "back").config == source.config


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("old", "new", "changes", "words"),
    [
        (EXPERT, None, {}, [f"{EXPERT!r} is missing"]),
        (EXPERT, EXPERT, {}, [f"{EXPERT!r} has shape [3, 16]", "[5, 16]"]),
        ("model.layers.0.mlp.gate.weight", None, {}, ["layers.0.mlp.gate.weight' is missing"]),
        (None, None, {"num_local_experts": 7}, ["layers.0.mlp.gate.weight' has shape", "[7, 16]"]),
        (None, None, {"num_experts": 7}, ["num_experts is 7 and num_local_experts 8"]),
        (None, None, {"num_experts_per_tok": 9}, ["text: 9", "8 experts"]),
        (None, None, {"moe_intermediate_size": "5"}, ["moe_intermediate_size is '5'"]),
        (None, None, {"decoder_sparse_step": 0}, ["decoder_sparse_step is 0"]),
        (None, None, {"mlp_only_layers": 1}, ["mlp_only_layers is 1"]),
        (None, None, {"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
        (None, None, {"norm_topk_prob": 1}, ["norm_topk_prob is 1"]),
    ],
)
def test_damaged(
    old: str | None,
    new: str | None,
    changes: dict[str, Any],
    words: list[str],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    from safetensors.numpy import save_file

    save(tmp_path / "m", dtype="float32")
    tensors = tensors_of(tmp_path / "m")
    if old is not None:
        tensor = tensors.pop(old)
        save_file(tensors | ({} if new is None else {new: tensor[:3]}), tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | changes))
    message = refused("hf-to-jax", tmp_path / "m", tmp_path / "out")
    assert all(word in message for word in words), message


def test_stacked_experts_of_another_number_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    save(tmp_path / "m", stacked=True)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_local_experts": 7}))
    message = refused("hf-to-jax", tmp_path / "m", tmp_path / "out")
    assert "experts.gate_up_proj' has shape [8, 10, 16]; config.json means 7 experts" in message


def test_another_layout_is_refused(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    save(tmp_path / "hf")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    for layout in ("dense", "mixtral"):
        message = refused("jax-to-hf", tmp_path / "jax", tmp_path / "out", "--layout", layout)
        assert f"--layout {layout}: the files of Qwen3MoeForCausalLM hold experts themselves" in message


def test_an_adapter_on_all_experts_together_has_no_name_in_pefts_format() -> None:
    source: Any = SimpleNamespace(
        path=Path("adapter"), config=small_spec("qwen3_moe"), lora=LoraConfig(targets=("q_proj", "up_proj"))
    )
    with pytest.raises(UserError, match=r"adapter: its factors of up_proj .* each expert by itself.*convert merge"):
        peft_tensors(source)


@pytest.mark.parametrize("verb", ["hf-to-meta", "hf-to-mindspore", "moefy"])
def test_a_model_made_with_experts_has_no_dense_form(verb: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    """So nobody is sent to demoefy, which would refuse it too."""
    hf_model("qwen3_moe").save_pretrained(tmp_path / "hf")
    more = ["--experts", "4", "--top-k", "text=2"] if verb == "moefy" else []
    said = refused(verb, tmp_path / "hf", tmp_path / "out", *more)
    assert "demoefy" not in said
    if verb != "hf-to-mindspore":  # which names another thing that its format lacks first
        assert "made with experts, and has no dense form" in said
