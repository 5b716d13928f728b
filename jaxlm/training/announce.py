"""What a run says before its first step, and when a signal or a number ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from rich.console import Console

from jaxlm.config import LoraConfig, RunConfig
from jaxlm.data.batches import Batches
from jaxlm.data.mixing import table
from jaxlm.data.order import Order
from jaxlm.devices.mesh import axis_sizes
from jaxlm.models.adapters import method_name
from jaxlm.nn.rounding import Kind
from jaxlm.screen import print_pairs
from jaxlm.training.advice import dropout_warnings, rank_warnings, schedule_warnings
from jaxlm.training.job import Job
from jaxlm.training.optimizer import Schedule, make_schedule
from jaxlm.training.profile import profile_warnings
from jaxlm.training.resume import length_before
from jaxlm.training.setup import CompiledSteps, TrainSetup
from jaxlm.training.start import Start
from jaxlm.training.state import Initializer, bytes_per_device, count
from jaxlm.training.stop import Stop
from jaxlm.units import memory_size


@dataclasses.dataclass(frozen=True)
class Announcement:
    """What a start will do.

    Attributes:
        facts: (name, value); lines that go on with the one before have no name.
        shares: the lines of a table of the sources; () for a single source.
        warnings: settings that are hardly ever meant.
    """

    facts: Sequence[tuple[str, str]]
    shares: Sequence[str]
    warnings: Sequence[str]

    def print(self, console: Console) -> None:
        print_pairs(console, list(self.facts))
        if self.shares:
            console.print("\n".join(self.shares), highlight=False, markup=False, soft_wrap=True)
        for warning in self.warnings:
            console.print(f"warning: {warning}", highlight=False, markup=False)

    def named_facts(self) -> Iterator[tuple[str, str]]:
        """The facts, each with all of its lines."""
        names: list[str] = []
        values: dict[str, str] = {}
        for name, value in self.facts:
            if name:
                names.append(name)
                values[name] = value
            else:
                values[names[-1]] += f"; {value}"
        return ((name, values[name]) for name in names)


def announce(
    job: Job,
    setup: TrainSetup,
    initializer: Initializer,
    start: Start,
    compiled: CompiledSteps,
    schedule: Schedule,
    batches: Batches,
) -> Announcement:
    """What will happen, with warnings of settings that are hardly ever meant."""
    total = len(batches)
    return Announcement(
        _facts(job, setup, initializer, start, compiled, total),
        table(job.data.shares(batches)) if len(job.config.data.train) > 1 else (),
        [
            *(_schedule_changes(job.config, start, batches.order, schedule, total) if start.step else []),
            *profile_warnings(job.config, start.step),
            *schedule_warnings(job.config.optimizer, schedule, total),
            *rank_warnings(job.model, dict(setup.model.adapters)),
            *dropout_warnings(getattr(job.source, "hf_config", None)),
        ],
    )


def _adapter(lora: LoraConfig) -> str:
    in_full = f", {' and '.join(lora.modules_to_save)} in full" if lora.modules_to_save else ""
    return f"{method_name(lora)} rank {lora.rank} on {', '.join(lora.targets)}{in_full}"


def _facts(
    job: Job, setup: TrainSetup, initializer: Initializer, start: Start, compiled: CompiledSteps, total: int
) -> list[tuple[str, str]]:
    config, moe = job.config, job.model.experts
    parameters, trained = count(initializer.dense), count(initializer.trainable)
    weights = config.model.path or f"fresh {config.model.shape}"
    how = "all" if config.lora is None else _adapter(config.lora)
    devices = jax.devices()
    axes = " x ".join(f"{axis} {size}" for axis, size in axis_sizes(setup.mesh).items() if size > 1) or "one device"
    needs = "" if compiled.memory is None else f"{memory_size(compiled.memory)} by the compiler's count; "
    train_bytes = bytes_per_device(initializer.trainable, initializer.trainable_shardings)
    opt_bytes = bytes_per_device(initializer.opt_state, initializer.opt_shardings)
    facts = [
        ("model", f"{weights}: {parameters:,} parameters, {job.model.num_layers} layers"),
        ("trained", f"{trained:,} ({trained / parameters:.2%}): {how}"),
        ("devices", f"{len(devices)} {devices[0].device_kind}, {axes}"),
        ("memory per device", f"{needs}trained {memory_size(train_bytes)}, optimizer {memory_size(opt_bytes)}"),
        ("attention", setup.attention[1]),
    ]
    if job.verbose:
        facts.append(("", setup.attention_details()))
    if config.model.quantize is not None:
        facts.append(("base", _base(config.model.quantize, setup)))
    in_host = bytes_per_device(initializer.params, initializer.params_shardings, in_host=True)
    if in_host:
        facts.append(("offloaded", f"{memory_size(in_host)} a device of frozen layers, in the hosts' memory"))
    if moe is not None and setup.experts is not None:
        uses = ", ".join(f"{name} {k}" for name, k in zip(moe.modalities, moe.top_k, strict=True))
        facts.append(("experts", f"{moe.num_experts}, router {moe.router}, a token uses: {uses}"))
        facts.append(("", f"{setup.experts[0]}: {setup.experts[1]}"))
    rows, length = config.train.global_batch_size, config.data.sequence_length
    micro = "" if setup.accumulation == 1 else f", in {setup.accumulation} micro-steps"
    facts += [
        ("a step", f"{rows} rows of {length} = {rows * length:,} tokens{micro}; {total} steps"),
        ("precision", f"parameters {config.model.param_dtype}, compute {config.model.dtype}"),
        ("remat", config.model.remat),
        ("compiled", f"in {compiled.seconds:.1f} s"),
    ]
    if start.step:
        facts.append(("resumed", f"from step {start.step}{', kept by each host' if start.from_local else ''}"))
    return facts


def _base(kind: Kind, setup: TrainSetup) -> str:
    """What the frozen linear layers are kept in, and how they are multiplied with."""
    if kind != "nf4":
        return f"linear layers in {kind}"
    plain = setup.why_plain_nf4()
    how = "a kernel to which they are read as they are" if plain is None else f"plain ({plain})"
    return f"linear layers in {kind}; products: {how}"


def _schedule_changes(config: RunConfig, start: Start, order: Order, schedule: Schedule, total: int) -> list[str]:
    """For a run that was begun for another number of steps: which learning rates that changes.

    Args:
        order: the run's, which knows how long it was to be.
        total: steps of the run as it is now.
    """
    before = length_before(start.files, order) if start.files else total
    if before == total:
        return []
    updates = start.step - int(start.state.skipped)
    old = make_schedule(config.optimizer, before)
    rate, planned = float(schedule(updates)), float(old(updates))
    if abs(rate - planned) <= 0.01 * max(rate, planned):
        return []
    following = f"step {updates + 1} takes {rate:.2e} instead of {planned:.2e}"
    if updates:
        following = f"step {updates} took {float(old(updates - 1)):.2e}, {following}"
    return [
        f"the run was begun for {before} steps and is now one of {total}, so that its {config.optimizer.schedule} "
        f"schedule is another: {following}"
    ]


def why_not_finite(step: int, config: RunConfig) -> str:
    """What to do about a loss or gradient that is not finite, as a sentence."""
    if step == 1:
        # No update had been made: the rate cannot be why. Weights were finite when they were read.
        return (
            "No step had been taken before it, so that the learning rate is not why: numbers too large for "
            f"model.dtype {config.model.dtype} came up in the model, or a record is broken (--preview 1 shows some)"
        )
    return "Lower optimizer.learning_rate, or lengthen its warm-up"


def last_words(by: str, stop: Stop, nothing_saved: bool, step: int, total: int, checkpoint: Path) -> str:
    """What a run says that a signal has ended.

    Args:
        by: the signal, and on which process.
        nothing_saved: this start has saved no step.
    """
    if step == total:
        return f"{by}: step {step} of {total} is saved in {checkpoint}, the run is complete"
    if nothing_saved:
        return f"{by} before a step was done: {stop.kept()}"
    return f"{by}: saved step {step} of {total} in {checkpoint}. Run the same command again to go on from there."
