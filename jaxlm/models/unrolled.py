"""The unrolled runner: a decoder layer by layer, with a cache of keys and values for each, for generation.

Training stacks the layers and scans over them. A decoding loop that did so would copy every layer's weights out of the
stack at every token, so here they are separate arrays, and the loop is unrolled over layers.

Shapes: R rows, T new tokens, S slots of a cache, K kv heads, h head dim, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.models.decoder import Angles, Decoder
from jaxlm.nn.attention import KVCache
from jaxlm.nn.beam_attention import BeamCache, Lineage
from jaxlm.nn.linear import with_chosen
from jaxlm.nn.paged_attention import PagedCache, least_tokens
from jaxlm.nn.self_attention import Cache
from jaxlm.spec import DecoderSpec

# For each layer: keys and values [R, K, S, h]. With an encoder then the `Source` with its own of these, of P rows, each
# of which R / P rows see. Where tokens see later ones, behind the layers the texts themselves [R, 1, S, 1] int32, which
# positions depend on, and an empty array beside them, so that all is moved and grown alike.
LayerCache = tuple[Any, ...]
Caches = list[LayerCache]
# {"params": {…, "layers": [one layer's parameters, …]}, "lora": [one layer's factors, or {}, …]}; with an encoder its
# layers are stacked, in "params" and in "encoder_lora".
Weights = dict[str, Any]


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
    x, angles, modality, segments = _start(decoder, _embed_params(params), tokens, lengths)
    caches: Caches = []
    for number, (layer, lora) in enumerate(zip(params["layers"], weights["lora"], strict=True)):
        p = number % len(angles)
        x, kv = _prefill_layer(decoder, p, layer, lora, number, x, angles[p], modality, segments, slots)
        caches.append(kv)
    if decoder.spec.prefix is not None:
        texts = tokens[:, None, :, None]
        caches.append(_grow_layer((texts, texts[..., :0]), slots))
    return _finish(decoder, head_params(params), x, lengths - 1), caches


def extend(
    decoder: Decoder, weights: Weights, caches: Caches, tokens: jax.Array, starts: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, Caches]:
    """Reads more tokens behind those that the caches hold.

    Returns:
        Logits [R, V] float32 after each row's last token, and the caches; arguments as those of `read_on`.
    """
    x, caches = read_on(decoder, weights, caches, tokens, starts, lengths)
    return _finish(decoder, head_params(weights["params"]), x, lengths - 1), caches


def read_on(
    decoder: Decoder, weights: Weights, caches: Caches, tokens: jax.Array, starts: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, Caches]:
    """Reads more tokens behind those that the caches hold.

    Args:
        caches: given up to this function.
        tokens: [R, T] int32, the new tokens, each row padded at its end.
        starts: [R] int32, number of tokens that each row has already.
        lengths: [R] int32, number of new tokens, at least 1.

    Returns:
        What the last layer gives [R, T, D], and the caches.
    """
    params = weights["params"]
    held = _texts(decoder, caches)
    x, angles, modality, texts = _go_on(decoder, _embed_params(params), tokens, starts, starts + lengths, held)
    places = _places(tokens, starts)
    bias = _jitted_bias(decoder, _bias_params(params), caches[0][0].shape[2]) if _bias_params(params) else None
    result: Caches = []
    for number, (layer, lora) in enumerate(zip(params["layers"], weights["lora"], strict=True)):
        p = number % len(angles)
        x, kv = _extend_layer(decoder, p, layer, lora, number, x, angles[p], modality, places, caches[number], bias)
        result.append(kv)
    return x, _with_texts(result, texts, caches)


def last_layer(decoder: Decoder, weights: Weights, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """What the last layer gives of texts, [R, T, D]; arguments as those of `prefill`."""
    params = weights["params"]
    x, angles, modality, segments = _start(decoder, _embed_params(params), tokens, lengths)
    for number, (layer, lora) in enumerate(zip(params["layers"], weights["lora"], strict=True)):
        p = number % len(angles)
        x, _ = _prefill_layer(decoder, p, layer, lora, number, x, angles[p], modality, segments, tokens.shape[1])
    return x


def logits_of(decoder: Decoder, weights: Weights, x: jax.Array) -> jax.Array:
    """Logits [..., V] float32 of what the last layer gives [..., D]."""
    return _jitted_head(decoder, head_params(weights["params"]), x)


def hidden_states(decoder: Decoder, weights: Weights, x: jax.Array) -> jax.Array:
    """The final hidden states [..., D] of what the last layer gives: behind the last norm."""
    return _last_norm(decoder, head_params(weights["params"]), x)


def _embed_params(params: Mapping[str, Any]) -> dict[str, Any]:
    names = ("embed_tokens", "project_in", "embed_positions", "embed_norm")
    return {name: params[name] for name in names if name in params}


def head_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that `Decoder.head` takes."""
    names = ("norm", "project_out", "lm_head" if "lm_head" in params else "embed_tokens")
    return {name: params[name] for name in names if name in params}


