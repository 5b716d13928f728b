"""Models that bitsandbytes rounded, written by its definitions: read as what they stand for, or kept bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.nn.rounding import NF4, Kind, dequantize, quantize
from jaxlm.weights.quantized import PartsReader, QuantizedSource, kernels_of
from tests.convert.tiny import make_hf_model
from tests.nn.test_rounding import oracle

SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)


def packed4(name: str, weight: np.ndarray, double: bool = True, block: int = 64) -> dict[str, Any]:
    """The tensors of a matrix [outputs, inputs] in `Params4bit`'s state dict."""
    torch = pytest.importorskip("torch")
    found = oracle(weight)
    codes = torch.tensor(found["codes"].reshape(-1)).to(torch.uint8)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
    tensors = {name: (codes[::2] << 4 | codes[1::2]).reshape(-1, 1), f"{name}.quant_map": torch.tensor(NF4)}
    if double:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(found["nested_offset"])}
        tensors[f"{name}.absmax"] = torch.tensor(found["absmax"]).to(torch.uint8)
        tensors[f"{name}.nested_absmax"] = torch.tensor(found["nested_absmax"])
        tensors[f"{name}.nested_quant_map"] = torch.tensor(found["map"])
    else:
        tensors[f"{name}.absmax"] = torch.tensor(np.abs(weight.reshape(-1, 64)).max(axis=1))
    content = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(content), dtype=torch.uint8)
    return tensors


def packed8(name: str, weight: np.ndarray) -> dict[str, Any]:
    """`int8_vectorwise_quant` of `Linear8bitLt`."""
    torch = pytest.importorskip("torch")
    matrix = torch.tensor(weight)
    largest = matrix.abs().max(dim=1).values.float()
    values = torch.round(matrix * (127.0 / largest[:, None])).to(torch.int8)
    return {name: values, f"{name.removesuffix('weight')}SCB": largest, f"{name}_format": torch.tensor(0).byte()}


def save(folder: Path, kind: Kind, **how: Any) -> Path:
    """A LLaMA beside its rounded form, in which the head and all else are as they were."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = make_hf_model(**SHAPE)
    model.save_pretrained(folder / "plain")
    model.save_pretrained(folder / kind)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            tensors |= packed8(name, tensor.numpy()) if kind == "int8" else packed4(name, tensor.numpy(), **how)
        else:
            tensors[name] = tensor
    safetensors.save_file(tensors, folder / kind / "model.safetensors", {"format": "pt"})
    bits = "load_in_8bit" if kind == "int8" else "load_in_4bit"
    config = json.loads((folder / kind / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", bits: True}
    (folder / kind / "config.json").write_text(json.dumps(config))
    return folder / kind


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_is_read_as_what_it_stands_for_and_kept_bit_by_bit(kind: Kind, tmp_path: Path) -> None:
    """The numbers and the arrays that rounding the plain model gives."""
    source, plain = open_model(save(tmp_path, kind)), open_model(tmp_path / "plain")
    assert isinstance(source, QuantizedSource) and source.kind == kind
    assert source.hf_config == plain.hf_config
    kernels = kernels_of(plain.config)
    reader = PartsReader(source, kind, kernels)
    for path, leaf in plain.leaves.items():
        if path not in kernels:
            np.testing.assert_array_equal(source.read(path, ()), plain.read(path, ()))
            continue
        for layer in range(leaf.shape[0]):
            at = (slice(layer, layer + 1),)
            parts = quantize(kind, plain.read(path, at)[0], kernels[path])
            for name, values in parts.items():
                found = reader.read(f"{path}/{name}", at)[0]
                assert found.dtype == values.dtype
                if name == "factors":  # 127 / x there, x / 127 here
                    np.testing.assert_allclose(found, values, rtol=1e-6)
                else:
                    np.testing.assert_array_equal(found, values)
            dense = dequantize(kind, parts, leaf.shape[1:], kernels[path])
            np.testing.assert_allclose(source.read(path, at)[0], dense, rtol=1e-6)
            np.testing.assert_allclose(source.read(path, (*at, slice(5, 9)))[0], dense[5:9], rtol=1e-6)


def test_what_has_no_place_in_our_form_is_read_but_not_kept(tmp_path: Path) -> None:
    """Magnitudes in float32."""
    source, plain = open_model(save(tmp_path, "nf4", double=False)), open_model(tmp_path / "plain")
    path = "layers/mlp/down_proj/kernel"
    error = np.abs(source.read(path, ()) - plain.read(path, ())).max()
    assert 0 < error < 0.2 * np.abs(plain.read(path, ())).max()
    with pytest.raises(UserError, match=r"q_proj.*not doubly quantised.*leave quantize out"):
        PartsReader(source, "nf4", kernels_of(plain.config))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("absmax", "absmax' is missing"),
        ("nested_quant_map", "nested_quant_map' is missing"),
        ("quant_state.bitsandbytes__nf4", "has dtype uint8|has shape|has no place"),
    ],
)
def test_an_array_that_is_missing_is_named(broken: str, message: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = save(tmp_path, "nf4")
    tensors = safetensors.load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.weight.{broken}"]
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_model(folder)
