"""Greedy answers to a few prompts at the end of a run: a look at what the model has learned.

Each token runs the whole row again. That needs no cache and serves a handful of short answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models.decoder import Decoder


def greedy_answers(
    model: Decoder, variables: Any, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """New tokens for each prompt, without the stop token.

    Args:
        model: the model; rows of at most its config's max_length tokens are computed.
        variables: what `Model.apply` takes.
        prompts: token ids, each at least one.
        max_tokens: most tokens of an answer.
        stop_ids: tokens that end an answer.
    """
    longest = max(len(prompt) for prompt in prompts)
    length = min(longest + max_tokens, model.config.max_length)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt[:length]
    starts = np.array([min(len(prompt), length) for prompt in prompts], np.int32)
    stops = jnp.asarray(list(stop_ids), jnp.int32)

    @jax.jit
    def run(variables: Any, tokens: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.arange(tokens.shape[0])

        def unfinished(carry: Any) -> jax.Array:
            _, ends, done = carry
            return jnp.any(~done & (ends < length) & (ends - starts < max_tokens))

        def one_more(carry: Any) -> Any:
            tokens, ends, done = carry
            hidden, head = cast(tuple[jax.Array, jax.Array], model.apply(variables, tokens, method="hidden"))
            last = hidden[rows, ends - 1]
            logits = jnp.einsum("bd,vd->bv", last, head.astype(last.dtype), preferred_element_type=jnp.float32)
            best = jnp.argmax(logits, -1).astype(jnp.int32)
            done = done | (ends >= length) | (ends - starts >= max_tokens) | jnp.isin(best, stops)
            place = jnp.minimum(ends, length - 1)
            tokens = tokens.at[rows, place].set(jnp.where(done, tokens[rows, place], best))
            return tokens, jnp.where(done, ends, ends + 1), done

        carry = (tokens, starts, starts >= length)
        tokens, ends, _ = jax.lax.while_loop(unfinished, one_more, carry)
        return tokens, ends

    filled, ends = jax.device_get(run(variables, tokens, starts))
    return [filled[row, start:end].tolist() for row, (start, end) in enumerate(zip(starts, ends, strict=True))]
