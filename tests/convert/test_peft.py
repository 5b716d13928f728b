"""Adapters to and from PEFT, and merging, against PEFT itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source import is_adapter, open_adapter, open_model
from convert.transforms.merge import MergedSource
from jaxlm.errors import UserError
from jaxlm.models.families import FAMILIES
from jaxlm.weights.names import leaf_shapes
from tests.convert.tiny import logits, make_adapter, make_hf_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

LINEARS = tuple(FAMILIES["llama"].linears)
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all_linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(q_proj|down_proj)"},
    "layers_apart": {"target_modules": r".*(0.*q_proj|1.*v_proj|up_proj)", "rank_pattern": {"0.mlp.up_proj": 5}},
    "names": {"target_modules": ["self_attn.q_proj", "o_proj", "up_proj"]},
    "rslora": {"use_rslora": True, "r": 4},
    "dora": {"use_dora": True, "target_modules": list(LINEARS)},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": list(LINEARS),
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 1, r".*\.0\.mlp\.gate_proj": 3},
        "alpha_pattern": {"v_proj": 1, "layers.2.mlp.up_proj": 32},
    },
    "some_layers": {"layers_to_transform": [0, 2], "target_modules": list(LINEARS), "use_dora": True},
    "one_layer": {"layers_to_transform": 1},
    "no_layer_named": {"layers_to_transform": []},  # means all
    "excluded": {"target_modules": list(LINEARS), "exclude_modules": ["k_proj", "gate_proj"]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_norm": {"modules_to_save": ["model.norm"]},
    "odd_alpha": {"lora_alpha": 2.5, "lora_dropout": 0.05},
}


def build(tmp_path: Path, adapter: dict[str, Any], **model: Any) -> tuple[Any, Path, Path]:
    """(PEFT model, base directory, adapter directory)"""
    base = make_hf_model(**model)
    base.save_pretrained(tmp_path / "base")
    return make_adapter(base, tmp_path / "peft", **adapter), tmp_path / "base", tmp_path / "peft"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    build(directory, {})
    return directory


def copy_plain(plain: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(base directory, a copy of the adapter to spoil)"""
    shutil.copytree(plain / "peft", tmp_path / "peft")
    return plain / "base", tmp_path / "peft"


def assert_same_files(want: Path, found: Path) -> None:
    a, b = (load_file(path / "adapter_model.safetensors") for path in (want, found))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ADAPTERS)
def test_round_trip_and_merge(name: str, tmp_path: Path, run: Callable[..., str]) -> None:
    model, base, adapter = build(tmp_path, ADAPTERS[name], attention_bias=True)
    run("peft-to-jax", adapter, tmp_path / "jax", "--base", base)
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    assert_same_files(adapter, tmp_path / "back")
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert written == json.loads((adapter / "adapter_config.json").read_text())

    run("merge", base, tmp_path / "jax", tmp_path / "merged")
    run("merge", base, adapter, tmp_path / "merged_peft")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("merged", "merged_peft"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    adapted = logits(model)
    reference = model.merge_and_unload()
    for key, value in reference.state_dict().items():
        assert torch.allclose(a[key], value, atol=1e-6, rtol=0), key
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(loaded), logits(reference), atol=1e-5)
    np.testing.assert_allclose(logits(loaded), adapted, atol=1e-5)
    # The adapter does something, or all of this shows nothing.
    assert np.abs(logits(transformers.AutoModelForCausalLM.from_pretrained(base)) - adapted).max() > 1e-2


@pytest.mark.parametrize(
    "name", ["dora_rslora", "patterns", "some_layers", "layers_apart", "regex", "saved", "saved_norm", "odd_alpha"]
)
def test_written_from_scratch(name: str, tmp_path: Path, run: Callable[..., str]) -> None:
    """Without the original adapter_config.json, as after training: PEFT loads it and computes the same."""
    model, base, adapter = build(tmp_path, ADAPTERS[name])
    run("peft-to-jax", adapter, tmp_path / "jax", "--base", base)
    (tmp_path / "jax" / "jaxlm" / "adapter_config.json").unlink()
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    assert_same_files(adapter, tmp_path / "back")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "back").eval()
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-6)
    found = open_adapter(tmp_path / "back", open_model(base).config)
    want = open_adapter(tmp_path / "jax")
    assert (found.lora, found.layers) == (want.lora, want.layers)


