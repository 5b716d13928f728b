"""MindSpore's formats: golden files that MindSpore 2.10 wrote, and files made here by the official message layout."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import jaxlm.weights.mindspore_ckpt
from convert.formats.mindspore import MindSporeAdapter, MindSporeSource
from convert.source import is_adapter, open_adapter, open_model
from jaxlm.errors import UserError
from jaxlm.spec import RopeSpec, uniform_decoder
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.files import read_tensors
from jaxlm.weights.leaves import LeafInfo
from jaxlm.weights.mindspore_ckpt import CkptWriter, read_ckpt
from tests.convert.tiny import logits, make_adapter, make_hf_model
from tests.models.small import hf_model

GOLDEN = Path(__file__).parent / "golden"
# What was given to MindSpore.
WRITTEN: dict[str, Any] = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.f16": np.ones(4, np.float16),
    "c.bf16": np.array([1.5, -2.25, 3.0]).astype(BFLOAT16),
    "i32": np.array([1, 2], np.int32),
    "scalar": np.array(3.5, np.float32),
    "bool": np.array([True, False]),
    "i64": np.array([1, 2], np.int64),
}
APPENDED = {"epoch_num": np.array(3, np.int64), "lr": np.array(0.5, np.float32), "flag": np.array(True)}


@pytest.mark.parametrize("name", ["list.ckpt", "dict.ckpt", "crc.ckpt", "app.ckpt", "st.safetensors"])
def test_golden_files(name: str) -> None:
    want = WRITTEN | (APPENDED if name == "app.ckpt" else {})  # and a string, which is left out
    found = read_tensors(GOLDEN / name)
    assert found.keys() == want.keys()
    for key, array in want.items():
        got = found[key].read()
        assert got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == array.tobytes(), key


def test_encrypted_file() -> None:
    with pytest.raises(UserError, match=r"enc\.ckpt: is encrypted; save it again without"):
        read_ckpt(GOLDEN / "enc.ckpt")
    with pytest.raises(UserError, match="is encrypted"):
        open_model(GOLDEN / "enc.ckpt")


def write(path: Path, arrays: dict[str, np.ndarray], crc: bool = False) -> Path:
    with CkptWriter(path, crc) as writer:
        for name, array in arrays.items():
            writer.write(name, array.shape, array.dtype, [array], lambda n: None)
    return path


def test_writes_what_mindspore_writes(tmp_path: Path) -> None:
    arrays = {name: np.asarray(array) for name, array in WRITTEN.items()}
    assert write(tmp_path / "x.ckpt", arrays).read_bytes() == (GOLDEN / "list.ckpt").read_bytes()
    assert write(tmp_path / "y.ckpt", arrays, crc=True).read_bytes() == (GOLDEN / "crc.ckpt").read_bytes()


# ---- by the message layout, independently of the writer


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def value(name: str, dims: list[int], kind: str, content: bytes, packed: bool = False) -> bytes:
    sizes = message(1, b"".join(map(varint, dims))) if packed else b"".join(b"\x08" + varint(d) for d in dims)
    tensor = sizes + message(2, kind.encode()) + message(3, content)
    return message(1, message(1, name.encode()) + message(2, tensor))


def read_bytes(path: Path, content: bytes) -> dict[str, Any]:
    path.write_bytes(content)
    return read_ckpt(path)


def test_uneven_slices(tmp_path: Path) -> None:
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    raw = array.tobytes()
    cuts = [0, 3, 40, 41, 41, 100, 140]
    slices = [value("w", [5, 7], "Float32", raw[a:b]) for a, b in itertools.pairwise(cuts)]
    others = value("v", [2], "Int8", b"\x01\x02"), value("u", [1], "Bool", b"\x01")
    found = read_bytes(tmp_path / "x.ckpt", others[0] + b"".join(slices) + others[1])
    assert list(found) == ["v", "w", "u"]
    assert found["w"].read().tobytes() == raw
    for start in range(5):
        for stop in range(start, 6):
            assert found["w"].rows(start, stop).tobytes() == array[start:stop].tobytes()
    # One message for the whole file, and packed dims, are the same to protobuf.
    assert read_bytes(tmp_path / "x.ckpt", value("p", [2, 1], "Float16", b"abcd", packed=True))["p"].shape == (2, 1)


def test_slices_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxlm.weights.mindspore_ckpt, "SLICE_BYTES", 100)
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    path = write(tmp_path / "x.ckpt", {"w": array, "one": array[:1], "none": array[:0]})
    # numpy.array_split(array.reshape(-1), 2): 18 and 17 elements.
    content = path.read_bytes()
    first = value("w", [5, 7], "Float32", array.tobytes()[:72])
    assert content.startswith(first + value("w", [5, 7], "Float32", array.tobytes()[72:]))
    found = read_ckpt(path)
    assert found["w"].read().tobytes() == array.tobytes() and found["one"].shape == (1, 7)
    assert found["none"].shape == (0, 7)


GOOD = value("a", [2], "Float32", b"12345678")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (GOOD[:-1], "cut short"),
        (GOOD + b"\x0a", "cut short"),
        (GOOD + b"junk", "is not where a tensor begins"),
        (GOOD + value("b", [1], "Bool", b"1") + GOOD, "'a' occurs twice"),
        (GOOD + value("a", [3], "Float32", b"1"), "the slices of 'a' differ"),
        (value("a", [3], "Float32", b"12345678"), "'a' of shape [3] and type Float32 needs 12 bytes, the file has 8"),
        (value("a", [2**62, 4], "Float32", b""), "needs 73786976294838206464 bytes"),
        (value("a", [2**63], "Float32", b""), "of shape [9223372036854775808]"),
        (value("a", [1] * 65, "Float32", b"1234"), "more than 64 fields"),
        (value("a", [1] * 65, "Float32", b"1234", packed=True), "of shape [1, 1"),
        (value("a", [2], "Int4", b"1"), "tensor 'a' is of type 'Int4'; known: Int8"),
        (value("a" * 5000, [1], "Bool", b"1"), "a name of 5000 bytes"),
        (message(1, message(1, b"\xff") + message(2, b"")), "a name that is not text"),
        (message(1, message(1, b"a") + message(3, b"")), "hash table"),
        (message(1, message(1, b"a")), "a name without a tensor"),
        (message(1, message(1, b"a") + message(2, message(2, b"Bool"))), "without type or content"),
        (message(1, b"\x0b" * 3), "unknown wire type 3"),
        (b"\x0a" + b"\xff" * 11, "does not end"),
        (b"\x0a" + varint(10**15), "a length in it is wrong"),
        (GOOD + b"crc_num" + (zlib.crc32(GOOD) ^ 1).to_bytes(10, "big"), "its CRC-32 is"),
        (GOOD + b"crc_num" + zlib.crc32(GOOD).to_bytes(9, "big"), "is not where a tensor begins"),
    ],
)
def test_damaged_files(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_bytes(tmp_path / "x.ckpt", content)
    assert words in str(error.value) and str(tmp_path / "x.ckpt") in str(error.value)
    assert read_bytes(tmp_path / "x.ckpt", GOOD + b"crc_num" + zlib.crc32(GOOD).to_bytes(10, "big")).keys() == {"a"}


# ---- models

NAMES = {
    "embed_tokens.weight": "tok_embeddings.embedding_weight",
    ".self_attn.q_proj.": ".attention.wq.",
    ".self_attn.k_proj.": ".attention.wk.",
    ".self_attn.v_proj.": ".attention.wv.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    "model.norm.": "model.norm_out.",
}


def mindspore_arrays(model: Any) -> dict[str, np.ndarray]:
    """The renaming of MindFormers' convert_weight.py; nothing is transposed or permuted."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for old, new in NAMES.items():
            name = name.replace(old, new)
        raw = tensor.float().numpy()
        found[name] = raw.astype(BFLOAT16) if str(tensor.dtype) == "torch.bfloat16" else raw
    return found


