"""`python -m jaxlm.tune --config FILE`: time every attention that can serve here, and keep the fastest.

What it finds goes to the user's table (see `kernels.backend`), from which `model.attention: auto` chooses.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.parser import parse_run
from jaxlm.config import RunConfig
from jaxlm.errors import UserError, exit_status
from jaxlm.kernels.backend import (
    NAMES,
    AttentionBackend,
    Entry,
    ShapeKey,
    read_table,
    shape_key,
    user_table,
    why_not,
    write_table,
)
from jaxlm.spec import AttentionSpec

if TYPE_CHECKING:
    from rich.console import Console

# Rows of a block of queries, and of keys, that are tried with the Pallas kernels.
BLOCKS = {"pallas_tpu": (256, 512, 1024), "pallas_gpu": (64, 128)}
DOCUMENTS = 8  # of a packed row
# A sample lasts at least so long, seconds: shorter ones time the clock.
LEAST_SAMPLE = 0.02
# Rows are checked up to this length: the plain form stores all scores.
LONGEST_CHECK = 8192
EPILOG = (
    "Every other --key value is one of the run's, as for jaxlm.train, e.g. --model.path DIR. What is not given is "
    "taken from the configuration: its model's heads, data.sequence_length, data.packing and model.dtype."
)


@dataclasses.dataclass
class Candidate:
    """An implementation on trial.

    Attributes:
        choice: what it is.
        run: one pass over values and gradients, on the device; None when it did not get so far.
        problem: why it cannot win, in words; '' when it can.
        seconds: of a pass, by round.
    """

    choice: AttentionBackend
    run: Callable[[], Any] | None = None
    problem: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.tune") -> int:
    """Exit status: 0 done, 2 for a mistake in the input."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("--config", action="append", metavar="FILE", help="a run's YAML; may be given several times")
    parser.add_argument("--heads", type=int, help="query heads")
    parser.add_argument("--kv_heads", type=int, help="kv heads (default: as many)")
    parser.add_argument("--head_dim", type=int, help="numbers of a head (default: 128 without a model)")
    parser.add_argument("--window", type=int, help="sliding window")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row; several are tuned in turn")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of queries, keys and values")
    packed = parser.add_mutually_exclusive_group()
    packed.add_argument("--packed", action="store_const", const=True, help=f"rows of {DOCUMENTS} documents")
    packed.add_argument("--single", dest="packed", action="store_const", const=False, help="rows of one document")
    parser.add_argument("--rows", type=int, default=1, help="rows at a time (default: 1)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds in which all are timed in turn (default: 10)")
    parser.add_argument("--dry_run", action="store_true", help="show the figures, write no table")
    options, others = parser.parse_known_args(argv)
    return exit_status(lambda: _run(options, others))


def _run(options: argparse.Namespace, others: Sequence[str]) -> None:
    from jaxlm.cli.start import quiet_logs

    quiet_logs()
    to_tune = cases(options, others)
    if not options.dry_run:  # a table that cannot be read or written is found out before the work
        read_table(user_table())
        user_table().parent.mkdir(parents=True, exist_ok=True)
    for case in to_tune:
        _tune(case, options)


def cases(options: argparse.Namespace, others: Sequence[str]) -> list[ShapeKey]:
    """What is to be tuned, from flags and configuration.

    Args:
        others: words that are keys of the run.

    Raises:
        UserError: for what does not go together, or a configuration without a model while no --heads is given.
    """
    words = [*itertools.chain(*(("--config", file) for file in options.config or [])), *others]
    configs = parse_run(words, prog="python -m jaxlm.tune", description="").configs if words else [RunConfig()]
    for name in ("heads", "kv_heads", "head_dim", "window", "rows", "rounds", "lengths"):
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise UserError(f"--{name}: {number} must be at least 1")
    keys: list[ShapeKey] = []
    attention = None
    for config in configs:
        path = config.model.path
        if attention is None or (path is not None and Path(path).exists()) or config.model.shape is not None:
            # Else a stage starts from what the one before it will have written.
            attention = _attention(config, options)
        packed = config.data.packing_mode == "first_fit" if options.packed is None else options.packed
        for length in options.lengths or [config.data.sequence_length]:
            key = shape_key(attention, options.dtype or config.model.dtype, length, packed)
            if key not in keys:
                keys.append(key)
    return keys


