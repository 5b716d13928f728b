"""The verbs inspect and verify: what is in a directory, whether it is whole, and whether it equals another."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.commands.command import add_verb, progress_bar
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from convert.analysis.describe import Description
    from convert.analysis.probe import Agreement
    from convert.analysis.verify import Report
    from jaxlm.spec import FeedForwardSpec, LayerSpec
    from jaxlm.weights.leaves import ParamSource

_WORST = 10
# Verbs with no destination.
READ_ONLY = ("inspect", "verify")


def add_check_verbs(verbs: Any) -> None:
    """Adds the verbs to argparse's sub-commands."""
    verb = add_verb(verbs, "inspect", _inspect, "show what a model, adapter or weight file holds")
    verb.add_argument(
        "source", metavar="PATH", help="any model or adapter, or a .safetensors, .bin, .pth or index file"
    )
    verb.add_argument("--json", action="store_true", help="as JSON")
    verb.add_argument("--checksum", action="store_true", help="add up all numbers, as some published deltas ask for")
    verb.add_argument("--base", metavar="BASE", help="the model that a PEFT or MindSpore adapter belongs to")
    verb.add_argument("--config", metavar="CONFIG", help="shape of a MindSpore model: a known name or a file")

    verb = add_verb(
        verbs, "verify", _verify, "compare two models or adapters, or check a directory against its manifest"
    )
    verb.description = (
        "With one path: compares its files with the sums in manifest.json, which jaxlm leaves in what it writes. "
        "With two: compares them tensor by tensor, whatever their formats. Exit status 1 when something differs."
    )
    verb.add_argument("first", metavar="A", help="a model or adapter of any format")
    verb.add_argument("second", metavar="B", nargs="?", help="another one to compare it with")
    verb.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="let absolute differences up to X pass (default: every bit counts; of two dtypes, every number)",
    )
    verb.add_argument("--no-logits", action="store_true", help="do not compare the answers of two models that differ")
    verb.add_argument("--prompt", action="append", metavar="TEXT", help="text for that (default: random tokens)")
    verb.add_argument("--base", metavar="BASE", help="the model that the adapters belong to")
    verb.add_argument("--config", metavar="CONFIG", help="shape of a MindSpore model: a known name or a file")
    verb.add_argument("--json", action="store_true", help="as JSON")


def _inspect(options: argparse.Namespace) -> None:
    from convert.analysis.describe import describe

    base = None if options.base is None else Path(options.base)
    description = describe(Path(options.source), base, options.config, options.checksum)
    if options.json:
        print(json.dumps(description.to_dict(), indent=1, ensure_ascii=False))
    else:
        _print_description(description)


def _print_description(description: Description) -> None:
    from jaxlm.units import disk_size

    size = f"{description.parameters:,} parameters, {disk_size(description.nbytes)}"
    print(f"{description.path}: {description.format} {description.kind}, {size}")
    c = description.config
    if description.kind == "model":
        _print_decoder(c)
    elif description.kind == "adapter":
        print(description.summary, end="; " if description.summary else "")
        print(
            "configuration: " + ", ".join(f"{key} {value}" for key, value in c.items() if value not in (None, {}, []))
        )
    if description.order is not None:
        print(f"neurons: {description.order}")
    if description.tokenizer is not None:
        print("tokenizer: " + ", ".join(f"{key} {_words(value)}" for key, value in description.tokenizer.items()))
    if description.format != "jaxlm" and (description.kind == "model" or description.summary):
        print("tensors: under jaxlm's names and shapes, layers stacked, whatever the files call them")
    width = max((len(name) for name, *_ in description.tensors), default=0)
    for name, shape, dtype, nbytes in description.tensors:
        print(f"{name:{width}}  {'x'.join(map(str, shape)) or 'scalar':>20}  {dtype:9} {disk_size(nbytes):>9}")
    print(f"{len(description.tensors)} tensors, {disk_size(description.nbytes)}")
    if description.manifest is not None:
        size = disk_size(description.manifest["bytes"])
        print(f"manifest: {description.manifest['files']} files, {size}; check: convert verify PATH")
    if description.checksum is not None:
        print(f"sum of all numbers: {description.checksum['sum']:.4f}")
        if "with_rotary_buffers" in description.checksum:
            value = description.checksum["with_rotary_buffers"]
            print(f"with the rotary buffers of old transformers versions: {value:.4f}")


