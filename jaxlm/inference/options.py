"""Checking how text is to be generated. No JAX here: `--help` and mistakes answer at once."""

from __future__ import annotations

import math

from jaxlm.config import Decoding
from jaxlm.errors import UserError

# Logits are divided by such numbers in float32; those beyond would make them infinite, or no numbers.
TINY = 1e-6


def check_decoding(options: Decoding) -> None:
    """Raises UserError for a value that cannot be meant, naming key, value and range."""
    checks = [
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        (
            "temperature",
            options.temperature == 0 or TINY <= options.temperature <= 1 / TINY,
            f"0 (take the most probable token), or between {TINY:g} and {1 / TINY:g}",
        ),
        ("top_k", 0 <= options.top_k < 2**31, "between 0 (off) and 2147483647"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1 (off)"),
        ("min_p", 0 <= options.min_p <= 1, "between 0 (off) and 1"),
        (
            "repetition_penalty",
            TINY <= options.repetition_penalty <= 1 / TINY,
            f"between {TINY:g} and {1 / TINY:g}; 1 is off",
        ),
        ("no_repeat_ngram_size", 0 <= options.no_repeat_ngram_size < 2**31, "between 0 (off) and 2147483647"),
        ("num_beams", options.num_beams >= 1, "at least 1"),
        ("length_penalty", math.isfinite(options.length_penalty), "finite"),
        ("samples", options.samples >= 1, "at least 1"),
        ("seed", 0 <= options.seed < 2**32, "between 0 and 4294967295"),
        ("stop", "" not in options.stop, "texts that are not empty"),
        ("stop_ids", all(index >= 0 for index in options.stop_ids), "token ids, 0 or more"),
    ]
    for key, holds, wanted in checks:
        if not holds:
            value = getattr(options, key)
            raise UserError(f"{key}: {list(value) if isinstance(value, tuple) else value!r} must be {wanted}")
    if options.num_beams > 1 and options.temperature > 0:
        raise UserError(
            f"num_beams: {options.num_beams} with temperature {options.temperature:g}: beam search draws nothing, so "
            "temperature, top_k, top_p and min_p would do nothing; set temperature 0, or num_beams 1"
        )
    if options.temperature == 0:
        for key, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            if getattr(options, key) != off:
                raise UserError(
                    f"{key}: {getattr(options, key):g} does nothing at temperature 0, where the most probable token "
                    f"is taken; set a temperature above 0, or {key} {off} first"
                )
    if options.num_beams == 1:
        for key, unset in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(options, key) != unset:
                raise UserError(f"{key}: {getattr(options, key)!r} belongs to beam search; set num_beams above 1")
    if options.samples > 1 and options.num_beams > 1 and options.samples > options.num_beams:
        raise UserError(
            f"samples: {options.samples} answers need at least as many beams (num_beams: {options.num_beams})"
        )
    if options.samples > 1 and options.num_beams == 1 and options.temperature == 0:
        raise UserError(f"samples: {options.samples} equal answers at temperature 0; set a temperature above 0")


def check_best_of(best_of: int, options: Decoding) -> None:
    """Raises UserError where the answers to choose from would be one, or equal."""
    if best_of < 2:
        raise UserError(f"best_of: {best_of} must be at least 2: there is nothing to choose from")
    if options.samples != 1:
        raise UserError(f"samples: {options.samples} with best_of: the best answer is one; leave samples out")
    if options.num_beams > 1:
        raise UserError(f"num_beams: {options.num_beams} with best_of, whose answers are drawn; leave one of them out")
    if options.temperature == 0:
        raise UserError(f"best_of: {best_of} equal answers at temperature 0; set a temperature above 0, e.g. 1")


def check_stop_ids(options: Decoding, vocab_size: int) -> None:
    """Raises UserError for a stop id that the model does not have."""
    for index in options.stop_ids:
        if index >= vocab_size:
            raise UserError(f"stop_ids: {index}: the model has the tokens 0 to {vocab_size - 1}")
