"""A plan on the terminal: its figures, bars of what takes memory, and other settings to try."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from jaxlm.config import RunConfig
from jaxlm.devices.operations import table
from jaxlm.planning.compiled import CompiledStep, can_compile
from jaxlm.planning.cost import FORMULA
from jaxlm.planning.report import Plan
from jaxlm.planning.suggest import MARGIN
from jaxlm.screen import print_pairs
from jaxlm.units import memory_size

WIDTH = 40
_COLOURS = {
    "parameters": "blue",
    "optimizer": "magenta",
    "gradients": "cyan",
    "activations": "green",
    "layer": "yellow",
    "loss": "yellow",
    "gathered": "bright_black",
    "embedding": "bright_black",
}
_MEANING = {
    "parameters": "",
    "optimizer": "",
    "gradients": "",
    "activations": "kept for the backward pass",
    "layer": "one layer while it is differentiated",
    "loss": "output matrix, logits of a chunk",
    "gathered": "weights from other devices or the hosts",
    "embedding": "the table's gradient before it is split",
}


def show(plan: Plan, config: RunConfig, console: Console) -> None:
    """Prints the plan; --json has more figures."""
    chip, cost, time = plan.topology.chip, plan.cost, plan.time
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.devices.items() if size > 1) or "one device"
    rows, length = config.train.global_batch_size, config.data.sequence_length
    micro = "" if plan.accumulation == 1 else f", in {plan.accumulation} micro-steps"
    pairs = [
        ("model", f"{config.model.shape or config.model.path}: {plan.parameters:,} parameters"),
        ("trained", f"{plan.trained:,} ({plan.trained / plan.parameters:.2%})"),
        ("devices", f"{plan.topology}: {plan.topology.count} {chip.device_kind}, {axes}"),
        (
            "a step",
            f"{rows} rows of {length:,} = {cost.tokens:,} tokens; {plan.micro_batch} rows per device at a time{micro}",
        ),
        ("attention", plan.attention),
        ("model FLOPs", f"{cost.model_flops:.3g} a step; a device computes {cost.hardware_flops:.3g}, recomputing"),
    ]
    print_pairs(console, pairs)
    console.print()
    _memory(plan, console)
    if time is not None:
        console.print()
        bounds = {"compute": time.compute, "links": time.links, "memory": time.memory}
        bounds |= {"network": time.network} if time.network else {}
        longest = max(bounds.values())
        for name, seconds in bounds.items():
            _bar(console, name, seconds / longest, f"{seconds * 1e3:,.1f} ms", "blue", "")
        times = f"{time.shortest:.3g} to {time.longest:.3g} s"
        mfu = f"{time.mfu[1]:.0%} to {time.mfu[0]:.0%}"
        speed = f"{time.tokens_per_second[1]:,.0f} to {time.tokens_per_second[0]:,.0f}"
        console.print(f"a step takes {times}: MFU {mfu}, {speed} tokens/s, by the data sheet", highlight=False)
        console.print(f"({FORMULA})", style="dim", highlight=False)
    if plan.compiled is not None:
        console.print()
        _compiled(plan, plan.compiled, console)
    elif chip.platform != "cpu":
        lack = can_compile(plan.topology, plan.memory.host > 0)
        hint = "--compile asks the compiler itself" if lack is None else f"--compile would ask the compiler: {lack}"
        console.print(hint, style="dim", highlight=False, markup=False)
    console.print()
    _verdict(plan, console)


def _bar(console: Console, name: str, share: float, value: str, colour: str, meaning: str) -> None:
    text = Text(f"{name:12}{value:>12}  ")
    full = share * WIDTH
    text.append("█" * int(full) + ("▌" if full % 1 >= 0.5 else ""), style=colour)
    if meaning:
        text.append(f"  {meaning}", style="dim")
    console.print(text)


def _memory(plan: Plan, console: Console) -> None:
    worst = plan.memory.phases()[plan.memory.worst]
    console.print(
        f"memory of a device, at the worst moment ({_MOMENT[plan.memory.worst]})", style="bold", highlight=False
    )
    known = plan.fits is not None
    whole = plan.topology.chip.memory if known else plan.memory.peak
    # Where the plan exceeds the memory, the bars are relative to the plan, or they would leave the terminal.
    whole = max(whole, plan.memory.peak)
    for name, size in worst.items():
        if size:
            _bar(console, name, size / whole, memory_size(size), _COLOURS[name], _MEANING[name])
    of = f" of {memory_size(plan.topology.chip.memory)}" if known else ""
    console.print(f"{'together':12}{memory_size(plan.memory.peak):>12}{of}", style="bold", highlight=False)
    if plan.memory.host:
        console.print(
            f"{'host':12}{memory_size(plan.memory.host):>12}  frozen layers, for each device", highlight=False
        )


_MOMENT = {
    "loss": "the loss and its gradient",
    "backward": "going back through the layers",
    "update": "the last gradients and the update",
}


def _compiled(plan: Plan, step: CompiledStep, console: Console) -> None:
    console.print(f"the compiler, after {step.seconds:.0f} s", style="bold", highlight=False)
    pairs = []
    if step.options:
        pairs.append(("options", ", ".join(f"{key}={value}" for key, value in step.options.items())))
    if step.refused is not None:
        print_pairs(console, [*pairs, ("refuses", step.refused)])
        return
    program = step.program
    assert program is not None
    if plan.fits is None:  # XLA for CPUs does not report its peak
        pairs.append(
            ("memory", f"arguments {memory_size(step.arguments)}, beside them {memory_size(step.temporaries)}")
        )
    else:
        pairs.append(
            (
                "memory",
                f"{memory_size(step.memory)} at its peak ({plan.memory.peak / step.memory - 1:+.0%} estimated)",
            )
        )
    for collective in program.collectives:
        how = "overlaps" if collective.overlaps else "waited for"
        pairs.append((collective.kind, f"{collective.bytes / 1e9:.3g} GB in {collective.count}, {how}"))
    if program.kernels:
        pairs.append(("kernels", ", ".join(f"{count} x {name}" for name, count in program.kernels.items())))
    chip = plan.topology.chip
    if program.cycles is not None and chip.clock:
        seconds = program.cycles / chip.clock
        text = f"{program.cycles / 1e9:.3g} Gcycles = {seconds:.3g} s, without kernels and what is waited for"
        waited = program.collective_bytes(False) / chip.link
        pairs.append(("cycles", f"{text}; waiting at full speed of the links {waited:.3g} s"))
    if step.involuntary:
        pairs.append(
            ("warning", f"{step.involuntary} times the partitioner gathers whole tensors because it has no better way")
        )
    print_pairs(console, pairs)


def show_operations(plan: Plan, console: Console) -> None:
    """Prints the operations that take the most cycles, by the compiler; nothing for a step that does not fit."""
    program = None if plan.compiled is None else plan.compiled.program
    if program is None or program.cycles is None:
        return
    console.print("\nwhere the compiler expects a step's cycles", style="bold", highlight=False)
    for line in table(program.operations, program.cycles, "Mcycles", 1e6):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if program.kernels:
        kernels = ", ".join(f"{count} x {name}" for name, count in program.kernels.items())
        console.print(f"not among them, as the compiler does not know what they take: {kernels}", highlight=False)


def _verdict(plan: Plan, console: Console) -> None:
    if plan.fits is None:
        console.print("whether it fits depends on this machine's memory, which a plan does not know", highlight=False)
        return
    room = plan.topology.chip.memory
    compiled = plan.compiled is not None and plan.compiled.refused is None
    needed = plan.compiled.memory if plan.compiled is not None and compiled else plan.memory.peak
    if plan.fits and plan.compiled is None and plan.memory.peak > MARGIN * room:
        console.print("fits narrowly; the estimate misses by up to a tenth: ask --compile", style="yellow")
    elif plan.fits:
        console.print(f"fits: {1 - needed / room:.0%} of the memory stay free", style="green", highlight=False)
    else:
        over = "" if needed <= room else f", by {memory_size(needed - room)} a device"
        console.print(f"does not fit{over}", style="bold red", highlight=False)
    for number, suggestion in enumerate(plan.suggestions):
        head = ("faster" if plan.fits else "try") if number == 0 else "or"
        time, speed = suggestion.time, ""
        if time is not None:
            speed = f", {time.shortest:.3g} to {time.longest:.3g} s a step"
        size = memory_size(suggestion.bytes)
        console.print(f"{head:7}{suggestion}  ({size}{speed})", highlight=False, soft_wrap=True)
    if not plan.fits and not plan.suggestions:
        console.print(
            "no remat, micro-batch or mesh makes it fit: try more devices, model.param_dtype: bfloat16 with lora, a "
            "smaller sequence_length, or optimizer.name: adafactor",
            highlight=False,
        )
