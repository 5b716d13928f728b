"""The verbs that make one model of two: make-delta, apply-delta, merge.

They also take the options of the scripts that they replace.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.commands.command import (
    DTYPES,
    add_dtype,
    add_gguf_type,
    add_shard_size,
    add_verb,
    result_format,
    write_result,
)
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from convert.transforms.delta import DeltaSource, SummedSource
    from jaxlm.weights.leaves import ParamSource

# Checked against convert.transforms.delta.FAMILIES by a test; that module is too heavy for --help.
FAMILY_NAMES = ("k2", "vicuna-v1.1", "vicuna-v0", "alpaca", "knowlm")
# What FastChat and K2, their READMEs, and stanford_alpaca and KnowLM call the three models of a verb.
_DELTA_OPTIONS = {
    "base": ("--base-model-path", "--base", "--path-raw"),
    "tuned": ("--target-model-path", "--target", "--path-tuned"),
    "delta": ("--delta-path", "--delta", "--path-diff"),
}
_MERGE_OPTIONS = {
    "base": ("--base-model-path", "--base", "--path-zhixi", "--base-model"),
    "adapter": ("--lora-path", "--lora", "--path-lora", "--lora-model"),
    "out": ("--target-model-path", "--target", "--path-sfted", "--output-dir"),
}

DELTA_EPILOG = """families, and what they stand for:
  k2           float16, no added token; tokenizer and configuration from BASE
  vicuna-v1.1  float16, no added token; from DELTA
  vicuna-v0    float16, one added token, whose row in the base is zeros; from DELTA
  alpaca       float32, one added token, whose row in the base is the mean of its rows; from DELTA
  knowlm       float32 (or --dtype float16), no added token; from DELTA
Without --family the dtype is the wider one of the two models, and an added token needs --new-row.

The options of the scripts that this replaces are understood too, with - or _ and with = or a space:
  FastChat, K2              --base-model-path B --target-model-path T --delta-path D [--low-cpu-mem]
  their READMEs             --base B --target T --delta D
  stanford_alpaca, KnowLM   --path_raw B --path_diff D --path_tuned T [--is_fp16 True]
                            [--check_integrity_naively False]
"""
MERGE_EPILOG = """Several adapters are folded in one after the other, as Chinese-LLaMA does it: modules_to_save of each
take the place of what is there, sums are float32 and rounded once, the tokenizer is that of the last adapter that has
one, and the vocabulary may only grow.

The options of the scripts that this replaces are understood too, with - or _ and with = or a space:
  FastChat's apply_lora     --base-model-path B --lora-path A --target-model-path OUT
  KnowLM's weight_diff      --path_zhixi B --path_lora A --path_sfted OUT [--is_fp16 True]
  Chinese-LLaMA's merge     --base_model B --lora_model A1,A2 --output_dir OUT [--output_type huggingface]