def test_jaxlm_base_and_bin_adapter(tmp_path: Path, run: Callable[..., str]) -> None:
    model, base, adapter = build(tmp_path, ADAPTERS["dora"])
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    run("hf-to-jax", base, tmp_path / "jax")
    assert "jaxlm.train" in run("merge", tmp_path / "jax", adapter, tmp_path / "merged")
    run("merge", tmp_path / "jax", adapter, tmp_path / "merged_hf", "--format", "hf")
    run("jax-to-hf", tmp_path / "merged", tmp_path / "back")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("back", "merged_hf"))
    reference = model.merge_and_unload().state_dict()
    for key, value in reference.items():
        assert torch.equal(a[key], b[key]) and torch.allclose(a[key], value, atol=1e-6, rtol=0), key


def test_options_of_other_scripts(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    """FastChat's apply_lora and KnowLM's weight_diff merge."""
    model, base, adapter = build(tmp_path, {})
    out = tmp_path / "out"
    run("merge", "--base-model-path", base, "--lora-path", adapter, "--target-model-path", out)
    state, want = load_file(out / "model.safetensors"), model.merge_and_unload().state_dict()
    assert all(torch.allclose(state[key], value, atol=1e-6, rtol=0) for key, value in want.items())
    arguments = [
        f"--path_zhixi={base}",
        f"--path_lora={adapter}",
        f"--path_sfted={tmp_path / 'half'}",
        "--is_fp16=True",
    ]
    run("merge", *arguments)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[key], value.half()) for key, value in state.items())
    assert "BASE ADAPTER OUT" in refused("merge", base, adapter)


def test_merging_rounds_once(tmp_path: Path) -> None:
    """A bfloat16 base is widened, the float32 sum rounded to bfloat16; --dtype float32 keeps the sum."""
    base = make_hf_model(dtype="bfloat16")
    base.save_pretrained(tmp_path / "base")
    make_adapter(base, tmp_path / "peft")
    source = open_model(tmp_path / "base")
    adapter = open_adapter(tmp_path / "peft", source.config)
    path = "layers/self_attn/q_proj/kernel"
    a = adapter.read("layers/self_attn/q_proj/lora_A", ())
    b = adapter.read("layers/self_attn/q_proj/lora_B", ())
    want = source.read(path, ()).astype(np.float32) + 3.0 * np.einsum("ldr,lrhe->ldhe", a, b)
    np.testing.assert_allclose(MergedSource(source, adapter, "float32").read(path, ()), want, atol=1e-6)
    rounded = MergedSource(source, adapter).read(path, ())
    assert rounded.dtype.name == "bfloat16"
    sum32 = MergedSource(source, adapter, "float32").read(path, ())
    assert np.array_equal(rounded, sum32.astype(rounded.dtype))


@pytest.mark.parametrize("name", ["patterns", "dora", "some_layers", "saved"])
def test_slices_of_a_merged_model(name: str, tmp_path: Path) -> None:
    _, base, directory = build(tmp_path, ADAPTERS[name])
    source = open_model(base)
    merged = MergedSource(source, open_adapter(directory, source.config))
    random = np.random.default_rng(0)
    for path, leaf in merged.leaves.items():
        whole = merged.read(path, ())
        assert whole.shape == leaf.shape
        for _ in range(4):
            index = tuple(
                slice(*sorted(int(x) for x in random.integers(0, size + 1, 2)), int(random.integers(1, 3)))
                for size in leaf.shape
            )
            np.testing.assert_allclose(merged.read(path, index), whole[index], atol=1e-6)


def test_added_tokens_follow_into_the_merged_model(tmp_path: Path, run: Callable[..., str]) -> None:
    base = make_hf_model()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(40)
    model = make_adapter(base, tmp_path / "peft", modules_to_save=["embed_tokens", "lm_head"])
    (tmp_path / "base" / "tokenizer.model").write_text("base")
    (tmp_path / "peft" / "tokenizer.json").write_text("adapter's")
    run("merge", tmp_path / "base", tmp_path / "peft", tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert loaded.config.vocab_size == 40
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-5)
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "tokenizer.json" in files and "tokenizer.model" not in files and "generation_config.json" in files
    # PEFT stores resized embeddings whether or not the configuration names them.
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    run("merge", tmp_path / "base", tmp_path / "peft", tmp_path / "merged2")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("merged", "merged2"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_rows_must_agree(tmp_path: Path, refused: Callable[..., str]) -> None:
    base = make_hf_model()
    base.save_pretrained(tmp_path / "base")
    make_adapter(base, tmp_path / "peft", modules_to_save=["embed_tokens"])
    file = tmp_path / "peft" / "adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.model.embed_tokens.weight"] = torch.ones(40, 16)
    save_file(state, file)
    message = refused("merge", tmp_path / "base", tmp_path / "peft", tmp_path / "out")
    assert "40 rows and the head 37" in message


