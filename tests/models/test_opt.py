"""OPT and Galactica against transformers' own, and what their positions and their files have beside it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.commands.main import main
from convert.source import open_model
from jaxlm.errors import UserError
from jaxlm.inference.model import unstack
from jaxlm.models import streamed
from jaxlm.models.decoder import Decoder
from jaxlm.models.families import SHAPES, read_config
from jaxlm.models.unrolled import next_logits, prefill
from jaxlm.weights.names import num_params
from tests.models.parity import check_family, random_model
from tests.models.small import SMALL, hf_config, hf_model, small_spec

T = 12
IDS = np.random.default_rng(3).integers(0, 37, (2, T)).astype(np.int32)


@pytest.mark.parametrize("variant", list(SMALL["opt"])[1:])  # test_matrix.py has the first
@pytest.mark.slow
def test_opt_is_that_of_transformers(variant: str) -> None:
    check_family("opt", variant)


def test_rows_that_begin_with_padding() -> None:
    """Positions count the tokens; transformers gives padding the row below them."""
    torch = pytest.importorskip("torch")
    module, spec, params = random_model("opt", "350m")
    mask = np.array([[0] * 4 + [1] * 8, [1] * 12])
    with torch.no_grad():
        expected = module(torch.from_numpy(IDS).long(), attention_mask=torch.from_numpy(mask)).logits.numpy()
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    found = jax.jit(Decoder(spec).apply)({"params": params}, IDS, positions, mask)
    np.testing.assert_allclose(found[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_padding_and_finished_rows_behind_the_last_learned_position() -> None:
    _, spec, params = random_model("opt", "plain", max_position_embeddings=6)
    assert spec.max_length == 6
    model = Decoder(spec)
    expected = model.apply({"params": params}, IDS[:, :6])
    weights = unstack({"params": params}, spec)
    logits, caches = prefill(model, weights, jnp.asarray(IDS), jnp.array([5, 6]), 16)
    np.testing.assert_allclose(logits, [expected[0, 4], expected[1, 5]], rtol=1e-5, atol=1e-5)
    logits, _ = next_logits(model, weights, caches, jnp.asarray(IDS[:, 5]), jnp.array([5, 6]))
    np.testing.assert_allclose(logits[0], expected[0, 5], rtol=1e-5, atol=1e-5)
    assert np.isfinite(logits).all()
    assert np.isnan(model.apply({"params": params}, IDS[:, :7])[:, 6]).all()  # a text that long is not computed


def test_positions_of_packed_documents_are_their_own_where_layers_are_streamed() -> None:
    _, spec, params = random_model("opt", "350m")
    positions = np.r_[0:5, 0:7][None]
    modules = {"embed_tokens": "embedding", "embed_positions": "embedding", "project_in": "kernel"}
    leaves = {f"{module}/{name}": params[module][name] for module, name in modules.items()}
    (states,) = streamed.embedded(spec, lambda path, index: leaves[path][index], [streamed.Tokens(IDS[:1], positions)])
    tokens = leaves["embed_tokens/embedding"][IDS[:1]] @ leaves["project_in/kernel"].T
    expected = tokens + leaves["embed_positions/embedding"][positions + 2]
    np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-5)


def test_350m_there_and_back_is_bit_equal(tmp_path: Path) -> None:
    hf_model("opt", "350m").save_pretrained(tmp_path / "hf")
    assert main(["hf-to-jax", str(tmp_path / "hf"), str(tmp_path / "jax")]) == 0
    assert main(["jax-to-hf", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and "model.decoder.project_out.weight" in before
    assert all(np.array_equal(value, after[name]) for name, value in before.items())


def test_files_of_the_model_without_a_head_are_read(tmp_path: Path) -> None:
    """Names without `model.`, and a head that is stored although it is the embedding."""
    model = hf_model("opt", "350m")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    usual = open_model(tmp_path)
    leaves = {path: usual.read(path, ()) for path in usual.leaves}
    older = {name.removeprefix("model."): value for name, value in tensors.items()}
    assert "decoder.project_in.weight" in older
    older["lm_head.weight"] = older["decoder.embed_tokens.weight"]
    save_file(older, tmp_path / "model.safetensors")
    again = open_model(tmp_path)
    assert again.leaves.keys() == leaves.keys()
    assert all(np.array_equal(again.read(path, ()), value) for path, value in leaves.items())
    other = older | {"lm_head.weight": older["lm_head.weight"] + 1}
    save_file(other, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.decoder.embed_tokens.weight"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enable_bias", 1),
        ("layer_norm_elementwise_affine", "no"),
        ("do_layer_norm_before", 0),
        ("_remove_final_layer_norm", []),
        ("word_embed_proj_dim", -3),
        ("word_embed_proj_dim", 1.5),
        ("activation_function", "tanh"),
        ("ffn_dim", "24"),
    ],
)
def test_a_switch_of_another_kind_is_refused(key: str, value: object) -> None:
    config = hf_config("opt").to_dict() | {"architectures": ["OPTForCausalLM"], key: value}
    with pytest.raises(UserError, match=rf"{key} (is )?{value!r}".replace("[", r"\[").replace("]", r"\]")):
        read_config(config)


def test_a_model_without_a_last_norm_has_the_states_of_its_last_layer() -> None:
    spec = small_spec("opt", "350m")
    x = jnp.arange(32.0).reshape(1, 2, 16)
    assert not spec.final_norm
    np.testing.assert_array_equal(Decoder(spec).apply({"params": {}}, x, method="last_states"), x)


def test_published_shapes_have_as_many_parameters_as_transformers_counts() -> None:
    counts = {"opt-125m": 125_239_296, "opt-350m": 331_196_416, "opt-6.7b": 6_658_473_984, "opt-30b": 29_974_540_288}
    for name, count in counts.items():
        assert num_params(SHAPES[name]) == count, name
