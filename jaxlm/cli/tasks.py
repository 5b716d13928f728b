"""`jaxlm evaluate --task NAME --data FILE` with a model, or with `--predictions FILE` instead of one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli import perplexity
from jaxlm.config import EvaluateConfig, SourceConfig
from jaxlm.errors import UserError
from jaxlm.machine import limit_heaps

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.cli.opening import OpenModel
    from jaxlm.evaluation.job import Job
    from jaxlm.evaluation.task import Answers, Figure, Task
    from jaxlm.inference.generator import Generator
    from jaxlm.processes.distributed import Hosts

INTERRUPTED = "interrupted; the same command goes on where it was"
OUTPUT = "evaluation"  # below the working directory, where no output is named


def run_tasks(config: EvaluateConfig, names: Sequence[str]) -> int:
    """Evaluates; exit status 0, or 1 where some questions have no answer.

    Raises:
        UserError: for what cannot be meant.
    """
    from jaxlm.evaluation.job import check_options, read_job
    from jaxlm.evaluation.registry import get_task

    measured = [name for name in names if name == perplexity.NAME]
    tasks = [get_task(name) for name in names if name not in measured]
    if config.options and not tasks:
        raise UserError(f"options.{next(iter(config.options))}: {perplexity.NAME} has no options")
    check_options(tasks, config.options)
    if config.batch_size < 1:
        raise UserError(f"batch_size: {config.batch_size} must be at least 1")
    if config.save_file is not None and not measured:
        raise UserError(f"save_file: is for perplexity and LPM-24; {names[0]} writes scores.json, below --output")
    has_model = config.model.path is not None or config.model.adapter is not None
    if config.predictions is None and not has_model:
        raise UserError("model: name one, e.g. --model out/run; or score the answers of a file with --predictions FILE")
    files, texts = _data_files(config, names)
    if measured:
        perplexity.check_words(config, texts)
    if config.predictions is not None:
        if has_model:
            raise UserError("predictions: are scored without a model; leave --model out")
        if len(tasks) > 1:
            raise UserError(f"predictions: holds the answers of one task, here are {len(tasks)}; name one")
        return _score_file(config, tasks[0], files.get(names[0]))
    for task in tasks:
        if task.name not in files:
            raise UserError(f"data: no file for {task.name}; name one: --data {task.name}=FILE")
    jobs = [read_job(task, files[task.name], config.options, config.limit) for task in tasks]
    return _run(config, jobs, texts)


def _data_files(config: EvaluateConfig, names: Sequence[str]) -> tuple[dict[str, Path], list[SourceConfig]]:
    """The data file of each task that has one, and the sources of perplexity, which may have several."""
    from jaxlm.locate import on_disk

    files: dict[str, Path] = {}
    texts: list[SourceConfig] = []
    bare: list[SourceConfig] = []
    for source in config.data:
        name, equals, path = source.path.partition("=")
        if not (equals and name in names):
            bare.append(source)
        elif name == perplexity.NAME:
            texts.append(dataclasses.replace(source, path=path))
        elif name in files:
            raise UserError(f"data: {name} has two files, {files[name]} and {path}; name one")
        else:
            files[name] = on_disk(path, "data", "data")
    if list(names) == [perplexity.NAME]:
        return {}, [*texts, *bare]
    rest = [name for name in names if name not in files and not (texts and name == perplexity.NAME)]
    if len(bare) > len(rest):
        raise UserError(f"data: {len(config.data)} files for {', '.join(names)}; name one for each task")
    for name, source in zip(rest, bare, strict=False):
        if name == perplexity.NAME:
            texts = [source]
        else:
            files[name] = on_disk(source.path, "data", "data")
    return files, texts


def _template(config: EvaluateConfig) -> str:
    texts = f"{perplexity.NAME}="  # which have their own
    templates = {source.template for source in config.data if not source.path.startswith(texts)}
    if len(templates) > 1:
        raise UserError(f"data.template: {' and '.join(sorted(templates))}: a model is asked in one template; name one")
    return next(iter(templates), "auto")


def _directory(config: EvaluateConfig, task: str) -> Path:
    """Where a task's files go."""
    model = config.model.adapter or config.model.path or config.predictions
    assert model is not None
    root = Path(OUTPUT) / Path(model).absolute().name if config.output is None else Path(config.output)
    return root / task


