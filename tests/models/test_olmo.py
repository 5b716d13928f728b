"""OLMo 2 and 3 against transformers' own."""

from __future__ import annotations

import pytest

from jaxlm.errors import UserError
from jaxlm.models.families import read_config
from tests.models.parity import check_family
from tests.models.small import SMALL, hf_config

CASES = [(family, variant) for family in ("olmo2", "olmo3") for variant in [*SMALL[family]][1:]]


@pytest.mark.parametrize(("family", "variant"), CASES)
@pytest.mark.slow
def test_olmo_is_that_of_transformers(family: str, variant: str) -> None:
    check_family(family, variant)


def test_a_theta_that_transformers_would_leave_out_in_layers_with_a_window_is_refused() -> None:
    sizes = {key: value for key, value in SMALL["olmo3"]["plain"].items() if key != "rope_parameters"}
    assert hf_config("olmo3", rope_parameters=None, rope_theta=3.0).rope_parameters == {
        "full_attention": {"rope_type": "default", "rope_theta": 3.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
    }
    with pytest.raises(UserError, match="put a rope_theta into rope_parameters"):
        read_config(sizes | dict(model_type="olmo3", rope_theta=3.0))