def test_tied_embedding(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    saved = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    _, base, adapter = build(tmp_path, saved, tie_word_embeddings=True)
    state = load_file(adapter / "adapter_model.safetensors")
    embedding, head = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
    state[head] = state[embedding].clone()
    save_file(state, adapter / "adapter_model.safetensors")
    run("peft-to-jax", adapter, tmp_path / "jax", "--base", base)
    assert open_adapter(tmp_path / "jax").lora.modules_to_save == ("embed_tokens",)
    (tmp_path / "jax" / "jaxlm" / "adapter_config.json").unlink()
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    assert_same_files(adapter, tmp_path / "back")
    run("merge", base, adapter, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.lm_head.weight, state[embedding])
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "back"
    ).eval()
    np.testing.assert_allclose(logits(loaded), logits(merged.eval()), atol=1e-5)
    del state[head]
    save_file(state, adapter / "adapter_model.safetensors")
    assert "ensure_weight_tying" in refused("merge", base, adapter, tmp_path / "out")


@pytest.mark.parametrize("form", ["{}.modules_to_save.weight", "{}.modules_to_save.default.weight"])
def test_older_names(form: str, tmp_path: Path, run: Callable[..., str]) -> None:
    _, base, adapter = build(tmp_path, {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True})
    shutil.copytree(adapter, tmp_path / "new")
    state = load_file(adapter / "adapter_model.safetensors")
    old = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem.endswith(("embed_tokens", "lm_head")):
            name = form.format(stem)
        old[name + ".weight" if name.endswith("vector") else name] = tensor
    save_file(old, adapter / "adapter_model.safetensors")
    run("peft-to-jax", adapter, tmp_path / "jax", "--base", base)
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    assert_same_files(tmp_path / "new", tmp_path / "back")


