"""The training loop: set up, resume, step, evaluate, save. Reads from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxlm.config import RunConfig, to_dict
from jaxlm.data.loader import Data
from jaxlm.errors import UserError
from jaxlm.locate import record_base
from jaxlm.models.llama import Llama
from jaxlm.models.shapes import LlamaConfig
from jaxlm.parallel.distributed import Hosts
from jaxlm.parallel.mesh import axis_sizes, local_rows, put_batch, rows_axis_size
from jaxlm.training.build import Build, build
from jaxlm.training.checkpoint import Checkpoints, model_json
from jaxlm.training.local_checkpoint import LocalCheckpoints
from jaxlm.training.optimizer import Schedule
from jaxlm.training.report import (
    MetricsWriter,
    ProgressReport,
    flops_per_token,
    human_bytes,
    plot_losses,
    print_pairs,
    read_metrics,
)
from jaxlm.training.resume import base_fingerprint, check_unchanged
from jaxlm.training.routing import RoutingReport
from jaxlm.training.state import Initializer, Readable, TrainState, bytes_per_device, count
from jaxlm.training.step import merged_variables


@dataclasses.dataclass(frozen=True)
class Job:
    """A run with its inputs opened.

    Attributes:
        config: the run.
        run_yaml: the config as text, kept with every checkpoint.
        model: shape of the model.
        source: where base parameters are read from; None for a fresh model.
        adapter: adapter to start from; None for a fresh one.
        data: the rows.
        files: small files kept with every checkpoint (tokenizer/..., hf_config.json).
        verbose: say at start-up also what choices rest on.
    """

    config: RunConfig
    run_yaml: str
    model: LlamaConfig
    source: Readable | None
    adapter: Readable | None
    data: Data
    files: Mapping[str, bytes]
    verbose: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        step: last step done.
        interrupted: a signal asked for the end.
        checkpoint: the newest checkpoint.
        model: the model object, for sampling.
        variables: trained variables, as `Model.apply` takes them.
        mesh: the mesh they live on.
        validation: validation losses by step, in order.
        best: (step, loss) of the best checkpoint kept.
    """

    step: int
    interrupted: bool
    checkpoint: Path
    model: Llama
    variables: Any
    mesh: jax.sharding.Mesh
    validation: list[tuple[int, float]]
    best: tuple[int, float] | None