"""


def add_combine_verbs(verbs: Any) -> None:
    """Adds the verbs to argparse's sub-commands."""
    for name, words, run, summary in (
        ("make-delta", "BASE TUNED OUT", _make_delta, "the difference between a tuned model and its base"),
        ("apply-delta", "BASE DELTA OUT", _apply_delta, "a base and a published delta become the tuned model"),
    ):
        verb = _add_verb_of_three(verbs, name, words, run, summary, _DELTA_OPTIONS)
        verb.epilog = DELTA_EPILOG
        verb.add_argument("--family", choices=FAMILY_NAMES, help="whose delta this is (see below)")
        verb.add_argument("--new-row", choices=("mean", "zero"), help="the base's row of an added token")
        verb.add_argument("--dtype", choices=DTYPES, default="keep", help="of the arithmetic and the result")
        verb.add_argument(
            "--tokenizer",
            metavar="WHERE",
            help=f"base, {'tuned' if name == 'make-delta' else 'delta'}, or a directory (default: as the family does)",
        )
        verb.add_argument("--format", choices=("hf", "jax"), default="hf", help="of the result (default: hf)")
        if name == "apply-delta":
            verb.add_argument(
                "--expect-sum", type=float, metavar="X", help="warn when the sum of all numbers is not this one"
            )
        verb.add_argument("--check-integrity-naively", nargs="?", const="True", default="True", help=argparse.SUPPRESS)

    verb = _add_verb_of_three(
        verbs, "merge", "BASE ADAPTER OUT", _merge, "fold an adapter, or several, into its base model", _MERGE_OPTIONS
    )
    verb.usage = "convert merge BASE ADAPTER [ADAPTER ...] OUT [options]"
    verb.epilog = MERGE_EPILOG
    verb.add_argument("--output-type", choices=("huggingface",), help=argparse.SUPPRESS)
    verb.add_argument(
        "--format", choices=("hf", "jax", "gguf"), help="of the result (default: jax for jaxlm models, else hf)"
    )
    verb.add_argument(
        "--rounded",
        action="store_true",
        help="BASE is quantised: merge into the rounded weights, not into the original ones that it records",
    )
    add_gguf_type(verb)
    add_dtype(verb)


def _add_verb_of_three(
    verbs: Any, name: str, words: str, run: Any, summary: str, options: Mapping[str, Sequence[str]]
) -> argparse.ArgumentParser:
    """A verb with three directories, by position or by the options of other scripts."""
    verb = add_verb(verbs, name, run, summary)
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.usage = f"convert {name} {words} [options]"
    verb.set_defaults(words=words)
    verb.add_argument("models", nargs="*", metavar="MODEL", help="the directories, in this order")
    verb.add_argument("--config", metavar="CONFIG", help="shape of a MindSpore model: a known name or a file")
    add_shard_size(verb)
    for destination, names in options.items():
        verb.add_argument(*names, dest=destination, help=argparse.SUPPRESS)
    # Memory is always low; nothing is calculated on another device.
    verb.add_argument("--low-cpu-mem", nargs="?", const="True", help=argparse.SUPPRESS)
    verb.add_argument("--device", choices=("cpu",), help=argparse.SUPPRESS)
    verb.add_argument("--is-fp16", nargs="?", const="True", default="False", help=argparse.SUPPRESS)
    return verb


def normalise(arguments: Sequence[str]) -> list[str]:
    """--path_raw=x as --path-raw=x: the scripts' options are spelled with underscores."""
    result: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return result


def _three(options: argparse.Namespace, *order: str) -> list[str]:
    """The three directories in `order`, given by position or by option."""
    named = [getattr(options, name) for name in order]
    if not any(named) and len(options.models) == 3:
        return list(options.models)
    if all(named) and not options.models:
        return named
    raise UserError(f"expected three directories, {options.words}, or the options of the script that this replaces")


def _flag(value: str, name: str) -> bool:
    # Fire, which two of the scripts use, takes Python's words.
    if value.lower() not in ("true", "false", "1", "0"):
        raise UserError(f"{name} {value}: expected True or False")
    return value.lower() in ("true", "1")


def _dtype(options: argparse.Namespace) -> str | None:
    if _flag(options.is_fp16, "--is_fp16"):
        if options.dtype not in ("keep", "float16"):
            raise UserError(f"--is_fp16 and --dtype {options.dtype} contradict each other")
        return "float16"
    return None if options.dtype == "keep" else str(options.dtype)


def _make_delta(options: argparse.Namespace) -> None:
    base, tuned, out = _three(options, "base", "tuned", "delta")
    _run(options, base, tuned, out, subtract=True)


def _apply_delta(options: argparse.Namespace) -> None:
    base, delta, out = _three(options, "base", "delta", "tuned")
    _run(options, base, delta, out, subtract=False)


