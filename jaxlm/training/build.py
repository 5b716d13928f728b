"""The programs of a run, built from its configuration and its devices: for `training.loop`, and for `jaxlm.plan`.

Devices may be real ones, or those of a topology that is not here: nothing is put on them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxlm.config import MoeRunConfig, RunConfig
from jaxlm.data.loader import BATCH_DTYPES
from jaxlm.devices.chips import Topology
from jaxlm.devices.compiler_options import compiler_options
from jaxlm.devices.mesh import abstract_mesh, make_mesh, replicated, rows_axis_size, slice_count, use_mesh
from jaxlm.errors import UserError
from jaxlm.kernels.backend import attention_details, choose_attention, shape_key
from jaxlm.models.decoder import Decoder
from jaxlm.nn.attention import kv_head_copies
from jaxlm.nn.experts import choose_compute
from jaxlm.nn.lora import resolve_lora
from jaxlm.sharding import BATCH
from jaxlm.spec import DecoderSpec
from jaxlm.training.optimizer import Schedule, make_optimizer, make_schedule
from jaxlm.training.state import Initializer
from jaxlm.training.step import make_eval_step, make_train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Build:
    """A run's model, mesh and steps.

    Attributes:
        config: the run.
        mesh: its devices.
        model: with its adapters, as it trains.
        attention: which runs, and the line that says why.
        attention_details: what that rests on, and why not another; says it when called.
        experts: how an MoE computes, and why; None for a dense model.
        micro_batch: rows of a device group at a time.
        accumulation: micro-steps of a step.
    """

    config: RunConfig
    mesh: Mesh
    model: Decoder
    attention: tuple[str, str]
    attention_details: Callable[[], str]
    experts: tuple[str, str] | None
    micro_batch: int
    accumulation: int

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-step over all devices."""
        return self.micro_batch * rows_axis_size(self.mesh)

    @property
    def packed(self) -> bool:
        """Rows hold several documents."""
        return packs(self.config)

    def options(self) -> dict[str, Any]:
        """What the compiler is told: by devices (see `parallel.compiler_options`), then train.compiler_options."""
        devices = list(self.mesh.devices.flat)
        found = compiler_options(devices[0].device_kind, len(devices) // slice_count(devices))
        return found | self.config.train.compiler_options

    def optimizer(self, total_steps: int) -> tuple[optax.GradientTransformation, Schedule]:
        schedule = make_schedule(self.config.optimizer, total_steps)
        return make_optimizer(self.config.optimizer, schedule), schedule

    def initializer(self, optimizer: optax.GradientTransformation) -> Initializer:
        return Initializer(self.model, self.config.lora, self.mesh, optimizer)

    def abstract_batch(self, micro_steps: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch's leaves [A, B, T], with where they lie."""
        shape = (micro_steps, rows, self.config.data.sequence_length)
        sharding = NamedSharding(self.mesh, BATCH)
        return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in BATCH_DTYPES.items()}

    def lower_train_step(
        self, setup: Initializer, schedule: Schedule, state: Any, frozen: Any, platform: str | None = None
    ) -> jax.stages.Lowered:
        """The train step, lowered: state donated, its placement pinned.

        Args:
            state, frozen: arrays, or ShapeDtypeStructs with shardings.
            platform: 'tpu', 'gpu' or 'cpu', for devices that are not here.
        """
        step = make_train_step(
            self.model,
            setup.optimizer,
            schedule,
            self.config.train,
            self.config.optimizer.clip_norm,
            self.micro_batch,
            self.packed,
            self.config.moe or MoeRunConfig(),
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(setup.state_shardings, replicated(self.mesh)))
        return self._lower(jitted, (state, frozen, self.abstract_batch(self.accumulation, self.micro_rows)), platform)

    def lower_eval_step(self, rows: int, trainable: Any, frozen: Any) -> jax.stages.Lowered:
        """The evaluation step on `rows` rows over all devices, lowered."""
        jitted = jax.jit(make_eval_step(self.model, self.packed), out_shardings=replicated(self.mesh))
        return self._lower(jitted, (trainable, frozen, self.abstract_batch(1, rows)), None)

    def _lower(self, jitted: Any, arguments: tuple[Any, ...], platform: str | None) -> jax.stages.Lowered:
        with use_mesh(self.mesh):
            traced = jitted.trace(*arguments)
            return traced.lower() if platform is None else traced.lower(lowering_platforms=(platform,))

    def compile(self, lowered: jax.stages.Lowered, **more: Any) -> jax.stages.Compiled:
        """With `options`, and `more` of them.

        Raises:
            UserError: for an option that this compiler does not have.
        """
        with use_mesh(self.mesh):
            return compile_with(lowered, self.options() | more)


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


def build(config: RunConfig, shape: DecoderSpec, devices: Sequence[Any] | Topology | None = None) -> Build:
    """What a run computes with.

    Args:
        shape: of the model, experts resolved.
        devices: None: all of JAX's. A topology: shapes and shardings are those on its devices, nothing can be compiled.

    Raises:
        UserError: for settings that do not fit together or these devices.
    """
    count = shape.experts.num_experts if shape.experts else None
    first: Any
    if isinstance(devices, Topology):
        first = devices.chip
        torus = devices.shape if first.platform == "tpu" else ()
        mesh = cast(Mesh, abstract_mesh(config.mesh, devices.count, count, devices.slices, torus))
    else:
        devices = list(jax.devices() if devices is None else devices)
        first = devices[0]
        mesh = make_mesh(config.mesh, devices, count)
    _check_sequence(mesh, config.data.sequence_length, shape.attention.num_heads, shape.attention.num_kv_heads)
    case = shape_key(shape.attention, config.model.dtype, config.data.sequence_length, packs(config), first)
    chosen, why = choose_attention(config.model.attention, case)
    adapters = resolve_lora(shape, config.lora) if config.lora else {}
    moe = config.moe or MoeRunConfig()
    experts = None if shape.experts is None else choose_compute(moe.compute, first.platform, shape.experts, adapters)
    # GPUs' forms cannot all be traced where there is none; XLA's keeps the same arrays.
    traced = "xla" if isinstance(devices, Topology) and first.platform == "gpu" else chosen
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
    details = functools.partial(attention_details, chosen, case)
    return Build(config, mesh, model, (str(chosen), why), details, experts, micro_batch, accumulation)


def _check_sequence(mesh: Mesh | AbstractMesh, length: int, heads: int, kv_heads: int) -> None:
    """Whether rows of so many tokens and so many heads can be divided over `sequence`.

    Raises:
        UserError: they cannot.
    """
    size, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
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


def frozen_base(setup: Initializer) -> dict[str, Any]:
    """The base that a step of an adapter takes, as ShapeDtypeStructs; {} where everything trains."""
    if setup.lora is None:
        return {}

    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return {"params": jax.tree.map(place, setup.params, setup.params_shardings)}


def packs(config: RunConfig) -> bool:
    """Whether rows hold several documents, told apart by segment ids."""
    return config.data.packing_mode == "first_fit"


def batch_split(config: RunConfig, row_groups: int) -> tuple[int, int]:
    """Rows of a device group at a time, and how many times that makes a step.

    The first is at most micro_batch_size, and a divisor of the group's share of the global batch.

    Raises:
        UserError: when rows cannot be shared out, or a micro batch that is part of the loss would not divide.
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
