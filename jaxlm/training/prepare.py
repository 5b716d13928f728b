"""From a checked configuration and an opened model to a job: tokenizer, adapter, rows, small files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from jaxlm.config import DistributedConfig, LoraConfig, RunConfig
from jaxlm.config.files import dump_yaml
from jaxlm.data.encoding import prompt_ids
from jaxlm.data.loader import Data, build_data
from jaxlm.data.prefix import check_prefix
from jaxlm.data.records import Record
from jaxlm.data.templates import for_questions, load_template
from jaxlm.data.tokenise import chosen_template
from jaxlm.errors import UserError
from jaxlm.models.adapters import resolve_lora, saved_modules
from jaxlm.models.families import load_shape
from jaxlm.models.resolve import resolve_experts
from jaxlm.processes.distributed import Hosts
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import Tokenizer
from jaxlm.training.caching import run_cache
from jaxlm.training.checks import check_quantize
from jaxlm.training.fit import check_with_model
from jaxlm.training.job import Job
from jaxlm.training.run_tokenizer import newest_small_files, open_tokenizer
from jaxlm.weights.names import leaf_shapes, tensor_name
from jaxlm.weights.native.layout import HF_CONFIG, RUN_YAML, TOKENIZER
from jaxlm.weights.native.model_json import json_bytes
from jaxlm.weights.native.prompt_json import PromptFile
from jaxlm.weights.partition import PARTITION_FILE, npy_bytes
from jaxlm.weights.quantized import QuantizedSource


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that can start.

    Attributes:
        job: the run with its inputs opened.
        tokenizer: the run's tokenizer.
        sample_prompts: train.sample_prompts as token ids, up to where the answers begin.
        asked: how its records ask.
    """

    job: Job
    tokenizer: Tokenizer
    sample_prompts: list[list[int]]
    asked: PromptFile


def prepare(
    config: RunConfig,
    source: Any,
    open_adapter: Callable[[str, Any], Any],
    console: Console,
    hosts: Hosts,
    verbose: bool,
) -> Prepared:
    """Opens what a run needs, and checks that it fits together.

    Args:
        config: the run.
        source: the opened model of model.path; None for a fresh one.
        open_adapter: opens the adapter at a path, for the base given as the second argument.
        console: where the report on the data goes.
        hosts: the processes, all of which prepare the same.
        verbose: kept in the job.

    Raises:
        UserError: for whatever does not fit.
    """
    tokenizer, tokenizer_files = open_tokenizer(config, source)
    config = as_stored(config, source)
    config = with_date(config, tokenizer, hosts)
    model = describe_model(config, source, tokenizer)
    # What can be known without the data, which may take hours to read.
    adapter = None
    if config.lora is not None and config.lora.init_from is not None:
        adapter = open_adapter(config.lora.init_from, source or model)
        _check_adapter(config.lora, adapter, model)
    check_with_model(config, model, hosts, console.print)
    prompts = _sample_prompts(config, tokenizer, model)
    data = read_data(config, tokenizer, model, console, hosts)
    config = dataclasses.replace(config, data=data.config)  # with what it leaves to the tokenizer
    if source is None:
        model = dataclasses.replace(
            model, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
        )
    files = {f"{TOKENIZER}/{name}": content for name, content in tokenizer_files.items()}
    if source is not None and source.hf_config is not None:
        files[HF_CONFIG] = json_bytes(source.hf_config)
    if source is not None and source.config.experts is not None and source.partition is not None:
        files[PARTITION_FILE] = npy_bytes(source.partition)
    asked = _prompt_file(data, tokenizer)
    job = Job(
        config=config,
        run_yaml=dump_yaml(dataclasses.replace(config, distributed=DistributedConfig())),  # of this start, not the run
        model=model,
        source=source,
        adapter=adapter,
        data=data,
        files=files | asked.files(),
        verbose=verbose,
        tensor_name=partial(tensor_name, model),
    )
    return Prepared(job, tokenizer, prompts, asked)


def as_stored(config: RunConfig, source: Any) -> RunConfig:
    """The run with model.quantize as the model is stored, where it is a jaxlm model that `convert quantize` wrote.

    Raises:
        UserError: it is stored in another form than is asked for, or would be trained.
    """
    if not isinstance(source, QuantizedSource):
        return config
    asked, path = config.model.quantize, config.model.path
    if asked is None and not source.stays_quantized:
        return config  # what it stands for
    if asked not in (None, source.kind):
        raise UserError(
            f"model.quantize: {asked}, but {path} is stored in {source.kind}: numbers that are rounded once are not "
            "rounded again; name the original at model.path, or leave quantize out"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantize=source.kind))
    check_quantize(config)
    source.check_kept()
    return config


def with_date(config: RunConfig, tokenizer: Tokenizer, hosts: Hosts | None = None) -> RunConfig:
    """The run with the day that its chat template is told, which stays that of its first start.

    Args:
        config: the run.
        tokenizer: gets the date.
        hosts: the processes, which take the date of the first of them; None: this one alone.
    """
    date = config.data.date
    if date is None and tokenizer.asks_for_date:
        date = _date_of_first_start(Path(config.output_dir))
        date = date if hosts is None else hosts.exchange("date", date)[0]
    if date:
        try:
            tokenizer.date = datetime.fromisoformat(date)
        except ValueError:
            raise UserError(
                f"data.date: {date!r} is not a date; write it like 2026-11-27, or 2026-11-27 12:00"
            ) from None
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date or None))


