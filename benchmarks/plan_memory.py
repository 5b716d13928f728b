"""`jaxlm plan`'s estimate of a device's memory, beside what a TPU's compiler says of the same step.

    python benchmarks/plan_memory.py [--measure] [--only v5e:2x2]

Without --measure, the compiler's figures are those of the checked-in table `plan_memory.json`. With it every step is
compiled again (four minutes; needs libtpu and no TPU) and the table is rewritten, with the versions that it is of.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from jaxlm.devices.chips import parse_topology
from jaxlm.planning.compiled import compile_step
from jaxlm.planning.memory import Memory, estimate_memory
from jaxlm.spec import DecoderSpec, uniform_decoder
from jaxlm.training.setup import set_up

TABLE = Path(__file__).with_suffix(".json")
MIB = 2**20
SHAPES = {
    "small": uniform_decoder(
        "llama",
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=6,
        num_heads=4,
        num_kv_heads=4,
        head_dim=128,
    ),
    "larger": uniform_decoder(
        "llama",
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One step of the table.

    Attributes:
        shape: key of SHAPES.
        settings: arguments of `run_config`.
        peak_mib: what the compiler said of the peak, MiB a device.
    """

    shape: str
    topology: str
    settings: dict[str, Any]
    peak_mib: float


def run_config(rows: int, devices: int, *, length: int = 512, steps: int = 1, **settings: Any) -> RunConfig:
    """A run of `rows` rows a group of devices and micro-step.

    Args:
        devices: number of devices.
        length: tokens of a row.
        steps: micro-steps of a step.
        settings: of the model; `mesh`, `lora` and `optimizer` of theirs.
    """
    mesh = MeshConfig(**settings.pop("mesh", {}))
    lora = settings.pop("lora", None)
    optimizer = OptimizerConfig(name=settings.pop("optimizer", "adamw"))
    return RunConfig(
        model=ModelConfig(**settings),
        lora=LoraConfig(**lora) if isinstance(lora, dict) else lora,
        data=DataConfig(sequence_length=length),
        optimizer=optimizer,
        train=TrainConfig(global_batch_size=rows * (devices // mesh.tensor) * steps, micro_batch_size=rows),
        mesh=mesh,
    )


def estimated(config: RunConfig, shape: DecoderSpec, topology: str) -> Memory:
    """What `jaxlm plan` reckons for a device."""
    setup = set_up(config, shape, parse_topology(topology))
    return estimate_memory(setup, setup.initializer(setup.schedule(10)))


def row_config(row: Row) -> RunConfig:
    """The run of a row."""
    return run_config(devices=parse_topology(row.topology).count, **row.settings)


def read_table() -> list[Row]:
    """The checked-in rows."""
    return [Row(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="compile every step again and rewrite the table")
    parser.add_argument("--only", default="", help="rows whose topology holds this; the table is not rewritten")
    arguments = parser.parse_args()
    rows = []
    print("| shape | topology | step | compiler, MiB | estimate | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    for row in read_table():
        if arguments.only not in row.topology:
            continue
        config, shape = row_config(row), SHAPES[row.shape]
        if arguments.measure:
            compiled = compile_step(config, shape, parse_topology(row.topology), quick=True)
            row = dataclasses.replace(row, peak_mib=round(compiled.memory / MIB, 1))
        rows.append(row)
        estimate = estimated(config, shape, row.topology).peak / MIB
        words = ", ".join(f"{key} {value}" for key, value in row.settings.items())
        print(
            f"| {row.shape} | {row.topology} | {words} | {row.peak_mib:.1f} | {estimate:.1f} "
            f"| {estimate / row.peak_mib:.2f} |",
            flush=True,
        )
    if arguments.measure and not arguments.only:
        versions = {name: version(name) for name in ("jax", "libtpu")}
        lines = ",\n".join(f"  {json.dumps(dataclasses.asdict(row))}" for row in rows)
        TABLE.write_text(f'{{"versions": {json.dumps(versions)},\n "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
