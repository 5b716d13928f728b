"""The training loop: open, place, compile, announce, run, finish. `train` reads from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxlm.config import to_dict
from jaxlm.data.batches import SOURCE_TOKENS
from jaxlm.devices.mesh import local_rows
from jaxlm.devices.trace import STEP
from jaxlm.errors import UserError
from jaxlm.locate import record_base
from jaxlm.processes.distributed import Hosts, versions
from jaxlm.runs.events import EVENTS, EventLog, read_events, resumed_steps
from jaxlm.runs.metrics import METRICS, read_metrics
from jaxlm.runs.plots import plot_losses, plot_rewards
from jaxlm.training.advice import final_warnings
from jaxlm.training.announce import announce, last_words, why_not_finite
from jaxlm.training.consumption import Consumption, plot_consumption
from jaxlm.training.job import Job, Outcome, Rollouts, TaskFigure, TrainingTask
from jaxlm.training.objectives.preference import REFERENCE
from jaxlm.training.profile import Profile, check_profile
from jaxlm.training.reference import reference_columns
from jaxlm.training.report import MetricsWriter, ProgressReport, flops_per_token
from jaxlm.training.routing import RoutingReport
from jaxlm.training.setup import CompiledSteps, TrainSetup, begin_compiling, compile_steps, set_up
from jaxlm.training.start import PASS_OVER, History, Start, open_history, place_state
from jaxlm.training.state import Initializer, TrainState, model_variables
from jaxlm.training.stop import Stop
from jaxlm.weights.native.layout import CHECKPOINTS, FINGERPRINTS, MODEL_JSON, RUN_YAML
from jaxlm.weights.native.model_json import ModelFile

AHEAD = 2  # batches of an evaluation that the devices have before them
NO_FIGURES: Mapping[str, TaskFigure] = types.MappingProxyType({})


def train(job: Job, console: Console, hosts: Hosts, stop: Stop) -> Outcome:
    """Runs a job to its end, or until a signal; everything it writes is below output_dir.

    Args:
        job: the run.
        console: process 0 prints to it.
        hosts: the processes, all of which have the same job and see the same output_dir.
        stop: watches for signals.

    Raises:
        UserError: for settings that do not fit together, a changed config on resume, a full disk, weights or a
            loss that are not finite (the loss with train.on_nonfinite: stop).
    """
    config = job.config
    history = open_history(job, hosts)
    setup = set_up(config, job.model, objective=job.objective)
    # Each host has its own table of measured kernels; with different programs they would wait for each other for ever.
    hosts.agree("attention", {"model.attention": setup.attention[0]})
    data = history.inputs.data  # in rows as the run's first start packed them
    drawn = job.rollouts is not None
    batches = data.train_batches(
        config.train.global_batch_size // (job.rollouts.group if job.rollouts is not None else 1),
        1 if drawn else setup.accumulation,
        config.train.epochs,
        config.train.steps,
        None if drawn else local_rows(setup.mesh, setup.micro_rows),
        history.data_state,
    )
    check_profile(config, len(batches))
    schedule = setup.schedule(len(batches))
    initializer = setup.initializer(schedule)
    terminal = console if hosts.process == 0 else None
    if history.step >= len(batches):
        start = place_state(job, hosts, setup, initializer, history)
        return _already_complete(job, setup, initializer, history, start, len(batches), terminal, stop)
    programs = begin_compiling(setup, initializer, schedule, job.data.validation is not None)
    start = place_state(job, hosts, setup, initializer, history)

    if REFERENCE in setup.objective.fields:
        columns, validation = reference_columns(job, hosts, setup, start, data, terminal)
        batches = batches.with_columns(columns)
        job = dataclasses.replace(job, data=dataclasses.replace(job.data, validation_columns=validation))
    compiled = compile_steps(initializer, programs, terminal)
    announcement = announce(job, setup, initializer, start, compiled, schedule, batches)
    for output in (terminal, hosts.log):
        if output is not None:
            announcement.print(output)
    events = EventLog(Path(config.output_dir) if hosts.process == 0 else None)
    events.write(
        "start",
        step=start.step,
        total=len(batches),
        facts=dict(announcement.named_facts()),
        data=job.data.report.lines(),
        versions=versions(),
        processes=hosts.processes,
    )
    remarks = [line for line in job.data.report.remarks() if line.startswith("warning: ")]
    for warning in (*(line.removeprefix("warning: ") for line in remarks), *announcement.warnings):
        events.write("warning", text=warning)

    run = TrainingRun(job, setup, compiled, start, history, batches, hosts, terminal, events)
    del start  # its state belongs to the first step
    stop.stepping()
    with events.ending():
        run.run()
    return _finish(run, stop, final_warnings(config.optimizer, schedule, run.total, not run.any_gradient))


class TrainingRun:
    """Steps, evaluates and saves until the last step or a signal.

    Attributes:
        state: after `step` steps; its buffers are donated to the next one.
        step: steps done.
        total: steps of the run.
        saved: step of the newest checkpoint.
        validation: validation losses by step, in order.
        any_gradient: a step had a gradient other than 0.
    """

    def __init__(
        self,
        job: Job,
        setup: TrainSetup,
        compiled: CompiledSteps,
        start: Start,
        history: History,
        batches: Any,
        hosts: Hosts,
        terminal: Console | None,
        events: EventLog,
    ) -> None:
        self.job, self.setup, self.compiled, self.history, self.hosts = job, setup, compiled, history, hosts
        self.events = events
        self.checkpoints, self.local, self.batches = history.checkpoints, start.local, batches
        self.state: TrainState = start.state
        self.frozen, self.step, self.total = start.frozen, start.step, len(batches)
        self.saved = history.step
        self.validation: list[tuple[int, float]] = []
        self.any_gradient = False
        self.out = Path(job.config.output_dir)
        self.files = _checkpoint_files(job, history, self.out)
        self.writer = _metrics_writer(job, self.out, start.step) if hosts.process == 0 else None
        lengths = job.config.data.sequence_length, job.config.data.row_length("encoder_ids")
        flops = flops_per_token(job.model, lengths[0], job.config.lora is None, lengths[1])
        self.report = ProgressReport(terminal, self.total, start.step, flops, hosts.log)
        self.routing = RoutingReport(job.model.experts)
        self.profile = Profile(job.config, hosts, start.step, lambda: compiled.train.as_text() or "")
        self._skipped = int(start.state.skipped)
        self._unread: tuple[int, Any, dict[str, float]] | None = None  # metrics of the newest step, on the devices
        self._rows = batches.iterator()
        self._rows.set_state(start.data_state)
        data = history.inputs.data
        self._packing = {"packing": data.packing_version} if data.packing_version > 1 else {}
        self.consumption = Consumption(data.source_names, data.source_tokens, start.data_state)

    def run(self) -> None:
        """Runs to the last step, or to the one that all processes agree to stop at, and saves its state.

        Raises:
            UserError: for a step that is not finite with train.on_nonfinite: stop, or a disk that is full.
        """
        with contextlib.closing(self.report), contextlib.closing(self._rows):
            try:
                self._run()
            except _NonFiniteError as error:
                self._save(None, stopped=str(error))
                self.checkpoints.close()
                raise UserError(
                    f"{error}; it was not taken, and the run is saved in {self.checkpoints.path(self.saved)}. "
                    f"{why_not_finite(error.step, self.job.config)}; or else {PASS_OVER}"
                ) from None
            finally:
                self._end_profile()
                if self.writer is not None:
                    self.writer.close()

    def _run(self) -> None:
        settings = self.job.config.train
        if self.step == 0 and settings.eval_every:
            self._evaluate()
        if self.step == 0:
            self._run_tasks(self.job.tasks)
        while self.step < self.total and not self.hosts.due():
            if self.profile.begins_with(self.step + 1):
                self._read_metrics()  # its work is not to be in the trace
                self.profile.begin(self.step + 1)
                self.report.pause()
            with jax.profiler.StepTraceAnnotation(STEP, step_num=self.step + 1):
                self._take_step()
            evaluates, saves = self._is_due(settings.eval_every), self._is_due(settings.save_every)
            tasks = [task for task in self.job.tasks if self._is_due(task.every)]
            if evaluates or saves or tasks:
                self._read_metrics()
                loss = self._evaluate() if evaluates else None
                figures = self._run_tasks(tasks)
                if saves:
                    self._save(loss, figures)
                    self.report.pause()
            if self.local is not None and not saves and self.step % settings.local_every == 0:
                self._read_metrics()
                self.local.save(self.state, self._position(), self.files)
            if self.profile.ends_with(self.step):
                self._read_metrics()
                self._end_profile()
        self._read_metrics()
        if self.saved != self.step:
            self._save(None)
        self.checkpoints.wait()

    def _end_profile(self) -> None:
        said = self.profile.end(self.step)
        if said is not None:
            self.report.say(said)
            self.report.pause()
            if said.startswith("train.profile"):
                self.events.write("warning", text=said)

    def _is_due(self, every: int) -> bool:
        return self.step == self.total or (every > 0 and self.step % every == 0)

    def _take_step(self) -> None:
        rows = next(self._rows)
        figures: dict[str, float] = {}
        source_tokens = rows[SOURCE_TOKENS]
        if self.job.rollouts is not None:
            rows, figures = self._roll_out(self.job.rollouts, rows)
        batch = self.setup.put_batch(rows, self.setup.micro_rows)
        self.state, metrics = self.compiled.train(self.state, self.frozen, batch)
        self.step += 1
        self._read_metrics()  # of the step before: the devices are busy with this one by then
        self.consumption.add(source_tokens)
        self._unread = (self.step, metrics, figures)

    def _roll_out(self, rollouts: Rollouts, prompts: Any) -> tuple[Any, dict[str, float]]:
        """The batch of the model's own answers; the state is saved where a reward ends the run."""
        setup, variables = self.setup, model_variables(self.state.trainable, self.frozen)
        done = False
        try:
            batch, figures = rollouts(prompts, self.step, setup.accumulation, setup.model, variables, setup.mesh)
            done = True
        finally:
            if not done and self.saved != self.step:
                self._read_metrics()
                self._rows.set_state({"step": self.step})  # these prompts are asked again
                self._save(None)
                self.checkpoints.wait()
        mine = list(local_rows(setup.mesh, setup.micro_rows))
        return {name: value[:, mine] for name, value in batch.items()}, figures

    def _read_metrics(self) -> None:
        """Waits for the newest step, and reports it."""
        if self._unread is None:
            return
        (step, arrays, figures), self._unread = self._unread, None
        metrics = jax.device_get(arrays)
        routed = self.routing.take(metrics)
        values = {name: value.item() for name, value in metrics.items()} | figures
        speed = self.report.step(step, values)
        if self.writer is not None and (step % self.job.config.train.log_every == 0 or step == self.total):
            self.writer.write(step, {**values, **speed, **routed, **self.consumption.figures()})
        self.any_gradient = self.any_gradient or values["grad_norm"] != 0
        if values["skipped"] > self._skipped:
            self._skipped = values["skipped"]
            text = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
            if self.job.config.train.on_nonfinite == "stop":
                raise _NonFiniteError(step, text)
            self.report.say(f"{text}: step skipped")
            self.events.write("warning", text=f"{text}: step skipped")

    def _evaluate(self) -> float | None:
        """The validation loss; None without validation rows, or when a signal asks for the end."""
        result = validate(self.job, self.setup, self.compiled, self.state, self.frozen, self.hosts)
        if result is None:
            return None
        figures, text = result
        if self.writer is not None:
            self.writer.write(self.step, figures)
        self.report.say(f"step {self.step}: {text}")
        loss = float(figures["validation_loss"])
        self.validation.append((self.step, loss))
        self.report.pause()
        return loss

    def _run_tasks(self, tasks: Sequence[TrainingTask]) -> dict[str, TaskFigure]:
        """The figures of tasks by TASK/FIGURE; those of tasks that come before a signal asks for the end."""
        found: dict[str, TaskFigure] = {}
        for task in tasks:
            if self.hosts.due():
                break
            variables = model_variables(self.compiled.weights(self.state), self.frozen)
            figures = {
                f"{task.name}/{name}": figure
                for name, figure in task(self.setup.model, variables, self.setup.mesh).items()
            }
            found |= figures
            values: dict[str, Any] = {name: figure.value for name, figure in figures.items()}
            errors = {name: figure.stderr for name, figure in figures.items() if figure.stderr is not None}
            if self.writer is not None:
                self.writer.write(self.step, values | {f"{name}_stderr": error for name, error in errors.items()})
            shown = (
                f"{name} {value:.4f}{f' ± {errors[name]:.4f}' if name in errors else ''}"
                for name, value in values.items()
            )
            self.report.say(f"step {self.step}: {', '.join(shown)}")
            self.report.pause()
        best = self.job.config.train.best
        ran = [task.name for task in tasks if any(name.startswith(f"{task.name}/") for name in found)]
        if best is not None and best.partition("/")[0] in ran and best not in found:
            raise UserError(f"train.best: {best!r} is not a figure of the task; there are {', '.join(found)}")
        return found

    def _position(self) -> dict[str, Any]:
        """Where the run stands in its data."""
        counters = self.batches.counters(self.step)
        return {**self._rows.get_state(), **counters, **self._packing, **self.consumption.state()}

    def _save(self, validation_loss: float | None, figures: Mapping[str, TaskFigure] = NO_FIGURES, **more: str) -> None:
        best = self.job.config.train.best
        figure = None if best is None else figures.get(best)
        value = validation_loss if best is None else None if figure is None else figure.value
        higher = figure is not None and figure.higher_is_better is not False
        position = {**self._position(), **more}
        weights = self.compiled.weights(self.state)
        other = None if weights is self.state.trainable else weights
        self.saved = self.checkpoints.save(self.state, position, self.files, value, higher, other)


