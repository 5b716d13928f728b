"""The training state: what trains, its optimizer state, and the placement of each leaf."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import LoraConfig
from jaxlm.devices.mesh import load_sharded, replicated, stored_chunks, tree_shardings, use_mesh
from jaxlm.models.adapters import saved_modules
from jaxlm.models.decoder import Decoder, abstract_variables, example_inputs, with_saved_modules
from jaxlm.nn.nf4 import weight_type
from jaxlm.nn.rounding import Kind
from jaxlm.nn.weight_types import join_parts, split_parts, with_stored_layers
from jaxlm.sharding import WHOLE_IF_UNEVEN
from jaxlm.spec import DecoderSpec, is_stacked
from jaxlm.training.optimizer import MakeOptimizer, parameter_axes
from jaxlm.training.update import update_in_place
from jaxlm.weights.leaves import LeafReader
from jaxlm.weights.quantized import PartsReader

HOST = "pinned_host"  # JAX's name of a host's memory that devices read from


@flax.struct.dataclass
class TrainState:
    """Everything a step changes.

    Attributes:
        step: optimizer steps done, int32.
        trainable: {'params': ...} for full fine-tuning, {'lora': ...} for adapters; float32 unless configured.
        opt_state: optax's state of `trainable`.
        dropout_key: base key; step t and micro-step a use fold_in(fold_in(key, t), a), so that no key is carried over.
        skipped: number of steps that were not taken because loss or gradient was not finite, int32.
    """

    step: Any
    trainable: Any
    opt_state: Any
    dropout_key: Any
    skipped: Any


def model_variables(trainable: Any, frozen: Any) -> dict[str, Any]:
    """What `Model.apply` takes, from the trained and the frozen tree."""
    if "params" in trainable:
        return {"params": trainable["params"]}
    return with_saved_modules(frozen["params"], trainable["lora"])


def with_saved(abstract: Any, model: DecoderSpec, lora: LoraConfig) -> Any:
    """The boxed `lora` collection plus full float32 copies of `modules_to_save`."""
    collection = dict(abstract.get("lora", {}))
    if lora.modules_to_save:
        flat = traverse_util.flatten_dict(abstract["params"], sep="/")
        chosen = {
            row.path: flat[row.path].replace_boxed(jax.ShapeDtypeStruct(flat[row.path].value.shape, jnp.float32))
            for rows in saved_modules(model, lora).values()
            for row in rows
        }
        collection["modules_to_save"] = traverse_util.unflatten_dict(chosen, sep="/")
    return collection


class Initializer:
    """Makes and places the state of one run; shapes are known before any array exists.

    Attributes:
        dense: shapes and dtypes of the base parameters as arrays, which is what they count as.
        params: those of what is kept of them.

    Args:
        model: the model, with its adapters.
        lora: adapter settings, or None for full fine-tuning.
        mesh: the devices that hold the arrays.
        make_optimizer: makes the update rule for what trains, by its logical axes.
        quantize: what the frozen linear layers of an adapter are kept in; None: arrays.
        offload: whether the matrices of an adapter's frozen layers lie in the hosts' memory.
    """

    def __init__(
        self,
        model: Decoder,
        lora: LoraConfig | None,
        mesh: Mesh,
        make_optimizer: MakeOptimizer,
        quantize: Kind | None = None,
        offload: bool = False,
    ) -> None:
        self.model, self.lora, self.mesh, self.quantize = model, lora, mesh, quantize
        boxed = abstract_variables(model)
        trainable = {"params": boxed["params"]} if lora is None else {"lora": with_saved(boxed, model.spec, lora)}
        base, stored_as = boxed["params"], weight_type(quantize)
        if stored_as is not None:
            assert lora is not None, "a quantised tensor cannot be trained"
            base = with_stored_layers(base, stored_as)
        self.dense, self.params = nn.unbox(boxed["params"]), nn.unbox(base)
        self.params_shardings = tree_shardings(base, mesh, WHOLE_IF_UNEVEN)
        if offload:
            assert lora is not None, "a tensor that is trained stays on the devices"
            self.params_shardings = jax.tree_util.tree_map_with_path(_in_host, self.params, self.params_shardings)
        self.trainable = nn.unbox(trainable)
        self.trainable_shardings = tree_shardings(trainable, mesh, WHOLE_IF_UNEVEN)
        self.optimizer = make_optimizer(parameter_axes(trainable))
        self.opt_state = jax.eval_shape(self.optimizer.init, self.trainable)
        self.opt_shardings = _opt_shardings(self.opt_state, self.trainable, self.trainable_shardings, mesh)

    @property
    def state_shardings(self) -> TrainState:
        everywhere = replicated(self.mesh)
        return TrainState(
            step=everywhere,
            trainable=self.trainable_shardings,
            opt_state=self.opt_shardings,
            dropout_key=everywhere,
            skipped=everywhere,
        )

    @property
    def averages(self) -> bool:
        """Whether the model is an average of what trains, and not what trains itself."""
        return isinstance(self.opt_state, optax.contrib.ScheduleFreeState)

    @cached_property
    def weights(self) -> Callable[[TrainState], Any]:
        """The trainable tree that is evaluated and kept as the model, of a state."""
        if not self.averages:
            return lambda state: state.trainable

        average = jax.jit(optax.contrib.schedule_free_eval_params, out_shardings=self.trainable_shardings)

        def averaged(state: TrainState) -> Any:
            with use_mesh(self.mesh):
                return average(state.opt_state, state.trainable)

        return averaged

    def update(
        self, wanted: jax.Array, factor: jax.Array, grads: Any, trainable: Any, opt_state: Any
    ) -> tuple[Any, Any]:
        """The parameters and the optimizer's state after an update, in a compiled function; see `step.Update`."""
        return update_in_place(self.optimizer, wanted, factor, grads, trainable, opt_state)

    def abstract_state(self) -> TrainState:
        """ShapeDtypeStructs with shardings, for restoring a checkpoint."""
        plain = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            trainable=self.trainable,
            opt_state=self.opt_state,
            dropout_key=jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
            skipped=jax.ShapeDtypeStruct((), jnp.int32),
        )
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            plain,
            self.state_shardings,
        )

    def load_params(self, source: LeafReader) -> Any:
        """All base parameters, read into their shards and cast to the model's param_dtype, or quantised."""
        params, stored = split_parts(self.params)
        shardings, _ = split_parts(self.params_shardings)
        if self.quantize is not None:
            source = PartsReader(source, self.quantize, {path: leaf.in_dims for path, leaf in stored.items()})
        return join_parts(load_sharded(params, shardings, source.read, stored_chunks(source, params)), stored)

    def init_params(self, seed: int) -> Any:
        """Fresh base parameters, created in their shards."""
        assert self.quantize is None

        def init(key: jax.Array) -> Any:
            return nn.unbox(self.model.init({"params": key}, **example_inputs(self.model.spec))["params"])

        with use_mesh(self.mesh):
            return jax.jit(init, out_shardings=self.params_shardings)(jax.random.key(seed))

    def init_lora(self, params: Any, seed: int) -> Any:
        """A fresh adapter on `params`: B zero, DoRA magnitudes and saved modules taken from the base."""

        def init(key: jax.Array, base: Any) -> Any:
            inputs = example_inputs(self.model.spec)
            _, new = self.model.apply({"params": base}, **inputs, rngs={"params": key}, mutable=["lora"])
            collection = dict(nn.unbox(new["lora"]))
            if "modules_to_save" in self.trainable["lora"]:
                collection["modules_to_save"] = _pick(base, self.trainable["lora"]["modules_to_save"])
            return collection

        with use_mesh(self.mesh):
            return jax.jit(init, out_shardings=self.trainable_shardings["lora"])(jax.random.key(seed), params)

    def load_lora(self, source: LeafReader) -> Any:
        """An earlier adapter's weights, into their shards."""
        lora = self.trainable["lora"]
        return load_sharded(lora, self.trainable_shardings["lora"], source.read, stored_chunks(source, lora))

    def new_state(self, trainable: Any, seed: int) -> TrainState:
        """Step 0 with a fresh optimizer; `trainable` becomes part of the state."""
        with use_mesh(self.mesh):
            opt_state = jax.jit(self.optimizer.init, out_shardings=self.opt_shardings)(trainable)
        everywhere = replicated(self.mesh)
        key = jax.random.key_data(jax.random.key(seed))
        return TrainState(
            step=jax.device_put(jnp.int32(0), everywhere),
            trainable=trainable,
            opt_state=opt_state,
            dropout_key=jax.device_put(key, everywhere),
            skipped=jax.device_put(jnp.int32(0), everywhere),
        )