# --- answers of a file ------------------------------------------------------------------------------------------------


def _score_file(config: EvaluateConfig, task: Task, data: Path | None) -> int:
    from rich.console import Console

    from jaxlm.evaluation.job import read_answers, read_job

    assert config.predictions is not None
    path = Path(config.predictions)
    job = None if data is None else read_job(task, data, config.options, config.limit)
    job, answers = read_answers(path, job, task, config.options)
    settings = job.settings() | {"predictions (sha256)": hashlib.sha256(path.read_bytes()).hexdigest()}
    directory = _directory(config, task.name)
    _make(directory)
    facts = {"predictions": str(path), "data": str(job.path), "versions": _versions()}
    if not config.overwrite:
        from jaxlm.evaluation.outputs import read_finished

        read_finished(directory, settings, facts)
    return _finish(directory, job, answers, settings, facts, Console(stderr=True, soft_wrap=True, highlight=False))


def _make(directory: Path) -> None:
    folder = next(parent for parent in [directory.absolute(), *directory.absolute().parents] if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"output: {directory}: nothing can be written in {folder}")
    directory.mkdir(parents=True, exist_ok=True)


def _versions() -> dict[str, str]:
    from jaxlm.processes.distributed import versions

    return versions()


# --- answers of a model -----------------------------------------------------------------------------------------------


def _run(config: EvaluateConfig, jobs: Sequence[Job], texts: Sequence[SourceConfig]) -> int:
    # JAX and everything above it is imported only here: --help and mistakes in the words answer at once.
    from rich.console import Console

    from jaxlm.cli.hub import download_all
    from jaxlm.cli.start import quiet_logs, use_compilation_cache
    from jaxlm.processes.distributed import run_settings, start, versions
    from jaxlm.training.stop import StopAtOnce

    terminal = Console(stderr=True, soft_wrap=True, highlight=False)
    quiet_logs()
    limit_heaps()
    use_compilation_cache(config.compilation_cache)
    with contextlib.ExitStack() as around:
        stop = around.enter_context(StopAtOnce(INTERRUPTED))
        hosts = around.enter_context(start(config.distributed, terminal.print))
        stop.starting(_directory(config, jobs[0].task.name if jobs else perplexity.NAME), hosts)
        if hosts.processes > 1:
            hosts.agree("versions", versions())
            hosts.agree("configuration", run_settings(config))
            hosts.agree("data", {str(job.path): job.digest for job in jobs})
        download_all([config], hosts)
        console = hosts.console(terminal)
        # Said before others are asked for hours: texts that cannot be used.
        prepared = perplexity.prepare(config, texts, console) if texts else None
        if prepared is not None:
            hosts.agree("texts and model", prepared.settings)
        for job in jobs:
            _take(_directory(config, job.task.name), hosts)
        if prepared is not None and _leaves_files(config):
            _take(_directory(config, perplexity.NAME), hosts)
        status = _ask_all(config, jobs, hosts, console) if jobs else 0
        if prepared is not None:
            status |= _measure(config, prepared, hosts, console)
        return status


