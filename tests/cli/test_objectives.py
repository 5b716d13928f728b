"""Settings of objectives: what goes together, and what a run sets by itself."""

from __future__ import annotations

from typing import Any

import pytest

from jaxlm.config import RunConfig
from jaxlm.config.reading import build
from jaxlm.errors import UserError

DATA = {"train": [{"path": "a.json"}]}
LORA = {"targets": ["q_proj"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preference": {}}, "preference: given, but objective is cross_entropy"),
        ({"objective": "grpo", "grpo": {}}, r"grpo.rewards: \[\] must be one name at least"),
        ({"objective": "grpo", "grpo": {"rewards": ["exact"], "group": 1}}, "grpo.group: 1 must be at least 2"),
        (
            {"objective": "grpo", "grpo": {"rewards": ["exact"], "weights": [1, 2]}},
            "must be one for each of grpo.rewards",
        ),
        ({"objective": "grpo", "grpo": {"rewards": ["exact"], "group": 3}}, "128 must be a multiple of grpo.group, 3"),
        (
            {"objective": "grpo", "grpo": {"rewards": ["exact"]}, "lora": LORA | {"dropout": 0.1}},
            "lora.dropout: 0.1 must be 0 with objective grpo",
        ),
        ({"objective": "preference", "preference": {"beta": 0}}, "preference.beta: 0.0 must be above 0"),
        (
            {"objective": "preference", "preference": {"loss": "ipo", "label_smoothing": 0.1}},
            "label_smoothing: 0.1 has no meaning for loss ipo",
        ),
        (
            {"objective": "preference", "preference": {"reference": "live"}},
            "live is not the model .*all parameters train",
        ),
        (
            {"objective": "preference", "preference": {"reference": "live"}, "lora": LORA | {"init_from": "out/sft"}},
            "live is not the model .*the adapter starts from out/sft",
        ),
        (
            {"objective": "reward", "data": DATA | {"too_long": "truncate"}},
            "data.too_long: is not supported.*drop or error",
        ),
        ({"data": DATA | {"records": "pairs"}}, "data.records: pairs goes with another objective"),
    ],
)
def test_what_does_not_go_together_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build({"model": {"path": "m"}, "data": DATA} | values, RunConfig)


def test_an_objective_sets_the_kind_of_records() -> None:
    def data(**values: Any) -> Any:
        return build({"model": {"path": "m"}, "data": DATA} | values, RunConfig).data

    assert data().records == "answers"
    assert data(objective="preference").records == data(objective="reward").records == "pairs"
    assert data(objective="preference", preference={"loss": "kto"}).records == "labelled"
    drawn = data(objective="grpo", grpo={"rewards": ["exact"]})
    assert (drawn.records, drawn.packing, drawn.too_long) == ("answers", False, "drop")