class _StopSignal:
    """SIGTERM and SIGINT ask all processes to save and end; a second SIGINT ends at once."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._received = False

    def __enter__(self) -> _StopSignal:
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, number: int, frame: Any) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
        self._hosts.ask_stop(signal.Signals(number).name)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(job: Job, console: Console, hosts: Hosts) -> Outcome:
    """Runs a job to its end, or until a signal; everything it leaves lies below output_dir.

    Args:
        job: the run.
        console: where process 0 tells about it.
        hosts: the processes, all of which have the same job and see the same output_dir.

    Raises:
        UserError: for settings that do not fit together, a changed config on resume, a full disk, a
            loss that is not finite (with train.on_nonfinite: stop).
    """
    config, first_host = job.config, hosts.process == 0
    out = Path(config.output_dir)
    terminal = console if first_host else None
    hosts.agree("data", _data_prints(job))

    # Model and mesh ---------------------------------------------------------------------------
    built = build(config, job.model)
    mesh, model, accumulation, micro_rows = built.mesh, built.model, built.accumulation, built.micro_rows
    # Hosts have tables of their own; with different programs they would wait for each other for ever.
    hosts.agree("attention", {"model.attention": built.attention[0]})
    batches = job.data.train_batches(
        config.train.global_batch_size,
        accumulation,
        config.train.epochs,
        config.train.steps,
        local_rows(mesh, micro_rows),
    )
    total = len(batches)
    optimizer, schedule = built.optimizer(total)
    setup = built.initializer(optimizer)

    # State: resumed, loaded or fresh ----------------------------------------------------------
    checkpoints = Checkpoints(out / "checkpoints", config.train.keep)
    steps_saved = checkpoints.steps()
    hosts.agree("checkpoints", {"steps": steps_saved})
    if steps_saved and not config.train.resume:
        raise UserError(
            f"output_dir: {out} holds checkpoints and train.resume is false; choose another output_dir or delete it"
        )
    prints = {"data": job.data.fingerprint}
    if config.lora is not None and job.source is not None:
        prints["base"] = base_fingerprint(job.model, job.source)
    saved = steps_saved[-1] if steps_saved else 0
    if steps_saved:
        check_unchanged(checkpoints.files(saved), config, prints, checkpoints.path(saved))
    local, newer = _local_checkpoints(config, hosts, setup, saved)
    if local is not None and newer is not None:
        check_unchanged(local.files(newer), config, prints, local.path(newer))
    base = None
    if config.lora is not None or not (steps_saved or newer):
        base = setup.load_params(job.source) if job.source is not None else setup.init_params(config.train.seed)
    frozen = {"params": base} if config.lora is not None else {}
    if local is not None and newer is not None:
        step, (state, data_state) = newer, local.restore(newer)
    elif steps_saved:
        step, (state, data_state) = saved, checkpoints.restore(saved, setup.abstract_state())
    else:
        step, data_state = 0, {"step": 0}
        state = setup.new_state(_new_trainable(job, setup, base), config.train.seed)
    del base
    if saved >= total:
        best = checkpoints.best()
        checkpoints.close()
        if first_host and (out / "metrics.jsonl").exists() and not (out / "loss.png").exists():
            plot_losses(read_metrics(out / "metrics.jsonl"), out / "loss.png")
        if terminal is not None:
            terminal.print(f"complete: {checkpoints.path(step)} is step {step} of {total}", highlight=False)
        return Outcome(
            step, False, checkpoints.path(step), model, merged_variables(state.trainable, frozen), mesh, [], best
        )

    # Programs ---------------------------------------------------------------------------------
    train_step, eval_step, compile_seconds, memory = _compile(job, built, setup, schedule, state, frozen, terminal)
    resumed = f"from step {step}" + ("" if newer is None else ", kept by each host") if step else None
    for told in (terminal, hosts.log):
        if told is not None:
            _announce(told, job, built, setup, total, resumed, compile_seconds, memory)

    # Loop -------------------------------------------------------------------------------------
    files = {**job.files, "run.yaml": job.run_yaml.encode(), "fingerprints.json": json.dumps(prints).encode()}
    files["model.json"] = model_json(
        job.model.to_dict(),
        None if config.lora is None else to_dict(config.lora),
        {} if config.model.path is None else record_base(config.model.path, out / "checkpoints" / "0"),
        config.model.param_dtype if config.lora is None else "float32",
    )
    writer = _metrics_writer(job, out, step) if first_host else None
    report = ProgressReport(
        terminal, total, step, flops_per_token(job.model, config.data.sequence_length, config.lora is None), hosts.log
    )
    routing = RoutingReport(job.model.moe)
    validation: list[tuple[int, float]] = []
    pending: tuple[int, Any] | None = None
    skipped = int(state.skipped)

    def finish_pending() -> None:
        """Reads the metrics of the step before: the device is by then busy with the next one."""
        nonlocal pending, skipped
        if pending is None:
            return
        done, found = pending[0], jax.device_get(pending[1])
        pending = None
        use, seen = found.pop("expert_use", None), found.pop("modality_tokens", None)
        values = {key: float(value) for key, value in found.items()}
        experts_used = {} if use is None else routing.add(use, seen)
        figures = report.step(done, values)
        if writer is not None and (done % config.train.log_every == 0 or done == total):
            counts = {key: int(values[key]) for key in ("tokens", "target_tokens", "skipped")}
            writer.write(done, {**values, **counts, **figures, **experts_used})
        if values["skipped"] > skipped:
            skipped = int(values["skipped"])
            what = f"step {done}: loss {values['loss']}, gradient norm {values['grad_norm']}"
            if config.train.on_nonfinite == "stop":
                raise _NonFinite(what)
            report.say(f"{what}: step skipped")

    def evaluate(at: int) -> float | None:
        result = _evaluate(job, eval_step, state, frozen, mesh, hosts)
        if result is None:
            return None
        if writer is not None:
            writer.write(at, result)
        report.say(
            f"step {at}: validation loss {result['validation_loss']:.4f}, "
            f"perplexity {result['validation_perplexity']:.2f}, accuracy {result['validation_accuracy']:.1%}"
        )
        validation.append((at, result["validation_loss"]))
        report.pause()
        return float(result["validation_loss"])

    rows = batches.iterator()
    rows.set_state(data_state)
    with _StopSignal(hosts), contextlib.closing(report), contextlib.closing(rows):
        try:
            if step == 0 and config.train.eval_every:
                evaluate(0)
            while step < total and not hosts.due():
                batch = put_batch(next(rows), mesh, micro_rows)
                state, metrics = train_step(state, frozen, batch)
                step += 1
                finish_pending()
                pending = (step, metrics)
                due_eval = _due(step, config.train.eval_every, total)
                due_save = _due(step, config.train.save_every, total)
                if due_eval or due_save:
                    finish_pending()
                    validation_loss = evaluate(step) if due_eval else None
                    if due_save:
                        saved = checkpoints.save(state, rows.get_state(), files, validation_loss)
                        report.pause()
                if local is not None and not due_save and step % config.train.local_every == 0:
                    finish_pending()
                    local.save(state, rows.get_state(), files)
            finish_pending()
            if saved != step:
                saved = checkpoints.save(state, rows.get_state(), files, None)
            checkpoints.wait()
        except _NonFinite as error:
            saved = checkpoints.save(state, rows.get_state(), files, None)
            checkpoints.close()
            raise UserError(
                f"{error}; it was not taken, and the run is saved in {checkpoints.path(saved)}. Lower "
                f"optimizer.learning_rate, or set train.on_nonfinite: skip to pass over such steps"
            ) from None
        finally:
            if writer is not None:
                writer.close()
    best = checkpoints.best()
    checkpoints.close()
    if local is not None and saved == total:
        local.clear()
    elif local is not None:
        local.wait()
    if first_host:
        plot_losses(read_metrics(out / "metrics.jsonl"), out / "loss.png")
        routing.plot(out / "experts.png")
    if hosts.stopped_by is not None and step < total:
        report.say(
            f"{hosts.stopped_by}: saved step {saved} of {total} in {checkpoints.path(saved)}. "
            f"Run the same command again to go on from there."
        )
    return Outcome(
        step=step,
        interrupted=hosts.stopped_by is not None,
        checkpoint=checkpoints.path(saved),
        model=model,
        variables=merged_variables(state.trainable, frozen),
        mesh=mesh,
        validation=validation,
        best=best,
    )


class _NonFinite(Exception):
    pass


def _local_checkpoints(
    config: RunConfig, hosts: Hosts, setup: Initializer, saved: int
) -> tuple[LocalCheckpoints | None, int | None]:
    """The hosts' own copies, and the step to go on from when they are newer than what is saved for all."""
    if config.train.local_checkpoints is None:
        return None, None
    if config.train.local_every < 1:
        raise UserError(f"train.local_every: {config.train.local_every}; give a positive number of steps")
    folder = Path(config.train.local_checkpoints)
    local = LocalCheckpoints(folder, Path(config.output_dir), hosts, setup.abstract_state())
    return local, local.newest(after=saved)


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _data_prints(job: Job) -> dict[str, str]:
    """What tells whether two processes have read the same data and the same base."""
    prints = {"hash of all tokens": job.data.fingerprint[:16]}
    for kind, reports in (("train", job.data.report.train), ("validation", job.data.report.validation)):
        prints |= {f"data.{kind}[{number}]": report.line() for number, report in enumerate(reports)}
    if job.source is not None:
        prints["hash of the model's norms at model.path"] = base_fingerprint(job.model, job.source)[:16]
    return prints


