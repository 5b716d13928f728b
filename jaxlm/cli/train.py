"""`python -m jaxlm.train --config FILE [--key value ...]`: pretrain, fine-tune or LoRA-tune a LLaMA."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.hub import download_all, with_commits
from jaxlm.cli.parser import parse_run
from jaxlm.cli.words import Flag
from jaxlm.config import RunConfig
from jaxlm.errors import UserError, exit_status
from jaxlm.locate import at_home
from jaxlm.machine import limit_heaps

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.processes.distributed import Hosts
    from jaxlm.training.job import Outcome
    from jaxlm.training.prepare import Prepared
    from jaxlm.training.stop import Stop

DESCRIPTION = (
    "Trains a LLaMA-family model: continued pretraining, full or LoRA instruction tuning, by one configuration. "
    "Run the same command again to go on after an interruption."
)
# Named as in `jax.distributed.initialize`, and as launchers of other systems have them.
ALIASES = {name: f"distributed.{name}" for name in ("coordinator", "num_processes", "process_id")}
# Below this number of parameters a model knows next to nothing, whatever it was trained on.
SMALL_MODEL = 50e6
FLAGS = {
    "preview": Flag("show a number of rows (default: 3) as text, trained tokens marked, then exit", int, 3),
    "dry_run": Flag("read the data, say what the run would take of each source, then exit"),
    "verbose": Flag("say at start-up also what choices rest on"),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.train") -> int:
    """Exit status.

    0 done; distributed.interrupted_status (0) after a signal, all saved; that or 128 + the signal's number when nothing
    was saved; 2 a mistake in the input.
    """
    from jaxlm.training.stop import Stop

    limit_heaps(max(1, (os.cpu_count() or 1) // 8))
    # Around all of it: importing JAX and compiling take their time too, and a signal in it is to be answered.
    with Stop() as stop:
        return exit_status(lambda: _main(sys.argv[1:] if argv is None else argv, prog, stop))


def _main(argv: Sequence[str], prog: str, stop: Stop) -> int:
    configs, flags, origins = parse_run(argv, prog=prog, description=DESCRIPTION, flags=FLAGS, aliases=ALIASES)
    with origins.explained():
        preview = flags.get("preview")
        if preview is not None and preview < 1:
            raise UserError(f"--preview: {preview} must be at least 1")
        from jaxlm.training.checks import check_config, check_files, check_stage

        for config in configs:
            check_config(config)
        if "stage" in flags:
            check_stage(configs[0], flags["stage"])
        if preview is not None or flags.get("dry_run"):
            configs = _pinned(configs, lambda line: print(line, file=sys.stderr))
            check_files(configs, first_host=False)
            _preview(configs[0], preview or 0)
            return 0
        return _status(run_stages(configs, stop, bool(flags.get("verbose"))), configs, stop)


def run_stages(configs: Sequence[RunConfig], stop: Stop, verbose: bool = False) -> list[Outcome]:
    """Trains one run after the other; the last outcome says whether a signal ended them early.

    Args:
        configs: the stages; a single one without stages.
        stop: what follows the signals.
        verbose: say at start-up also what choices rest on.

    Raises:
        UserError: a mistake in the input.
    """
    # JAX and everything above it is imported only here: --help and mistakes in the config answer at once.
    from jaxlm.cli.start import importing, quiet_logs, use_compilation_cache

    with importing():
        from rich.console import Console

        import convert.source  # noqa: F401 (what `_train` needs)
        import jaxlm.training.loop
        import jaxlm.training.prepare  # noqa: F401
        from jaxlm.processes.distributed import run_settings, start, versions
        from jaxlm.training.checks import check_files
        from jaxlm.training.fit import check_without_model

    stop.exit_status = configs[0].distributed.interrupted_status
    terminal = Console(soft_wrap=True)
    quiet_logs()
    use_compilation_cache(configs[0].train.compilation_cache)
    outcomes: list[Outcome] = []
    with start(configs[0].distributed, terminal.print) as hosts:
        stop.starting(Path(configs[0].output_dir), hosts, last=False)
        console = hosts.console(terminal)
        hosts.agree("versions", versions())
        for config in configs:
            hosts.agree("configuration", run_settings(config))
        configs = _pinned(configs, console.print, hosts)
        hosts.check("files", _problem(check_files, configs, hosts.process == 0))
        hosts.check("tasks", _problem(_check_tasks, configs))
        # Also those of later stages: whoever starts the same command again is told at once.
        for config in configs:
            hosts.take_directory(Path(config.output_dir), console.print)
        hosts.check("devices and settings", _problem(check_without_model, configs))
        download_all(configs, hosts)
        for number, config in enumerate(configs, 1):
            stop.starting(Path(config.output_dir), hosts, number == len(configs))
            hosts.check_shared(Path(config.output_dir))
            hosts.open_log(Path(config.output_dir))
            if len(configs) > 1:
                console.rule(f"stage {number} of {len(configs)}: {Path(config.output_dir).name}")
            outcomes.append(_train(config, console, hosts, stop, verbose))
            if outcomes[-1].interrupted is not None:
                break
    return outcomes


def _check_tasks(configs: Sequence[RunConfig]) -> None:
    for config in configs:
        if config.train.tasks or config.train.best is not None:
            from jaxlm.evaluation.during import read_jobs

            read_jobs(config)


def _pinned(configs: Sequence[RunConfig], say: Callable[[str], None], hosts: Hosts | None = None) -> list[RunConfig]:
    """The runs with the commits that their names of the hub mean; see `with_commits`."""
    made: set[Path] = set()
    pinned = []
    for config in configs:
        pinned.append(with_commits(config, say, hosts, config.output_dir, frozenset(made)))
        made.add(at_home(config.output_dir).absolute())
    return pinned


def _problem(check: Callable[..., None], *what: Any) -> str | None:
    try:
        check(*what)
    except UserError as error:
        return str(error)
    return None


def _train(config: RunConfig, console: Console, hosts: Hosts, stop: Stop, verbose: bool) -> Outcome:
    from convert.source import open_adapter, open_model
    from jaxlm.training.loop import train
    from jaxlm.training.prepare import prepare

    source = None if config.model.path is None else open_model(config.model.path)
    prepared = prepare(config, source, open_adapter, console, hosts, verbose)
    job = prepared.job
    if config.train.tasks:
        from jaxlm.evaluation.during import training_tasks

        tasks = training_tasks(config, job.model, prepared.tokenizer, prepared.asked)
        job = dataclasses.replace(job, tasks=tasks)
    if config.objective == "grpo":
        from jaxlm.evaluation.rollouts import rollouts

        job = dataclasses.replace(job, rollouts=rollouts(config, prepared.tokenizer, prepared.asked, hosts))
    outcome = train(job, console, hosts, stop)
    if outcome.interrupted is None:
        _show_samples(prepared, outcome, console)
        _show_summary(prepared.job.config, outcome, console)
    return outcome


def _status(outcomes: Sequence[Outcome], configs: Sequence[RunConfig], stop: Stop) -> int:
    outcome, config = outcomes[-1], configs[len(outcomes) - 1]
    if outcome.interrupted is None:
        return 0
    if not outcome.saved:
        return stop.status(signal.Signals[outcome.interrupted.split()[0]])
    return 0 if outcome.complete and config is configs[-1] else config.distributed.interrupted_status


def _preview(config: RunConfig, rows: int) -> None:
    from rich.console import Console

    from convert.source import open_model
    from jaxlm.cli.start import quiet_logs
    from jaxlm.data.mixing import table
    from jaxlm.data.preview import TEXTS, preview
    from jaxlm.training.prepare import describe_model, read_data, with_date
    from jaxlm.training.run_tokenizer import open_tokenizer

    quiet_logs()
    console = Console(soft_wrap=True)
    source = None if config.model.path is None else open_model(config.model.path)
    tokenizer, _ = open_tokenizer(config, source)
    config = with_date(config, tokenizer)
    data = read_data(config, tokenizer, describe_model(config, source, tokenizer), console)
    train = data.train_batches(config.train.global_batch_size, 1, config.train.epochs, config.train.steps)
    shown = 0
    for number in range(len(train) if rows else 0):
        shown += preview(train[number], tokenizer, console, shown, rows, TEXTS[config.data.records])
        if shown == rows:
            break
    part = f"{shown} rows of a" if rows else "a"
    console.rule(f"{part} run of {len(train):,} steps of {config.train.global_batch_size}", align="left")
    console.print("\n".join(table(data.shares(train))), highlight=False, markup=False, soft_wrap=True)


def _show_samples(prepared: Prepared, outcome: Outcome, console: Console) -> None:
    if not prepared.sample_prompts:
        return
    from jaxlm.inference.samples import greedy_answers
    from jaxlm.weights.names import num_params

    settings, tokenizer = prepared.job.config.train, prepared.tokenizer
    stops = set(tokenizer.end_ids).union(*(report.end_ids for report in prepared.job.data.report.train))
    prompts, tokens = prepared.sample_prompts, settings.sample_tokens
    answers = greedy_answers(outcome.model, outcome.variables, outcome.mesh, prompts, tokens, sorted(stops))
    console.print()
    for text, answer in zip(settings.sample_prompts, answers, strict=True):
        console.print(f"> {text}", style="bold", highlight=False, markup=False)
        console.print(f"  {tokenizer.decode(answer).strip()}", highlight=False, markup=False)
    if (parameters := num_params(outcome.model.spec)) < SMALL_MODEL:
        console.print(
            f"  ({parameters / 1e6:.1f} M parameters have learned a little text by heart, mistakes included; ask them "
            "nothing else)",
            style="dim",
            highlight=False,
        )


def _show_summary(config: RunConfig, outcome: Outcome, console: Console) -> None:
    from jaxlm.screen import print_pairs

    out = Path(config.output_dir)
    pairs = []
    pairs.append(("adapter" if config.lora else "model", str(outcome.checkpoint)))
    if outcome.best is not None and outcome.best[0] != outcome.step:
        what, (step, value) = config.train.best or "validation loss", outcome.best
        pairs.append(("best", f"{out / 'checkpoints' / str(step)} ({what} {value:.4f})"))
    pairs.append(("metrics", str(out / "metrics.jsonl")))
    pairs.append(("loss curve", str(out / "loss.png")))
    if config.objective != "cross_entropy":
        pairs.append(("rewards", str(out / "preference.png")))
    if len(outcome.validation) > 1:
        first, last = outcome.validation[0], outcome.validation[-1]
        pairs.append(("validation loss", f"{first[1]:.4f} at step {first[0]}, {last[1]:.4f} at step {last[0]}"))
    run, beside = shlex.quote(str(out)), str(out.parent / out.name)
    pairs.append(("report", f"jaxlm report {run}"))
    pairs.append(("ask it", f"python -m jaxlm.generate --model {run} --interactive"))
    if config.lora is None:
        pairs.append(("next", f"convert jax-to-hf {run} {shlex.quote(f'{beside}-hf')}"))
    else:
        pairs.append(("next", f"convert jax-to-peft {run} {shlex.quote(f'{beside}-peft')}"))
        base = shlex.quote(str(config.model.path))
        pairs.append(("or", f"convert merge {base} {run} {shlex.quote(f'{beside}-merged')}"))
    console.print()
    print_pairs(console, pairs)


if __name__ == "__main__":
    sys.exit(main())