def _run(options: argparse.Namespace, base_path: str, other_path: str, out: str, subtract: bool) -> None:
    from convert.source import open_model
    from convert.transforms.delta import SummedSource, WithTokenizer, delta_source, find_tokenizer
    from jaxlm.weights.leaves import main_dtype

    dtype = _dtype(options)
    base = open_model(base_path, options.config)
    other = open_model(other_path, options.config or _config_of_base(base, Path(other_path)))
    result, side = delta_source(base, other, subtract, options.family, options.new_row, dtype)
    files = find_tokenizer(options.tokenizer, base, other, side)
    total = SummedSource(WithTokenizer(result, files))
    expected = None if subtract else _expected_sum(options, result)
    source: ParamSource = WithTokenizer(result, files) if expected is None else total
    rows = other.config.vocab_size - base.config.vocab_size
    added = f"{rows} added row{'s' if rows > 1 else ''}" if rows else "no added rows"
    origin = f"tokenizer from {files[0].parent}" if files else "no tokenizer"
    family = f"family {options.family}, " if options.family else ""
    print(f"{family}{main_dtype(result.leaves)}, {added}, {origin}", file=sys.stderr)
    write_result(options.format, source, out, options.shard_size)
    if expected is not None:
        _say_sum(total, expected)


def _config_of_base(base: ParamSource, other: Path) -> Path | None:
    """The base's config.json for a delta in MindSpore's format, which has no shape, unless one lies beside that."""
    folder = other if other.is_dir() else other.parent
    beside = (folder / "config.json").is_file() or any(folder.glob("*.y*ml"))
    config = base.path / "config.json"
    return config if config.is_file() and not beside else None


def _expected_sum(options: argparse.Namespace, result: DeltaSource) -> float | None:
    from convert.transforms.delta import published_sum
    from jaxlm.weights.leaves import main_dtype

    if not _flag(options.check_integrity_naively, "--check_integrity_naively"):
        return None
    if options.expect_sum is not None:
        return float(options.expect_sum)
    if options.family is None or main_dtype(result.leaves) != "float32":
        return None
    return published_sum(options.family, result.config)


def _say_sum(source: SummedSource, expected: float) -> None:
    from convert.transforms.delta import inv_freq_sum, sum_matches

    with_buffers = source.total + inv_freq_sum(source.config)
    sums = f"{source.total:.4f} ({with_buffers:.4f} with the rotary buffers of old transformers versions)"
    if sum_matches(source.total, expected, source.config):
        print(f"{'sum':12} {sums}, as expected")
        return
    print(
        f"warning: the sum of all numbers is {sums}; expected was {expected:.4f}. Most likely the base is not the one "
        "that the delta was made with (another conversion, or converted again by another version); compare it with "
        "`convert inspect --checksum`",
        file=sys.stderr,
    )


def _merge(options: argparse.Namespace) -> None:
    from convert.source import check_rounding, open_adapter, open_model, original_of
    from convert.transforms.merge import merge_in_order

    several = options.models[1:-1]
    if len(several) > 1:
        options.models = [options.models[0], several[0], options.models[-1]]
    base_path, adapter, out = _three(options, "base", "adapter", "out")
    adapters = several or ([adapter] if Path(adapter).exists() else adapter.split(","))
    dtype = _dtype(options)
    named = open_model(base_path, options.config)
    check_rounding(open_adapter(adapters[0], named), named)
    base = named if options.rounded else original_of(named)
    if base is not named:
        print(f"merged into the weights that {named.path} was rounded from: {base.path}", file=sys.stderr)
    merged = merge_in_order(base, [partial(open_adapter, path) for path in adapters], dtype)
    if len(adapters) > 1:
        rows = merged.config.vocab_size - base.config.vocab_size
        added = f"{rows} added row{'s' if rows > 1 else ''}" if rows else "no added rows"
        print(f"in this order: {', '.join(adapters)}; {added}, tokenizer from {merged.tokenizer_dir}", file=sys.stderr)
    write_result(result_format(options.format, named), merged, out, options.shard_size, options.gguf_type)