@pytest.mark.parametrize("rows", [37, 40])
@pytest.mark.parametrize(
    ("tied", "config"),
    [
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, {"modules_to_save": ["lm_head"]}),
        (False, {"modules_to_save": ["embed_tokens"]}),
        (False, {}),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (True, {}),
    ],
)
def test_resized_embeddings_as_peft_writes_them(
    tied: bool, config: dict[str, Any], rows: int, tmp_path: Path, run: Callable[..., str]
) -> None:
    """With save_embedding_layers: the same module under up to three names. PEFT's own logits come out."""
    base = make_hf_model(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(rows)
    model = make_adapter(base, tmp_path / "auto", **config)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    if config:
        assert any(".original_module." in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    run("peft-to-jax", tmp_path / "peft", tmp_path / "jax", "--base", tmp_path / "base")
    for number, adapter in enumerate(("peft", "jax")):
        run("merge", tmp_path / "base", tmp_path / adapter, tmp_path / f"merged{number}")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{number}").eval()
        assert merged.config.vocab_size == rows
        np.testing.assert_allclose(logits(merged), logits(model), atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_twins_that_differ_are_refused(order: int, tmp_path: Path, refused: Callable[..., str]) -> None:
    _, base, adapter = build(tmp_path, {"modules_to_save": ["embed_tokens", "lm_head"]})
    state = load_file(adapter / "adapter_model.safetensors")
    head = "base_model.model.lm_head.weight"
    twin = head.replace(".weight", ".modules_to_save.weight")
    state[twin] = state[head] + 1e-3
    save_file(dict(list(state.items())[::order]), adapter / "adapter_model.safetensors")
    message = refused("merge", base, adapter, tmp_path / "out")
    assert repr(head) in message and repr(twin) in message and "differ" in message


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NORM = "base_model.model.model.layers.0.input_layernorm.weight"
B0 = A0.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"some_future_feature": 1}, "some_future_feature"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"r": 0}, "r is 0"),
        ({"r": 3}, "shape"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": []}, "target_modules is []"),
        ({"target_modules": ["q_proj", "query"]}, "'query'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "PEFT's merge_and_unload"),
        ({"target_modules": "nothing"}, "'nothing' match no linear layer"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight' has no place"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.lora_A.weight' is missing"),
        ({"layers_to_transform": [0, 3]}, "layers_to_transform names 3"),
        ({"layers_to_transform": [0, 1]}, "layers.2.self_attn.q_proj.lora_A.weight' has no place"),
        ({"modules_to_save": ["score"]}, "'score'"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight' is missing"),
        ({"use_dora": True}, "lora_magnitude_vector' is missing"),
        ({"rank_pattern": {"nowhere": 4}}, "nowhere"),
    ],
)
def test_configurations_refused(
    config: dict[str, Any], words: str, plain: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    base, adapter = copy_plain(plain, tmp_path)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    for verb in (("peft-to-jax", adapter, tmp_path / "o", "--base", base), ("merge", base, adapter, tmp_path / "o")):
        message = refused(*verb)
        assert words in message and str(adapter) in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(A0), f"'{A0}' is missing"),
        (lambda s: s.pop(B0), f"'{B0}' is missing"),
        (lambda s: s.update(x=torch.ones(1)), "'x' has no place"),
        (lambda s: s.update({A0: torch.ones(2, 15)}), f"'{A0}' has shape [2, 15]"),
        (lambda s: s.update({A0: s[A0].to(torch.float16)}), "is float16"),
        (lambda s: s.clear(), "holds no tensors"),
        (lambda s: s.update({NORM: torch.ones(16)}), "only the final norm"),
        (
            lambda s: [s.pop(k) for k in list(s) if "lora" in k] and s.update(x=torch.ones(1)),
            "none of the LoRA tensors",
        ),
        (lambda s: s.update({A0.replace("lora_A", "lora_A.default"): s.pop(A0)}), f"'{A0}' is missing"),
    ],
)
def test_tensors_refused(
    change: Callable[[Any], Any], words: str, plain: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    base, adapter = copy_plain(plain, tmp_path)
    state = load_file(adapter / "adapter_model.safetensors")
    change(state)
    save_file(state, adapter / "adapter_model.safetensors")
    message = refused("peft-to-jax", adapter, tmp_path / "o", "--base", base)
    assert words in message and "adapter_model.safetensors" in message


def test_wrong_kind_of_directory(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    _, base, adapter = build(tmp_path, {})
    run("peft-to-jax", adapter, tmp_path / "jax", "--base", base)
    for directory in (adapter, tmp_path / "jax"):
        assert is_adapter(directory)
        assert "convert merge BASE" in refused("hf-to-jax", directory, tmp_path / "o")
        assert "convert merge BASE" in refused("merge", directory, adapter, tmp_path / "o")
        with pytest.raises(UserError, match="convert merge BASE"):
            open_model(directory)
    assert "is a jaxlm adapter already" in refused("peft-to-jax", tmp_path / "jax", tmp_path / "o", "--base", base)
    assert "is a PEFT adapter already" in refused("jax-to-peft", adapter, tmp_path / "o")
    assert "is not an adapter" in refused("jax-to-peft", base, tmp_path / "o")
    assert "is not an adapter" in refused("merge", base, base, tmp_path / "o")
    (adapter / "adapter_model.safetensors").unlink()
    assert "neither adapter_model.safetensors nor" in refused("merge", base, adapter, tmp_path / "o")
    with pytest.raises(UserError, match="does not record the shape of its base"):
        open_adapter(adapter)


def test_directories_with_both_kinds_of_files(plain: Path, tmp_path: Path) -> None:
    base, adapter = copy_plain(plain, tmp_path)
    shutil.copyfile(base / "config.json", adapter / "config.json")
    assert is_adapter(adapter)  # no weights of a model in it
    shutil.copytree(base, tmp_path / "model")
    shutil.copyfile(adapter / "adapter_config.json", tmp_path / "model" / "adapter_config.json")
    assert not is_adapter(tmp_path / "model") and open_model(tmp_path / "model").leaves


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_not_merged(
    dora: bool, value: float, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    """In the base, in a factor, in a module saved in full: named, whatever is written."""
    base, adapter = tmp_path / "base", tmp_path / "peft"
    make_hf_model().save_pretrained(base)
    make_adapter(make_hf_model(), adapter, use_dora=dora, modules_to_save=["lm_head"])
    run("hf-to-jax", base, tmp_path / "jax")
    for folder, file, part in (
        (base, "model.safetensors", "layers.1.self_attn.v_proj.weight"),
        (adapter, "adapter_model.safetensors", "layers.1.self_attn.v_proj.lora_A.weight"),
        (adapter, "adapter_model.safetensors", "lm_head"),
    ):
        whole = (folder / file).read_bytes()
        tensors = load_file(folder / file)
        (name,) = [name for name in tensors if part in name]
        tensors[name].view(-1)[3] = value
        save_file(tensors, folder / file)
        for shape in ("hf", "jax"):
            message = refused("merge", base, adapter, tmp_path / "o", "--format", shape)
            assert str(folder) in message and "infinities or NaNs" in message
        (folder / file).write_bytes(whole)
    run("merge", tmp_path / "jax", adapter, tmp_path / "o")


def test_adapter_of_another_base(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    _, base, adapter = build(tmp_path, {})
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "some/llama"}))
    run("peft-to-jax", adapter, tmp_path / "jax", "--base", base)
    make_hf_model(num_hidden_layers=2).save_pretrained(tmp_path / "short")
    make_hf_model(hidden_size=32).save_pretrained(tmp_path / "wide")
    for directory in (adapter, tmp_path / "jax"):
        assert "layers" in refused("merge", tmp_path / "short", directory, tmp_path / "o")
        message = refused("merge", tmp_path / "wide", directory, tmp_path / "o")
        assert "shape" in message and "another base than the one given: it records " in message
        assert ("some/llama" if directory == adapter else str(base)) in message


def test_inspect(tmp_path: Path, run: Callable[..., str]) -> None:
    _, base, adapter = build(tmp_path, {"use_dora": True, "modules_to_save": ["lm_head"]})
    printed = run("peft-to-jax", adapter, tmp_path / "jax", "--base", base)
    assert "DoRA rank 2, alpha 6, on q_proj v_proj, saved in full: lm_head" in printed
    printed = run("inspect", tmp_path / "jax")
    assert "DoRA rank 2, alpha 6" in printed and "modules_to_save/lm_head/kernel" in printed and str(base) in printed
    assert A0 in run("inspect", adapter)


def test_adapter_leaves_are_padded_with_zeros(tmp_path: Path) -> None:
    _, base, directory = build(tmp_path, {"rank_pattern": {"layers.1.self_attn.q_proj": 5}})
    config = open_model(base).config
    adapter = open_adapter(directory, config)
    a = adapter.read("layers/self_attn/q_proj/lora_A", ())
    b = adapter.read("layers/self_attn/q_proj/lora_B", ())
    assert a.shape == (3, 16, 5) and b.shape == (3, 5, 4, 4) and leaf_shapes(config)
    assert (a[[0, 2], :, 2:] == 0).all() and (b[[0, 2], 2:] == 0).all() and (a[1] != 0).any(axis=0).all()
    state = load_file(directory / "adapter_model.safetensors")
    assert np.array_equal(a[0, :, :2], state[A0].numpy().T)
    for index in ((slice(1, 3), slice(3, 9), slice(1, 4)), (slice(0, 1), slice(None), slice(2, 4))):
        assert np.array_equal(adapter.read("layers/self_attn/q_proj/lora_A", index), a[index])


def test_adapter_in_a_training_run(tmp_path: Path, run: Callable[..., str]) -> None:
    """As the training loop saves it: Orbax with OCDBT, beside other state."""
    import jax.numpy as jnp
    from orbax.checkpoint import v1 as ocp

    from tests.convert.test_source import tree

    _, base, directory = build(tmp_path, ADAPTERS["dora"] | {"modules_to_save": ["embed_tokens", "lm_head"]})
    run("peft-to-jax", directory, tmp_path / "jax", "--base", base)
    adapter = open_adapter(tmp_path / "jax")
    lora = tree({path: jnp.asarray(adapter.read(path, ())) for path in adapter.leaves})
    step = tmp_path / "run" / "checkpoints" / "7"
    ocp.save_checkpointables(step, {"model": {"lora": lora}, "train": {"step": jnp.int32(7)}})
    shutil.copytree(tmp_path / "jax" / "jaxlm", step / "jaxlm")
    assert is_adapter(tmp_path / "run")
    run("jax-to-peft", tmp_path / "run", tmp_path / "back")
    assert_same_files(directory, tmp_path / "back")
    run("merge", base, tmp_path / "run", tmp_path / "merged")
    run("merge", base, directory, tmp_path / "reference")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("merged", "reference"))
    assert all(torch.equal(a[key], b[key]) for key in a)
