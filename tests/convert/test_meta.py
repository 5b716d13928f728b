"""Meta's checkpoints: against the formula that transformers' own converter uses, re-done here in torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.formats.meta import MetaSource, _generation, ffn_params
from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.spec import RopeSpec, uniform_decoder
from jaxlm.weights.dtypes import WEIGHT_DTYPES
from tests.convert.tiny import logits, make_hf_model

# Three pairs in a head: with two, Meta's order and HF's would be each other's.
SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 28}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name -> (HF configuration, extra keys of params.json, the embedding's split)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "llama1": (dict(num_key_value_heads=4, rms_norm_eps=1e-6, max_position_embeddings=2048), {"vocab_size": -1}, 1),
    "llama2": (dict(rms_norm_eps=1e-5, max_position_embeddings=4096, dtype="bfloat16"), {"vocab_size": -1}, 1),
    "llama3": (
        dict(rms_norm_eps=1e-5, max_position_embeddings=8192, rope_parameters={"rope_theta": 5e5}, dtype="bfloat16"),
        {"vocab_size": 40, "rope_theta": 500000.0, "use_scaled_rope": False},
        0,
    ),
    "llama3.1": (
        dict(rms_norm_eps=1e-5, max_position_embeddings=131072, rope_parameters=LLAMA31, dtype="bfloat16"),
        {"vocab_size": 40, "rope_theta": 500000.0, "use_scaled_rope": True},
        0,
    ),
    "llama3.2": (
        dict(
            rms_norm_eps=1e-5,
            max_position_embeddings=131072,
            rope_parameters=LLAMA31 | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        {"vocab_size": 40, "rope_theta": 500000.0, "use_scaled_rope": True},
        0,
    ),
}
LINEARS = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def make(name: str) -> Any:
    return make_hf_model(**({"vocab_size": 40} | SIZES | MODELS[name][0]))


def meta_state(model: Any, embedding_axis: int) -> dict[str, tuple[Any, int | None]]:
    """Meta's name -> tensor in Meta's order, and the dimension that is split."""
    config = model.config
    state = model.state_dict()

    def interleave(weight: Any) -> Any:
        # The inverse of `w.view(heads, dim // heads // 2, 2, D).transpose(1, 2)`, which the converter applies.
        heads = weight.shape[0] // config.head_dim
        halves = weight.view(heads, 2, config.head_dim // 2, weight.shape[1])
        return halves.transpose(1, 2).reshape(weight.shape).contiguous()

    found = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], embedding_axis),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
    }
    for layer in range(config.num_hidden_layers):
        for hf, (meta, axis) in LINEARS.items():
            weight = state[f"model.layers.{layer}.{hf}.weight"]
            if meta in ("attention.wq", "attention.wk"):
                weight = interleave(weight)
            found[f"layers.{layer}.{meta}.weight"] = (weight, axis)
    return found


def save_meta(model: Any, directory: Path, shards: int, embedding_axis: int, **params: Any) -> Path:
    """As Meta published its models."""
    torch = pytest.importorskip("torch")
    directory.mkdir(parents=True)
    config = model.config
    for number in range(shards):
        part = {"rope.freqs": torch.ones(config.head_dim // 2)}
        for name, (weight, axis) in meta_state(model, embedding_axis).items():
            part[name] = (weight if axis is None else weight.chunk(shards, axis)[number]).clone()
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    values = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "multiple_of": 256,
        "norm_eps": config.rms_norm_eps,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        values["n_kv_heads"] = config.num_key_value_heads
    (directory / "params.json").write_text(json.dumps(values | params))
    return directory


def saved(name: str, directory: Path, shards: int = 2, dtype: str = "") -> tuple[Any, Path]:
    model = make(name)
    if dtype:
        torch = pytest.importorskip("torch")
        model = model.to(getattr(torch, dtype))
    _, params, axis = MODELS[name]
    return model, save_meta(model, directory, shards, axis, **params)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_meta_to_hf(name: str, shards: int, tmp_path: Path, run: Callable[..., str]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    dtype = "float16" if name == "llama1" else ""
    model, source = saved(name, tmp_path / "meta", shards, dtype)
    run("meta-to-hf", source, tmp_path / "hf", "--shard-size", "4KB")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    want = model.state_dict()
    assert found.state_dict().keys() == want.keys()
    for key, value in found.state_dict().items():
        assert value.dtype == want[key].dtype and torch.equal(value, want[key]), key
    for key in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "vocab_size"):
        assert getattr(found.config, key) == getattr(model.config, key), key
    # In float32 from a fresh twin: `model.to(bfloat16)` rounded its rotary frequencies too.
    twin = type(model)(model.config)
    twin.load_state_dict(want)
    assert (logits(found.float().eval()) == logits(twin.eval())).all()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_hf_to_meta(name: str, shards: int, tmp_path: Path, run: Callable[..., str]) -> None:
    torch = pytest.importorskip("torch")
    model = make(name)
    model.save_pretrained(tmp_path / "hf")
    printed = run("hf-to-meta", tmp_path / "hf", tmp_path / "meta", "--shards", shards)
    assert f"{shards} processes" in printed
    names = [f"consolidated.{number:02d}.pth" for number in range(shards)]
    # What belongs to the tokenizer comes along, for the way back.
    assert sorted(path.name for path in (tmp_path / "meta").iterdir()) == [
        "README.md",
        *names,
        "generation_config.json",
        "manifest.json",
        "params.json",
    ]
    files = [torch.load(tmp_path / "meta" / file, weights_only=True) for file in names]
    mapped = torch.load(tmp_path / "meta" / names[0], weights_only=True, mmap=True)
    assert all(torch.equal(mapped[key], value) for key, value in files[0].items())
    want = meta_state(model, MODELS[name][2])
    for number, file in enumerate(files):
        assert file.keys() == want.keys()
        for key, (weight, axis) in want.items():
            part = weight if axis is None else weight.chunk(shards, axis)[number]
            assert file[key].dtype == part.dtype and torch.equal(file[key], part), key
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params["vocab_size"] == 40 and params["dim"] == 24 and params.get("n_kv_heads", 4) in (2, 4)
    assert params.get("use_scaled_rope", False) == (name in ("llama3.1", "llama3.2"))
    assert params.get("rope_theta", 10000.0) == model.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", ["llama2", "llama3.2"])
def test_there_and_back(name: str, tmp_path: Path, run: Callable[..., str]) -> None:
    make(name).save_pretrained(tmp_path / "hf")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-meta", tmp_path / "jax", tmp_path / "meta", "--shards", 2)
    run("meta-to-jax", tmp_path / "meta", tmp_path / "jax2")
    run("jax-to-hf", tmp_path / "jax2", tmp_path / "hf2")
    want, found = open_model(tmp_path / "hf"), open_model(tmp_path / "hf2")
    assert want.leaves == found.leaves and want.config == found.config
    for path in want.leaves:
        assert want.read(path, ()).tobytes() == found.read(path, ()).tobytes(), path
    run("meta-to-hf", tmp_path / "meta", tmp_path / "hf3", "--dtype", "float32")
    assert open_model(tmp_path / "hf3").leaves["norm/scale"].dtype == "float32"


def test_slices(tmp_path: Path) -> None:
    _, source = saved("llama3", tmp_path / "meta")
    model = MetaSource(source)
    for path, leaf in model.leaves.items():
        whole = model.read(path, ())
        for cut in (slice(0, 1), slice(1, None, 2), slice(3, 7), slice(5, None, 3)):
            for axis in range(len(leaf.shape)):
                index = (slice(None),) * axis + (cut,)
                assert model.read(path, index).tobytes() == whole[index].tobytes(), (path, index)


def test_max_positions(tmp_path: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    _, source = saved("llama2", tmp_path / "meta")
    assert "max_position_embeddings 4096, as LLaMA 2" in MetaSource(source).assumed[0]
    run("meta-to-hf", source, tmp_path / "hf", "--max-positions", 123)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 123
    assert not MetaSource(source, 123).assumed
    _, tied = saved("llama3.2", tmp_path / "tied")
    assert MetaSource(tied, 123).assumed == ["a tied head: output.weight equals tok_embeddings.weight"]


def test_tokenizer_above_the_sizes(tmp_path: Path, run: Callable[..., str]) -> None:
    _, source = saved("llama1", tmp_path / "LLaMA" / "7B")
    (tmp_path / "LLaMA" / "tokenizer.model").write_bytes(b"sp")
    run("meta-to-hf", source, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"sp"
    run("hf-to-meta", tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"sp"


# ---- what is refused


def change(directory: Path, **values: Any) -> None:
    params = json.loads((directory / "params.json").read_text()) | values
    (directory / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dim": 32}, "expected [40, 16] or [20, 32]: [40, 32] split into 2 shards"),
        ({"dim": "gone"}, "dim is None; expected a positive whole number"),
        ({"n_layers": 4}, "'layers.3."),
        ({"n_layers": 2}, "'layers.2."),
        ({"n_layers": 1 << 30}, "says that the model has 1073741824 layers, but there are"),
        ({"n_heads": 5}, "do not fit"),
        ({"n_kv_heads": 4}, "'layers.0.attention.wk.weight' has shape"),
        ({"vocab_size": 39}, "vocab_size is 39, but the tensors have 40"),
        ({"norm_eps": "x"}, "norm_eps is 'x'"),
        ({"norm_eps": -1e-5}, "expected a positive number"),
        ({"use_scaled_rope": 1}, "expected true or false"),
        ({"rope_scaling_factor": 8}, "use_scaled_rope is not true"),
        ({"moe_args": {"num_experts": 16}}, "'moe_args' ({'num_experts': 16}) is not known"),
        ({"quantization_args": {"group_size": 32}}, "in full precision are read"),
    ],
)
def test_wrong_params(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    _, source = saved("llama2", tmp_path / "meta")
    change(source, **values)
    with pytest.raises(UserError) as error:
        MetaSource(source)
    assert words in str(error.value) and str(source) in str(error.value)


def test_shards_that_do_not_fit(tmp_path: Path, refused: Callable[..., str]) -> None:
    torch = pytest.importorskip("torch")
    _, source = saved("llama2", tmp_path / "meta", shards=2)
    second = source / "consolidated.01.pth"
    good = torch.load(second, weights_only=True)

    def say() -> str:
        with pytest.raises(UserError) as error:
            MetaSource(source)
        return str(error.value)

    torch.save(good | {"extra.weight": torch.ones(2)}, second)
    assert "'extra.weight' has no place" in say()
    torch.save({name: value for name, value in good.items() if name != "norm.weight"}, second)
    assert f"{second}: tensor 'norm.weight' is missing" in say()
    torch.save(good | {"norm.weight": good["norm.weight"].half()}, second)
    assert "'norm.weight' is float16, in the first shard bfloat16" in say()
    torch.save(good | {"layers.1.feed_forward.w2.weight": torch.ones(24, 13)}, second)
    assert "[24, 28] split into 2 shards" in say() and str(second) in say()
    second.rename(source / "consolidated.02.pth")
    assert "consolidated.01.pth is missing between the shards" in say()
    (source / "consolidated.02.pth").unlink()
    for vocabulary in ({}, {"vocab_size": 40}):
        change(source, **vocabulary)
        assert "holds 1 of the shards, up to consolidated.00.pth" in say()
        assert "12 of the 24 rows" in say() and "consolidated.01.pth seems to be missing (of 2 in all)" in say()
    (source / "consolidated.00.pth").unlink()
    assert "no consolidated.00.pth" in refused("meta-to-hf", source, tmp_path / "out")
    (source / "params.json").unlink()
    saved("llama2", tmp_path / "other")
    (tmp_path / "other" / "params.json").unlink()
    assert "but no params.json" in refused("meta-to-hf", tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("Llama", {"attention_bias": True}, "'model.layers.0.self_attn.q_proj.bias'"),
        ("Qwen2", {}, "'model.layers.0.self_attn.q_proj.bias'"),
        ("Mistral", {"sliding_window": 8}, "sliding window of 8"),
        ("Llama", {"head_dim": 4}, "4 heads of 4 for D 24"),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'linear'"),
        ("Llama", {"rope_parameters": LLAMA31 | {"low_freq_factor": 2.0}}, "differs from Meta's"),
        ("Llama", {"vocab_size": 37}, "cannot be split evenly (37"),
        # Which has LLaMA's names, but turns its heads otherwise.
        (
            "Glm",
            {"attention_bias": False, "head_dim": 6, "pad_token_id": None, "partial_rotary_factor": 0.7},
            "has no place for attention.rotary_dim",
        ),
    ],
)
def test_what_meta_cannot_hold(
    architecture: str, changes: dict[str, Any], words: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    make_hf_model(architecture, **(SIZES | changes)).save_pretrained(tmp_path / "hf")
    assert words in refused("hf-to-meta", tmp_path / "hf", tmp_path / "out", "--shards", 2)
    assert "must be at least 1" in refused("hf-to-meta", tmp_path / "hf", tmp_path / "out", "--shards", 0)


def test_verbs_say_what_they_take(tmp_path: Path, refused: Callable[..., str]) -> None:
    model, source = saved("llama2", tmp_path / "meta")
    model.save_pretrained(tmp_path / "hf")
    assert "is a checkpoint in Meta's format already" in refused("hf-to-meta", source, tmp_path / "out")
    assert "not a jaxlm model: use convert hf-to-meta" in refused("jax-to-meta", tmp_path / "hf", tmp_path / "out")
    assert "is a Hugging Face model, not a checkpoint in" in refused("meta-to-jax", tmp_path / "hf", tmp_path / "out")
    assert "use convert meta-to-jax" in refused("hf-to-jax", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("dim", "hidden", "want"),
    [
        (4096, 11008, {"multiple_of": 256}),  # LLaMA 7B
        (5120, 13824, {"multiple_of": 256}),
        (8192, 28672, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),  # LLaMA 2 70B
        (4096, 14336, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),  # LLaMA 3 8B
        (2048, 8192, {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),  # LLaMA 3.2 1B
        (896, 4864, None),
        (16, 24, None),
    ],
)
def test_ffn_formula(dim: int, hidden: int, want: dict[str, Any] | None) -> None:
    found = ffn_params(dim, hidden)
    # As Meta's FeedForward computes it.
    width = int(2 * (4 * dim) / 3)
    if found.get("ffn_dim_multiplier") is not None:
        width = int(found["ffn_dim_multiplier"] * width)
    width = found["multiple_of"] * ((width + found["multiple_of"] - 1) // found["multiple_of"])
    assert width == hidden
    if want is not None:
        assert found == want


@pytest.mark.parametrize(
    ("values", "dtype", "want"),
    [
        ({}, "float16", ("LLaMA 1", 2048)),
        ({}, "bfloat16", ("LLaMA 2", 4096)),
        ({"num_kv_heads": 2}, "float16", ("LLaMA 2", 4096)),  # 70B, saved again in float16
        ({"rope": RopeSpec(rope_theta=1e6)}, "bfloat16", ("Code Llama", 16384)),
        ({"rope": RopeSpec(rope_theta=5e5)}, "bfloat16", ("LLaMA 3", 8192)),
        ({"rope": RopeSpec(**LLAMA31)}, "bfloat16", ("LLaMA 3.1 and later", 131072)),
    ],
)
def test_generations(values: dict[str, Any], dtype: str, want: tuple[str, int]) -> None:
    sizes: dict[str, Any] = dict(vocab_size=40, hidden_size=24, intermediate_size=28, num_layers=3)
    config = uniform_decoder("llama", **{**sizes, "num_heads": 4, "num_kv_heads": 4, "head_dim": 6, **values})
    assert _generation(config, WEIGHT_DTYPES[dtype]) == want


def test_rope_factor_that_no_release_has(tmp_path: Path, run: Callable[..., str]) -> None:
    rope = {"rope_parameters": LLAMA31 | {"factor": 32.0}}
    make_hf_model(**(SIZES | rope)).save_pretrained(tmp_path / "hf")
    run("hf-to-meta", tmp_path / "hf", tmp_path / "meta")
    assert json.loads((tmp_path / "meta" / "params.json").read_text())["rope_scaling_factor"] == 32.0
    assert MetaSource(tmp_path / "meta").config.attention.rope.factor == 32.0
