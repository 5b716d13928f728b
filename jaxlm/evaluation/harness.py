"""A model of jaxlm for lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, 0.4.13).

Texts become tokens, contexts are cut and continuations are told apart as its own `hf` model does, so that the figures
are the same; what differs is how it is computed (`evaluation.likelihood`, and the engine's slots for generation).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from jaxlm.config import Decoding
from jaxlm.errors import UserError
from jaxlm.evaluation import likelihood
from jaxlm.evaluation.likelihood import Choices
from jaxlm.inference.answering import complete
from jaxlm.inference.generator import Generator
from jaxlm.inference.prompts import Prompter
from jaxlm.screen import Bars

try:  # an extra of pyproject.toml; without it this module is not imported but for the message
    from lm_eval import utils
    from lm_eval.api import model as harness_model
    from lm_eval.api import task as harness_task
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as error:
    raise UserError(f"harness: needs {error.name}: pip install 'jaxlm[harness]'") from None

__all__ = ["JaxlmModel", "drop_advice", "register_model", "without_bars"]

MAX_NEW_TOKENS = 256  # where a task names no number, as with `hf`
# Settings of generation that tasks may name -> ours.
SETTINGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "num_beams": "num_beams",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "seed": "seed",
}


def _is_wanted(record: logging.LogRecord) -> bool:
    """Whether a warning of lm_eval tells the user something: how to give data to a suite stands in jaxlm's own help."""
    return "Custom kwargs can be passed to `--metadata`" not in record.getMessage()


def drop_advice() -> None:
    """Keeps lm_eval's advice about its own command line off the screen; its warnings stay."""
    logging.getLogger(harness_task.__name__).addFilter(_is_wanted)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """A block in which lm_eval draws no bars about its own bookkeeping; `JaxlmModel` draws one while it asks."""

    def walk(entries: Iterable[Any], **_: Any) -> Iterable[Any]:
        return entries

    modules = harness_model, harness_task
    bars = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = walk
    try:
        yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


