"""A model laid out for decoding: one tree of weights per layer, and one key/value cache per layer.

Training stacks the layers and scans over them. A decoding loop that did so would copy every layer's weights out of the
stack at every token, so here they are read as separate arrays, and the loop is unrolled over layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxlm.devices.mesh import load_sharded, stored_chunks, tree_shardings
from jaxlm.kernels.backend import AttentionBackend
from jaxlm.models.decoder import Block, RMSNorm, abstract_variables, output_logits
from jaxlm.models.decoder import Decoder as Llama
from jaxlm.models.shapes import LlamaConfig
from jaxlm.nn.attention import KVCache, MaskSpec
from jaxlm.nn.experts import modality_ids
from jaxlm.nn.linear import quantize
from jaxlm.nn.lora import LoraSpec
from jaxlm.nn.positions import rope_cos_sin
from jaxlm.sharding import ROW_AXES

# Of each layer: keys and values [R, K, S, h].
Caches = list[tuple[jax.Array, jax.Array]]
Weights = dict[str, Any]


class Readable(Protocol):
    """A model or adapter whose leaves can be read by slices (see `jaxlm.weights.leaves`)."""

    @property
    def leaves(self) -> Mapping[str, Any]: ...

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What a model computes with; hashable, so that jitted functions can take it as a static argument.

    Args:
        config: the shape.
        adapters: (linear layer, its LoRA) of an adapter that is applied on the fly.
        dtype: of weights and compute, e.g. 'bfloat16'.
        attention: implementation for reading prompts (see `nn.attention`).
        quantized: linear layers are kept in int8.
        experts: how an MoE feed-forward computes (see `nn.experts`).
    """

    config: LlamaConfig
    adapters: tuple[tuple[str, LoraSpec], ...] = ()
    dtype: str = "float32"
    attention: str | AttentionBackend = "xla"
    quantized: bool = False
    experts: str = "dense"

    def block(self) -> Block:
        dtype = jnp.dtype(self.dtype)
        return Block(
            self.config,
            dict(self.adapters),
            dtype,
            dtype,
            self.attention,
            True,
            keep_kv=True,
            quantized=self.quantized,
            experts=self.experts,
        )

    def abstract_weights(self) -> Weights:
        """Boxed shapes, dtypes and logical axes: {"params": {..., "layers": [...]}, "lora": [...]}."""
        c, dtype = self.config, jnp.dtype(self.dtype)
        top = dict(abstract_variables(Llama(c, {}, dtype, dtype))["params"])
        angles = jax.ShapeDtypeStruct((1, 8, c.head_dim // 2), jnp.float32)
        x = jax.ShapeDtypeStruct((1, 8, c.hidden_size), dtype)

        def init(key: jax.Array, x: jax.Array, cos: jax.Array, sin: jax.Array) -> Any:
            modality = jnp.zeros(x.shape[:2], jnp.int32)
            return self.block().init(key, x, jnp.int32(0), cos, sin, MaskSpec(), modality)

        layer = jax.eval_shape(init, jax.random.key(0), x, angles, angles)
        top["layers"] = [layer["params"]] * c.num_layers
        return {"params": top, "lora": [layer.get("lora", {})] * c.num_layers}


def load_weights(decoder: Decoder, mesh: Mesh, model: Readable, adapter: Readable | None = None) -> Weights:
    """Reads a model, layer by layer, into the shards of `mesh`, cast to the decoder's dtype or quantised.

    Args:
        model: where 'layers/self_attn/q_proj/kernel' and so on are read from.
        adapter: of a decoder with adapters: their factors, and modules that take the place of the model's.
    """
    boxed = decoder.abstract_weights()
    saved = set() if adapter is None else {path for path in adapter.leaves if path.startswith("modules_to_save/")}

    def read_top(path: str, index: tuple[slice, ...]) -> np.ndarray:
        name = f"modules_to_save/{path}"
        return adapter.read(name, index) if adapter is not None and name in saved else model.read(path, index)

    top = {name: tree for name, tree in boxed["params"].items() if name != "layers"}
    # A vocabulary of 32,001 rows (Alpaca's and Vicuna's) must not keep the layers from being split.
    bare = nn.unbox(top)
    params = load_sharded(bare, tree_shardings(top, mesh, ("vocab",)), read_top, stored_chunks(model, bare))
    layers, factors = [], []
    for number in range(decoder.config.num_layers):
        params_box, lora_box = boxed["params"]["layers"][number], boxed["lora"][number]
        read = _LayerReader(model, number, decoder.quantized)
        layers.append(_load_layer(params_box, mesh, read))
        lora = {}
        if lora_box:
            assert adapter is not None
            lora = _load_layer(lora_box, mesh, _LayerReader(adapter, number))
        factors.append(lora)
    return {"params": {**params, "layers": layers}, "lora": factors}


def _load_layer(boxed: Any, mesh: Mesh, read: _LayerReader) -> Any:
    """One layer's leaves, each read as a whole: it is cut into shards in memory."""
    bare = nn.unbox(boxed)
    return load_sharded(bare, tree_shardings(boxed, mesh), read, stored_chunks(None, bare))


class _LayerReader:
    """Leaves of one layer, without the layer dim."""

    def __init__(self, source: Readable, layer: int, quantized: bool = False) -> None:
        self.source, self.layer, self.quantized = source, slice(layer, layer + 1), quantized
        self._last: tuple[str, tuple[np.ndarray, np.ndarray]] | None = None

    def __call__(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        if self.quantized and path.endswith(("/kernel", "/kernel_scale")):
            name = path.removesuffix("_scale")
            if self._last is None or self._last[0] != name:
                # Of the whole kernel, also for a shard: the factor is that of all its inputs.
                kernel = self.source.read(f"layers/{name}", (self.layer,))[0]
                self._last = name, quantize(kernel, 2 if "/o_proj/" in name else 1)
            return self._last[1][path.endswith("_scale")][index]
        return self.source.read(f"layers/{path}", (self.layer, *index))[0]


def unstack(variables: Mapping[str, Any], config: LlamaConfig) -> Weights:
    """The decoding layout of a model's variables with stacked layers (a copy): for tests and small models."""

    def layer(tree: Any, number: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[number], tree)

    params = dict(variables["params"])
    lora = variables.get("lora", {}).get("layers", {})
    numbers = range(config.num_layers)
    return {
        "params": {**params, "layers": [layer(params["layers"], number) for number in numbers]},
        "lora": [layer(lora, number) for number in numbers],
    }


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a cache [R, K, S, h] over the row axes, heads over `tensor`."""
    return NamedSharding(mesh, P(ROW_AXES, "tensor", None, None))


# --- reading a prompt -------------------------------------------------------------------------------------------------
# Layer by layer through one compiled program: it compiles in a fraction of the time that all layers in one would take,
# and a prompt is so much work that starting a program per layer costs nothing.


def prefill(
    decoder: Decoder, weights: Weights, tokens: jax.Array, lengths: jax.Array, slots: int
) -> tuple[jax.Array, Caches]:
    """Reads prompts.

    Args:
        tokens: [R, T] int32, each row padded at its end.
        lengths: [R] int32, at least 1.
        slots: S of the caches, at least T.

    Returns:
        Logits [R, V] float32 after each row's last token, and the caches.
    """
    params = weights["params"]
    x, *shared = _start(decoder, params["embed_tokens"], tokens, None, lengths)
    caches: Caches = []
    for number, layer in enumerate(params["layers"]):
        x, kv = _prefill_layer(decoder, layer, weights["lora"][number], number, x, *shared, slots)
        caches.append(kv)
    return _finish(decoder, _output(params), params["norm"], x, lengths - 1), caches


def extend(
    decoder: Decoder, weights: Weights, caches: Caches, tokens: jax.Array, starts: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, Caches]:
    """Reads more tokens behind those that the caches hold.

    Args:
        caches: given up to this function.
        tokens: [R, T] int32, the new tokens, each row padded at its end.
        starts: [R] int32, how many tokens each row has already.
        lengths: [R] int32, how many are new, at least 1.

    Returns:
        As `prefill`.
    """
    params = weights["params"]
    x, *shared = _start(decoder, params["embed_tokens"], tokens, starts, starts + lengths)
    places = _places(tokens, starts)
    result: Caches = []
    for number, layer in enumerate(params["layers"]):
        x, kv = _extend_layer(decoder, layer, weights["lora"][number], number, x, *shared, places, caches[number])
        result.append(kv)
    return _finish(decoder, _output(params), params["norm"], x, lengths - 1), result


def hidden_states(decoder: Decoder, weights: Weights, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """The last hidden states [R, T, D] of texts, behind the final norm; arguments as those of `prefill`."""
    params = weights["params"]
    x, *shared = _start(decoder, params["embed_tokens"], tokens, None, lengths)
    for number, layer in enumerate(params["layers"]):
        x, _ = _prefill_layer(decoder, layer, weights["lora"][number], number, x, *shared, tokens.shape[1])
    return _normed(decoder, params["norm"], x)


def logits_of(decoder: Decoder, weights: Weights, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] float32 of hidden states [..., D] behind the final norm."""
    return _head(decoder, _output(weights["params"]), hidden)


def _output(params: Mapping[str, Any]) -> jax.Array:
    head: jax.Array = params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"]
    return head


def _places(tokens: jax.Array, starts: jax.Array | None) -> jax.Array:
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return places if starts is None else places + starts[:, None]


def _embed(decoder: Decoder, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    x = jnp.take(nn.with_logical_constraint(embedding, ("vocab", "act_embed")), tokens, axis=0)
    return nn.with_logical_constraint(x.astype(decoder.dtype), ("batch", "length", "act_embed"))


@partial(jax.jit, static_argnums=0)
def _start(
    decoder: Decoder, embed_tokens: Any, tokens: jax.Array, starts: jax.Array | None, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    x = _embed(decoder, embed_tokens["embedding"], tokens)
    places = _places(tokens, starts)
    present = (places < lengths[:, None]).astype(jnp.int32)  # 0 in the padding, which uses no expert
    return x, *rope_cos_sin(decoder.config, places, lengths), _modality(decoder, tokens, present)


def _modality(decoder: Decoder, tokens: jax.Array, present: jax.Array | None) -> jax.Array | None:
    return None if decoder.config.moe is None else modality_ids(decoder.config.moe, tokens, present)


def _run_layer(
    decoder: Decoder,
    layer: Any,
    lora: Any,
    number: jax.Array | int,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    modality: jax.Array | None,
    cache: KVCache | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    variables = {"params": layer, "lora": lora} if lora else {"params": layer}
    mask = MaskSpec(window=decoder.config.sliding_window)
    x, kept = cast(
        tuple[jax.Array, KVCache], decoder.block().apply(variables, x, number, cos, sin, mask, modality, cache)
    )
    return x, (kept.k, kept.v)


@partial(jax.jit, static_argnums=(0, 8), donate_argnums=4)
def _prefill_layer(
    decoder: Decoder,
    layer: Any,
    lora: Any,
    number: jax.Array,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    modality: jax.Array | None,
    slots: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # No mask for the padding: it stands behind the text, and nothing looks ahead.
    x, kv = _run_layer(decoder, layer, lora, number, x, cos, sin, modality)
    return x, _with_slots(kv, slots)


def _cached_layer(
    decoder: Decoder,
    layer: Any,
    lora: Any,
    number: jax.Array | int,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    modality: jax.Array | None,
    places: jax.Array,
    kv: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _run_layer(decoder, layer, lora, number, x, cos, sin, modality, KVCache(*kv, places))


_extend_layer = jax.jit(_cached_layer, static_argnums=0, donate_argnums=(4, 9))
# Inside a compiled loop: traced once instead of once per layer. The compiler puts it in line.
_inner_layer = jax.jit(_cached_layer, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _finish(decoder: Decoder, head: jax.Array, norm: Any, x: jax.Array, last: jax.Array) -> jax.Array:
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return _logits(decoder, head, norm, x)


def _logits(decoder: Decoder, head: jax.Array, norm: Any, x: jax.Array) -> jax.Array:
    return _head(decoder, head, _normed(decoder, norm, x))


@partial(jax.jit, static_argnums=0, inline=True)
def _normed(decoder: Decoder, norm: Any, x: jax.Array) -> jax.Array:
    dtype = jnp.dtype(decoder.dtype)
    normed = RMSNorm(decoder.config.rms_norm_eps, dtype, dtype).apply({"params": norm}, x)
    assert isinstance(normed, jax.Array)
    return normed


@partial(jax.jit, static_argnums=0, inline=True)
def _head(decoder: Decoder, head: jax.Array, x: jax.Array) -> jax.Array:
    return output_logits(x, head, jnp.dtype(decoder.dtype))


# --- one token --------------------------------------------------------------------------------------------------------


def next_logits(
    decoder: Decoder, weights: Weights, caches: Caches, token: jax.Array, place: jax.Array
) -> tuple[jax.Array, Caches]:
    """One step: the logits [R, V] after `token` [R], which stands at `place` [R]; and the caches with it.

    A pure function of arrays, for the inside of a loop.
    """
    params, tokens, places = weights["params"], token[:, None], place[:, None]
    x = _embed(decoder, params["embed_tokens"]["embedding"], tokens)
    cos, sin = rope_cos_sin(decoder.config, places, place + 1)
    modality = _modality(decoder, tokens, None)
    result: Caches = []
    for number, (layer, lora) in enumerate(zip(params["layers"], weights["lora"], strict=True)):
        x, kv = _inner_layer(decoder, layer, lora, number, x, cos, sin, modality, places, caches[number])
        result.append(kv)
    return _logits(decoder, _output(params), params["norm"], x[:, 0]), result


def grow(caches: Caches, slots: int) -> Caches:
    """The caches with room for `slots` tokens; layer by layer, so that only one is held twice."""
    return [_grow_layer(kv, slots) for kv in caches]


@partial(jax.jit, static_argnums=1)
def _grow_layer(kv: tuple[jax.Array, jax.Array], slots: int) -> tuple[jax.Array, jax.Array]:
    return _with_slots(kv, slots)


def _with_slots(kv: Sequence[jax.Array], slots: int) -> tuple[jax.Array, jax.Array]:
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))) for x in kv)
    axes = ("batch", "kv_heads", None, None)
    return nn.with_logical_constraint(k, axes), nn.with_logical_constraint(v, axes)


@partial(jax.jit, static_argnums=1)
def _repeat_layer(kv: tuple[jax.Array, jax.Array], times: int) -> tuple[jax.Array, jax.Array]:
    k, v = (jnp.repeat(x, times, axis=0) for x in kv)
    return k, v


def repeat_rows(caches: Caches, times: int) -> Caches:
    """Each row `times` times, one after the other: several samples or beams of a prompt."""
    return caches if times == 1 else [_repeat_layer(kv, times) for kv in caches]


def cache_bytes(config: LlamaConfig, rows: int, slots: int, dtype: DTypeLike) -> int:
    """Bytes of all caches."""
    per_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return rows * slots * per_slot


def weight_bytes(weights: Weights) -> int:
    """Bytes of all weights, over all devices."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