def _print_decoder(config: dict[str, Any]) -> None:
    """The sizes of a model, its layers with those that differ from the first one."""
    from jaxlm.models.families import family_of
    from jaxlm.spec import DecoderSpec

    spec = DecoderSpec.from_dict(config)
    print(
        f"{family_of(spec).architecture}: L {spec.num_layers}, D {spec.hidden_size}, V {spec.vocab_size}, "
        f"tied {spec.tied_head}, positions {spec.max_position_embeddings}"
    )
    _print_layers(spec.period, "")
    if spec.encoder is not None:
        print(f"encoder: L {spec.encoder.num_layers}; the decoder begins with token {spec.encoder.start_token_id}")
        _print_layers(spec.encoder.period, "encoder, ")


def _print_layers(period: tuple[LayerSpec, ...], part: str) -> None:
    for number, layer in enumerate(period):
        attention, rope = layer.attention, layer.attention.rope
        positions = f"rope {rope.rope_type} {rope.rope_theta:g}" if rope else "alibi" if attention.alibi else "no rope"
        if attention.rotary_dim is not None:
            positions += f" on {attention.rotary_dim} dims"
        if attention.relative_bias is not None:
            positions = f"distances in {attention.relative_bias.num_buckets} buckets"
        where = part + ("every layer" if len(period) == 1 else f"layer {number} of every {len(period)}")
        print(
            f"{where}: F {layer.feed_forward.size}, H {attention.num_heads}, K {attention.num_kv_heads}, "
            f"h {attention.head_dim}, {positions}, window {attention.window}"
        )
        if layer.feed_forward.experts is not None:
            _print_experts(layer.feed_forward)