class _NonFiniteError(Exception):
    def __init__(self, step: int, text: str) -> None:
        super().__init__(text)
        self.step = step


def validate(
    job: Job, setup: TrainSetup, compiled: CompiledSteps, state: TrainState, frozen: Any, hosts: Hosts
) -> tuple[dict[str, float], str] | None:
    """The objective's figures over all validation rows, and a line about them; None without any.

    Also None once a signal asks for the end: a preempted machine has seconds left, and they are for saving. The sums of
    a batch stay on the devices, which compute the next ones meanwhile, and are read together at the end. There they are
    added in float64: added in float32 on the devices, they would depend on the number of batches.
    """
    if compiled.evaluate is None:
        return None
    rows, weights = setup.eval_rows, compiled.weights(state)
    results: list[dict[str, jax.Array]] = []
    for batch in job.data.eval_batches(rows, local_rows(setup.mesh, rows)):
        micro = setup.put_batch({name: array[None] for name, array in batch.items()}, rows)
        results.append(compiled.evaluate(weights, frozen, micro))
        if len(results) > AHEAD:
            jax.block_until_ready(results[-1 - AHEAD])  # so that the end that is asked for is near
        if hosts.due():
            return None
    sums: dict[str, float] = {}
    for result in jax.device_get(results):
        for name, value in result.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return setup.objective.validation(sums)


