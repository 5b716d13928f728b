"""The verbs moefy and demoefy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.commands.command import add_shard_size, add_verb, write_result
from convert.commands.routing import COVERAGE_TOKENS, check_new, coverage_directory, report_coverage
from convert.commands.sample import add_sample_options, check_no_sample, pairs, sample_of
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.weights.leaves import ParamSource

# Checked against convert.transforms.experts and jaxlm.spec by a test; those modules are too heavy for --help.
METHODS = ("kmeans", "order", "partition")
ROUTERS = ("learned", "modality", "activation", "activation_released")


def add_expert_verbs(verbs: Any) -> None:
    """Adds the verbs to argparse's sub-commands."""
    verb = add_verb(verbs, "moefy", _moefy, "divide the feed-forward layers of a dense model into experts")
    verb.add_argument("source", metavar="MODEL", help="a dense model of any format")
    verb.add_argument("destination", metavar="OUT", help="jaxlm directory to create")
    verb.add_argument("--experts", type=int, metavar="E", help="number of experts; must divide the neurons of a layer")
    verb.add_argument(
        "--method",
        choices=METHODS,
        help="which neurons go together: balanced k-means on the rows of up_proj (default), the order in which they "
        "stand, or a partition that is given",
    )
    verb.add_argument(
        "--partition",
        metavar="PATH",
        help="a folder with SciMind's patterns_{layer}.npy, or a .npy file of expert numbers [layers, neurons]",
    )
    verb.add_argument("--seed", type=int, default=0, help="of k-means (default: 0)")
    verb.add_argument("--router", choices=ROUTERS, default="learned", help="default: learned, which starts at zero")
    verb.add_argument(
        "--top-k",
        required=True,
        action="append",
        metavar="NAME=K,...",
        help="experts that a token of each modality uses: text=14,smiles=2; text is every token of no other",
    )
    verb.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="NAME=A:B,...",
        help="the token ids from A to B - 1 are a modality: smiles=32000:32066 (default: the tokenizer's modalities)",
    )
    verb.add_argument("--shared", type=int, metavar="N", help="router modality: experts that serve every modality")
    verb.add_argument("--config", metavar="CONFIG", help="shape of a MindSpore model: a known name or a file")
    add_sample_options(verb, COVERAGE_TOKENS, False, "to measure the experts on, see `convert coverage`")

    verb = add_verb(verbs, "demoefy", _demoefy, "make a model of experts dense again, neurons in their original order")
    verb.add_argument("source", metavar="MODEL", help="what moefy made, or a run or merge that began with it")
    verb.add_argument("destination", metavar="OUT", help="directory to create")
    verb.add_argument("--format", choices=("hf", "jax"), default="jax", help="of the result (default: jax)")
    add_shard_size(verb)


def _moefy(options: argparse.Namespace) -> None:
    from convert.source import open_model
    from convert.transforms.experts import MoefiedSource, dense_first, make_order, moe_config
    from jaxlm.weights.partition import read_owners

    partition = None if options.partition is None else Path(options.partition)
    method = options.method or ("kmeans" if partition is None else "partition")
    if (partition is None) is (method == "partition"):
        raise UserError(
            f"--method {method}: "
            + ("needs --partition PATH" if partition is None else "takes no --partition; leave one of the two out")
        )
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected a whole number from 0 on")
    top_k = {name: _number("--top-k", name, value) for name, value in pairs("--top-k", options.top_k).items()}
    ranges = {name: _range(name, value) for name, value in pairs("--range", options.range).items()}
    source = open_model(options.source, options.config)
    if source.config.experts is not None:
        raise UserError(
            f"{options.source}: is divided into {source.config.experts.num_experts} experts already; "
            f"{dense_first(source)}"
        )
    experts = options.experts
    if experts is None:
        if partition is None:
            raise UserError("--experts: give the number of experts that the feed-forward layers are divided into")
        experts = int(read_owners(partition, source.config.num_layers, source.config.feed_forward.size).max()) + 1
    moe = moe_config(source.config, experts, options.router, top_k, ranges or _modalities(source), options.shared)
    sample = None
    if options.sample is None:
        check_no_sample(options)
    else:  # mistakes in it before the work
        check_new(Path(options.destination))
        coverage = coverage_directory(options.destination)
        sample = sample_of(options, source, moe)
    order = make_order(source, experts, method, partition, options.seed)
    write_result("jax", MoefiedSource(source, order, moe), options.destination)
    size = source.config.feed_forward.size // experts
    used = ", ".join(f"{name} {k}" for name, k in zip(moe.modalities, moe.top_k, strict=True))
    print(f"{'experts':12} {experts} of {size} neurons by {method}, router {moe.router}; a token uses: {used}")
    if moe.router == "learned" and 1 in moe.top_k and experts > 1:
        print(
            f"{'':12} where a token uses one expert, its output is weighted by the softmax over all: by 1/{experts} "
            "until the router is trained"
        )
    if sample is not None:
        report_coverage(open_model(options.destination), sample, coverage)


def _demoefy(options: argparse.Namespace) -> None:
    from convert.source import open_model
    from convert.transforms.experts import DenseSource

    source = DenseSource(open_model(options.source))
    write_result(options.format, source, options.destination, options.shard_size)


def _modalities(source: ParamSource) -> dict[str, tuple[int, int]]:
    """The token ids of the modalities that `convert extend-vocab` gave to the model's tokenizer."""
    from jaxlm.modalities import MODALITIES_FILE
    from jaxlm.tokenizer import load_tokenizer

    if MODALITIES_FILE not in (file.name for file in source.tokenizer_files):
        return {}
    return {modality.name: modality.range for modality in load_tokenizer(source.tokenizer_dir).modalities}


def _number(option: str, name: str, value: str) -> int:
    # int() also takes underscores and digits of other scripts, which nobody means here.
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise UserError(f"{option} {name}={value}: expected a whole number")
    return int(value)


def _range(name: str, value: str) -> tuple[int, int]:
    first, colon, stop = value.partition(":")
    if not colon:
        raise UserError(f"--range {name}={value}: expected the first token id and the last plus one, as 32000:32066")
    return _number("--range", name, first), _number("--range", name, stop)
