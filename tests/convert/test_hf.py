"""Hugging Face -> jaxlm -> Hugging Face, against transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source import open_model
from tests.convert.tiny import logits, make_hf_model, save_torch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 6},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "extra_row": {"vocab_size": 32001},
    "qwen2": {"architecture": "Qwen2"},
    "qwen2_tied": {"architecture": "Qwen2", "tie_word_embeddings": True},
    "mistral": {"architecture": "Mistral", "sliding_window": 5},
}


def assert_same_model(model: Any, directory: Path, dtype: str = "float32") -> None:
    """`directory` loads in transformers as `model`, bit by bit, and computes the same."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    assert type(loaded) is type(model)
    want, found = model.state_dict(), loaded.state_dict()
    assert want.keys() == found.keys()
    for name in want:
        assert want[name].dtype == found[name].dtype and torch.equal(want[name], found[name]), name
    # In float32 from a fresh twin: `model.to(bfloat16)` would have rounded its rotary frequencies too.
    twin = type(model)(model.config)
    twin.load_state_dict(want)
    assert np.array_equal(logits(twin.eval()), logits(loaded.float().eval()))


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(
    name: str, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "extra_row":  # too many rows for tiny blocks
        monkeypatch.setattr("jaxlm.weights.tensors.BLOCK_BYTES", 100_000)
        monkeypatch.setattr("jaxlm.weights.leaves.BLOCK_ELEMENTS", 25_000)
    model = make_hf_model(**MODELS[name])
    model.save_pretrained(tmp_path / "hf")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    assert_same_model(model, tmp_path / "back")
    want, found = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "back"))
    assert found == want | ({"torch_dtype": "float32"} if "dtype" not in want else {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin", "bin_sharded"])
def test_dtypes_and_file_forms(form: str, dtype: str, tmp_path: Path, run: Callable[..., str]) -> None:
    model = make_hf_model(dtype=dtype)
    if form.startswith("bin"):
        save_torch(model, tmp_path / "hf", shards=3 if form == "bin_sharded" else 1)
    else:
        model.save_pretrained(tmp_path / "hf", max_shard_size="4KB" if form == "sharded" else "5GB")
    assert (len(list((tmp_path / "hf").glob("*.index.json"))) == 1) == form.endswith("sharded")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back", "--shard-size", "4KB")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert_same_model(model, tmp_path / "back", dtype)


def test_layout_is_the_documented_one(hf_dir: Path) -> None:
    state = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).state_dict()
    source = open_model(hf_dir)
    q = state["model.layers.1.self_attn.q_proj.weight"].numpy()  # (H h) D
    found = source.read("layers/self_attn/q_proj/kernel", (slice(1, 2),))[0]  # D H h
    assert np.array_equal(found[3, 2], q[2 * 4 : 3 * 4, 3])
    o = state["model.layers.2.self_attn.o_proj.weight"].numpy()  # D (H h)
    found = source.read("layers/self_attn/o_proj/kernel", (slice(2, 3),))[0]  # H h D
    assert np.array_equal(found[1, 2], o[:, 1 * 4 + 2])
    down = state["model.layers.0.mlp.down_proj.weight"].numpy()
    assert np.array_equal(source.read("layers/mlp/down_proj/kernel", (slice(0, 1),))[0], down.T)
    assert np.array_equal(source.read("lm_head/kernel", ()), state["lm_head.weight"].numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_casts_like_torch(dtype: str, hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).to(getattr(torch, dtype))
    assert dtype in run("hf-to-jax", hf_dir, tmp_path / "jax", "--dtype", dtype)
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    assert_same_model(model, tmp_path / "back", dtype)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == dtype


def test_float16_overflow_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    model = make_hf_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e5
    model.save_pretrained(tmp_path / "hf")
    message = refused("hf-to-jax", tmp_path / "hf", tmp_path / "jax", "--dtype", "float16")
    assert "lm_head" in message and "100000" in message and "bfloat16" in message


def test_old_config_spelling(tmp_path: Path, run: Callable[..., str]) -> None:
    model = make_hf_model(rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0})
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["rope_parameters"], config["dtype"], config["num_key_value_heads"], config["head_dim"]
    config |= {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 5000.0,
        "torch_dtype": "float32",
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "_name_or_path": "someone/some-llama",
        "transformers_version": "4.28.0",
    }
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    assert_same_model(model, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_tokenizer_files_travel_byte_for_byte(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    names = ("tokenizer.model", "tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json")
    for name in names:
        (hf_dir / name).write_bytes(name.encode() + b"\r\n\xff\x00")
    run("hf-to-jax", hf_dir, tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    for name in (*names, "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf_dir / name).read_bytes()


def test_old_checkpoints_with_buffers_and_a_stored_tied_head(tmp_path: Path, run: Callable[..., str]) -> None:
    model = make_hf_model(tie_word_embeddings=True)
    save_torch(model, tmp_path / "hf")
    file = tmp_path / "hf" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    assert "lm_head.weight" in state
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(state, file)
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    assert_same_model(model, tmp_path / "back")


def test_tied_head_that_differs_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    save_torch(make_hf_model(tie_word_embeddings=True), tmp_path / "hf")
    file = tmp_path / "hf" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["lm_head.weight"][36, 15] += 1e-6
    torch.save(state, file)
    message = refused("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    assert "lm_head.weight differs" in message and "tie_word_embeddings" in message


def _edit(hf_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(hf_dir / "model.safetensors")
    change(state)
    save_file(state, hf_dir / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("model.layers.1.mlp.up_proj.weight"),
            ["'model.layers.1.mlp.up_proj.weight' is missing", "(1 "],
        ),
        (lambda s: s.pop("lm_head.weight"), ["'lm_head.weight' is missing", "tie_word_embeddings"]),
        (lambda s: s.update(foo=torch.ones(2)), ["'foo' has no place"]),
        (
            # Three of each kind, in the model's order or by name.
            lambda s: (
                [s.pop(f"model.layers.{layer}.self_attn.q_proj.weight") for layer in range(3)],
                s.pop("model.layers.1.mlp.gate_proj.weight"),
                s.update({f"extra.{number}": torch.ones(2) for number in (3, 1, 2, 4, 5)}),
                s.update({f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(2, 3) for layer in range(3)}),
                s.update({"model.norm.weight": torch.ones(17)}),
            ),
            [
                "tensor 'model.layers.0.self_attn.q_proj.weight' is missing, so are "
                "'model.layers.1.self_attn.q_proj.weight' and 'model.layers.1.mlp.gate_proj.weight' (4 missing in all)",
                "'extra.1' has no place in this model, nor have 'extra.2' and 'extra.3' (5 unexpected in all)",
                "'model.layers.0.mlp.up_proj.weight' has shape [2, 3], expected [24, 16]; ",
                "'model.layers.2.mlp.up_proj.weight' has shape [2, 3], ",
                "(4 of another shape in all)",
            ],
        ),
        (
            lambda s: s.update({"model.layers.3.mlp.up_proj.weight": torch.ones(24, 16)}),
            ["'model.layers.3.mlp.up_proj.weight' has no place"],
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(17)}),
            ["'model.norm.weight' has shape [17]", "expected [16]"],
        ),
        (
            lambda s: s.update({"model.layers.1.mlp.up_proj.weight": torch.ones(24, 16, dtype=torch.int8)}),
            ["'model.layers.1.mlp.up_proj.weight' has dtype int8"],
        ),
        (
            lambda s: s.update({"model.layers.1.mlp.up_proj.weight": torch.ones(24, 16, dtype=torch.float16)}),
            ["is float32", "'model.layers.1.mlp.up_proj.weight' is float16"],
        ),
    ],
)
def test_coverage_is_strict(
    change: Callable[[dict[str, Any]], None],
    words: list[str],
    hf_dir: Path,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    _edit(hf_dir, change)
    message = refused("hf-to-jax", hf_dir, tmp_path / "jax")
    for word in words:
        assert word in message


def test_changed_config_is_written_back(hf_dir: Path, tmp_path: Path) -> None:
    """A config.json that no longer describes the model is updated; what it says besides is kept."""
    import dataclasses

    from jaxlm.weights.hf import hf_config_for

    source = open_model(hf_dir)
    assert source.hf_config is not None
    source.hf_config["custom"] = 1
    source.config = dataclasses.replace(source.config, vocab_size=40)  # type: ignore[misc]
    written = json.loads(hf_config_for(source))
    assert written["vocab_size"] == 40 and written["custom"] == 1


# --- other names, missing files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LLaMAForCausalLM", "YiForCausalLM"])
def test_other_names_of_llama(name: str, hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Read as LLaMA, Yi's norms under the names of its first release, and written under the usual name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(hf_dir, tmp_path / "other")
    file, weights = tmp_path / "other" / "config.json", tmp_path / "other" / "model.safetensors"
    content = json.loads(file.read_text()) | {"architectures": [name]}
    tensors = load_file(weights)
    if name == "YiForCausalLM":
        content |= {"model_type": "Yi", "auto_map": {"AutoConfig": "configuration_yi.YiConfig"}}
        names = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
        for old, new in names.items():
            tensors = {key.replace(old, new): value for key, value in tensors.items()}
        assert "model.layers.0.ln1.weight" in tensors
    save_file(tensors, weights)
    file.write_text(json.dumps(content))
    run("hf-to-jax", tmp_path / "other", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    want = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).eval()
    np.testing.assert_array_equal(logits(found), logits(want))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in written


@pytest.mark.parametrize("form", ["pytorch_model", "model"])
def test_parts_without_an_index(form: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    """The message says which file is missing, not that there are no weights."""
    model = make_hf_model()
    if form == "model":
        model.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    else:
        save_torch(model, tmp_path / "hf", shards=3)
    (index,) = (tmp_path / "hf").glob("*.index.json")
    index.unlink()
    message = refused("hf-to-jax", tmp_path / "hf", tmp_path / "out")
    assert index.name in message and "download that file too" in message
