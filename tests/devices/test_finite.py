"""Weights that are not finite are named: the tensor, and the layer, in stacks and in lists."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config import MeshConfig
from jaxlm.devices.finite import check_finite
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError


def tree(value: float) -> np.ndarray:
    leaf = np.ones((3, 2), np.float32)
    leaf[1, 0] = value
    return leaf


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"params": {"layers": {"mlp": {"kernel": tree(np.nan)}}}}, "m: layers/mlp/kernel, layer 1 holds 1 value that"),
        ({"layers": {"0": {"mlp": {"kernel": tree(np.inf)}}}}, "m: layers/0/mlp/kernel, layer 1 holds 1 value that"),
        ({"tail": {"0": {"mlp": {"kernel": tree(np.nan)}}}}, "m: tail/0/mlp/kernel, layer 1 holds 1 value that"),
        ({"params": {"layers": [{"a": tree(1)}, {"a": tree(np.nan)}]}}, "m: layers/a, layer 1 holds 1 value that"),
        ({"params": {"norm": {"scale": tree(np.nan)}}}, "m: norm/scale holds 1 value that"),
    ],
)
def test_a_tensor_that_is_not_finite_is_named_with_its_layer(broken: Any, message: str) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match=message):
        check_finite(jax.tree.map(jax.numpy.asarray, broken), mesh, "m", "way out")