def _bias_params(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in ("relative_bias",) if name in params}


def _bias(decoder: Decoder, table: Any, slots: int) -> jax.Array | None:
    """The relative bias of a cache of this number of slots."""
    return cast(jax.Array | None, decoder.apply({"params": table}, slots, 1, method="bias"))


_jitted_bias = jax.jit(_bias, static_argnums=(0, 2))


def _places(tokens: jax.Array, starts: jax.Array | None) -> jax.Array:
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return places if starts is None else places + starts[:, None]


def _embed(decoder: Decoder, embed: Any, tokens: jax.Array, places: jax.Array) -> jax.Array:
    learned = decoder.spec.learned_positions
    if learned is not None:
        # Padding and rows that are finished may stand behind the last position: what comes of them is not used, but a
        # NaN in a cache would reach the row's other tokens. Longer texts are refused before they come here.
        places = jnp.minimum(places, learned.num_positions - 1)
    return cast(jax.Array, decoder.apply({"params": embed}, tokens, places, method="embed"))


def _head(decoder: Decoder, head: Any, x: jax.Array) -> jax.Array:
    return cast(jax.Array, decoder.apply({"params": head}, x, method="head"))


_jitted_head = jax.jit(_head, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _last_norm(decoder: Decoder, head: Any, x: jax.Array) -> jax.Array:
    return cast(jax.Array, decoder.apply({"params": head}, x, method="last_states"))


@partial(jax.jit, static_argnums=0)
def _start(
    decoder: Decoder, embed: Any, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, tuple[Angles, ...], jax.Array | None, jax.Array | None]:
    places = _places(tokens, None)
    present = (places < lengths[:, None]).astype(jnp.int32)  # 0 in the padding, which uses no expert
    x, modality = _embed(decoder, embed, tokens, places), decoder.modality(tokens, present)
    if decoder.spec.prefix is None:
        # No mask for the padding: it stands behind the text, and nothing looks ahead.
        return x, decoder.angles(places, lengths), modality, None
    positions, answer, segments = decoder.prefixed(tokens, places, present)
    return x, decoder.angles(positions, lengths, answer), modality, segments


def _next(
    decoder: Decoder, embed: Any, tokens: jax.Array, places: jax.Array, lengths: jax.Array, texts: jax.Array | None
) -> tuple[jax.Array, tuple[Angles, ...], jax.Array | None]:
    """The input of the first layer and the angles, of tokens behind those that the caches hold; the texts with them.

    Args:
        tokens: [R, T], at `places` [R, T] of rows that have `lengths` [R] tokens with them.
        texts: [R, 1, S, 1] where there is a prefix.
    """
    x = _embed(decoder, embed, tokens, places)
    if texts is None:
        return x, decoder.angles(places, lengths), None
    texts = texts.at[jnp.arange(len(tokens))[:, None], 0, places, 0].set(tokens.astype(texts.dtype), mode="drop")
    ids = texts[:, 0, :, 0]
    every = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    by_slot = decoder.prefixed(ids, every, (every < lengths[:, None]).astype(jnp.int32))[:2]
    at = jnp.minimum(places, ids.shape[1] - 1)
    positions, answer = (jnp.take_along_axis(cast(jax.Array, values), at, axis=1) for values in by_slot)
    return x, decoder.angles(positions, lengths, answer), texts


@partial(jax.jit, static_argnums=0)
def _go_on(
    decoder: Decoder, embed: Any, tokens: jax.Array, starts: jax.Array, lengths: jax.Array, texts: jax.Array | None
) -> tuple[jax.Array, tuple[Angles, ...], jax.Array | None, jax.Array | None]:
    places = _places(tokens, starts)
    present = (places < lengths[:, None]).astype(jnp.int32)  # 0 in the padding, which uses no expert
    x, angles, texts = _next(decoder, embed, tokens, places, lengths, texts)
    return x, angles, decoder.modality(tokens, present), texts


def _texts(decoder: Decoder, caches: Caches) -> jax.Array | None:
    return None if decoder.spec.prefix is None else caches[-1][0]


def _with_texts(result: Caches, texts: jax.Array | None, caches: Caches) -> Caches:
    return result if texts is None else [*result, (texts, caches[-1][1])]


def _run_layer(
    decoder: Decoder,
    period_index: int,
    layer: Any,
    lora: Any,
    number: jax.Array | int,
    x: jax.Array,
    angles: Angles,
    modality: jax.Array | None,
    cache: Cache | None = None,
    *more: Any,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    variables = {"params": layer, "lora": lora} if lora else {"params": layer}
    block = decoder.block(period_index, keep_kv=True)
    inputs = x, number, angles, segments, modality, cache, *more
    x, kept = cast(tuple[jax.Array, Cache], block.apply(variables, *inputs))
    return x, (kept.k, kept.v)


@partial(jax.jit, static_argnums=(0, 1, 9), donate_argnums=5)
def _prefill_layer(
    decoder: Decoder,
    period_index: int,
    layer: Any,
    lora: Any,
    number: jax.Array,
    x: jax.Array,
    angles: Angles,
    modality: jax.Array | None,
    segments: jax.Array | None,
    slots: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x, kv = _run_layer(decoder, period_index, layer, lora, number, x, angles, modality, segments=segments)
    return x, _with_slots(kv, slots)


def _cached_layer(
    decoder: Decoder,
    period_index: int,
    layer: Any,
    lora: Any,
    number: jax.Array | int,
    x: jax.Array,
    angles: Angles,
    modality: jax.Array | None,
    places: jax.Array,
    kv: LayerCache,
    bias: jax.Array | None,
    lineage: Lineage | None = None,
) -> tuple[jax.Array, LayerCache]:
    k, v, *source = kv
    cache = KVCache(k, v, places) if lineage is None else BeamCache(k, v, places, lineage)
    x, (k, v) = _run_layer(decoder, period_index, layer, lora, number, x, angles, modality, cache, bias, *source)
    return x, (k, v, *source)


_extend_layer = jax.jit(_cached_layer, static_argnums=(0, 1), donate_argnums=(5, 9))
# Inside a compiled loop: traced once instead of once per layer. The compiler puts it in line.
_inner_layer = jax.jit(_cached_layer, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=0)
def _finish(decoder: Decoder, head: Any, x: jax.Array, last: jax.Array) -> jax.Array:
    return _head(decoder, head, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])


# --- one token --------------------------------------------------------------------------------------------------------


def next_logits(
    decoder: Decoder,
    weights: Weights,
    caches: Caches,
    token: jax.Array,
    place: jax.Array,
    lineage: Lineage | None = None,
) -> tuple[jax.Array, Caches]:
    """One step: the logits [R, V] after `token` [R], which stands at `place` [R]; and the caches with it.

    A pure function of arrays, for the inside of a loop.

    Args:
        lineage: of beams, with the slots at `place`; None: each row's cache holds its own text.
    """
    params, tokens, places = weights["params"], token[:, None], place[:, None]
    held = _texts(decoder, caches)
    x, angles, texts = _next(decoder, _embed_params(params), tokens, places, place + 1, held)
    modality = decoder.modality(tokens)
    bias = _bias(decoder, _bias_params(params), caches[0][0].shape[2])
    result: Caches = []
    for number, (layer, lora) in enumerate(zip(params["layers"], weights["lora"], strict=True)):
        p = number % len(angles)
        inputs = x, angles[p], modality, places, caches[number], bias, lineage
        x, kv = _inner_layer(decoder, p, layer, lora, number, *inputs)
        result.append(kv)
    return _head(decoder, head_params(params), x[:, 0]), _with_texts(result, texts, caches)


# --- tokens of many texts, side by side -------------------------------------------------------------------------------


def padded_tokens(spec: DecoderSpec, count: int) -> int:
    """The number of tokens that layers see of a step of `count`: enough for every sum (see `least_tokens`)."""
    heads = (layer.attention for layer in spec.period if layer.attention.qk_norm is not None)
    return max(count, least_tokens(min([spec.hidden_size, *(each.num_kv_heads * each.head_dim for each in heads)])))


def next_states(
    decoder: Decoder,
    weights: Weights,
    pages: Caches,
    tokens: jax.Array,
    places: jax.Array,
    tables: jax.Array,
    chunk_rows: jax.Array,
    chosen: jax.Array | None = None,
    shared_pages: bool = False,
) -> tuple[jax.Array, Caches]:
    """What the last layer gives of a step's tokens [N, D], and the pages with them (see `nn.paged_attention`).

    A pure function of arrays; no token depends on another text's.

    Args:
        pages: for each layer keys and values [M, K, page, h].
        tokens: [N].
        places, tables, chunk_rows: see `PagedCache`.
        chosen: [N] int32, the adapter of each token, where there are several (see `nn.linear.AdapterBank`).
        shared_pages: see `PagedCache`.
    """
    count, fill = len(tokens), padded_tokens(decoder.spec, len(tokens)) - len(tokens)
    length = (count - len(tables)) // len(chunk_rows) if len(chunk_rows) else 0
    tokens, places = jnp.pad(tokens, (0, fill)), jnp.pad(places, (0, fill), constant_values=-1)
    lora = weights["lora"] if chosen is None else with_chosen(weights["lora"], jnp.pad(chosen, (0, fill))[None])
    params, at = weights["params"], jnp.maximum(places, 0)[:, None]
    x = _embed(decoder, _embed_params(params), tokens[None], at.T)
    # A text's length is that up to the token itself: factors of longrope may depend on it.
    angles = jax.tree.map(lambda each: each.swapaxes(0, 1), decoder.angles(at, at[:, 0] + 1))
    modality = decoder.modality(tokens[None], (places >= 0).astype(jnp.int32)[None])  # padding uses no expert
    result: Caches = []
    for number, (layer, factors) in enumerate(zip(params["layers"], lora, strict=True)):
        p = number % len(angles)
        k, v = pages[number]
        cache = PagedCache(k, v, tables, chunk_rows, places, length, shared_pages)
        x, kv = _paged_layer(decoder, p, layer, factors, number, x, angles[p], modality, cache)
        result.append(kv)
    return x[0, :count], result


_paged_layer = jax.jit(_run_layer, static_argnums=(0, 1))

# --- caches -----------------------------------------------------------------------------------------------------------


def grow(caches: Caches, slots: int) -> Caches:
    """The caches with room for `slots` tokens; layer by layer, so that only one is held twice."""
    return [(*_grow_layer((k, v), slots), *source) for k, v, *source in caches]


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
    """Each row `times` times, one after the other: several samples or beams of a prompt, which see one source."""
    return caches if times == 1 else [(*_repeat_layer((k, v), times), *source) for k, v, *source in caches]


def continued(decoder: Decoder, caches: Caches, origin: jax.Array) -> Caches:
    """The caches of beams, each of which continues the row `origin` [R]: with its text, where positions depend on it.

    Keys and values stay where they are (see `nn.beam_attention`).
    """
    texts = _texts(decoder, caches)
    return caches if texts is None else [*caches[:-1], (texts[origin], caches[-1][1])]


def gathered(decoder: Decoder, caches: Caches, lineage: Lineage) -> Caches:
    """The caches of beams, in which each row holds all of its text."""
    texts = [] if decoder.spec.prefix is None else caches[-1:]
    layers = caches[: len(caches) - len(texts)]
    return [*((lineage.gathered(k), lineage.gathered(v), *source) for k, v, *source in layers), *texts]


def cache_bytes(spec: DecoderSpec, rows: int, slots: int, dtype: DTypeLike) -> int:
    """Bytes of all caches."""
    values = sum(2 * layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.layers())
    return rows * slots * values * jnp.dtype(dtype).itemsize