def _attention(config: RunConfig, options: argparse.Namespace) -> AttentionSpec:
    """The attention layers to tune for: of the model, with what the options say otherwise."""
    from convert.source import open_model
    from jaxlm.models.families import load_shape

    own: AttentionSpec | None = None
    if config.model.path is not None:
        own = open_model(config.model.path).config.attention
    elif config.model.shape is not None:
        own = load_shape(config.model.shape).attention
    elif options.heads is None:
        raise UserError("no model to tune for: give --config FILE with a model, or --heads N")
    heads = options.heads or (own.num_heads if own else 1)
    kv_heads = options.kv_heads or (own.num_kv_heads if own is not None and options.heads is None else heads)
    if heads % kv_heads:
        raise UserError(f"--kv_heads: {kv_heads} does not divide {heads} query heads")
    head_dim = options.head_dim or (128 if own is None else own.head_dim)
    window = options.window or (None if own is None else own.window)
    spec = AttentionSpec(heads, kv_heads, head_dim, window=window)
    if own is None:
        return spec
    return dataclasses.replace(
        spec, rope=own.rope, soft_cap=own.soft_cap, alibi=own.alibi, relative_bias=own.relative_bias
    )


def candidates(case: ShapeKey) -> list[Candidate]:
    """All implementations, with all blocks that a row is long enough for."""
    trials = []
    for name in NAMES:
        lack = why_not(name, case)
        if lack is not None:
            trials.append(Candidate(AttentionBackend(name), problem=lack))
            continue
        sizes = [size for size in BLOCKS.get(name, ()) if size < 2 * case.length]
        trials.append(Candidate(AttentionBackend(name)))
        trials += [Candidate(AttentionBackend(name, *blocks)) for blocks in itertools.product(sizes, sizes)]
    return trials


