"""BLOOM against transformers' own, and what its positions and its files have beside it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import SHAPES, read_config, write_config
from jaxlm.weights.names import num_params
from tests.models.parity import check_family, random_model
from tests.models.small import SMALL, hf_config, hf_model, small_spec


@pytest.mark.parametrize("variant", list(SMALL["bloom"])[1:])  # test_matrix.py has the first
@pytest.mark.slow
def test_bloom_is_that_of_transformers(variant: str) -> None:
    check_family("bloom", variant)


def test_rows_that_begin_with_padding() -> None:
    """transformers counts keys from the first that is not padding, jaxlm the distance: the same up to a constant."""
    torch = pytest.importorskip("torch")
    module, spec, params = random_model("bloom", "six_heads")
    ids = np.random.default_rng(3).integers(0, 37, (3, 12)).astype(np.int32)
    mask = (np.arange(12) >= np.array([[5], [0], [1]])).astype(np.int32)
    with torch.no_grad():
        expected = module(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask)).logits.numpy()
    found = jax.jit(Decoder(spec).apply)({"params": params}, ids, None, mask)
    np.testing.assert_allclose(found[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_bigsciences_own_files_are_read(tmp_path: Path) -> None:
    """Names without `transformer.`, and the keys of their config.json."""
    hf_model("bloom").save_pretrained(tmp_path)
    usual = open_model(tmp_path)
    leaves = {path: usual.read(path, ()) for path in usual.leaves}
    tensors = load_file(tmp_path / "model.safetensors")
    assert "transformer.h.2.self_attention.query_key_value.bias" in tensors
    save_file(
        {name.removeprefix("transformer."): value for name, value in tensors.items()}, tmp_path / "model.safetensors"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["n_embed"], config["num_attention_heads"] = config.pop("hidden_size"), config.pop("n_head")
    config |= dict(offset_alibi=100, seq_length=2048, n_inner=None, attention_softmax_in_fp32=True, pretraining_tp=4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = open_model(tmp_path)
    assert again.config == usual.config and again.leaves.keys() == leaves.keys()
    assert all(np.array_equal(again.read(path, ()), value) for path, value in leaves.items())


def test_switches() -> None:
    config = hf_config("bloom").to_dict() | {"architectures": ["BloomForCausalLM"]}
    assert read_config(config | dict(slow_but_exact=True, pretraining_tp=2)) == small_spec("bloom")
    longer = read_config(config | {"seq_length": 4096})
    assert longer.max_length == 4096 and write_config(longer, "float32")["seq_length"] == 4096
    for key, value in (
        ("apply_residual_connection_post_layernorm", True),
        ("slow_but_exact", 1),
        ("n_inner", 48),
        ("n_layer", "3"),
    ):
        with pytest.raises(UserError, match=f"{key} is {value!r}"):
            read_config(config | {key: value})
    with pytest.raises(UserError, match="hidden_size is 16 and n_embed is 32; they mean the same"):
        read_config(config | {"n_embed": 32})


def test_published_shapes_have_as_many_parameters_as_is_said_of_them() -> None:
    """The numbers of the model cards."""
    counts = {"560m": 559_214_592, "1b7": 1_722_408_960, "7b1": 7_069_016_064, "176b": 176_247_271_424}
    for name, count in counts.items():
        assert num_params(SHAPES[f"bloomz-{name}"]) == count, name
