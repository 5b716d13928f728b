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
from jaxlm.config import RunConfig
from jaxlm.errors import UserError, exit_status

if TYPE_CHECKING:
    from jaxlm.planning.report import Plan
    from jaxlm.spec import DecoderSpec

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
    "json": Flag("all figures as JSON"),
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

    if "topology" not in flags:
        raise UserError("--topology: say for which devices, e.g. v5e:4x4, h200:8 or cpu:8")
    topology = parse_topology(flags["topology"], flags.get("memory"))
    # Shapes are worked out on the CPU; whatever this machine has is left alone. Before JAX is imported.
    os.environ.update(ENVIRONMENT)
    from jaxlm.planning.report import plan
    from jaxlm.planning.show import show

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
        plans.append(plan(config, topology, shape, compile=bool(flags.get("compile")), console=console))
        if "json" not in flags:
            if len(configs) > 1:
                console.rule(f"stage {number + 1} of {len(configs)}: {Path(config.output_dir).name}")
            show(plans[-1], config, console)
    if "json" in flags:
        dicts = [plan.to_dict() for plan in plans]
        print(json.dumps(dicts[0] if len(dicts) == 1 else dicts, indent=1))
    return int(any(plan.fits is False for plan in plans))


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