def _ask_all(config: EvaluateConfig, jobs: Sequence[Job], hosts: Hosts, console: Console) -> int:
    """Tasks with requests, one after the other; the weights are read when there is something to ask."""
    from jaxlm.cli.opening import model_settings, open_model
    from jaxlm.evaluation.outputs import origins

    opened = open_model(config.model, config.tokenizer, _template(config), config.add_bos, config.mesh, console)
    generator: Generator | None = None
    status = 0
    for job in jobs:
        directory = _directory(config, job.task.name)
        settings = job.settings() | model_settings(opened, config.batch_size)
        told = ("model", "adapter", "tokenizer", "dtype", "template")
        facts = {key: opened.facts[key] for key in told} | {"data": str(job.path), "versions": _versions()}
        answers = _answers_before(directory, settings, facts, config.overwrite, hosts)
        if answers is None:
            generator = generator or opened.load(hosts, console)
            answers, more = _ask(config, job, opened, generator, directory, settings, origins(facts), hosts, console)
            facts |= more
        elif hosts.process == 0:
            _say_evaluated(directory, console)
            facts |= _facts_before(directory, "bos", "first_request")
        if hosts.process == 0:
            status |= _finish(directory, job, answers, settings, facts, console)
    return status


def _measure(config: EvaluateConfig, prepared: perplexity.Prepared, hosts: Hosts, console: Console) -> int:
    """Perplexity: scored, or scored before."""
    from jaxlm.evaluation.outputs import JOURNAL

    job, settings = prepared.job, prepared.settings
    if not _leaves_files(config):
        assert config.save_file is not None
        answers, sums = perplexity.measure(prepared, config, None, hosts, console)
        if hosts.process == 0:
            perplexity.tell(prepared, sums)
            show(job.task.name, job.score(answers), console)
            perplexity.save(Path(config.save_file), prepared, sums)
        return 0
    directory = _directory(config, job.task.name)
    before = _answers_before(directory, settings, prepared.facts, config.overwrite, hosts)
    measured = None
    if before is None:
        measured = perplexity.measure(prepared, config, directory / JOURNAL, hosts, console)
    if hosts.process != 0:
        return 0
    if before is not None:
        _say_evaluated(directory, console)
        measured = before, _facts_before(directory, "sums")["sums"]
    assert measured is not None
    answers, sums = measured
    perplexity.tell(prepared, sums)
    facts = prepared.facts | {"sums": sums, "versions": _versions()}
    status = _finish(directory, job, answers, settings, facts, console)
    if config.save_file is not None:
        perplexity.save(Path(config.save_file), prepared, sums)
    return status


def _leaves_files(config: EvaluateConfig) -> bool:
    """Whether perplexity has a directory; where only --save_file is named, that is all that is written."""
    return config.save_file is None or config.output is not None


def _say_evaluated(directory: Path, console: Console) -> None:
    console.print(f"{directory}: was evaluated with these settings before; figures anew", markup=False)


def _take(directory: Path, hosts: Hosts) -> None:
    """Locks the directory of a task; process 0 does so for all."""
    from jaxlm.lock import Lock

    problem = None
    if hosts.process == 0:
        lock = Lock(directory.resolve() / ".lock", f"output: {directory}", "name another --output")
        try:
            _make(directory)
            hosts.take(lock)
        except OSError as error:
            problem = f"output: {directory}: {error.filename}: cannot write there ({error.strerror})"
        except UserError as error:
            problem = str(error)
    hosts.check("output is free", problem)


def _answers_before(
    directory: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], overwrite: bool, hosts: Hosts
) -> list[Answers] | None:
    """The answers of an evaluation that has ended; all processes learn whether there are some."""
    from jaxlm.evaluation.outputs import SCORES, read_finished

    problem, answers = None, None
    if hosts.process == 0:
        try:
            if overwrite and (directory / SCORES).is_file():
                (directory / SCORES).unlink()
            answers = read_finished(directory, settings, facts)
        except UserError as error:
            problem = str(error)
    hosts.check("the output directory", problem)
    ended = hosts.exchange("evaluated before", json.dumps(answers is not None))[0]
    return (answers or []) if json.loads(ended) else None


def _facts_before(directory: Path, *keys: str) -> dict[str, Any]:
    from jaxlm.evaluation.outputs import SCORES
    from jaxlm.jsontext import read_object

    return {key: value for key, value in read_object(directory / SCORES).items() if key in keys}


