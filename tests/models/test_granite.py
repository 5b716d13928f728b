"""Granite against transformers' own, and its multipliers."""

from __future__ import annotations

import pytest

from jaxlm.errors import UserError
from jaxlm.models.families import read_config
from tests.models.parity import check_family
from tests.models.small import hf_config, small_spec


@pytest.mark.slow
def test_biases_and_a_tied_head() -> None:
    check_family("granite", "biases")


def test_multipliers_of_1_add_nothing() -> None:
    spec = small_spec("granite", "biases")
    assert (spec.embedding_scale, spec.logits_scale, spec.period[0].residual_scale) == (None, None, None)
    assert spec.attention.scale == 1.0  # and not head_dim**-0.5


@pytest.mark.parametrize(
    "key", ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"]
)
@pytest.mark.parametrize("value", ["2", 0, -1.0, True])
def test_a_multiplier_is_a_positive_number(key: str, value: object) -> None:
    config = hf_config("granite").to_dict() | {"architectures": ["GraniteForCausalLM"], key: value}
    with pytest.raises(UserError, match=f"{key} is {value!r}; expected a positive number"):
        read_config(config)
