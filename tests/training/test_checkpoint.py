"""Checkpoints that cannot be restored say why, and what can be done with them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from jaxlm.config import MeshConfig, OptimizerConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.state import Initializer
from tests.training.test_state import CONFIG


def initializer(name: str) -> Initializer:
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]
    optimizer = partial(make_optimizer, config, make_schedule(config, 10))
    return Initializer(Decoder(CONFIG), None, make_mesh(MeshConfig()), optimizer)


def test_an_optimizer_that_keeps_something_else(tmp_path: Path) -> None:
    made = initializer("adamw")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(made.new_state({"params": made.init_params(0)}, 0), {}, {}, None)
    checkpoints.wait()
    assert int(checkpoints.restore(0, made.abstract_state())[0].step) == 0
    with pytest.raises(UserError, match=r"checkpoints/0: the weights can be read, the optimizer's state cannot"):
        checkpoints.restore(0, initializer("lion").abstract_state())
    # Where the weights are gone too, nothing is promised of them.
    shutil.rmtree(tmp_path / "checkpoints" / "0" / "model")
    with pytest.raises(UserError, match=r"checkpoints/0: this checkpoint cannot be read"):
        checkpoints.restore(0, made.abstract_state())
    checkpoints.close()
