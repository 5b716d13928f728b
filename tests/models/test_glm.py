"""GLM-4 and ChatGLM, held to transformers' GLM."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.families import read_config
from jaxlm.nn.positions import apply_partial_rope, rope_cos_sin
from tests.models.parity import check_family
from tests.models.small import SMALL, hf_config, small_spec


@pytest.mark.slow
def test_glm_without_biases_that_turns_whole_heads() -> None:
    check_family("glm", "whole heads")


def test_half_of_a_head_turns_in_pairs_of_neighbours() -> None:
    """Heads of 8 dims at positions 0, 1 and 2, as printed by transformers' GLM."""
    spec = small_spec("glm")
    assert (spec.attention.head_dim, spec.attention.rotary_dim) == (8, 4)
    q = jnp.arange(24, dtype=jnp.float32).reshape(1, 3, 1, 8) / 10
    cos, sin = rope_cos_sin(spec.attention.rotary, 4, 64, jnp.arange(3)[None])
    found = apply_partial_rope(q, cos, sin, spec.attention.rotary_interleaved)
    expected = [
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        [-0.325082, 1.159449, 0.98895, 1.109945, 1.2, 1.3, 1.4, 1.5],
        [-2.211641, 0.747426, 1.761643, 1.935618, 2.0, 2.1, 2.2, 2.3],
    ]
    np.testing.assert_allclose(found[0, :, 0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_what_a_missing_key_of_glm_means(family: str) -> None:
    sizes = {key: value for key, value in SMALL[family]["plain"].items() if key not in ("head_dim", "eos_token_id")}
    spec = read_config({"model_type": family, **sizes, "eos_token_id": None})
    assert (spec.attention.head_dim, spec.attention.rotary_dim, spec.attention.qkv_bias) == (128, 64, True)
    assert spec.eos_token_id == (151329, 151336, 151338)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_both_spellings_of_the_part_that_turns(family: str) -> None:
    """That of the files of 2024, with keys of their own, and that of transformers 5."""
    old = {"partial_rotary_factor": 0.25, "rope_theta": 5e6, "rope_scaling": None}
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}}
    read = {
        name: read_config({"model_type": family, **SMALL[family]["plain"], **keys})
        for name, keys in (("old", old), ("new", new))
    }
    assert read["old"] == read["new"] and read["old"].attention.rotary_dim == 2
    theirs = hf_config(family, **old).rope_parameters
    assert (theirs["rope_theta"], theirs["partial_rotary_factor"]) == (5e6, 0.25)