@contextlib.contextmanager
def _bar(description: str, total: int, is_hidden: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, as every command has it; the block calls what it gets with what is done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bars(*columns, console=Console(stderr=True), disable=is_hidden) as bars:
        task = bars.add_task(description, total=total)
        yield lambda count: bars.advance(task, count)


class JaxlmModel(TemplateLM):
    """The harness's model; all three kinds of requests.

    Args:
        generator: the model on its devices.
        prompter: its tokenizer, and whether bos stands in front of texts.
        batch_size: requests that are computed together.
        digest: of what decides its answers.
    """

    def __init__(self, generator: Generator, prompter: Prompter, batch_size: int = 8, digest: str = "") -> None:
        super().__init__()
        self._generator, self._prompter = generator, prompter
        self.tokenizer = prompter.tokenizer
        self.batch_size, self.digest = batch_size, digest
        self.backend = "causal" if generator.decoder.spec.encoder is None else "seq2seq"
        self.first_fed: dict[str, Any] | None = None

    # --- what the harness asks about the model ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_id is None:
            raise UserError(
                f"harness: the tokenizer of {self.tokenizer.path} has no eos token; name one in its settings"
            )
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing else stands before: bos, or eos where there is no bos."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self._generator.max_length

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """For the results: what computed them."""
        return {"model_dtype": str(self._generator.decoder.dtype), "model_bos": self._prompter.beginning}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's template writes it; without the prompt, its last turn stays open.

        Raises:
            UserError: there is no template, or it does not take the conversation.
        """
        text = self.tokenizer.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        at = text.rindex(last.strip())
        # Templates may take white space off the ends.
        return (
            text[: at + len(last.lstrip())] if text[at:].startswith(last.lstrip()) else text[: at + len(last.strip())]
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with the tokenizer's own special tokens around, unless told otherwise or bos is there already.

        A prompt of ChatGLM-6B ends with the two that open its answer.
        """
        ids = list(self.tokenizer.encode(string, True).ids)
        if add_special_tokens is False:
            return ids
        before = list(self.tokenizer.opening) if self._prompter.adds_bos else []
        bos = self.tokenizer.token(self.prefix_token_id)
        if self.tokenizer.opens_answers:
            return ids if add_special_tokens is None and string.endswith(bos) else [*ids, *before]
        if add_special_tokens is None and string.startswith(bos):
            return ids
        behind = [self.eot_token_id] if self.tokenizer.adds_eos else []
        return [*before, *ids, *behind]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it; apart where special tokens stand between them."""
        if not self.tokenizer.opens_answers:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        return self.tok_encode(stripped), self.tok_encode(continuation, add_special_tokens=False)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether all are the largest) of each (key, context, continuation)."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            shared.setdefault(self._cut(context, continuation), []).append(number)
        groups = sorted(shared.items(), key=lambda entry: (-len(entry[0]), entry[0]))
        results: dict[int, tuple[float, bool]] = {}
        with _bar("log-likelihoods", len(requests), disable_tqdm) as advance:
            for start in range(0, len(groups), self.batch_size):
                part = groups[start : start + self.batch_size]
                asked = [Choices(context, tuple(tuple(requests[n][2]) for n in own)) for context, own in part]
                for each in asked:
                    likelihood.check(self._generator, each)
                self._remember(asked[0])
                for (_, own), scored in zip(
                    part, likelihood.scores(self._generator, asked, self.batch_size), strict=True
                ):
                    pairs = zip(own, scored.log_probs, scored.is_greedy, strict=True)
                    for number, value, is_greedy in pairs:
                        results[number] = value, is_greedy
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
                    advance(len(own))
        return [results[number] for number in range(len(requests))]

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """The context, without its first tokens where the model cannot read all of it with the continuation."""
        most = self.max_length if self.backend == "seq2seq" else self.max_length + 1 - len(continuation)
        return tuple(context[-most:]) if most > 0 else ()

    def _remember(self, asked: Choices) -> None:
        if self.first_fed is None:
            continuations = [
                {"ids": list(ids), "text": self.tokenizer.decode(ids, False)} for ids in asked.continuations
            ]
            text = self.tokenizer.decode(asked.context, False)
            self.first_fed = {"ids": list(asked.context), "text": text, "continuations": continuations}

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows as long as the context; each token is predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for context, continuation in self._rolling_windows(request.args[0]):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _rolling_windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """A text as pairs of what is read and what is predicted; with `opens_answers`, an answer to nothing."""
        opening = list(self.tokenizer.opening) if self.tokenizer.opens_answers else []
        pieces = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False if opening else None),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - len(opening),
            context_len=1,
        )
        pairs = [(list(context), list(new)) for context, new in map(utils.make_disjoint_window, pieces)]
        if not opening:
            return pairs
        # The first window follows the opening, whose last token is the prefix; others have a token before them.
        return [([*opening, *(context if at else [])], new) for at, (context, new) in enumerate(pairs)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first of the texts that end it."""
        groups: dict[tuple[Decoding, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(number)
        results: dict[int, str] = {}
        with _bar("answers", len(requests), disable_tqdm) as advance:
            for (settings, until), numbers in groups.items():
                prompts = {number: self._prompt(requests[number].args[0], settings) for number in numbers}
                for batch in complete(self._generator, self.tokenizer, prompts, settings, self.batch_size, False):
                    for number, completions in batch.items():
                        text = self.tokenizer.decode(completions[0].ids)
                        results[number] = postprocess_generated_text(text, list(until), None)
                        self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
                    advance(len(batch))
        return [results[number] for number in range(len(requests))]

    def _prompt(self, text: str, settings: Decoding) -> list[int]:
        room = self.max_length - (settings.max_new_tokens if self.backend == "causal" else 0)
        if room < 1:
            raise UserError(
                f"harness: max_gen_toks {settings.max_new_tokens} leaves no room for a prompt: the model's context is "
                f"{self.max_length} tokens; give --options.gen_kwargs '{{max_gen_toks: …}}'"
            )
        ids = self.tok_encode(text)[-room:]
        if self.first_fed is None:
            self.first_fed = {"ids": ids, "text": self.tokenizer.decode(ids, False)}
        return ids

    def _settings(self, given: Mapping[str, Any]) -> tuple[Decoding, tuple[str, ...]]:
        """A task's settings of generation as ours, and the texts that end an answer."""
        kwargs = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self.tokenizer.token(self.eot_token_id))
        most, samples = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample", False)
        unknown = [name for name in kwargs if name not in SETTINGS]
        if unknown:
            known = ", ".join(SETTINGS)
            raise UserError(f"harness: generation setting {unknown[0]!r} is not one of jaxlm's; known: {known}")
        values = {SETTINGS[name]: value for name, value in kwargs.items()}
        if not samples:
            for name in ("temperature", "top_k", "top_p", "min_p"):  # of no effect, in `hf` too
                values.pop(name, None)
        stop = tuple(term for term in until if term)
        return dataclasses.replace(Decoding(), max_new_tokens=most, stop=stop, **values), stop