def _ask(
    config: EvaluateConfig,
    job: Job,
    opened: OpenModel,
    generator: Generator,
    directory: Path,
    settings: Mapping[str, Any],
    origins: Mapping[str, str | None],
    hosts: Hosts,
    console: Console,
) -> tuple[list[Answers], dict[str, Any]]:
    """The answers to every record, and what was fed first."""
    from jaxlm.evaluation.asking import ask, by_record, check_requests, first_fed, make_plan
    from jaxlm.evaluation.journal import Answered, Journal
    from jaxlm.evaluation.outputs import JOURNAL
    from jaxlm.evaluation.task import Answer

    tokenizer = opened.prompts.tokenizer
    requests = job.task.requests(job.records, job.options, tokenizer)
    check_requests(requests, len(job.records))
    with console.status("tokenising"):
        plan = make_plan(requests, generator, opened.prompter, config.batch_size, job.names)
    console.print(
        f"{job.task.name}: {len(job.records):,} records, {len(requests):,} requests; {opened.prompter.beginning}",
        markup=False,
    )
    journal, problem = None, None
    if hosts.process == 0:
        try:
            journal = Journal(directory / JOURNAL, settings, config.overwrite, origins)
        except UserError as error:
            problem = str(error)
    hosts.check("the journal", problem)
    known = json.loads(hosts.exchange("answered", json.dumps([] if journal is None else list(journal.answers)))[0])
    answered = Answered(dict.fromkeys(known, Answer())) if journal is None else journal
    if answered.answers:
        console.print(f"going on: {len(answered.answers):,} of {len(requests):,} were answered before", markup=False)
    with _progress(console, len(requests), len(answered.answers)) as advance:
        ask(plan, generator, tokenizer, answered, advance)
    if journal is not None:
        journal.close()
    facts = {"bos": opened.prompter.beginning, "first_request": first_fed(plan, tokenizer)}
    return by_record(len(job.records), requests, answered.answers), facts


@contextlib.contextmanager
def _progress(console: Console, total: int, done: int) -> Any:
    """A bar with questions per second and the time that is left; gives the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from jaxlm.screen import Bars

    columns = TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    started, asked = time.perf_counter(), 0
    with Bars(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=total, completed=done, speed="")

        def advance(count: int) -> None:
            nonlocal asked
            asked += count
            speed = f"{asked / (time.perf_counter() - started):.1f} questions/s"
            progress.update(task, advance=count, speed=speed)

        yield advance


def _finish(
    directory: Path,
    job: Job,
    answers: Sequence[Answers],
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    console: Console,
) -> int:
    """Scores the answers, writes everything, and shows the figures."""
    from jaxlm.evaluation import outputs

    errors = [answer.error for parts in answers for answer in parts.values() if answer.error is not None]
    figures = job.score(answers)
    outputs.write_predictions(directory, job, answers)
    outputs.write_report(directory, job, answers, figures, facts, errors)
    outputs.write_scores(directory, settings, facts, figures, len(errors))
    (directory / outputs.JOURNAL).unlink(missing_ok=True)
    show(job.task.name, figures, console)
    console.print(f"{len(job.records):,} records; wrote {directory}", markup=False)
    for error in errors[:5]:
        console.print(f"not answered: {error}", markup=False)
    if len(errors) > 5:
        console.print(f"and {len(errors) - 5:,} more; each has its error in predictions.jsonl", markup=False)
    return 1 if errors else 0


def show(title: str, figures: Mapping[str, Figure], console: Console) -> None:
    """The figures as a table on standard output."""
    from jaxlm.screen import new_table, print_table

    table = new_table("figure", "value", "stderr", "n", title=title)
    for name, figure in figures.items():
        stderr = "" if figure.stderr is None else f"{figure.stderr:.4f}"
        table.add_row(name, f"{figure.value:.4f}", stderr, f"{figure.n:,}")
    print_table(table)
