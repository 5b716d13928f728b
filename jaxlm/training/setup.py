"""What a run computes with, from its configuration and its devices: for `training.loop`, and for `jaxlm.plan`.

Devices may be real ones, or those of a topology that this machine does not have: nothing is placed on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from rich.console import Console

from jaxlm.config import MoeRunConfig, RunConfig
from jaxlm.data.batches import BATCH_DTYPES, ENCODER_DTYPES
from jaxlm.devices.chips import Topology
from jaxlm.devices.compiler_options import compiler_options
from jaxlm.devices.mesh import (
    abstract_mesh,
    make_mesh,
    put_batch,
    replicated,
    rows_axis_size,
    slice_count,
    use_mesh,
)
from jaxlm.errors import UserError
from jaxlm.kernels.backend import attention_details, choose_for_layers
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.nn.attention import kv_head_copies
from jaxlm.nn.nf4 import why_plain, why_plain_on_gpu
from jaxlm.nn.routers import choose_compute
from jaxlm.sharding import BATCH, SEQUENCE, TENSOR
from jaxlm.spec import DecoderSpec
from jaxlm.training.objectives.choice import objective_of
from jaxlm.training.objectives.objective import Objective, ObjectiveFactory
from jaxlm.training.objectives.policy import ADVANTAGES, DRAWN
from jaxlm.training.objectives.preference import REFERENCE
from jaxlm.training.optimizer import Schedule, make_optimizer, make_schedule
from jaxlm.training.state import Initializer, TrainState
from jaxlm.training.step import make_eval_step, make_train_step

FLOATS: dict[str, Any] = dict.fromkeys((REFERENCE, DRAWN, ADVANTAGES), np.float32)  # fields of some objectives
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """A run's model, objective and mesh; lowers and compiles its steps.

    Attributes:
        config: the run.
        mesh: its devices.
        model: with its adapters, as it trains.
        make_objective: makes what is minimised.
        attention: the attention backend, and the line that says why.
        attention_details: says, when called, what that choice rests on, and why it is not another.
        experts: how an MoE computes, and why; None for a dense model.
        micro_batch: rows of a device group at a time.
        accumulation: micro-steps of a step.
        platform: of the devices: 'tpu', 'gpu' or 'cpu'.
        capability: compute capability of GPUs; None for others.
    """

    config: RunConfig
    mesh: Mesh
    model: Decoder
    make_objective: ObjectiveFactory
    attention: tuple[str, str]
    attention_details: Callable[[], str]
    experts: tuple[str, str] | None
    micro_batch: int
    accumulation: int
    platform: str = "cpu"
    capability: str | None = None

    @functools.cached_property
    def objective(self) -> Objective:
        """What is minimised."""
        return self.make_objective(self.config, self.model, self.micro_batch)

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-step over all devices."""
        return self.micro_batch * rows_axis_size(self.mesh)

    @property
    def eval_rows(self) -> int:
        """Rows of an evaluation batch over all devices."""
        return self.config.train.micro_batch_size * rows_axis_size(self.mesh)

    def why_plain_nf4(self) -> str | None:
        """Why products with a base in four bits run without a kernel; None: they run by one."""
        spec, mesh = self.model.spec, dict(self.mesh.shape)
        if self.platform == "cpu":
            return "there is no kernel for cpu"
        sizes = [(spec.hidden_size, "embed"), *((layer.feed_forward.size, "mlp") for layer in spec.period)]
        reasons = [why_plain(mesh, self.model.dtype, size, axis) for size, axis in sizes]
        if self.platform == "gpu":
            rows = self.micro_batch * self.config.data.sequence_length // mesh[SEQUENCE]
            reasons.append(why_plain_on_gpu(rows, self.capability))
        return next((why for why in reasons if why is not None), None)

    def compiler_options(self) -> dict[str, Any]:
        """Options for the compiler: by devices (see `devices.compiler_options`), then train.compiler_options."""
        devices = list(self.mesh.devices.flat)
        options = compiler_options(devices[0].device_kind, len(devices) // slice_count(devices))
        return options | self.config.train.compiler_options

    def schedule(self, total_steps: int) -> Schedule:
        """The learning rate of a run of this length."""
        return make_schedule(self.config.optimizer, total_steps)

    def initializer(self, schedule: Schedule) -> Initializer:
        """What makes and places the state."""
        optimizer = functools.partial(make_optimizer, self.config.optimizer, schedule)
        model = self.config.model
        offload = model.offload is not None
        return Initializer(self.model, self.config.lora, self.mesh, optimizer, model.quantize, offload)

    def abstract_batch(self, micro_steps: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The leaves [A, B, T] of a batch that the objective reads, with their placement."""
        sharding, dtypes = NamedSharding(self.mesh, BATCH), BATCH_DTYPES | ENCODER_DTYPES | FLOATS
        lengths = {name: self.config.data.row_length(name) for name in self.objective.fields}
        return {
            name: jax.ShapeDtypeStruct((micro_steps, rows, length), dtypes[name], sharding=sharding)
            for name, length in lengths.items()
        }

    def abstract_frozen(self, initializer: Initializer) -> dict[str, Any]:
        """The trees that a step reads and does not train, as ShapeDtypeStructs."""

        def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        params = jax.tree.map(place, initializer.params, initializer.params_shardings)
        return dict.fromkeys(self.objective.frozen, params)

    def put_batch(self, batch: Mapping[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
        """This host's rows [A, B_local, T] of what the objective reads, as global arrays [A, B, T].

        Args:
            rows: B, the rows of a micro-step over all devices.
        """
        return put_batch({name: batch[name] for name in self.objective.fields}, self.mesh, rows)

    def lower_train_step(
        self, initializer: Initializer, schedule: Schedule, state: Any, frozen: Any, platform: str | None = None
    ) -> jax.stages.Lowered:
        """The train step, lowered: state donated, its placement pinned.

        Args:
            state, frozen: arrays, or ShapeDtypeStructs with shardings.
            platform: 'tpu', 'gpu' or 'cpu', for devices that are not here.
        """
        clip_norm = self.config.optimizer.clip_norm
        step = make_train_step(self.objective, initializer.optimizer, schedule, clip_norm, initializer.update)
        shardings = initializer.state_shardings, replicated(self.mesh)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        return self._lower(jitted, (state, frozen, self.abstract_batch(self.accumulation, self.micro_rows)), platform)

    def lower_eval_step(self, trainable: Any, frozen: Any) -> jax.stages.Lowered:
        """The evaluation step on `eval_rows` rows, lowered."""
        jitted = jax.jit(make_eval_step(self.objective), out_shardings=replicated(self.mesh))
        return self._lower(jitted, (trainable, frozen, self.abstract_batch(1, self.eval_rows)), None)

    def _lower(self, jitted: Any, arguments: tuple[Any, ...], platform: str | None) -> jax.stages.Lowered:
        with use_mesh(self.mesh):
            traced = jitted.trace(*arguments)
            return traced.lower() if platform is None else traced.lower(lowering_platforms=(platform,))

    def compile(self, lowered: jax.stages.Lowered, **more: Any) -> jax.stages.Compiled:
        """Compiles with `compiler_options`, and `more` of them.

        Raises:
            UserError: for an option that this compiler does not have.
        """
        with use_mesh(self.mesh):
            return compile_with(lowered, self.compiler_options() | more)


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """A run's programs, ready to be called.

    Attributes:
        train: (state, frozen, batch) -> (state, metrics).
        evaluate: (trainable, frozen, batch) -> sums; None for a run without validation rows.
        weights: state -> what `evaluate` takes of it, and what is kept as the model.
        seconds: time that compiling took.
        memory: bytes of one device that the train step takes, by the compiler; None where it does not say.
    """

    train: jax.stages.Compiled
    evaluate: Callable[..., Any] | None
    weights: Callable[[TrainState], Any]
    seconds: float
    memory: int | None


class Programs(NamedTuple):
    """A run's compiled steps, and the seconds that compiling took."""

    train: jax.stages.Compiled
    evaluate: jax.stages.Compiled | None
    seconds: float


def begin_compiling(
    setup: TrainSetup, initializer: Initializer, schedule: Schedule, validates: bool
) -> Callable[[], Programs]:
    """Compiles the train step, and the evaluation step of a run with validation rows, while others read the weights.

    Args:
        validates: whether there are validation rows.

    Returns:
        What waits for them.
    """
    state, frozen = initializer.abstract_state(), setup.abstract_frozen(initializer)

    def lowered() -> tuple[jax.stages.Lowered, jax.stages.Lowered | None]:
        train = setup.lower_train_step(initializer, schedule, state, frozen)
        return train, setup.lower_eval_step(state.trainable, frozen) if validates else None

    def compiled(train: jax.stages.Lowered, evaluate: jax.stages.Lowered | None, started: float) -> Programs:
        programs = setup.compile(train), None if evaluate is None else setup.compile(evaluate)
        return Programs(*programs, time.perf_counter() - started)

    if setup.platform == "gpu":  # whose compiler tries kernels on the device, and measures them: it must have it alone
        return lambda: compiled(*lowered(), time.perf_counter())
    started = time.perf_counter()
    executor = ThreadPoolExecutor(1, "compile")
    future = executor.submit(compiled, *lowered(), started)
    executor.shutdown(wait=False)
    return future.result


def compile_steps(initializer: Initializer, programs: Callable[[], Programs], console: Console | None) -> CompiledSteps:
    """Waits for what `begin_compiling` has begun."""
    status = contextlib.nullcontext() if console is None else console.status("compiling the train step")
    with status:
        train_step, eval_step, seconds = programs()
    analysis = train_step.memory_analysis()
    memory = None
    if analysis is not None:
        memory = int(
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
            + analysis.temp_size_in_bytes
        )
    return CompiledSteps(train_step, eval_step, initializer.weights, seconds, memory)


def compile_with(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> jax.stages.Compiled:
    """Compiles with XLA's options by name.

    Raises:
        UserError: for an option that this compiler does not have.
    """
    try:
        return lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error):
            raise
        raise UserError(f"train.compiler_options: {str(error).splitlines()[0]}") from None


def set_up(
    config: RunConfig,
    shape: DecoderSpec,
    devices: Sequence[Any] | Topology | None = None,
    objective: ObjectiveFactory = objective_of,
) -> TrainSetup:
    """Decides what a run computes with.

    Args:
        shape: the model, experts resolved.
        devices: None: all of JAX's. A topology: shapes and shardings are those on its devices, nothing can be compiled.
        objective: makes what is minimised.

    Raises:
        UserError: for settings that do not fit together or these devices.
    """
    experts_count = shape.experts.num_experts if shape.experts else None
    chip: Any
    if isinstance(devices, Topology):
        chip = devices.chip
        torus = devices.shape if chip.platform == "tpu" else ()
        mesh = cast(Mesh, abstract_mesh(config.mesh, devices.count, experts_count, devices.slices, torus))
    else:
        devices = list(jax.devices() if devices is None else devices)
        chip = devices[0]
        mesh = make_mesh(config.mesh, devices, experts_count)
    layers = shape.attention_layers
    if shape.encoder is not None and mesh.shape[SEQUENCE] > 1:
        raise UserError(
            f"mesh.sequence: {mesh.shape[SEQUENCE]} is not supported for a model with an encoder; set it to 1"
        )
    for attention in layers:
        _check_sequence(mesh, config.data.sequence_length, attention.num_heads, attention.num_kv_heads)
    backend, why, key = choose_for_layers(
        config.model.attention, layers, config.model.dtype, config.data.sequence_length, config.data.packed, chip
    )
    adapters = resolve_lora(shape, config.lora) if config.lora else {}
    moe = config.moe or MoeRunConfig()
    experts = (
        None
        if shape.experts is None
        else choose_compute(moe.compute, chip, shape.experts, adapters, config.model.dtype)
    )
    # GPUs' backends cannot all be traced where there is no GPU; XLA's keeps the same arrays.
    traced = "xla" if isinstance(devices, Topology) and chip.platform == "gpu" else backend
    model = Decoder(
        shape,
        adapters,
        DTYPES[config.model.dtype],
        DTYPES[config.model.param_dtype],
        traced,
        config.model.remat,
        experts[0] if experts else "dense",
        moe.noise,
    )
    micro_batch, accumulation = batch_split(config, rows_axis_size(mesh))
    return TrainSetup(
        config=config,
        mesh=mesh,
        model=model,
        make_objective=objective,
        attention=(str(backend), why),
        attention_details=functools.partial(attention_details, backend, key),
        experts=experts,
        micro_batch=micro_batch,
        accumulation=accumulation,
        platform=chip.platform,
        capability=chip.compute_capability if chip.platform == "gpu" else None,
    )


def _check_sequence(mesh: Mesh | AbstractMesh, length: int, heads: int, kv_heads: int) -> None:
    """Checks that rows of this length and the model's heads can be divided over `sequence`.

    Raises:
        UserError: they cannot.
    """
    size, tensor = mesh.shape[SEQUENCE], mesh.shape[TENSOR]
    if size == 1:
        return
    if length % size:
        raise UserError(f"mesh.sequence: {size} does not divide rows of {length} tokens (data.sequence_length)")
    copies = kv_head_copies(kv_heads, size * tensor)
    if heads % (size * tensor) or heads % (kv_heads * copies):
        raise UserError(
            f"mesh.sequence: {size} times mesh.tensor {tensor} does not divide the model's {heads} heads (of "
            f"{kv_heads} keys and values), which are what is divided inside attention"
        )


def batch_split(config: RunConfig, row_groups: int) -> tuple[int, int]:
    """Rows of a device group at a time, and the number of micro-steps in a step.

    The first is at most micro_batch_size, and a divisor of the group's share of the global batch.

    Raises:
        UserError: when rows cannot be shared out, or a micro-batch that is part of the loss does not divide its share.
    """
    wanted, total = config.train.micro_batch_size, config.train.global_batch_size
    if total % row_groups:
        raise UserError(
            f"train.global_batch_size: {total} rows cannot be shared by {row_groups} groups of devices "
            "(mesh data x fsdp x expert)"
        )
    share = total // row_groups
    micro = next(n for n in range(min(wanted, share), 0, -1) if share % n == 0)
    if micro != wanted and config.train.loss_normalisation == "mean_of_means":
        raise UserError(
            f"train.micro_batch_size: {wanted} does not divide the {share} rows of a group of devices; under "
            f"mean_of_means it is part of the loss, so it is not changed for you. Try {micro}"
        )
    return micro, share // micro