def _already_complete(
    job: Job,
    setup: TrainSetup,
    initializer: Initializer,
    history: History,
    start: Start,
    total: int,
    terminal: Console | None,
    stop: Stop,
) -> Outcome:
    """The outcome of a run whose last step an earlier start has saved."""
    out, checkpoint = Path(job.config.output_dir), history.checkpoints.path(start.step)
    best = history.checkpoints.best()
    history.checkpoints.close()
    stop.finished()
    if terminal is not None:
        if (out / METRICS).exists() and not (out / "loss.png").exists():
            plot_losses(read_metrics(out / METRICS), out / "loss.png", resumed_steps(read_events(out / EVENTS)))
        terminal.print(f"complete: {checkpoint} is step {start.step} of {total}", highlight=False)
    return Outcome(
        step=start.step,
        interrupted=None,
        saved=True,
        checkpoint=checkpoint,
        model=setup.model,
        variables=model_variables(initializer.weights(start.state), start.frozen),
        mesh=setup.mesh,
        validation=[],
        best=best,
        complete=True,
    )


def _finish(run: TrainingRun, stop: Stop, warnings: list[str]) -> Outcome:
    """Closes the checkpoints, draws the plots, and says how the run ended.

    Args:
        warnings: printed if the run is complete.
    """
    best = run.checkpoints.best()
    run.checkpoints.close()
    complete = run.step == run.total
    if complete:
        stop.finished()
    if run.local is not None and run.saved == run.total:
        run.local.clear()
    elif run.local is not None:
        run.local.wait()
    if run.hosts.process == 0:
        metrics = read_metrics(run.out / METRICS)
        plot_losses(metrics, run.out / "loss.png", resumed_steps(read_events(run.out / EVENTS)))
        plot_rewards(metrics, run.out / "preference.png")
        run.routing.plot(run.out / "experts.png")
        plot_consumption(metrics, run.out / "data.png")
    checkpoint, saved_none = run.checkpoints.path(run.saved), run.saved == run.history.step
    if run.hosts.stopped_by is not None:
        run.report.say(last_words(run.hosts.stopped_by, stop, saved_none, run.step, run.total, checkpoint))
    for warning in warnings if complete else []:
        run.report.say(f"warning: {warning}")
        run.events.write("warning", text=warning)
    run.events.write("end", step=run.step, complete=complete, stopped_by=run.hosts.stopped_by)
    return Outcome(
        step=run.step,
        interrupted=run.hosts.stopped_by,
        saved=not saved_none,
        checkpoint=checkpoint,
        model=run.setup.model,
        variables=model_variables(run.compiled.weights(run.state), run.frozen),
        mesh=run.setup.mesh,
        validation=run.validation,
        best=best,
        complete=complete,
    )


def _checkpoint_files(job: Job, history: History, out: Path) -> Mapping[str, bytes]:
    """The small files of every checkpoint."""
    config = job.config
    description = ModelFile(
        job.model,
        config.model.param_dtype if config.lora is None else "float32",
        config.lora,
        base={} if config.model.path is None else record_base(config.model.path, out / CHECKPOINTS / "0"),
        rounding=history.inputs.rounding,
    )
    return {
        **job.files,
        RUN_YAML: job.run_yaml.encode(),
        FINGERPRINTS: history.inputs.to_json(),
        MODEL_JSON: description.to_bytes(),
    }


def _metrics_writer(job: Job, out: Path, step: int) -> MetricsWriter:
    (out / "config.yaml").write_text(job.run_yaml, encoding="utf-8")
    settings = job.config.train
    return MetricsWriter(out, step, settings.tensorboard, settings.wandb, to_dict(job.config))