def tensors(case: ShapeKey, rows: int, heads: int, kv_heads: int) -> tuple[Any, ...]:
    """q, k, v, a cotangent of the output, and segment ids (None: single documents), seeded."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = [(rows, case.length, n, case.head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), case.dtype) for shape in shapes]
    if not case.packed:
        return *arrays, None
    cuts = np.sort(rng.choice(np.arange(1, case.length), min(DOCUMENTS, case.length) - 1, replace=False))
    ids = 1 + np.searchsorted(cuts, np.arange(case.length), side="right")
    return *arrays, jnp.asarray(np.broadcast_to(ids, (rows, case.length)), jnp.int32)


def passes(case: ShapeKey, choice: AttentionBackend) -> Callable[..., Any]:
    """(q, k, v, cotangent, segment ids) -> output and the gradients of q, k and v; jitted."""
    import jax
    import jax.numpy as jnp

    from jaxlm.nn.attention import MaskSpec, attention

    def run(q: Any, k: Any, v: Any, cotangent: Any, ids: Any) -> Any:
        bias = jnp.sin(jnp.arange(q.shape[2] * (2 * case.length - 1.0))).reshape(q.shape[2], -1)
        mask = MaskSpec(
            ids,
            window=case.window,
            soft_cap=case.soft_cap,
            alibi=case.alibi,
            bias=bias if case.relative_bias else None,
        )
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, mask, choice), q, k, v)
        return out, *back(cotangent.astype(out.dtype))

    return jax.jit(run)


def check(case: ShapeKey, choice: AttentionBackend) -> str:
    """Holds values and gradients to the plain form in float32; what is wrong in words, '' when nothing is."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    case = dataclasses.replace(case, length=min(case.length, LONGEST_CHECK))
    arguments = tensors(case, 1, case.heads // case.kv_heads, 1)  # one kv head will do
    exact = [a if a is None or a.dtype == jnp.int32 else a.astype(jnp.float32) for a in arguments]
    with jax.default_matmul_precision("highest"):
        expected = passes(case, AttentionBackend("reference"))(*exact)
    # Accelerators round float32 operands of products too, to 8 bits of mantissa at worst.
    most = 1e-4 if case.dtype == "float32" and case.platform == "cpu" else 2.0**-6
    for name, a, b in zip(("output", "dq", "dk", "dv"), passes(case, choice)(*arguments), expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        error = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
        if not error <= most:
            return f"wrong: {name} differs from the plain form by {error:.2g} of its largest, {most:.2g} is allowed"
    return ""


def measure(case: ShapeKey, rows: int, rounds: int, say: Callable[[str], None]) -> list[Candidate]:
    """Checks and times all candidates: in each round all of them in turn, starting with another one each time.

    Args:
        tell: is told what is under way.
    """
    import jax

    trials = candidates(case)
    arguments = tensors(case, rows, case.heads, case.kv_heads)
    for trial in trials:
        if trial.problem:
            continue
        say(f"{trial.choice}: compiling and checking")
        try:
            trial.problem = check(case, trial.choice)
            run = passes(case, trial.choice)
            jax.block_until_ready(run(*arguments))
            trial.run = partial(run, *arguments)
        except (jax.errors.JaxRuntimeError, UserError, NotImplementedError, ValueError) as error:
            # Blocks that do not fit on the chip, scores that do not fit in memory: it is out, and the table says why.
            trial.problem = str(error).strip().splitlines()[0][:200]
    running = [trial for trial in trials if not trial.problem and trial.run is not None]
    repeats = {id(trial): 0 for trial in running}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for trial in running[number % len(running) :] + running[: number % len(running)]:
            assert trial.run is not None
            times = repeats[id(trial)] or 1
            started = time.perf_counter()
            for _ in range(times):
                result = trial.run()
            jax.block_until_ready(result)
            seconds = (time.perf_counter() - started) / times
            if repeats[id(trial)]:
                trial.seconds.append(seconds)
            else:  # the first round tells how often it has to be run
                repeats[id(trial)] = max(1, round(LEAST_SAMPLE / seconds))
    return trials


def fastest(trials: Sequence[Candidate]) -> tuple[Candidate, dict[str, float]]:
    """The winner, and milliseconds of each implementation with its best blocks.

    Rounds are pairs: what slows the machine for a while slows all. So times are the median of one, and the medians of
    the others' ratios to it.
    """
    timed = [trial for trial in trials if trial.seconds]
    if not timed:
        raise UserError("no implementation could be timed; the table says why")
    base = _base(timed)
    unit = statistics.median(base.seconds) * 1e3
    times = {id(trial): unit * _ratio(trial, base) for trial in timed}
    best: dict[str, float] = {}
    for trial in timed:
        best[trial.choice.name] = min(times[id(trial)], best.get(trial.choice.name, float("inf")))
    return min(timed, key=lambda trial: times[id(trial)]), best


def _base(timed: Sequence[Candidate]) -> Candidate:
    """What the others are compared with: XLA's form, or whatever could be timed."""
    return next((trial for trial in timed if trial.choice.name == "xla"), timed[0])


def _ratio(trial: Candidate, base: Candidate) -> float:
    return statistics.median(a / b for a, b in zip(trial.seconds, base.seconds, strict=True))


def _tune(case: ShapeKey, options: argparse.Namespace) -> None:
    import jax
    from rich.console import Console

    console = Console(soft_wrap=True)
    rows = "packed rows" if case.packed else "rows of one document"
    window = f", window {case.window}" if case.window else ""
    console.print(
        f"{case.device}: {options.rows} x {case.length:,} tokens, {case.heads} heads on {case.kv_heads} of "
        f"{case.head_dim}{window}, {case.dtype}, {rows}",
        highlight=False,
    )
    # The first round counts only for finding out how long a pass takes.
    with console.status("starting") as status:
        trials = measure(case, options.rows, options.rounds + 1, status.update)
    _print(console, trials)
    winner, times = fastest(trials)
    made = f"jax {jax.__version__}, {datetime.date.today().isoformat()}"
    path = user_table()
    if options.dry_run:
        console.print(f"fastest: {winner.choice}; not written (--dry_run)", highlight=False)
        return
    table = read_table(path)
    key = case.device_kind, case.dtype, case.shape_class
    table.setdefault(key, {})[case.bucket] = Entry(winner.choice, times, case.length, made)
    write_table(path, table)
    console.print(f"fastest: {winner.choice}; 'attention: auto' takes it from now on, from {path}", highlight=False)


def _print(console: Console, trials: Sequence[Candidate]) -> None:
    from rich.text import Text

    from jaxlm.screen import new_table, print_table

    timed = [trial for trial in trials if trial.seconds]
    base = _base(timed) if timed else None
    table = new_table(
        "implementation", "blocks", "ms", "" if base is None else f"of {base.choice.name}", "problem", left=["problem"]
    )
    order = sorted(timed, key=lambda trial: _ratio(trial, _base(timed)))
    for trial in [*order, *(trial for trial in trials if trial not in order)]:
        blocks = "" if trial.choice.block_q is None else f"{trial.choice.block_q} x {trial.choice.block_k}"
        figures = "", ""
        if trial.seconds:
            ratio = "" if base is None else f"{_ratio(trial, base):.2f}"
            figures = f"{statistics.median(trial.seconds) * 1e3:,.3f}", ratio
        table.add_row(trial.choice.name, blocks, *figures, Text(trial.problem))
    print_table(table)


if __name__ == "__main__":
    sys.exit(main())
