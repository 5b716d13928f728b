"""The training loop: set up, resume, step, evaluate, save. Reads from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxlm.config import RunConfig, to_dict
from jaxlm.data.loader import Data
from jaxlm.devices.finite import Namer, check_finite, leaf_name
from jaxlm.devices.mesh import axis_sizes, local_rows, put_batch, rows_axis_size
from jaxlm.errors import UserError
from jaxlm.locate import record_base
from jaxlm.models.decoder import Decoder
from jaxlm.models.version1 import recorded
from jaxlm.processes.distributed import Hosts
from jaxlm.spec import DecoderSpec
from jaxlm.training.advice import final_warnings, rank_warnings, schedule_warnings
from jaxlm.training.build import Build, build
from jaxlm.training.checkpoint import Checkpoints, model_json
from jaxlm.training.local_checkpoint import LocalCheckpoints
from jaxlm.training.optimizer import Schedule, make_schedule
from jaxlm.training.report import (
    MetricsWriter,
    ProgressReport,
    flops_per_token,
    human_bytes,
    plot_losses,
    print_pairs,
    read_metrics,
)
from jaxlm.training.resume import (
    PRINTS,
    RUN,
    BaseModel,
    Inputs,
    base_fingerprint,
    check_inputs,
    check_settings,
    length_before,
)
from jaxlm.training.routing import RoutingReport
from jaxlm.training.state import Initializer, Readable, TrainState, bytes_per_device, count
from jaxlm.training.step import merged_variables
from jaxlm.training.stop import Stop


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
        tensor_name: how messages name a tensor of the source.
    """

    config: RunConfig
    run_yaml: str
    model: DecoderSpec
    source: BaseModel | None
    adapter: Readable | None
    data: Data
    files: Mapping[str, bytes]
    verbose: bool = False
    tensor_name: Namer = leaf_name


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        step: last step done.
        interrupted: what asked for the end before the last step, e.g. 'SIGTERM on process 1 (host)'; None: nothing did.
        saved: whether this start has saved a step.
        checkpoint: the newest checkpoint.
        model: the model object, for sampling.
        variables: trained variables, as `Model.apply` takes them.
        mesh: the mesh they live on.
        validation: validation losses by step, in order.
        best: (step, loss) of the best checkpoint kept.
        complete: it was the last step of the run.
    """

    step: int
    interrupted: str | None
    saved: bool
    checkpoint: Path
    model: Decoder
    variables: Any
    mesh: jax.sharding.Mesh
    validation: list[tuple[int, float]]
    best: tuple[int, float] | None
    complete: bool = True


def train(job: Job, console: Console, hosts: Hosts, stop: Stop) -> Outcome:
    """Runs a job to its end, or until a signal; everything it leaves lies below output_dir.

    Args:
        job: the run.
        console: where process 0 tells about it.
        hosts: the processes, all of which have the same job and see the same output_dir.
        stop: what follows the signals.

    Raises:
        UserError: for settings that do not fit together, a changed config on resume, a full disk, weights or a
            loss that are not finite (the loss with train.on_nonfinite: stop).
    """
    config, first_host = job.config, hosts.process == 0
    out = Path(config.output_dir)
    terminal = console if first_host else None
    if hosts.processes > 1:
        hosts.agree("data", _data_prints(job))

    # What there is to go on from --------------------------------------------------------------
    checkpoints = Checkpoints(out / "checkpoints", config.train.keep)
    steps_saved = checkpoints.steps()
    hosts.agree("checkpoints", {"steps": steps_saved})
    saved = steps_saved[-1] if steps_saved else 0
    kept = checkpoints.files(saved) if steps_saved else {}
    inputs = Inputs(config, job.data, job.model, None if config.lora is None else job.source)
    if kept:
        check_settings(kept, config, checkpoints.path(saved))
        check_inputs(kept, inputs, checkpoints.path(saved))
    data_state = json.loads(kept["data.json"]) if kept else {"step": 0}
    if "stopped" in data_state and config.train.on_nonfinite == "stop":
        raise UserError(f"{checkpoints.path(saved)}: the run was stopped: {data_state['stopped']}; {PASS_OVER}")

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
        data_state,
    )
    total = len(batches)
    optimizer, schedule = built.optimizer(total)
    setup = built.initializer(optimizer)

    # State: resumed, loaded or fresh ----------------------------------------------------------
    local, newer = _local_checkpoints(config, hosts, setup, saved)
    if local is not None and newer is not None:
        kept = {**kept, **local.files(newer)}
        check_settings(kept, config, local.path(newer))
        check_inputs(kept, inputs, local.path(newer))
    base = None
    if config.lora is not None or not (steps_saved or newer):
        base = setup.load_params(job.source) if job.source is not None else setup.init_params(config.train.seed)
    if base is not None and job.source is not None:
        check_finite(base, mesh, f"model.path: {config.model.path}", DAMAGED, job.tensor_name)
    frozen = {"params": base} if config.lora is not None else {}
    if local is not None and newer is not None:
        step, where, (state, data_state) = newer, local.path(newer), local.restore(newer)
    elif steps_saved:
        step, where, (state, data_state) = (
            saved,
            checkpoints.path(saved),
            checkpoints.restore(saved, setup.abstract_state()),
        )
    else:
        step, where = 0, None
        state = setup.new_state(_new_trainable(job, setup, base), config.train.seed)
        if job.adapter is not None and config.lora is not None:
            check_finite(state.trainable, mesh, f"lora.init_from: {config.lora.init_from}", DAMAGED)
    if where is not None:
        way_out = f"go back to the step before it: move {where} away, and run the same command again"
        check_finite(state.trainable, mesh, str(where), way_out)
    del base
    if saved >= total:
        best = checkpoints.best()
        checkpoints.close()
        stop.finished()
        if first_host and (out / "metrics.jsonl").exists() and not (out / "loss.png").exists():
            plot_losses(read_metrics(out / "metrics.jsonl"), out / "loss.png")
        if terminal is not None:
            terminal.print(f"complete: {checkpoints.path(step)} is step {step} of {total}", highlight=False)
        return Outcome(
            step, None, True, checkpoints.path(step), model, merged_variables(state.trainable, frozen), mesh, [], best
        )

    # Programs ---------------------------------------------------------------------------------
    train_step, eval_step, compile_seconds, memory = _compile(job, built, setup, schedule, state, frozen, terminal)
    resumed = f"from step {step}" + ("" if newer is None else ", kept by each host") if step else None
    for told in (terminal, hosts.log):
        if told is not None:
            _announce(told, job, built, setup, total, resumed, compile_seconds, memory)
            if step:
                _say_new_schedule(told, job, kept, batches.source, schedule, step - int(state.skipped), total)
            for warning in [
                *schedule_warnings(config.optimizer, schedule, total),
                *rank_warnings(job.model, dict(model.adapters)),
            ]:
                told.print(f"warning: {warning}", highlight=False, markup=False)

    # Loop -------------------------------------------------------------------------------------
    files = {**job.files, RUN: job.run_yaml.encode(), PRINTS: inputs.to_json()}
    files["model.json"] = model_json(
        recorded(job.model),
        None if config.lora is None else to_dict(config.lora),
        {} if config.model.path is None else record_base(config.model.path, out / "checkpoints" / "0"),
        config.model.param_dtype if config.lora is None else "float32",
    )
    writer = _metrics_writer(job, out, step) if first_host else None
    report = ProgressReport(
        terminal, total, step, flops_per_token(job.model, config.data.sequence_length, config.lora is None), hosts.log
    )
    routing = RoutingReport(job.model.experts)
    validation: list[tuple[int, float]] = []
    pending: tuple[int, Any] | None = None
    skipped, gradients, first_saved = int(state.skipped), False, saved

    def finish_pending() -> None:
        """Reads the metrics of the step before: the device is by then busy with the next one."""
        nonlocal pending, skipped, gradients
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
        gradients = gradients or values["grad_norm"] != 0
        if values["skipped"] > skipped:
            skipped = int(values["skipped"])
            what = f"step {done}: loss {values['loss']}, gradient norm {values['grad_norm']}"
            if config.train.on_nonfinite == "stop":
                raise _NonFinite(done, what)
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

    def position() -> dict[str, Any]:
        return {**rows.get_state(), **batches.counters(step)}

    stop.stepping()
    with contextlib.closing(report), contextlib.closing(rows):
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
                        saved = checkpoints.save(state, position(), files, validation_loss)
                        report.pause()
                if local is not None and not due_save and step % config.train.local_every == 0:
                    finish_pending()
                    local.save(state, position(), files)
            finish_pending()
            if saved != step:
                saved = checkpoints.save(state, position(), files, None)
            checkpoints.wait()
        except _NonFinite as error:
            saved = checkpoints.save(state, {**position(), "stopped": str(error)}, files, None)
            checkpoints.close()
            raise UserError(
                f"{error}; it was not taken, and the run is saved in {checkpoints.path(saved)}. "
                f"{_why_not_finite(error.step, job.config)}; or else {PASS_OVER}"
            ) from None
        finally:
            if writer is not None:
                writer.close()
    best = checkpoints.best()
    checkpoints.close()
    if step == total:
        stop.finished()
    if local is not None and saved == total:
        local.clear()
    elif local is not None:
        local.wait()
    if first_host:
        plot_losses(read_metrics(out / "metrics.jsonl"), out / "loss.png")
        routing.plot(out / "experts.png")
    if hosts.stopped_by is not None:
        report.say(_last_words(hosts.stopped_by, stop, saved == first_saved, step, total, checkpoints.path(saved)))
    for warning in final_warnings(config.optimizer, schedule, total, not gradients) if step == total else []:
        report.say(f"warning: {warning}")
    return Outcome(
        step=step,
        interrupted=hosts.stopped_by,
        saved=saved != first_saved,
        checkpoint=checkpoints.path(saved),
        model=model,
        variables=merged_variables(state.trainable, frozen),
        mesh=mesh,
        validation=validation,
        best=best,
        complete=step == total,
    )


DAMAGED = "the file is damaged, or was saved by a run that had diverged; get it again, or take an earlier one"
PASS_OVER = (
    "to go on past this step, set train.on_nonfinite: skip; to train with other settings, choose another output_dir"
)


class _NonFinite(Exception):
    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step = step


def _why_not_finite(step: int, config: RunConfig) -> str:
    if step == 1:
        # No update had been made: the rate cannot be why. Weights were finite when they were read.
        return (
            "No step had been taken before it, so that the learning rate is not why: numbers too large for "
            f"model.dtype {config.model.dtype} came up in the model, or a record is broken (--preview 1 shows some)"
        )
    return "Lower optimizer.learning_rate, or lengthen its warm-up"


def _last_words(by: str, stop: Stop, nothing: bool, step: int, total: int, checkpoint: Path) -> str:
    if step == total:
        return f"{by}: step {step} of {total} is saved in {checkpoint}, the run is complete"
    if nothing:
        return f"{by} before a step was done: {stop.kept()}"
    return f"{by}: saved step {step} of {total} in {checkpoint}. Run the same command again to go on from there."


def _say_new_schedule(
    console: Console,
    job: Job,
    kept: Mapping[str, bytes],
    source: Any,
    schedule: Schedule,
    taken: int,
    total: int,
) -> None:
    """Of a run that was begun for another number of steps: which learning rates that changes.

    Args:
        kept: files of the checkpoint it goes on from.
        source: its batches, which know how long the run was to be.
        taken: updates done.
        total: steps of the run as it is now.
    """
    before = length_before(kept, source) if kept else total
    if before == total:
        return
    old = make_schedule(job.config.optimizer, before)
    rate, planned = float(schedule(taken)), float(old(taken))
    if abs(rate - planned) <= 0.01 * max(rate, planned):
        return
    last = f"step {taken} took {float(old(taken - 1)):.2e}, step {taken + 1}" if taken else f"step {taken + 1}"
    console.print(
        f"warning: the run was begun for {before} steps and is now one of {total}, so that its "
        f"{job.config.optimizer.schedule} schedule is another: {last} takes {rate:.2e} instead of {planned:.2e}",
        highlight=False,
        markup=False,
    )


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
    if job.model.experts is not None and built.experts is not None:
        moe = job.model.experts
        own = ", ".join(f"{name} {k}" for name, k in zip(moe.modalities, moe.top_k, strict=True))
        pairs.append(("experts", f"{moe.num_experts}, router {moe.router}, a token uses: {own}"))
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