def _in_host(path: tuple[Any, ...], leaf: Any, sharding: NamedSharding) -> NamedSharding:
    """Where a leaf lies: the matrices of layers, which `nn.linear` fetches, in the hosts' memory."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_matrix = is_stacked(name) and "kernel" in name.split("/") and leaf.ndim > 2
    return sharding.with_memory_kind(HOST) if is_matrix else sharding


def _pick(base: Any, like: Any) -> Any:
    """The leaves of `base` that `like` has, as float32 copies (the state is donated: no aliases)."""
    if not isinstance(like, Mapping):
        return jnp.array(base, jnp.float32, copy=True)
    return {key: _pick(base[key], value) for key, value in like.items()}


def _opt_shardings(opt_state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Moments are placed as their parameters; scales of their blocks along, as far as they divide.

    Leaves of another shape (counts, Adafactor's factors) are replicated.
    """
    keystr = jax.tree_util.keystr
    known = {
        keystr(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The path of a moment ends in the path of its parameter.
        for start in range(len(path)):
            shape, sharding = known.get(keystr(path[start:]), (None, None))
            if shape is None:
                continue
            if shape == leaf.shape:
                return sharding
            if len(shape) == leaf.ndim:
                return NamedSharding(mesh, _divided(sharding, leaf.shape))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _divided(sharding: NamedSharding, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of a sharding where a smaller array of the same rank can be cut so, else whole along that dim."""
    entries = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))

    def parts(axes: Any) -> int:
        names = axes if isinstance(axes, tuple) else (axes,)
        return math.prod(sharding.mesh.shape[name] for name in names)

    cut = (axes if axes is None or size % parts(axes) == 0 else None for axes, size in zip(entries, shape, strict=True))
    return PartitionSpec(*cut)


def count(tree: Any) -> int:
    """Number of scalars in a tree of (abstract) arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any, shardings: Any, in_host: bool = False) -> int:
    """Bytes of one device's shards in its memory, or of those that lie in its host's."""

    def size(leaf: Any, sharding: NamedSharding) -> int:
        if (sharding.memory_kind == HOST) != in_host:
            return 0
        return int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))
