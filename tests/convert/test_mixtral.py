"""Mixtral's layout: transformers computes what jaxlm computes, there and back."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert.formats.mixtral import MixtralSource
from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.spec import DecoderSpec, ExpertsSpec
from jaxlm.weights.files import read_tensors
from tests.convert.test_experts import EVERY, TOKENS, E, F, assert_same_leaves, params
from tests.convert.test_hf_experts import MODALITIES, assert_same_model, make_moe, make_order
from tests.convert.tiny import BASE, make_adapter, make_hf_model


@functools.cache
def forward(config: DecoderSpec, compute: str) -> Any:
    return jax.jit(Decoder(config, dtype="float32", experts=compute).apply)


def jaxlm_logits(path: Path, compute: str, tokens: np.ndarray = TOKENS) -> np.ndarray:
    source = open_model(path)
    return np.asarray(forward(source.config, compute)({"params": params(source)}, tokens))


def torch_logits(model: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


@pytest.mark.parametrize("k", [2, 3])
def test_transformers_computes_the_same(k: int, hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # Two modalities with one k are one to Mixtral.
    settings = MODALITIES | {"top_k": (k, k)}
    moe = make_moe(hf_dir, tmp_path / "moe", make_order(), ExpertsSpec(E, "learned", **settings))
    said = run("jax-to-hf", moe, tmp_path / "out", "--layout", "mixtral", "--shard-size", "9KB")
    assert f"computes {k} for every token" in said and ("not a power of two" in said) is (k == 3)
    # Not by PyTorch's grouped product, which takes no experts as narrow as these.
    how = {"experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how).eval()
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (model.config.num_local_experts, model.config.intermediate_size) == (E, F // E)
    expected = jaxlm_logits(moe, "dense")
    np.testing.assert_allclose(torch_logits(model), expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(jaxlm_logits(moe, "loop"), expected, atol=2e-5 * np.abs(expected).max())
    # So that the above can fail: another k is another function.
    model.config.num_experts_per_tok = E
    for layer in model.model.layers:
        layer.mlp.gate.top_k = E
    assert np.abs(torch_logits(model) - expected).max() > 1e-2 * np.abs(expected).max()
    if k == 2:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how).eval()
        found = model.generate(
            torch.from_numpy(TOKENS[:, :8]).long(), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
        tokens = TOKENS * (np.arange(12) < 8)  # what is not written yet cannot be seen
        for place in range(8, 12):
            tokens[:, place] = jaxlm_logits(moe, "dense", tokens)[:, place - 1].argmax(-1)
        np.testing.assert_array_equal(found.numpy(), tokens)


@pytest.mark.parametrize(("order", "architecture"), [(True, "Llama"), (False, "Llama"), (True, "Mistral")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(order: bool, architecture: str, dtype: str, tmp_path: Path, run: Callable[..., str]) -> None:
    """The very model, for a k that is a power of two: modalities, order and architecture too."""
    make_hf_model(architecture, dtype).save_pretrained(tmp_path / "hf")
    config = ExpertsSpec(E, "learned", **(MODALITIES | {"top_k": (2, 2)}))
    moe = make_moe(tmp_path / "hf", tmp_path / "moe", make_order() if order else None, config)
    run("jax-to-hf", moe, tmp_path / "out", "--layout", "mixtral")
    assert_same_model(tmp_path / "out", moe)
    run("hf-to-jax", tmp_path / "out", tmp_path / "back")
    assert_same_model(tmp_path / "back", moe)
    assert "equal" in run("verify", tmp_path / "out", moe)
    run("jax-to-hf", tmp_path / "back", tmp_path / "again", "--layout", "mixtral")
    first, second = (read_tensors(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(first[name].read().tobytes() == second[name].read().tobytes() for name in first)
    run("jax-to-hf", tmp_path / "back", tmp_path / "dense", "--layout", "dense")
    if order:
        from tests.convert.test_hf_experts import FOLDER

        shutil.rmtree(tmp_path / "dense" / FOLDER)
        assert_same_leaves(open_model(tmp_path / "dense"), open_model(tmp_path / "hf"))


def test_k_that_is_rounded(tmp_path: Path, run: Callable[..., str]) -> None:
    """w2 is k times down_proj rounded once; the way back rounds once more."""
    make_hf_model(dtype="bfloat16").save_pretrained(tmp_path / "hf")
    moe = make_moe(tmp_path / "hf", tmp_path / "moe", None, ExpertsSpec(E, "learned", top_k=(3,)))
    run("jax-to-hf", moe, tmp_path / "out", "--layout", "mixtral")
    path = "layers/mlp/down_proj/kernel"
    whole = open_model(moe).read(path, EVERY)
    w2 = [
        read_tensors(tmp_path / "out/model.safetensors")[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"]
        for e in range(E)
    ]
    stored = np.concatenate([tensor.read().T for tensor in w2])
    np.testing.assert_array_equal(stored, (whole[1].astype(np.float32) * 3).astype(whole.dtype))
    back = open_model(tmp_path / "out").read(path, EVERY).astype(np.float32)
    np.testing.assert_allclose(back, whole.astype(np.float32), rtol=2**-7)


def make_mixtral(directory: Path, **changes: Any) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12, "rope_theta": 5e5}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**(values | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixtral_of_transformers(tied: bool, tmp_path: Path, run: Callable[..., str]) -> None:
    model = make_mixtral(tmp_path / "hf", tie_word_embeddings=tied)
    source = open_model(tmp_path / "hf")
    assert source.config.experts == ExpertsSpec(4, "learned", top_k=(2,)) and source.config.feed_forward.size == 48
    assert source.partition is None and source.config.attention.rope.rope_theta == 5e5
    expected = torch_logits(model)
    np.testing.assert_allclose(jaxlm_logits(tmp_path / "hf", "loop"), expected, atol=2e-5 * np.abs(expected).max())
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")  # Mixtral's layout, as it came
    first, second = (read_tensors(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert {name: tensor.read().tobytes() for name, tensor in first.items()} == {
        name: tensor.read().tobytes() for name, tensor in second.items()
    }
    cuts = (slice(1, None), slice(None, None, 2), slice(3, 30))
    for path in source.leaves:
        if path.startswith("layers/mlp/"):
            np.testing.assert_array_equal(source.read(path, cuts), source.read(path, EVERY)[cuts])


def test_it_goes_out_as_it_came_in(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    """Through jaxlm's format, a merge and new rows, and again; a flag overrides."""
    transformers = pytest.importorskip("transformers")
    model = make_mixtral(tmp_path / "hf")
    adapter = tmp_path / "peft"
    make_adapter(make_hf_model("Mistral"), adapter)
    run("merge", tmp_path / "hf", adapter, tmp_path / "merged", "--format", "hf")
    run("merge", tmp_path / "hf", adapter, tmp_path / "merged-jax", "--format", "jax")
    run("jax-to-hf", tmp_path / "merged-jax", tmp_path / "again")
    run("make-delta", tmp_path / "hf", tmp_path / "merged", tmp_path / "delta")
    for name in ("merged", "again", "delta"):
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
        assert open_model(tmp_path / name).config.experts.layout == "mixtral"
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(found).__name__ == "MixtralForCausalLM"
    np.testing.assert_array_equal(torch_logits(found), torch_logits(model))
    run("jax-to-hf", tmp_path / "jax", tmp_path / "dense", "--layout", "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert open_model(tmp_path / "dense").config.experts.layout == "dense"
    # A run may have changed what Mixtral has a place for: not silently another layout.
    file = tmp_path / "jax" / "jaxlm" / "model.json"
    content = json.loads(file.read_text())
    content["model"]["period"][0]["feed_forward"]["experts"] |= {
        "modalities": ["text", "smiles"],
        "ranges": [[20, 30]],
        "top_k": [2, 1],
    }
    file.write_text(json.dumps(content))
    assert "--layout dense" in refused("jax-to-hf", tmp_path / "jax", tmp_path / "out")


def test_missing_keys_are_those_of_mixtral(tmp_path: Path) -> None:
    """The defaults of transformers' MixtralConfig, which are not Mistral's."""
    transformers = pytest.importorskip("transformers")
    make_mixtral(tmp_path / "m", num_attention_heads=8, num_key_value_heads=8, num_local_experts=8)
    file = tmp_path / "m" / "config.json"
    whole = json.loads(file.read_text())
    whole["rope_parameters"].pop("rope_theta")
    gone = (
        "rms_norm_eps", "max_position_embeddings", "sliding_window", "num_key_value_heads", "num_local_experts",
        "num_experts_per_tok", "rope_theta",
    )  # fmt: skip
    file.write_text(json.dumps({key: value for key, value in whole.items() if key not in gone}))
    config, want = open_model(tmp_path / "m").config, transformers.MixtralConfig.from_pretrained(tmp_path / "m")
    assert config.norm.eps == want.rms_norm_eps == 1e-5
    assert config.attention.rope.rope_theta == want.rope_parameters["rope_theta"] == 1e6
    assert config.max_position_embeddings == want.max_position_embeddings
    assert config.attention.window == want.sliding_window is None
    assert (config.attention.num_kv_heads, config.experts.num_experts, config.experts.top_k) == (8, 8, (2,))


def test_a_rope_scaling_that_loses_theta_is_refused(tmp_path: Path) -> None:
    """transformers replaces rope_parameters as a whole, and takes Mixtral's own 1,000,000."""
    transformers = pytest.importorskip("transformers")
    make_mixtral(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    whole = json.loads(file.read_text()) | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    for theta, refused in ((5e5, True), (1e4, True), (1e6, False)):
        whole["rope_parameters"]["rope_theta"] = theta
        file.write_text(json.dumps(whole))
        assert transformers.MixtralConfig.from_pretrained(tmp_path / "m").rope_parameters["rope_theta"] == 1e6
        if refused:
            with pytest.raises(UserError, match=rf"config.json: rope_scaling.* {theta}; .* go on with 1e\+06"):
                open_model(tmp_path / "m")
        else:
            assert open_model(tmp_path / "m").config.attention.rope.rope_theta == 1e6


# --- what has no place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        (ExpertsSpec(E, "activation", top_k=(2,)), ["is activation", "convert distil-router", "leave --layout out"]),
        (ExpertsSpec(E, "modality", top_k=(2,)), ["is modality"]),
        (ExpertsSpec(E, "learned", top_k=(1,)), ["one expert", "weigh it by 1", "leave --layout out"]),
        (ExpertsSpec(E, "learned", **MODALITIES), ["one k", "text 3, smiles 1", "leave --layout out"]),
    ],
)
def test_other_routers(
    moe: ExpertsSpec, words: list[str], hf_dir: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    directory = make_moe(hf_dir, tmp_path / "moe", make_order(), moe)
    message = refused("jax-to-hf", directory, tmp_path / "out", "--layout", "mixtral")
    assert all(word in message for word in ["--layout mixtral", *words]), message


def test_biases_and_dense_models(
    hf_dir: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    make_hf_model("Qwen2").save_pretrained(tmp_path / "qwen")
    moe = make_moe(tmp_path / "qwen", tmp_path / "moe", None, ExpertsSpec(E, "learned", top_k=(2,)))
    assert "no biases" in refused("jax-to-hf", moe, tmp_path / "out", "--layout", "mixtral")
    run("hf-to-jax", hf_dir, tmp_path / "dense")
    assert "is a dense model" in refused("jax-to-hf", tmp_path / "dense", tmp_path / "out", "--layout", "mixtral")


def rename(weights: Path, old: str, new: str | None) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(weights)
    tensor = tensors.pop(old)
    save_file(tensors | ({} if new is None else {new: tensor[:3] if new == old else tensor}), weights)


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize(
    ("old", "new", "changes", "words"),
    [
        (EXPERT, None, {}, [f"{EXPERT!r} is missing"]),
        (EXPERT, EXPERT, {}, [f"{EXPERT!r} has shape [3, 16]", "[12, 16]"]),
        ("model.layers.0.block_sparse_moe.gate.weight", None, {}, ["layers.0.mlp.router.weight' is missing"]),
        (None, None, {"num_local_experts": 3}, ["experts.3.", "3 experts"]),
        (None, None, {"num_experts_per_tok": 1}, ["config.json", "num_experts_per_tok is 1", "write 2"]),
        (None, None, {"num_experts_per_tok": 5}, ["config.json", "text: 5"]),
        (None, None, {"num_local_experts": "4"}, ["config.json", "num_local_experts is '4'"]),
        (None, None, {"hidden_act": "tanh"}, ["config.json", "'tanh'"]),
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
    make_mixtral(tmp_path / "m")
    if old is not None:
        rename(tmp_path / "m" / "model.safetensors", old, new)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | changes))
    message = refused("hf-to-jax", tmp_path / "m", tmp_path / "out")
    assert all(word in message for word in words), message


def test_folder_of_another_model(
    hf_dir: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    for name, k in (("two", 2), ("three", 3)):
        moe = make_moe(hf_dir, tmp_path / f"moe-{name}", make_order(), ExpertsSpec(E, "learned", top_k=(k,)))
        run("jax-to-hf", moe, tmp_path / name, "--layout", "mixtral")
    shutil.rmtree(tmp_path / "two" / "jaxlm_experts")
    assert isinstance(open_model(tmp_path / "two"), MixtralSource)  # without it, one modality and no other order
    shutil.copytree(tmp_path / "three" / "jaxlm_experts", tmp_path / "two" / "jaxlm_experts")
    assert "belongs to another model" in refused("hf-to-jax", tmp_path / "two", tmp_path / "out")
