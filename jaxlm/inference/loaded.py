"""A loaded model as the public interface hands it out: text in, text, logits, log-probabilities and embeddings out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import Decoding
from jaxlm.config.plain import plain
from jaxlm.config.reading import build
from jaxlm.devices.mesh import use_mesh
from jaxlm.errors import UserError
from jaxlm.inference.answering import Completion, complete
from jaxlm.inference.best_of import Judge, check_tokens
from jaxlm.inference.generator import Generator
from jaxlm.inference.options import check_decoding, check_stop_ids
from jaxlm.inference.prompts import Prompter
from jaxlm.inference.rows import bucket, divisible, fetch
from jaxlm.models.encoder_decoder import source_caches
from jaxlm.models.unrolled import hidden_states, last_layer, logits_of, read_on
from jaxlm.sharding import ROW_AXES
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import Tokenizer

Ids = Sequence[int]


class LoadedModel:
    """A model on its devices; `jaxlm.load` makes one.

    Shapes: T tokens of a text, V vocabulary, D model. Every result is a NumPy array in float32 or made of plain Python
    values.

    Attributes:
        tokenizer: the model's, or the one that was named.
        spec: the decoder, described by data.
    """

    def __init__(self, generator: Generator, prompter: Prompter) -> None:
        self._generator, self._prompter = generator, prompter

    @property
    def tokenizer(self) -> Tokenizer:
        return self._prompter.tokenizer

    @property
    def spec(self) -> DecoderSpec:
        return self._generator.decoder.spec

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._generator.max_length

    def prompt_ids(self, question: str, input: str | None = None) -> list[int]:
        """Tokens of a question in the model's template.

        Args:
            question: a text.
            input: goes with it where the template has a place for one (alpaca's input).

        Raises:
            UserError: for an empty question, or an input that the template would not show.
        """
        for name, text in (("question", question), ("input", input)):
            if not isinstance(text, str) and (name == "question" or text is not None):
                raise UserError(f"prompt_ids: {name}: expected text, found {text!r}")
        return self._prompter.question(question, input)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Ids],
        options: Decoding | None = None,
        *,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Completion]:
        """Answers prompts; the same texts that `python -m jaxlm.generate` gives.

        Args:
            prompts: questions, which are put into the model's template, or lists (or rows of an array) of token ids,
                which are continued as they stand. A single text is a list of one.
            options: how to decode; default: greedy, at most 256 tokens.
            batch_size: prompts answered together.
            settings: fields of `jaxlm.config.Decoding` that replace those of `options`, e.g. max_new_tokens=64,
                temperature=0.7, seed=1.

        Returns:
            The completions in the order of the prompts; with samples=n the n of a prompt stand side by side.

        Raises:
            UserError: for a prompt that is empty, does not fit the context, or holds an id that the model does not
                have; for settings that cannot be meant.
        """
        options = _decoding(options, settings)
        check_decoding(options)
        check_stop_ids(options, self._generator.decoder.spec.vocab_size)
        _check_batch_size(batch_size)
        ids: dict[int, Ids] = {}
        for number, prompt in enumerate(_listed(prompts)):
            name = f"prompt {number}"
            ids[number] = self._prompter.question(prompt, None, name) if isinstance(prompt, str) else _plain(prompt)
            self._generator.check_prompt(ids[number], name)
        strip = not self._prompter.is_text
        completions: dict[int, list[Completion]] = {}
        for batch in complete(self._generator, self.tokenizer, ids, options, batch_size, strip):
            completions |= batch
        return [completion for number in range(len(ids)) for completion in completions[number]]

    def best_of(
        self,
        prompts: str | Sequence[str] | Sequence[Ids],
        samples: int,
        reward_model: LoadedModel,
        options: Decoding | None = None,
        *,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[tuple[Completion, float]]:
        """Of several answers to each prompt, the one that a reward model gives the highest reward, and that reward.

        Args:
            prompts: see `generate`.
            samples: answers drawn for each prompt.
            reward_model: of a run with objective reward, with the same tokens as this model.
            options, batch_size, settings: see `generate`; temperature is 1 unless it is given.

        Raises:
            UserError: as `generate`; also for a reward model of another vocabulary.
        """
        check_tokens(self.spec, reward_model.spec)
        if options is None:
            settings = {"temperature": 1.0} | settings
        settings["samples"] = samples
        completions = self.generate(prompts, options, batch_size=batch_size, **settings)
        asked = [self.prompt_ids(each) if isinstance(each, str) else _plain(each) for each in _listed(prompts)]
        judge = reward_model.judge(self.spec, batch_size)
        answers = {number: completions[number * samples : (number + 1) * samples] for number in range(len(asked))}
        best = judge.best(dict(enumerate(asked)), answers)
        return [best[number] for number in range(len(asked))]

    def judge(self, spec: DecoderSpec, batch_size: int) -> Judge:
        """This model, trained with objective reward, as the judge of what a model of `spec` writes."""
        rewards = functools.partial(self.rewards, batch_size=batch_size)
        return Judge(rewards, spec.reward_token_id, self.max_length)

    def rewards(self, texts: Sequence[Ids], *, batch_size: int = 8) -> np.ndarray:
        """The reward of each text, [number of texts] float32, by a model that was trained with objective reward.

        Args:
            texts: token ids of prompt, answer and what ends it.
            batch_size: texts that are read together.

        Raises:
            UserError: as `logits`.
        """
        self.spec.refuse_encoder("rewards")
        _check_batch_size(batch_size)
        result = np.zeros(len(texts), np.float32)
        for start in range(0, len(texts), batch_size):
            batch = [_plain(ids) for ids in texts[start : start + batch_size]]
            with use_mesh(self._generator.mesh):
                x, lengths = self._last_layer(batch)
                logits = logits_of(self._generator.decoder, self._generator.weights, x[jnp.arange(len(x)), lengths - 1])
                row = fetch(logits[:, self.spec.reward_token_id], self._generator.mesh)
            result[start : start + batch_size] = row[: len(batch)]
        return result

    def logits(self, ids: Ids) -> np.ndarray:
        """Logits [T, V] float32: row t is the prediction of the token behind ids[t].

        Args:
            ids: tokens of one text, bos included where the model expects it.

        Raises:
            UserError: for an empty text, one beyond the model's context, or an id that the model does not have.
        """
        self.spec.refuse_encoder("logits: use log_probs, which takes a prompt and what is written")
        ids = _plain(ids)
        return self._logits(ids, 0, len(ids))

    def log_probs(self, prompt: str | Ids, continuation: str | Ids) -> np.ndarray:
        """Natural logarithms of the probabilities of each token of a continuation, [T] float32.

        Args:
            prompt: a text as it stands (no template; the tokenizer's own bos in front), or token ids.
            continuation: of the same kind. Texts are cut into tokens together with the prompt; a token that holds
                characters of both belongs to the continuation, as in training. With an encoder, which reads the prompt,
                they are cut apart, and eos ends the prompt.

        Raises:
            UserError: as `logits`; also when prompt and continuation are not of one kind, or one of them has no token.
        """
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise UserError(
                "log_probs: prompt and continuation must both be texts or both be token ids; "
                "see LoadedModel.tokenizer.encode and LoadedModel.prompt_ids"
            )
        if self.spec.encoder is not None:
            return self._log_probs_of_target(prompt, continuation)
        if isinstance(prompt, str):
            ids, first = self._joined(prompt, cast(str, continuation))
        else:
            ids, first = [*_plain(prompt), *_plain(cast(Ids, continuation))], len(prompt)
        if not 0 < first < len(ids):
            raise UserError(
                f"log_probs: {'the prompt' if first == 0 else 'the continuation'} has no tokens; each needs one"
            )
        return _log_probs_of(ids[first:], self._logits(ids, first - 1, len(ids) - 1))

    def _log_probs_of_target(self, prompt: str | Ids, continuation: str | Ids) -> np.ndarray:
        """`log_probs` of what the decoder writes when the encoder has read the prompt."""
        texts = isinstance(prompt, str)
        source = self._plain_ids(prompt) if isinstance(prompt, str) else _plain(prompt)
        if texts and self.tokenizer.adds_eos and self.tokenizer.eos_id is not None:
            source.append(self.tokenizer.eos_id)
        target = (
            list(self.tokenizer.encode(_whole(cast(str, continuation))).ids)
            if texts
            else _plain(cast(Ids, continuation))
        )
        for ids in (source, target):
            self._check(ids)
        generator = self._generator
        beginning = generator.beginning(source)
        tokens = np.zeros((2, bucket(max(len(source), len(target) + 1))), np.int32)
        tokens[0, : len(source)], tokens[1, : len(target)] = source, [*beginning, *target[:-1]]
        lengths = np.array([len(source), len(target)], np.int32)
        rows = divisible(1, generator.mesh)
        sharding = NamedSharding(generator.mesh, P(ROW_AXES))
        with use_mesh(generator.mesh):
            read, written = (jax.device_put(np.repeat(each[None], rows, axis=0), sharding) for each in tokens)
            sizes, new = (jax.device_put(np.repeat(each, rows), sharding) for each in lengths)
            caches = source_caches(generator.decoder, generator.weights, read, sizes, written.shape[1])
            x, _ = read_on(generator.decoder, generator.weights, caches, written, jnp.zeros_like(new), new)
            logits = logits_of(generator.decoder, generator.weights, x[0])
            return _log_probs_of(target, fetch(logits, generator.mesh)[: len(target)])

    def _joined(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both texts, and the number of those that belong to the prompt alone."""
        opening = list(self.tokenizer.opening) if self.tokenizer.adds_bos else []
        if self.tokenizer.opens_answers:
            before, answer = (self.tokenizer.encode(_whole(text)).ids for text in (prompt, continuation))
            return [*before, *opening, *answer], len(before) + len(opening)
        encoding = self.tokenizer.encode(_whole(prompt + continuation))
        inside = sum(end <= len(prompt) for _, end in encoding.offsets)
        return [*opening, *encoding.ids], len(opening) + inside

    def embed(
        self,
        texts: str | Sequence[str] | Sequence[Ids],
        *,
        pooling: Literal["mean", "last"] = "mean",
        batch_size: int = 8,
    ) -> np.ndarray:
        """Embeddings of texts, [number of texts, D] float32: the last hidden states behind the final norm, pooled.

        Args:
            texts: texts as they stand (no template; the tokenizer's own bos in front, or ChatGLM-6B's [gMASK]<sop>
                behind, as its tokenizer puts them), or lists of token ids. A single text is a list of one.
            pooling: mean: over all tokens of a text, bos included; last: the last token's (ChatGLM-6B's <sop>).
            batch_size: texts that are read together.

        Raises:
            UserError: as `logits`.
        """
        self.spec.refuse_encoder("embed")
        if pooling not in ("mean", "last"):
            raise UserError(f"embed: pooling {pooling!r} must be mean or last")
        _check_batch_size(batch_size)
        ids = [self._plain_ids(text) if isinstance(text, str) else _plain(text) for text in _listed(texts)]
        order = sorted(range(len(ids)), key=lambda number: (-len(ids[number]), number))
        result = np.zeros((len(ids), self._generator.decoder.spec.hidden_size), np.float32)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [ids[number] for number in numbers]
            with use_mesh(self._generator.mesh):
                x, lengths = self._last_layer(batch)
                hidden = hidden_states(self._generator.decoder, self._generator.weights, x)
                pooled = _pool(hidden, lengths, pooling)
                result[numbers] = fetch(pooled, self._generator.mesh)[: len(numbers)]
        return result

    def _plain_ids(self, text: str) -> list[int]:
        opening = list(self.tokenizer.opening) if self.tokenizer.adds_bos else []
        ids = self.tokenizer.encode(_whole(text)).ids
        return [*ids, *opening] if self.tokenizer.opens_answers else [*opening, *ids]

    def _last_layer(self, texts: Sequence[Ids]) -> tuple[jax.Array, jax.Array]:
        """What the last layer gives of texts [R, T, D], and their lengths [R]; the last rows only fill up the mesh."""
        generator = self._generator
        for ids in texts:
            self._check(ids)
        rows = divisible(len(texts), generator.mesh)
        tokens = np.zeros((rows, bucket(max(map(len, texts)))), np.int32)
        for row, ids in enumerate(texts):
            tokens[row, : len(ids)] = ids
        lengths = np.array([*map(len, texts), *[1] * (rows - len(texts))], np.int32)
        sharding = NamedSharding(generator.mesh, P(ROW_AXES))
        placed = jax.device_put(tokens, sharding), jax.device_put(lengths, sharding)
        return last_layer(generator.decoder, generator.weights, *placed), placed[1]

    def _check(self, ids: Ids) -> None:
        spec, longest = self._generator.decoder.spec, self.max_length
        if not ids:
            raise UserError("the text has no tokens")
        if len(ids) > longest:
            raise UserError(f"the text has {len(ids)} tokens, the model's context is {longest}; shorten it")
        if not 0 <= min(ids) <= max(ids) < spec.vocab_size:
            raise UserError(
                f"the text holds token ids {min(ids)} to {max(ids)}, the model has 0 to {spec.vocab_size - 1}"
            )

    def _logits(self, ids: Ids, start: int, stop: int) -> np.ndarray:
        """Logits [stop - start, V] behind the tokens at these positions."""
        generator, count = self._generator, stop - start
        positions = np.minimum(start + np.arange(bucket(count)), stop - 1)  # few shapes, so few programs
        with use_mesh(generator.mesh):
            x, _ = self._last_layer([ids])
            logits = logits_of(generator.decoder, generator.weights, x[0, positions])
            rows: np.ndarray = fetch(logits, generator.mesh)[:count]
        return rows


def _log_probs_of(ids: Ids, logits: np.ndarray) -> np.ndarray:
    """Natural logarithms [T] of the probabilities that logits [T, V] give ids."""
    scores = logits - logits.max(axis=-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    chosen: np.ndarray = np.take_along_axis(scores, np.array(ids)[:, None], axis=1)[:, 0]
    return chosen


def _decoding(options: Decoding | None, settings: Mapping[str, Any]) -> Decoding:
    """The options with these settings, their types checked like those of a file."""
    if options is not None and not isinstance(options, Decoding):
        raise UserError(f"options: expected a jaxlm.config.Decoding, found {options!r}")
    known = [field.name for field in dataclasses.fields(Decoding)]
    for name in settings:
        if name not in known:
            raise UserError(f"generate: {name!r} is not a setting; known: {', '.join(known)}")
    values = {name: getattr(options or Decoding(), name) for name in known} | dict(settings)
    return build(plain(values), Decoding)


def _check_batch_size(batch_size: int) -> None:
    if not (isinstance(batch_size, (int, np.integer)) and batch_size >= 1):
        raise UserError(f"batch_size: {batch_size!r} must be a whole number, at least 1")


def _listed(values: str | Sequence[Any]) -> Sequence[Any]:
    if isinstance(values, str):
        return [values]
    wanted = "expected texts, or lists of token ids"
    if isinstance(values, bytes) or not isinstance(values, (Sequence, np.ndarray, jax.Array)):
        raise UserError(f"{wanted}, found {type(values).__name__}")
    if len(values) and np.ndim(values[0]) == 0 and not isinstance(values[0], str):
        raise UserError(f"{wanted}: put the ids of a single text into a list, [ids]")
    return values


def _whole(text: str) -> str:
    """The text, unless it holds half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds half of a Unicode character (a lone surrogate) at {error.start}") from None
    return text


def _plain(ids: Ids) -> list[int]:
    """Token ids as Python integers, from a list or an array of one dimension."""
    values = np.asarray(ids)
    if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise UserError(f"token ids must be a list of integers, found {type(ids).__name__} of {values.dtype}")
    return [int(index) for index in values]


@jax.jit
def _mean(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    inside = jnp.arange(hidden.shape[1])[None] < lengths[:, None]
    total = jnp.sum(hidden.astype(jnp.float32) * inside[..., None], axis=1)
    return total / lengths[:, None]


@jax.jit
def _last(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0].astype(jnp.float32)


def _pool(hidden: jax.Array, lengths: jax.Array, pooling: str) -> jax.Array:
    return _mean(hidden, lengths) if pooling == "mean" else _last(hidden, lengths)