def describe_model(config: RunConfig, source: Any, tokenizer: Tokenizer) -> Any:
    """The model that is trained: that of `source` or model.shape, with the experts that `moe` asks for."""
    ranges = {modality.name: modality.range for modality in tokenizer.modalities}
    if source is not None:
        return resolve_experts(source.config, config.moe, fresh=False, ranges=ranges)
    assert config.model.shape is not None
    return resolve_experts(load_shape(config.model.shape), config.moe, fresh=True, ranges=ranges)


def read_data(
    config: RunConfig, tokenizer: Tokenizer, model: Any, console: Console, hosts: Hosts | None = None
) -> Data:
    """Reads and tokenises the sources, or opens what was tokenised before, and says on the console what they hold."""
    cache = run_cache(config.data.cache, console, hosts)
    # Where stores are made, a bar takes the status's place.
    uses_stores = cache is not None and cache.wants(config.data.train)
    with nullcontext() if uses_stores else console.status("reading and tokenising"):
        data = build_data(
            config.data,
            tokenizer,
            seed=config.train.seed,
            vocab_size=model.vocab_size,
            max_positions=model.max_length,
            ranges=None if model.experts is None else model.experts.ranges,
            start_id=None if model.encoder is None else model.encoder.start_token_id,
            cache=cache,
        )
    for examples in (data.train, data.validation):
        check_prefix(model.prefix, examples, tokenizer, data.config.packing_mode)
    console.print("\n".join([*data.report.lines(), *data.report.remarks()]), highlight=False, markup=False)
    return data


def _date_of_first_start(output_dir: Path) -> str:
    """The date that a run began with: of its newest checkpoint or its config.yaml, else now.

    Empty for a checkpoint from before the date was kept: such a run goes on as it was.
    """
    newest = newest_small_files(output_dir)
    for file in (*(() if newest is None else (newest / RUN_YAML,)), output_dir / "config.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        date = (content.get("data") or {}).get("date") if isinstance(content, dict) else None
        if date is not None:
            return str(date)
        if newest is not None:
            return ""
    return datetime.now().isoformat(sep=" ", timespec="seconds")


def _check_adapter(lora: LoraConfig, adapter: Any, model: Any) -> None:
    """Refuses an adapter to start from that is not of the kind that is asked for now."""
    if adapter.layers is not None:
        raise UserError(f"lora.init_from: {lora.init_from} adapts only the layers {list(adapter.layers)}")
    modules = saved_modules(model, lora)
    for module, rows in modules.items():
        for row in rows:
            saved, wanted = adapter.leaves.get(f"modules_to_save/{row.path}"), leaf_shapes(model)[row.path]
            if saved is not None and saved.shape != wanted:
                raise UserError(
                    f"lora.init_from: {lora.init_from} saved {module} with shape {saved.shape}, "
                    f"the model has {wanted}; merge it into its base first (`convert merge`)"
                )
    # The same linear layers may go by other names, the same ranks be written as other patterns.
    mine, theirs = (resolve_lora(model, dataclasses.replace(each, dropout=0.0)) for each in (lora, adapter.lora))
    if mine == theirs and modules.keys() == saved_modules(model, adapter.lora).keys():
        return
    decisive = ("rank", "alpha", "rslora", "targets", "rank_pattern", "alpha_pattern", "dora", "per_expert")
    for key in (*decisive, "modules_to_save"):
        here, there = getattr(lora, key), getattr(adapter.lora, key)
        same = set(here) == set(there) if isinstance(here, tuple) else here == there
        if not same:
            raise UserError(f"lora.{key}: {here!r}, but the adapter {lora.init_from} has {there!r}; set it to that")


def _sample_prompts(config: RunConfig, tokenizer: Tokenizer, model: DecoderSpec) -> list[list[int]]:
    """train.sample_prompts in the template of the first source, as tokens up to where the answers begin."""
    if not config.train.sample_prompts:
        return []
    name, _ = chosen_template(config.data.train[0], tokenizer)
    template = for_questions(load_template(name, tokenizer))
    prompts = []
    for text in config.train.sample_prompts:
        # Whatever schema the template reads, it finds the question.
        fields = {"instruction": text, "text": text, "messages": [{"role": "user", "content": text}]}
        record = Record("train.sample_prompts", fields)
        encoder = model.encoder is not None
        prompt = prompt_ids(template, record, tokenizer, config.data.add_bos, config.data.add_eos, encoder)
        most = model.max_length - 1
        if not 0 < len(prompt) <= most:
            raise UserError(f"train.sample_prompts: {text[:40]!r} is {len(prompt)} tokens, the model takes 1 to {most}")
        prompts.append(prompt)
    return prompts


def _prompt_file(data: Data, tokenizer: Tokenizer) -> PromptFile:
    """What tells `jaxlm.generate` how to ask: the first template that is not plain text; a user's own comes along.

    For a task it is the conversation that the task is put into: whoever asks words the question. `stop_ids` are the
    tokens that ended the answers.
    """
    templates = [report.template for report in data.report.train]
    name = next((name for name in templates if name != "text"), "text")
    name = for_questions(load_template(name, tokenizer)).name
    stops = sorted(frozenset().union(*(report.end_ids for report in data.report.train)))
    return PromptFile(name, data.config.add_bos, data.config.add_eos, tuple(stops))