def _print_experts(feed_forward: FeedForwardSpec) -> None:
    """Prints the number of experts in a layer, who chooses, and the number that a token of each modality uses."""
    moe = feed_forward.experts
    assert moe is not None
    used = []
    for name, k, tokens in zip(moe.modalities, moe.top_k, [None, *moe.ranges], strict=True):
        where = "all other tokens" if tokens is None else f"tokens {tokens[0]} to {tokens[1] - 1}"
        used.append(f"{name} {k} ({where if moe.ranges else 'all tokens'})")
    shared = f", {moe.shared} shared by all" if moe.shared else ""
    print(
        f"experts: {moe.num_experts} of {feed_forward.size // moe.num_experts} neurons, "
        f"router {moe.router}{shared}; a token uses: {', '.join(used)}"
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _verify(options: argparse.Namespace) -> int:
    if options.tolerance is not None and not options.tolerance >= 0:
        raise UserError(f"--tolerance {options.tolerance}: expected a number of at least 0")
    if options.second is None:
        return _verify_manifest(Path(options.first), options.json)
    from convert.source import is_adapter

    adapters = is_adapter(options.first), is_adapter(options.second)
    if adapters[0] != adapters[1]:
        which, other = (options.first, options.second) if adapters[0] else (options.second, options.first)
        raise UserError(
            f"{which} is an adapter and {other} a full model; merge it first: convert merge BASE "
            f"{shlex.quote(str(which))} OUT"
        )
    return _verify_adapters(options) if adapters[0] else _verify_models(options)


def _verify_manifest(directory: Path, as_json: bool) -> int:
    from jaxlm.weights.manifest import check_manifest, files_not_listed

    checked = list(check_manifest(directory))
    bad = {name: problem for name, problem in checked if problem is not None}
    added = files_not_listed(directory)
    if as_json:
        print(json.dumps({"files": len(checked), "bad": bad, "not_in_manifest": added}, indent=1, ensure_ascii=False))
        return 1 if bad else 0
    for name, problem in bad.items():
        print(f"{directory / name}: {problem}")
    for name in added:
        print(f"{directory / name}: is not in the manifest; it was added later")
    print(f"{directory}: {len(checked) - len(bad)} of {len(checked)} files are as they were written")
    return 1 if bad else 0


def _verify_adapters(options: argparse.Namespace) -> int:
    from convert.analysis.verify import compare_adapters
    from convert.conversion import keep_freed_memory
    from convert.source import open_model, stored_adapter
    from jaxlm.weights.leaves import AdapterSource

    config = None if options.base is None else open_model(options.base).config
    opened: dict[str, AdapterSource] = {}
    # One that records its base's shape tells it for the other.
    for path in sorted(
        (options.first, options.second), key=lambda path: (Path(path) / "adapter_config.json").is_file()
    ):
        opened[path] = stored_adapter(path, config)
        config = opened[path].config
    first, second = opened[options.first], opened[options.second]
    keep_freed_memory()
    with progress_bar("comparing", first) as advance:
        report = compare_adapters(first, second, advance)
    return _say_report(options, report, None)


def _verify_models(options: argparse.Namespace) -> int:
    from convert.analysis.verify import compare_models
    from convert.conversion import keep_freed_memory
    from convert.source import open_model

    first, second = (open_model(path, config=options.config) for path in (options.first, options.second))
    keep_freed_memory()
    with progress_bar("comparing", first) as advance:
        report = compare_models(first, second, advance)
    agreement = None
    # Experts are chosen by the kinds of tokens, which a text does not say; so only dense models are asked.
    dense = first.config.experts is None and second.config.experts is None
    if dense and not (options.no_logits or report.same(None)):
        agreement = _compare_logits(first, second, options.prompt)
    return _say_report(options, report, agreement)


def _compare_logits(first: ParamSource, second: ParamSource, prompts: list[str] | None) -> Agreement:
    import numpy as np

    from convert.analysis.probe import agreement, logits, random_tokens
    from jaxlm.tokenizer import load_tokenizer

    size = min(first.config.vocab_size, second.config.vocab_size)
    if prompts is None:
        rows = [random_tokens(size)]
    else:
        tokenizer = load_tokenizer(first.tokenizer_dir)
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        rows = [np.array([[*begin, *tokenizer.encode(text).ids]], np.int32) for text in prompts]
    pairs = []
    for row in rows:
        if row.size == 0 or row.max() >= size:
            raise UserError("--prompt: is empty, or has tokens that one of the models does not have")
        pairs.append((logits(first, row), logits(second, row)))
    width = min(pair[0].shape[-1] for pair in pairs)
    both = [np.concatenate([pair[i].reshape(-1, pair[i].shape[-1]) for pair in pairs]) for i in (0, 1)]
    assert width > 0
    return agreement(both[0], both[1])


def _say_report(options: argparse.Namespace, report: Report, agreement: Agreement | None) -> int:
    import dataclasses

    same = report.same(options.tolerance)
    if options.json:
        values = {"same": same} | dataclasses.asdict(report)
        values["logits"] = None if agreement is None else dataclasses.asdict(agreement)
        print(json.dumps(values, indent=1, ensure_ascii=False, default=str))
        return 0 if same else 1
    for path, names in zip((options.first, options.second), report.only, strict=True):
        if names:
            more = f" and {len(names) - _WORST} more" if len(names) > _WORST else ""
            print(f"only in {path}: {', '.join(names[:_WORST])}{more}")
    for name, shapes in report.shapes.items():
        print(f"{name}: shape {list(shapes[0])} and {list(shapes[1])}")
    for words, fields in (("", report.config), ("note: ", report.notes)):
        for name, pair in fields.items():
            print(f"{words}configuration: {name} is {pair[0]!r} and {pair[1]!r}")
    _print_tensors(report)
    if agreement is not None:
        print(
            f"logits of {agreement.tokens} tokens: largest difference {agreement.max_abs:.3g}, "
            f"KL {agreement.kl:.3g} nats (largest {agreement.max_kl:.3g}), same first choice {agreement.top1:.1%}"
        )
    within = "" if options.tolerance is None else f" within {options.tolerance:g}"
    print(f"{options.first} and {options.second}: {'equal' if same else 'NOT equal'}{within}")
    return 0 if same else 1


def _print_tensors(report: Report) -> None:
    import numpy as np

    from convert.analysis.verify import coarser

    worst = report.worst
    print(f"{len(report.tensors)} tensors compared, {len(report.exact)} equal, {len(worst)} differ")
    casts = sorted({tensor.dtypes for tensor in report.tensors if tensor.dtypes[0] != tensor.dtypes[1]})
    for first, second in casts:
        count = sum(tensor.dtypes == (first, second) for tensor in report.tensors)
        rounded = coarser(np.dtype(first), np.dtype(second)).name
        print(f"{count} tensors are {first} and {second}: compared as numbers, ulps after rounding to {rounded}")
    if not worst:
        return
    shown = worst[:_WORST]
    width = max(len(tensor.name) for tensor in shown)
    print(f"{'largest differences':{width}}  {'differ':>8}  {'max ulp':>10}  {'max abs':>9}  {'max rel':>9}")
    for tensor in shown:
        share = tensor.different / tensor.elements
        print(f"{tensor.name:{width}}  {share:8.2%}  {tensor.max_ulp:10}  {tensor.max_abs:9.3g}  {tensor.max_rel:9.3g}")