def _new_trainable(job: Job, setup: Initializer, base: Any) -> Any:
    if job.config.lora is None:
        return {"params": base}
    if job.adapter is not None:
        return {"lora": setup.load_lora(job.adapter)}
    return {"lora": setup.init_lora(base, job.config.train.seed + 1)}


def _compile(
    job: Job,
    built: Build,
    setup: Initializer,
    schedule: Schedule,
    state: TrainState,
    frozen: Any,
    console: Console | None,
) -> tuple[Any, Any, float, int | None]:
    """Both programs, compiled ahead of the loop: seconds it took, and bytes of one device."""
    started = time.perf_counter()
    status = console.status("compiling the train step") if console is not None else contextlib.nullcontext()
    with status:
        train_step = built.compile(built.lower_train_step(setup, schedule, state, frozen))
        eval_step = None
        if job.data.validation is not None:
            rows = _eval_rows(job.config, rows_axis_size(built.mesh))
            eval_step = built.compile(built.lower_eval_step(rows, state.trainable, frozen))
    seconds = time.perf_counter() - started
    analysis = train_step.memory_analysis()
    memory = None
    if analysis is not None:
        memory = int(
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
            + analysis.temp_size_in_bytes
        )
    return train_step, eval_step, seconds, memory


def _eval_rows(config: RunConfig, row_groups: int) -> int:
    return config.train.micro_batch_size * row_groups


