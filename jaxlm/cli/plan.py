"""`python -m jaxlm.plan --config FILE [--topology v5e:16x16]`: will a run fit, and how fast can it be?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.parser import parse_run
from jaxlm.cli.words import Flag
from jaxlm.config import RunConfig, ServeConfig
from jaxlm.errors import UserError, exit_status

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.planning.report import Plan
    from jaxlm.spec import DecoderSpec

STEPS = 1000  # of a run whose length the data decide
DESCRIPTION = (
    "Says of a run, before it starts and without its devices: parameters, FLOPs, bytes of each device, whether it "
    "fits, how fast it can be, and which settings near these would fit or be faster. Only the model's shape is "
    "needed: model.path with a config.json, or model.shape, which counts when both are given."
)
FLAGS = {
    "topology": Flag(
        "the devices, e.g. v5e:16x16, v5p:4x4x8, 2*v5e:16x16 (slices), h200:8, h200:2x8 (hosts x GPUs), rtx4090:1, "
        "gpu:8 (any other, with --memory), cpu:8",
        str,
    ),
    "memory": Flag("GiB of each GPU, in place of what is known of it, as nvidia-smi shows it", float),
    "compile": Flag("also compile the very train step for them, and say what the compiler says (minutes for 7B)"),
    "by_op": Flag("with --compile for a TPU: also the ten operations that take the most cycles of a step"),
    "schedule": Flag("also draw the learning rate over the steps into this file, e.g. schedule.png", str),
    "json": Flag("all figures as one JSON object; that of several stages has them in stages"),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.plan") -> int:
    """Exit status: 0 it fits (or nobody can say), 1 it does not, 2 a mistake in the input."""
    return exit_status(lambda: _main(sys.argv[1:] if argv is None else argv, prog))


def _main(argv: Sequence[str], prog: str) -> int:
    configs, flags, origins = parse_run(argv, prog=prog, description=DESCRIPTION, flags=FLAGS)
    with origins.explained():
        return _run(configs, flags)


def _run(configs: list[RunConfig], flags: dict[str, Any]) -> int:
    from rich.console import Console

    from jaxlm.cli.start import quiet_logs
    from jaxlm.devices.chips import parse_topology
    from jaxlm.planning.compiled import ENVIRONMENT

    if "schedule" in flags:
        _draw_schedules(configs, Path(flags["schedule"]), Console(soft_wrap=True, stderr=True))
        if "topology" not in flags:
            return 0
    if "topology" not in flags:
        raise UserError("--topology: say for which devices, e.g. v5e:4x4, h200:8 or cpu:8")
    topology = parse_topology(flags["topology"], flags.get("memory"))
    if flags.get("by_op") and not flags.get("compile"):
        raise UserError("--by_op: goes with --compile, as the compiler says it")
    if flags.get("by_op") and topology.chip.platform != "tpu":
        raise UserError(
            f"--by_op: {topology}: only a TPU's compiler says what an operation costs; measure it with train.profile "
            "(docs/profiling.md)"
        )
    # Shapes are worked out on the CPU; whatever this machine has is left alone. Before JAX is imported.
    os.environ.update(ENVIRONMENT)
    from jaxlm.planning.report import plan
    from jaxlm.planning.show import show, show_operations

    quiet_logs()
    console = Console(soft_wrap=True, stderr=bool(flags.get("json")))
    plans: list[Plan] = []
    shape: DecoderSpec | None = None
    for number, config in enumerate(configs):
        # What a stage starts from is what the one before it leaves behind, some day.
        path, before = config.model.path, configs[number - 1]
        follows = path is None or (path in (before.output_dir, before.model.path) and not Path(path).exists())
        if shape is None or config.model.shape is not None or not follows:
            shape = model_shape(config)
        config = _as_stored(config)
        plans.append(plan(config, topology, shape, compile=bool(flags.get("compile")), console=console))
        if "json" not in flags:
            if len(configs) > 1:
                console.rule(f"stage {number + 1} of {len(configs)}: {Path(config.output_dir).name}")
            show(plans[-1], config, console)
            if flags.get("by_op"):
                show_operations(plans[-1], console)
    if "json" not in flags and shape is not None:
        console.print(f"\n[bold]jaxlm serve[/] {_serving(shape, topology.chip.platform)}")
    if "json" in flags:
        dicts = [plan.to_dict() for plan in plans]
        print(json.dumps(dicts[0] if len(dicts) == 1 else {"stages": dicts}, indent=1))
    return int(any(plan.fits is False for plan in plans))


def _serving(spec: DecoderSpec, platform: str) -> str:
    """What `jaxlm serve` of the model that a run makes would compile at its start."""
    from jaxlm.inference.paged.programs import check_servable, usual_programs

    try:
        check_servable(spec)
    except UserError as error:
        return f"does not take this model: {error}"
    rows = ServeConfig().rows
    return f"with {rows} answers at a time compiles programs at its start, {usual_programs(spec, rows, platform)}"


def _as_stored(config: RunConfig) -> RunConfig:
    """The run with model.quantize as `training.prepare.as_stored` sets it, where the model is here."""
    from convert.source import open_model
    from jaxlm.locate import on_disk
    from jaxlm.training.prepare import as_stored
    from jaxlm.weights.native.layout import find_native

    if config.model.path is None or config.lora is None:
        return config
    path = on_disk(config.model.path, "small", "model.path")
    return as_stored(config, open_model(path)) if path.is_dir() and find_native(path) is not None else config


def _draw_schedules(configs: list[RunConfig], target: Path, console: Console) -> None:
    """A line and a plot for each stage; the files of several are numbered."""
    if target.suffix != ".png" or not target.absolute().parent.is_dir():
        raise UserError(f"--schedule: {target}: name a .png file in a directory that is there, e.g. schedule.png")
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: whatever this machine has is left alone
    from jaxlm.planning.schedule import describe, draw, rates

    for number, config in enumerate(configs):
        steps = config.train.steps or STEPS
        values = rates(config.optimizer, steps)
        file = target if len(configs) == 1 else target.with_stem(f"{target.stem}-{number + 1}")
        draw(config.optimizer, values, file)
        assumed = "" if config.train.steps else f" ({STEPS:,} steps are assumed; the data decide, or train.steps)"
        console.print(f"learning rate {describe(config.optimizer, values)}{assumed}; drawn in {file}", markup=False)


def model_shape(config: RunConfig) -> DecoderSpec:
    """The shape that a run's model has; weights are not looked for.

    Raises:
        UserError: when neither model.shape nor a directory at model.path says it.
    """
    from convert.formats.hf_experts import read_hf_shape
    from convert.source import open_model
    from jaxlm.locate import on_disk
    from jaxlm.modalities import resolve
    from jaxlm.models.families import load_shape
    from jaxlm.models.resolve import resolve_experts

    ranges = {}
    if config.model.shape is not None:
        shape = load_shape(config.model.shape)
    elif config.model.path is None:
        raise UserError("model: give --model.shape (e.g. llama-2-7b, or a config.json) or --model.path")
    else:
        path = on_disk(config.model.path, "small", "model.path")
        if not path.exists():
            raise UserError(
                f"model.path: {path}: no such directory; a plan needs only the model's shape, e.g. --model.shape "
                "llama-2-7b, or that of a config.json"
            )
        if (path / "config.json").is_file():
            shape = read_hf_shape(path)
        else:
            shape = open_model(path).config
    if config.moe is not None and shape.experts is None:
        # Only the number of modalities matters here, not the ids that they will have.
        modalities = resolve(config.tokenizer.modalities, 0)
        ranges = {modality.name: modality.range for modality in modalities}
    fresh = config.model.shape is not None
    return resolve_experts(shape, config.moe, fresh=fresh, ranges=ranges)


if __name__ == "__main__":
    sys.exit(main())
