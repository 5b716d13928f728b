"""Models in 4 and 8 bits: by GPTQ and AWQ, read; by compressed-tensors, written and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.commands.formats import SCHEMES as NAMED_SCHEMES
from convert.conversion import Opened, WriteOptions, convert, write
from convert.formats.compressed import GROUP_SIZE, SCHEMES
from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.weights.leaves import CastSource
from tests.convert.gguf_models import RandomSource, spec_of

GROUP = 32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------------


def word(numbers: np.ndarray, bits: int) -> int:
    """Whole numbers in an int32, the first in the lowest bits."""
    value = sum(int(number) << (bits * place) for place, number in enumerate(numbers))
    return value - (1 << 32) if value >= 1 << 31 else value


def gptq(numbers: np.ndarray, zeros: np.ndarray, bits: int, less: int) -> dict[str, np.ndarray]:
    """qweight and qzeros of numbers [out, in] and zeros [groups, out]."""
    n = 32 // bits
    out, inputs = numbers.shape
    qweight = [[word(numbers[o, i * n : i * n + n], bits) for o in range(out)] for i in range(inputs // n)]
    qzeros = [[word(row[o * n : o * n + n] - less, bits) for o in range(out // n)] for row in zeros]
    return {"qweight": np.array(qweight, np.int32), "qzeros": np.array(qzeros, np.int32)}


def awq(numbers: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """The same in AWQ's order of eight outputs."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    out, inputs = numbers.shape
    qweight = [[word(numbers[o * 8 : o * 8 + 8, i][order], 4) for o in range(out // 8)] for i in range(inputs)]
    qzeros = [[word(row[o * 8 : o * 8 + 8][order], 4) for o in range(out // 8)] for row in zeros]
    return {"qweight": np.array(qweight, np.int32), "qzeros": np.array(qzeros, np.int32)}


def save_packed(directory: Path, method: str, **settings: Any) -> dict[str, np.ndarray]:
    """A LLaMA whose linear layers are random whole numbers; what they stand for, by name."""
    write("hf", RandomSource(spec_of("llama")), directory)
    bits, version2 = settings.get("bits", 4), settings.get("checkpoint_format") == "gptq_v2"
    rng = np.random.default_rng(0)
    tensors, expected = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.split(".")[-2] in LINEAR]:
        out, inputs = tensors.pop(name).shape
        layer = name.removesuffix(".weight")
        numbers = rng.integers(0, 1 << bits, (out, inputs))
        zeros = rng.integers(1, 1 << bits, (inputs // GROUP, out))
        scales = rng.uniform(0.01, 0.1, (inputs // GROUP, out)).astype(np.float16)
        groups = np.arange(inputs) // GROUP
        if settings.get("desc_act"):
            groups = rng.permutation(groups)
        if method == "awq":
            packed = awq(numbers, zeros)
        else:
            packed = gptq(numbers, zeros, bits, 0 if version2 else 1) | {"g_idx": groups.astype(np.int32)}
            packed["bias"] = np.zeros(out, np.float16)  # as AutoGPTQ writes them
        tensors |= {f"{layer}.{part}": array for part, array in (packed | {"scales": scales}).items()}
        expected[name] = scales[groups].T.astype(np.float32) * (numbers - zeros[groups].T).astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP, "sym": False} | settings
    (directory / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gptq", {}),
        ("gptq", {"desc_act": True}),
        ("gptq", {"bits": 8}),
        ("gptq", {"checkpoint_format": "gptq_v2"}),
        ("awq", {"version": "gemm", "zero_point": True}),
    ],
)
def test_packed_numbers_are_what_they_stand_for(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    expected = save_packed(tmp_path / "packed", method, **settings)
    convert(tmp_path / "packed", tmp_path / "jax")
    convert(tmp_path / "jax", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    part = open_model(tmp_path / "packed").read(
        "layers/mlp/down_proj/kernel", (slice(1, 2), slice(5, 50), slice(3, 21))
    )
    whole = expected["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(part[0], whole.T[5:50, 3:21])


def test_what_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    directory = tmp_path / "packed"
    save_packed(directory, "awq")
    config = json.loads((directory / "config.json").read_text())

    def message(**settings: Any) -> str:
        content = config | {"quantization_config": config["quantization_config"] | settings}
        (directory / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            open_model(directory)
        return str(error.value)

    assert "has 4 bits, version 'gemv'; read are 4 bits, version gemm" in message(version="gemv")
    assert "3 bits" in message(quant_method="gptq", bits=3)
    assert "checkpoint_format is 'marlin'" in message(quant_method="gptq", checkpoint_format="marlin")
    assert "group_size is None" in message(group_size=None)
    assert "do not go together with groups of 64" in message(group_size=64)
    assert "the model is quantised" in message(quant_method="eetq")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.qzeros"]
    save_file(tensors, directory / "model.safetensors")
    assert "'model.layers.2.mlp.up_proj.qzeros' is missing" in message()


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def rounded(matrix: np.ndarray, bits: int, group: int, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(words, scales, what they stand for) of a matrix, by the definition: one group at a time."""
    rows, columns = matrix.shape
    scales, numbers = np.empty((rows, columns // group), dtype), np.empty((rows, columns), np.int64)
    for row in range(rows):
        for at in range(0, columns, group):
            part = matrix[row, at : at + group].astype(np.float32)
            scale = np.float32(np.abs(part).max() / np.float32((2**bits - 1) / 2)).astype(dtype)
            scales[row, at // group] = scale
            whole = np.round(part / scale.astype(np.float32))
            numbers[row, at : at + group] = np.clip(whole, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    n = 32 // bits
    words = [[word(numbers[r, c : c + n] + 2 ** (bits - 1), bits) for c in range(0, columns, n)] for r in range(rows)]
    values = numbers.astype(np.float32) * np.repeat(scales.astype(np.float32), group, axis=1)
    return np.array(words, np.int32), scales, values


@pytest.mark.parametrize(
    ("scheme", "model", "dtype"),
    [("w4a16", "llama", "float32"), ("w8a16", "qwen2", "bfloat16"), ("w4a16", "phi3", "float16")],
)
def test_matrices_are_rounded_by_the_definition(scheme: str, model: str, dtype: str, tmp_path: Path) -> None:
    source = CastSource(RandomSource(spec_of(model)), dtype)
    options: dict[str, Any] = dict(scheme=scheme, group_size=GROUP)
    write("hf", Opened(source), tmp_path / "packed", WriteOptions(**options))
    write("hf", Opened(source), tmp_path / "plain")
    stored, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "plain"))
    bits, kind = SCHEMES[scheme], {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)  # type: ignore[index]
    names = [name for name in plain if "_proj.weight" in name]
    assert len(names) == 3 * (4 if model == "phi3" else 7)
    back = open_model(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "jax")
    convert(tmp_path / "jax", tmp_path / "back")
    read = load_file(tmp_path / "back" / "model.safetensors")
    for name in names:
        words, scales, values = rounded(plain[name], bits, GROUP if bits == 4 else plain[name].shape[1], kind)
        np.testing.assert_array_equal(stored[f"{name}_packed"], words)
        np.testing.assert_array_equal(stored[f"{name}_scale"], scales)
        assert stored[f"{name}_shape"].tolist() == list(plain[name].shape)
        np.testing.assert_array_equal(read[name], values)
        assert name not in stored
    for name in plain.keys() - set(names):
        np.testing.assert_array_equal(stored[name], plain[name])
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and settings["format"] == "pack-quantized"
    assert settings["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    assert settings["ignore"] == ["lm_head"]
    assert back.config == source.config


def test_zeros_at_other_places_are_read(tmp_path: Path) -> None:
    source = RandomSource(spec_of("llama"))
    write("hf", Opened(source), tmp_path / "packed", WriteOptions(scheme="w4a16", group_size=GROUP))
    file = tmp_path / "packed" / "model.safetensors"
    tensors, rng = load_file(file), np.random.default_rng(1)
    expected = {}
    for name in [name for name in tensors if name.endswith("_packed")]:
        base = name.removesuffix("_packed")
        rows, columns = tensors[f"{base}_shape"]
        zeros = rng.integers(0, 16, (rows, columns // GROUP))  # as they are stored: plus 8
        words = [[word(zeros[r : r + 8, g], 4) for g in range(columns // GROUP)] for r in range(0, rows, 8)]
        tensors[f"{base}_zero_point"] = np.array(words, np.int32)
        shifts = np.arange(8) * 4
        numbers = (tensors[name].astype(np.int64)[..., None] >> shifts & 15).reshape(rows, columns)
        scales = np.repeat(tensors[f"{base}_scale"], GROUP, axis=1)
        expected[base] = scales * (numbers - np.repeat(zeros, GROUP, axis=1)).astype(np.float32)
    save_file(tensors, file)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    read = open_model(tmp_path / "packed").read("layers/mlp/up_proj/kernel", ())
    for layer in range(3):
        np.testing.assert_array_equal(read[layer].T, expected[f"model.layers.{layer}.mlp.up_proj.weight"])


def test_experts_are_rounded_one_by_one(tmp_path: Path) -> None:
    source = RandomSource(spec_of("qwen3_moe"))
    write("hf", Opened(source), tmp_path / "packed", WriteOptions(scheme="w4a16", group_size=32))
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.7.down_proj.weight_packed"].shape == (64, 4)
    assert stored["model.layers.0.mlp.gate.weight"].dtype == np.float32
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["lm_head", "re:.*gate$"]
    leaf = source.arrays["layers/mlp/down_proj/kernel"][2]
    read = open_model(tmp_path / "packed").read("layers/mlp/down_proj/kernel", ())[2]
    for expert in range(8):
        part = slice(32 * expert, 32 * expert + 32)
        np.testing.assert_array_equal(read[part], rounded(leaf[part].T, 4, 32, np.float32)[2].T)


def test_the_verb(run: Callable[..., str], refused: Callable[..., str], tmp_path: Path) -> None:
    write("hf", RandomSource(spec_of("llama")), tmp_path / "hf")
    printed = run("compress", tmp_path / "hf", tmp_path / "packed", "--group-size", "32", "--dtype", "bfloat16")
    assert "vllm serve" in printed
    assert set(NAMED_SCHEMES) == set(SCHEMES) and GROUP_SIZE == 128
    words = ("compress", tmp_path / "hf", tmp_path / "no")
    assert "rows of 64 numbers, which groups of 128 do not divide" in refused(*words)
    assert "--group-size 12: expected a multiple of 8" in refused(*words, "--group-size", "12")
    moe = RandomSource(spec_of("mixtral"))
    write("jax", moe, tmp_path / "moe")
    assert "convert demoefy" in refused("compress", tmp_path / "moe", tmp_path / "no", "--group-size", "32")
