"""An objective that is not cross-entropy trains through the same step and the same loop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console

from jaxlm.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, SourceConfig, TrainConfig, to_dict
from jaxlm.data.encoding import Example
from jaxlm.data.examples import from_list
from jaxlm.data.loader import Data
from jaxlm.data.report import Report
from jaxlm.models.decoder import Decoder
from jaxlm.processes.distributed import Hosts
from jaxlm.spec import uniform_decoder
from jaxlm.training.job import Job, Outcome
from jaxlm.training.loop import train
from jaxlm.training.objectives.objective import Batch, Metrics, MicroLoss
from jaxlm.training.state import model_variables
from jaxlm.training.stop import Stop

SHAPE = uniform_decoder(
    "llama", vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)


@dataclasses.dataclass(frozen=True)
class SmallLogits:
    """Mean square of the logits, and how far they are from those of the weights that training began with."""

    model: Decoder

    fields = ("input_ids", "segment_ids")
    frozen = ("reference",)

    def prepare(self, batch: Batch) -> Batch:
        tokens = batch["segment_ids"] > 0
        return {**batch, "share": tokens / tokens.sum()}

    def loss(self, trainable: Any, frozen: Any, micro: Batch, key: jax.Array, micro_steps: int) -> MicroLoss:
        sums = self.evaluate(trainable, frozen, micro)
        loss = (sums["square"] * micro["share"]).sum()
        distance = (sums["distance"] * micro["share"]).sum()
        figures = {"tokens": (micro["segment_ids"] > 0).sum(), "distance": distance}
        return MicroLoss(loss + 0.1 * distance, loss, figures)

    def evaluate(self, trainable: Any, frozen: Any, micro: Batch) -> Metrics:
        def logits(variables: Any) -> Any:
            return self.model.apply(variables, micro["input_ids"], None, micro["segment_ids"])

        now, before = logits(model_variables(trainable, {})), logits({"params": frozen["reference"]})
        found = {"square": jnp.square(now).mean(-1), "distance": jnp.square(now - before).mean(-1)}
        return found if "share" in micro else {**jax.tree.map(jnp.sum, found), "tokens": jnp.float32(now[..., 0].size)}

    def validation(self, sums: dict[str, float]) -> tuple[dict[str, float], str]:
        loss = sums["square"] / sums["tokens"]
        return {"validation_loss": loss}, f"mean square {loss:.3f}"


def run(out: Path, steps: int) -> tuple[Outcome, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    texts = [Example(rng.integers(0, 48, 12).astype(np.int32), np.ones(12, bool)) for _ in range(40)]
    examples = from_list(texts, [0] * len(texts), range(len(texts)))
    data_config = DataConfig(train=(SourceConfig(path="made up"),), sequence_length=16)
    config = RunConfig(
        model=ModelConfig(shape="made up", dtype="float32"),
        data=data_config,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        train=TrainConfig(steps=steps, global_batch_size=16, micro_batch_size=1, eval_every=3, save_every=0),
        output_dir=str(out),
    )
    data = Data(data_config, 0, examples, examples, Report((), ()), "hash", ())
    job = Job(
        config=config,
        run_yaml=yaml.safe_dump(to_dict(config)),
        model=SHAPE,
        source=None,
        adapter=None,
        data=data,
        files={},
        objective=lambda config, model, micro_batch: SmallLogits(model),
    )
    out.mkdir(exist_ok=True)
    outcome = train(job, Console(quiet=True), Hosts(), Stop())
    return outcome, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_another_objective_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    outcome, lines = run(tmp_path / "straight", 6)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert training[-1]["loss"] < 0.8 * training[0]["loss"]
    # The reference stayed what it was, though the state that it equals is donated to the first step.
    assert training[0]["distance"] == 0 < training[-1]["distance"]
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert outcome.validation == list(zip([0, 3, 6], validated, strict=True))
    assert validated[2] < validated[1] < validated[0] == pytest.approx(training[0]["loss"], rel=0.2)
    run(tmp_path / "in two parts", 3)
    _, resumed = run(tmp_path / "in two parts", 6)
    same = [line["loss"] for line in resumed if "loss" in line]
    assert same == [line["loss"] for line in training]