STATE = {
    "adam_m.model.norm_out.weight": np.ones(16, np.float32),
    "adam_v.model.norm_out.weight": np.ones(16, np.float32),
    "accu_grads.model.norm_out.weight": np.ones(16, np.float32),
    "moments.model.layers.0.attention.wq.weight": np.ones((16, 16), np.float32),
    "model.layers.0.attention.key_past": np.ones((1, 2, 4, 8), np.float16),
    "model.layers.0.attention.value_past": np.ones((1, 2, 4, 8), np.float16),
    "epoch_num": np.array(3, np.int64),
    "step_num": np.array(3, np.int64),
    "loss_scale": np.array(65536.0, np.float32),
    "learning_rate": np.array([1e-4], np.float32),
    "global_step": np.array([7], np.int32),
    "current_iterator_step": np.array(0, np.int32),
}
YAML = {
    "model": {
        "arch": {"type": "LlamaForCausalLM"},
        "model_config": {
            "type": "LlamaConfig",
            "seq_length": 64,
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 4,
            "n_kv_heads": 2,
            "vocab_size": 37,
            "multiple_of": 256,
            "rms_norm_eps": 1.0e-6,
            "pad_token_id": None,
            "extend_method": "None",
        },
    }
}


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_mindspore_to_hf(
    architecture: str, dtype: str, crc: bool, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = make_hf_model(architecture, dtype)
    path = write(tmp_path / "llama.ckpt", mindspore_arrays(model) | STATE, crc)
    model.config.save_pretrained(tmp_path / "other")
    assert "put one there, or give the verb --config" in refused("mindspore-to-hf", path, tmp_path / "hf")
    run("mindspore-to-hf", path, tmp_path / "hf", "--config", tmp_path / "other" / "config.json")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert type(found) is type(model) and found.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert found.state_dict()[key].dtype == tensor.dtype and torch.equal(found.state_dict()[key], tensor), key
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    assert (logits(twin.eval()) == logits(found.float().eval())).all()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_tied_head_that_is_stored(
    suffix: str, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    """Equal to the embedding it is no second tensor, as for Hugging Face; otherwise it is refused by name."""
    model = make_hf_model(tie_word_embeddings=True)
    (tmp_path / "ms").mkdir()
    arrays = mindspore_arrays(model)
    arrays["lm_head.weight"] = arrays["model.tok_embeddings.embedding_weight"].copy()
    file = tmp_path / "ms" / f"model{suffix}"
    save = save_file if suffix == ".safetensors" else (lambda found, path: write(path, found))
    save(arrays, file)
    model.config.save_pretrained(tmp_path / "ms")
    run("mindspore-to-hf", file, tmp_path / "hf")
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    np.testing.assert_array_equal(logits(found), logits(model))
    arrays["lm_head.weight"][3, 4] += 1
    save(arrays, file)
    message = refused("mindspore-to-hf", file, tmp_path / "out")
    assert "lm_head.weight differs from model.tok_embeddings.embedding_weight" in message


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16", "float32"])
def test_there_and_back(dtype: str, joined: bool, tmp_path: Path, run: Callable[..., str]) -> None:
    model = make_hf_model("Qwen2")
    model.save_pretrained(tmp_path / "hf")
    options = ["--qkv-concat", "--crc"] if joined else []
    run("hf-to-mindspore", tmp_path / "hf", tmp_path / "ms", "--dtype", dtype, *options)
    names = set(read_tensors(tmp_path / "ms" / "model.ckpt"))
    if joined:
        assert "model.layers.2.attention.w_qkv.bias" in names and "model.layers.0.attention.wq.weight" not in names
    else:
        assert names == mindspore_arrays(model).keys()
    run("mindspore-to-jax", tmp_path / "ms", tmp_path / "jax")
    run("jax-to-mindspore", tmp_path / "jax", tmp_path / "ms2", *options)
    run("mindspore-to-hf", tmp_path / "ms2" / "model.ckpt", tmp_path / "hf2")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "cast", "--dtype", dtype)
    want, found = open_model(tmp_path / "cast"), open_model(tmp_path / "hf2")
    assert want.leaves == found.leaves and want.config == found.config
    for path in want.leaves:
        assert want.read(path, ()).tobytes() == found.read(path, ()).tobytes(), path
    first, second = (tmp_path / folder / "model.ckpt" for folder in ("ms", "ms2"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("groups", [1, 2])
def test_concatenated(groups: int, tmp_path: Path, run: Callable[..., str], capsys: Any) -> None:
    model = make_hf_model("Qwen2")
    model.save_pretrained(tmp_path / "hf")
    arrays = mindspore_arrays(model)
    for layer in range(3):
        stem = f"model.layers.{layer}"
        for new, old, suffix in (
            ("attention.w_qkv", ("attention.wq", "attention.wk", "attention.wv"), "weight"),
            ("attention.w_qkv", ("attention.wq", "attention.wk", "attention.wv"), "bias"),
            ("feed_forward.w_gate_hidden", ("feed_forward.w1", "feed_forward.w3"), "weight"),
        ):
            parts = [np.split(arrays.pop(f"{stem}.{name}.{suffix}"), groups) for name in old]
            joined = [part[group] for group in range(groups) for part in parts]
            arrays[f"{stem}.{new}.{suffix}"] = np.concatenate(joined)
    path = write(tmp_path / "x.ckpt", arrays)
    run("mindspore-to-hf", path, tmp_path / "out", "--config", tmp_path / "hf" / "config.json", "--groups", groups)
    want, found = open_model(tmp_path / "hf"), open_model(tmp_path / "out")
    for leaf in want.leaves:
        assert want.read(leaf, ()).tobytes() == found.read(leaf, ()).tobytes(), leaf
    with pytest.raises(UserError, match="--groups 3: does not divide the 16 rows"):
        MindSporeSource(path, tmp_path / "hf" / "config.json", 3)
    # Any slice, also across the groups.
    source = MindSporeSource(path, tmp_path / "hf" / "config.json", groups)
    for leaf in ("layers/self_attn/k_proj/kernel", "layers/mlp/up_proj/kernel", "layers/self_attn/v_proj/bias"):
        whole = source.read(leaf, ())
        for axis in range(whole.ndim):
            index = (slice(None),) * axis + (slice(1, None, 2),)
            assert source.read(leaf, index).tobytes() == whole[index].tobytes()


def test_safetensors_and_their_folder(tmp_path: Path, run: Callable[..., str]) -> None:
    model = make_hf_model()
    arrays = mindspore_arrays(model)
    (tmp_path / "ms").mkdir()
    model.config.save_pretrained(tmp_path / "ms")
    model.save_pretrained(tmp_path / "hf")
    want = open_model(tmp_path / "hf")

    def same(path: Path) -> None:
        found = open_model(path)
        assert isinstance(found, MindSporeSource) and found.config == want.config
        for leaf in want.leaves:
            assert want.read(leaf, ()).tobytes() == found.read(leaf, ()).tobytes()

    save_file(arrays | STATE, tmp_path / "ms" / "model.safetensors", {"format": "ms"})
    same(tmp_path / "ms")
    same(tmp_path / "ms" / "model.safetensors")
    names = sorted(arrays)
    (tmp_path / "ms" / "model.safetensors").unlink()
    save_file({name: arrays[name] for name in names[:9]}, tmp_path / "ms" / "part0.safetensors")
    save_file({name: arrays[name] for name in names[9:]}, tmp_path / "ms" / "part1.safetensors")
    same(tmp_path / "ms")
    save_file({name: arrays[name] for name in names[8:]}, tmp_path / "ms" / "part1.safetensors")
    with pytest.raises(UserError, match=r"part1\.safetensors: holds .* which part0\.safetensors holds too"):
        open_model(tmp_path / "ms")
    with pytest.raises(UserError, match="is a file, and not a MindSpore checkpoint; give its directory"):
        open_model(tmp_path / "hf" / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, {}),
        ({"theta": 5e5, "bos_token_id": 7}, {"rope": {"rope_theta": 5e5}, "bos_token_id": 7}),
        ({"max_position_embedding": 99}, {"max_position_embeddings": 99}),
        ({"intermediate_size": 24}, {}),
        ({"rms_norm_eps": "1e-5", "eos_token_id": [2, 3]}, {"norm_eps": 1e-5, "eos_token_id": (2, 3)}),
        (
            {"extend_method": "PI", "scaling_factor": 4.0},
            {"rope": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        ),
        (
            {
                "extend_method": "LLAMA3",
                "scaling_factor": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            {
                "rope": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
        ),
    ],
)
def test_mindformers_yaml(changes: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "x.ckpt", mindspore_arrays(make_hf_model()))
    values = {"model": {"model_config": YAML["model"]["model_config"] | changes}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "other.yaml").write_text("a: 1")
    config = open_model(path).config
    rope = want.get("rope", {})
    want = {key: value for key, value in want.items() if key != "rope"}
    sizes: dict[str, Any] = dict(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2
    )
    assert config == uniform_decoder(
        **{
            "family": "llama",
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 4,
            "max_position_embeddings": 64,
            "norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **sizes,
            **want,
        },
        rope=RopeSpec(**rope),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "x"}, "hidden_size is 'x'; expected a positive number"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": True}, "num_heads is True"),
        ({"n_kv_heads": 3}, "is not a multiple of"),
        ({"theta": {"a": 1}}, "theta is of type dict"),
        ({"bos_token_id": "x"}, "bos_token_id is not a token id"),
        ({"extend_method": "LLAMA3", "scaling_factor": {"factor": 8.0}}, "low_freq_factor is of type NoneType"),
        ({"extend_method": ["PI"]}, "extend_method is 'another kind'"),
        ({"num_layers": 10**9}, "says that the model has 1000000000 layers"),
        ({"num_layers": 4}, "tensor 'model.layers.3.attention_norm.weight' is missing"),
        ({"num_heads": 8, "n_kv_heads": 4}, ""),
        ({"vocab_size": 38}, "has shape [37, 16], expected [38, 16]"),
        ({"extend_method": "NTK"}, "extend_method is 'NTK'; None, PI and LLAMA3"),
        ({"qkv_has_bias": True}, "wq.bias' is missing"),
    ],
)
def test_configurations_that_do_not_fit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.ckpt", mindspore_arrays(make_hf_model()))
    values = {"model": {"model_config": YAML["model"]["model_config"] | changes}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    if not words:
        assert open_model(path).config.attention.head_dim == 2  # nothing in the shapes tells
        return
    with pytest.raises(UserError) as error:
        open_model(path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "extend_method", "bos_token_id", "scaling_factor"])
def test_yaml_that_grows_when_printed(key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.ckpt", mindspore_arrays(make_hf_model()))
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    (tmp_path / "run.yaml").write_text(f"{laughs}model: {{model_config: {{extend_method: PI, {key}: *a29}}}}\n")
    with pytest.raises(UserError) as error:
        open_model(path)
    assert len(str(error.value)) < 500


def test_what_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    model = make_hf_model()
    arrays = mindspore_arrays(model)
    out = tmp_path / "out"
    model.config.save_pretrained(tmp_path)
    config = tmp_path / "config.json"

    def say(change: dict[str, np.ndarray], *options: object) -> str:
        return refused("mindspore-to-hf", write(tmp_path / "x.ckpt", change), out, *options)

    path = write(tmp_path / "x.ckpt", arrays)
    assert "neither a file" in refused("mindspore-to-hf", path, out, "--config", "llama-9")
    assert "'model.layers.0.mlp.experts' has no place" in say(arrays | {"model.layers.0.mlp.experts": np.ones(2)})
    assert "holds no concatenated tensors" in refused("mindspore-to-hf", write(path, arrays), out, "--groups", 2)
    assert "is for an adapter only" in refused("mindspore-to-hf", path, out, "--alpha", 2)
    assert "the model has 32 layers, but there are 30" in refused("mindspore-to-hf", path, out, "--config", "llama-7b")
    (tmp_path / "rank_3").mkdir()
    part = write(tmp_path / "rank_3" / "x.ckpt", arrays | {"model.norm_out.weight": np.ones(8, np.float32)})
    message = refused("mindspore-to-hf", part, out, "--config", config)
    assert "rank_3 holds the part of one rank: merge the parts first" in message
    path.unlink()
    config.unlink()
    assert "holds one part per rank (rank_3, …)" in refused("mindspore-to-hf", tmp_path, out)
    (tmp_path / "two").mkdir()
    for name in "ab":
        write(tmp_path / "two" / f"{name}.ckpt", arrays)
    assert "holds 2 MindSpore checkpoints (a.ckpt, b.ckpt" in refused("mindspore-to-hf", tmp_path / "two", out)
    model.save_pretrained(tmp_path / "hf")
    assert "is a Hugging Face model already" in refused("mindspore-to-hf", tmp_path / "hf", out)
    assert "is a Hugging Face model, not a MindSpore" in refused("mindspore-to-jax", tmp_path / "hf", out)


# ---- LoRA


def adapter_file(directory: Path, path: Path, suffix: str, extra: dict[str, np.ndarray] | None = None) -> Path:
    """A PEFT adapter renamed as MindFormers' convert_reversed.py would find it."""
    arrays = dict(extra or {})
    for name, tensor in read_tensors(directory / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.")
        for old, new in NAMES.items():
            name = name.replace(old, new)
        for old, new in ((".lora_A.weight", f".{suffix}_delta_lora_a"), (".lora_B.weight", f".{suffix}_delta_lora_b")):
            name = name.replace(old, new)
        arrays[name] = tensor.read()
    return write(path, arrays)


@pytest.mark.parametrize("suffix", ["tk", "mindpet"])
def test_lora(suffix: str, tmp_path: Path, run: Callable[..., str]) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    base = make_hf_model()
    base.save_pretrained(tmp_path / "base")
    make_adapter(base, tmp_path / "peft", target_modules=["q_proj", "v_proj", "down_proj"], r=2, lora_alpha=16)
    # MindFormers saves the frozen base too.
    path = adapter_file(tmp_path / "peft", tmp_path / "l.ckpt", suffix, mindspore_arrays(make_hf_model()) | STATE)
    printed = run("mindspore-to-hf", path, tmp_path / "out", "--lora", "--base", tmp_path / "base")
    assert "rank 2, alpha 16, on q_proj v_proj down_proj" in printed
    want, found = (read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "out"))
    assert want.keys() == found.keys()
    assert all(want[name].read().tobytes() == found[name].read().tobytes() for name in want)
    loaded = peft.PeftModel.from_pretrained(make_hf_model(), tmp_path / "out").eval()
    expected = peft.PeftModel.from_pretrained(make_hf_model(), tmp_path / "peft").eval()
    with torch.no_grad():
        assert (logits(loaded) == logits(expected)).all()
    run("mindspore-to-jax", path, tmp_path / "jax", "--lora", "--base", tmp_path / "base", "--alpha", 4)
    assert open_adapter(tmp_path / "jax").lora.alpha == 4.0


def test_lora_files_alone(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    base = make_hf_model()
    base.save_pretrained(tmp_path / "base")
    make_adapter(base, tmp_path / "peft", layers_to_transform=[1], lora_alpha=16)
    path = adapter_file(tmp_path / "peft", tmp_path / "l.ckpt", "mindpet")
    assert is_adapter(path) and not is_adapter(tmp_path / "base")
    assert "is a LoRA adapter, not a full model" in refused("mindspore-to-hf", path, tmp_path / "x")
    run("merge", tmp_path / "base", path, tmp_path / "merged")
    run("merge", tmp_path / "base", tmp_path / "peft", tmp_path / "wanted")
    want, found = open_model(tmp_path / "wanted"), open_model(tmp_path / "merged")
    assert all(want.read(leaf, ()).tobytes() == found.read(leaf, ()).tobytes() for leaf in want.leaves)
    config = open_model(tmp_path / "base").config
    adapter = MindSporeAdapter(path, config, 3.0)
    assert adapter.layers == (1,) and adapter.lora.alpha == 3.0 and adapter.lora.targets == ("q_proj", "v_proj")
    assert adapter.leaves["layers/self_attn/q_proj/lora_A"] == LeafInfo((3, 16, 2), np.dtype(np.float32))


def test_lora_that_does_not_fit(tmp_path: Path) -> None:
    config = uniform_decoder(
        "llama",
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
    )
    a, b = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)
    stem = "model.layers.{}.attention.{}.mindpet_delta_lora_"

    def say(arrays: dict[str, np.ndarray]) -> str:
        with pytest.raises(UserError) as error:
            MindSporeAdapter(write(tmp_path / "x.ckpt", arrays), config)
        return str(error.value)

    good = {stem.format(layer, "wq") + factor: x for layer in range(3) for factor, x in (("a", a), ("b", b))}
    MindSporeAdapter(write(tmp_path / "x.ckpt", good), config)
    assert "layer 2 lacks lora_b of q_proj" in say({k: v for k, v in good.items() if k != stem.format(2, "wq") + "b"})
    assert "belongs to no linear layer of the base model's 3" in say(good | {stem.format(3, "wq") + "a": a})
    assert "belongs to no linear layer" in say(good | {stem.format(0, "w_qkv") + "a": a})
    assert "has shape [2, 15]" in say(good | {stem.format(1, "wq") + "a": a[:, :15].copy()})
    assert "has shape [3, 16]" in say(good | {stem.format(1, "wq") + "a": np.ones((3, 16), np.float32)})
    assert "the same factor twice" in say(good | {stem.format(1, "wq").replace("mindpet", "tk") + "a": a})
    assert "holds no LoRA factors" in say({"model.norm_out.weight": np.ones(16, np.float32)})


def test_config_json_is_written(tmp_path: Path, run: Callable[..., str]) -> None:
    model = make_hf_model()
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"sp")
    run("hf-to-mindspore", tmp_path / "hf", tmp_path / "ms", "--dtype", "float16")
    assert json.loads((tmp_path / "ms" / "config.json").read_text())["dtype"] == "float16"
    assert (tmp_path / "ms" / "tokenizer.model").read_bytes() == b"sp"
    assert open_model(tmp_path / "ms").tokenizer_files[-1].name == "tokenizer.model"


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("granite", "LlamaForCausalLM has no place for attention.scale 0.3"),
        ("gemma", "LlamaForCausalLM has no place for norm.offset 1.0"),
        ("smollm3", "a smollm3 model's layers differ from each other"),
    ],
)
def test_what_mindformers_would_compute_otherwise_is_not_written(
    family: str, words: str, tmp_path: Path, refused: Callable[..., str], run: Callable[..., str]
) -> None:
    """Though every tensor has a name there."""
    hf_model(family).save_pretrained(tmp_path / "hf")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    assert words in refused("jax-to-mindspore", tmp_path / "jax", tmp_path / "out")