def _evaluate(
    job: Job, eval_step: Any, state: TrainState, frozen: Any, mesh: jax.sharding.Mesh, hosts: Hosts
) -> dict[str, Any] | None:
    """Token-weighted loss, perplexity and accuracy over all validation rows; None without any.

    None too once a signal asks for the end: a preempted machine has seconds left, and they are for saving.
    """
    if eval_step is None:
        return None
    rows = _eval_rows(job.config, rows_axis_size(mesh))
    sums = dict.fromkeys(("loss", "correct", "target_tokens"), 0.0)
    for batch in job.data.eval_batches(rows, local_rows(mesh, rows)):
        micro = put_batch({name: array[None] for name, array in batch.items()}, mesh, rows)
        out = jax.device_get(eval_step(state.trainable, frozen, micro))
        if hosts.due():
            return None
        for key in sums:
            sums[key] += float(out[key])
    loss = sums["loss"] / max(sums["target_tokens"], 1.0)
    return {
        "validation_loss": loss,
        "validation_perplexity": float(np.exp(min(loss, 700.0))),
        "validation_accuracy": sums["correct"] / max(sums["target_tokens"], 1.0),
        "validation_tokens": int(sums["target_tokens"]),
    }


def _metrics_writer(job: Job, out: Path, step: int) -> MetricsWriter:
    (out / "config.yaml").write_text(job.run_yaml, encoding="utf-8")
    train_config = job.config.train
    return MetricsWriter(out, step, train_config.tensorboard, train_config.wandb, to_dict(job.config))


def _announce(
    console: Console,
    job: Job,
    built: Build,
    setup: Initializer,
    total: int,
    resumed: str | None,
    compile_seconds: float,
    memory: int | None,
) -> None:
    """What will happen, before it does."""
    config = job.config
    everything = count(setup.params)
    trained = count(setup.trainable)
    devices = jax.devices()
    axes = " x ".join(f"{axis} {size}" for axis, size in axis_sizes(built.mesh).items() if size > 1) or "one device"
    train_bytes = bytes_per_device(setup.trainable, setup.trainable_shardings)
    opt_bytes = bytes_per_device(setup.opt_state, setup.opt_shardings)
    pairs = []
    start = config.model.path or f"fresh {config.model.shape}"
    pairs.append(("model", f"{start}: {everything:,} parameters, {job.model.num_layers} layers"))
    how = "all" if config.lora is None else f"LoRA rank {config.lora.rank} on {', '.join(config.lora.targets)}"
    pairs.append(("trained", f"{trained:,} ({trained / everything:.2%}): {how}"))
    pairs.append(("devices", f"{len(devices)} {devices[0].device_kind}, {axes}"))
    needs = "" if memory is None else f"{human_bytes(memory)} by the compiler's count; "
    pairs.append(
        ("memory per device", f"{needs}trained {human_bytes(train_bytes)}, optimizer {human_bytes(opt_bytes)}")
    )
    pairs.append(("attention", built.attention[1]))
    if job.verbose:
        pairs.append(("", built.attention_details()))
    if job.model.moe is not None and built.experts is not None:
        moe = job.model.moe
        own = ", ".join(f"{name} {k}" for name, k in zip(moe.modalities, moe.top_k, strict=True))
        pairs.append(("experts", f"{moe.experts}, router {moe.router}, a token uses: {own}"))
        pairs.append(("", f"{built.experts[0]}: {built.experts[1]}"))
    rows, length = config.train.global_batch_size, config.data.sequence_length
    micro = "" if built.accumulation == 1 else f", in {built.accumulation} micro-steps"
    pairs.append(("a step", f"{rows} rows of {length} = {rows * length:,} tokens{micro}; {total} steps"))
    pairs.append(("precision", f"parameters {config.model.param_dtype}, compute {config.model.dtype}"))
    pairs.append(("remat", config.model.remat))
    pairs.append(("compiled", f"in {compile_seconds:.1f} s"))
    if resumed is not None:
        pairs.append(("resumed", resumed))
    print_pairs(console, pairs)
