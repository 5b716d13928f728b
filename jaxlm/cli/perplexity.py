"""`jaxlm evaluate --task perplexity`: texts before, while and after they are scored; see `jaxlm.cli.tasks`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import EvaluateConfig, SourceConfig
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.evaluation.job import Job
    from jaxlm.evaluation.task import Answers
    from jaxlm.evaluation.texts import Settings, Texts, TextSource
    from jaxlm.processes.distributed import Hosts
    from jaxlm.tokenizer import Tokenizer
    from jaxlm.weights.leaves import AdapterSource, ModelFiles, ParamSource
    from jaxlm.weights.native.prompt_json import PromptFile

NAME = "perplexity"
CONTEXT = 2048  # tokens of a row at most, unless more are asked for


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Texts as the model is fed them, before its weights are read.

    Attributes:
        source, adapter: what is loaded.
        job: the texts as records.
        settings: what decides the figures.
        facts: what else one wants to know, for scores.json.
        saved: the part of --save_file that is known before anything is scored.
        told: lines that say what the model is and how texts are fed.
    """

    source: ParamSource
    adapter: AdapterSource | None
    texts: Texts
    job: Job
    settings: dict[str, Any]
    facts: dict[str, Any]
    saved: dict[str, Any]
    told: list[str]


def check_words(config: EvaluateConfig, sources: Sequence[SourceConfig]) -> None:
    """Raises UserError for what cannot be meant; needs no model."""
    from jaxlm.data.records import check_source

    if not sources:
        raise UserError("data: name a file of texts or instructions, e.g. --data heldout.jsonl")
    if config.predictions is not None:
        raise UserError("predictions: are not for perplexity; its texts are --data")
    if config.limit is not None and config.limit < 1:
        raise UserError(f"limit: {config.limit} must be at least 1")
    for source in sources:
        check_source(source)
    if config.save_file is not None:
        folder = Path(config.save_file).absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"save_file: {config.save_file}: nothing can be written in {folder}")


def prepare(config: EvaluateConfig, sources: Sequence[SourceConfig], console: Console) -> Prepared:
    """Opens the model and tokenises the texts.

    Raises:
        UserError: for a model or texts that cannot be used.
    """
    from convert.source import open_with_adapter
    from jaxlm.data.prefix import check_prefix
    from jaxlm.evaluation.job import Job
    from jaxlm.evaluation.tasks.perplexity import TASK, Options
    from jaxlm.evaluation.texts import read_texts
    from jaxlm.inference.loading import compute_dtype
    from jaxlm.tokenizer import load_tokenizer
    from jaxlm.weights.native.prompt_json import trained_prompt

    files = open_with_adapter(config.model.path, config.model.adapter)
    source, adapter = files.parts(config.model.merge_adapter)
    spec = source.config
    spec.refuse_encoder(NAME)
    trained = trained_prompt(files.trained_path)
    tokenizer = load_tokenizer(config.tokenizer or files.merged.tokenizer_dir)
    tokenizer.complete(spec.bos_token_id, spec.eos_token_id, spec.pad_token_id)
    chosen, reasons = _choose(config, sources, tokenizer, trained, spec.max_length)
    with console.status("reading and tokenising"):
        texts = read_texts(chosen, tokenizer, spec.vocab_size)
    check_prefix(spec.prefix, texts.examples, tokenizer, "rows")

    first = chosen[0].settings
    options = Options(
        sequence_length=first.length,
        stride=first.stride,
        train_on_inputs=first.train_on_inputs,
        add_eos=tuple(each.settings.add_eos for each in chosen),
    )
    paths = [each.source.path for each in chosen]
    records: list[Any] = [
        {"name": name, "source": paths[number]} for name, number in zip(texts.names, texts.source.tolist(), strict=True)
    ]
    job = Job(TASK, Path(paths[0]), options, records, texts.names, texts.digest, config.limit)
    dtype, template = compute_dtype(config.model.dtype), _one([each.template for each in chosen])
    settings = job.settings() | _model_settings(config, files, texts) | {"dtype": dtype, "template": template}
    about = {"model": files.path, "adapter": files.adapter_path}
    ids = texts.examples[0].input_ids.tolist()
    facts = {
        **about,
        "data": ", ".join(paths),
        "dtype": dtype,
        "template": template if isinstance(template, str) else ", ".join(template),
        "bos": f"bos {tokenizer.token(tokenizer.bos_id)} first" if first.add_bos and tokenizer.bos_id else "no bos",
        "first_request": {"ids": ids, "text": tokenizer.decode(ids, False)},
        "texts": texts.counts(),
    }
    saved = {
        "task": NAME,
        **about,
        "data": _one(paths),
        "template": template,
        "dtype": dtype,
        "sequence_length": first.length,
        "stride": first.stride,
        "add_bos": first.add_bos,
        "add_eos": _one([each.settings.add_eos for each in chosen]),
        "train_on_inputs": first.train_on_inputs,
        **texts.counts(),
    }
    lora = "" if files.adapter_path is None else f" + {files.adapter_path}"
    told = [f"model      {files.path}{lora} in {dtype}", *(f"template   {reason}" for reason in reasons)]
    return Prepared(source, adapter, texts, job, settings, facts, saved, told)


def _one(values: Sequence[Any]) -> Any:
    """The value of all sources, or the list of their values where these differ."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def _choose(
    config: EvaluateConfig, sources: Sequence[SourceConfig], tokenizer: Tokenizer, trained: PromptFile, context: int
) -> tuple[list[TextSource], list[str]]:
    """How each source becomes text, and why so."""
    from jaxlm.evaluation.texts import TextSource, choose

    chosen, reasons = [], []
    for source in sources:
        limits = [limit for limit in (source.limit, config.limit) if limit is not None]
        source = dataclasses.replace(source, limit=min(limits, default=None))
        template, why = choose(source, tokenizer, trained.template)
        chosen.append(TextSource(source, template, _settings(config, tokenizer, trained, template, context)))
        where = f" ({source.path})" if len(sources) > 1 else ""
        reasons.append(f"{template}: {why}{where}")
    return chosen, reasons


def _settings(
    config: EvaluateConfig, tokenizer: Tokenizer, trained: PromptFile, template: str, context: int
) -> Settings:
    """Lengths, and whether bos and eos stand around texts: as asked for, else as in training."""
    from jaxlm.evaluation.texts import Settings

    length = min(context, CONTEXT) if config.sequence_length is None else config.sequence_length
    if length > context:
        raise UserError(f"sequence_length: {length}; the model reads at most {context} tokens")

    def first(*values: bool | None) -> bool:
        return next(value for value in values if value is not None)

    begins = tokenizer.adds_bos
    ends = False if template == "text" else trained.add_eos
    return Settings(
        length=length,
        stride=length - 1 if config.stride is None else config.stride,
        add_bos=first(config.add_bos, trained.add_bos, begins),
        add_eos=first(config.add_eos, ends, tokenizer.eos_id is not None),
        train_on_inputs=config.train_on_inputs,
    )


def _model_settings(config: EvaluateConfig, files: ModelFiles, texts: Texts) -> dict[str, Any]:
    """What decides a model's figures: its numbers, by hashes, and the tokens that it is fed."""
    from jaxlm.inference.loading import kept_in
    from jaxlm.weights.fingerprint import base_fingerprint

    spec, kind = files.base.config, kept_in(files.base, config.model.kind)
    return {
        **({} if kind is None else {"weights kept in": kind}),
        "weights (hash of samples)": base_fingerprint(spec, files.base),
        "adapter (hash of samples)": None if files.adapter is None else base_fingerprint(spec, files.adapter),
        "merge_adapter": config.model.merge_adapter,
        "tokens (sha256)": texts.examples.digest(),
        "batch_size": config.batch_size,
    }


def measure(
    prepared: Prepared, config: EvaluateConfig, journal: Path | None, hosts: Hosts, console: Console
) -> tuple[list[Answers], dict[str, float]]:
    """Loads the model and scores the texts.

    Args:
        journal: the file of what has been scored, which process 0 writes; None: nothing is kept.
        hosts: the processes, which score together.

    Returns:
        The answer to each text; and the sums of loss, correct and tokens over the rows, of which --save_file is made.
        Where an earlier run scored a part of them, only process 0 has all.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from jaxlm.devices.mesh import rows_axis_size
    from jaxlm.evaluation import perplexity
    from jaxlm.evaluation.journal import JournalFile
    from jaxlm.evaluation.outputs import origins
    from jaxlm.evaluation.scorer import place
    from jaxlm.screen import Bars

    examples = prepared.texts.examples
    longest = perplexity.row_length(examples, int(examples.lengths.max()))
    with console.status("loading"):
        scorer = place(prepared.source, prepared.adapter, config.model, config.mesh, longest)
    for line in (*prepared.told, f"attention  {scorer.attention_reason}"):
        console.print(line, markup=False)
    # Batches are numbered: those of another number of devices are other ones.
    rows = {"rows of a batch": config.batch_size * rows_axis_size(scorer.mesh)}
    file, problem = None, None
    if journal is not None and hosts.process == 0:
        try:
            file = JournalFile(journal, prepared.settings | rows, config.overwrite, origins(prepared.facts))
        except UserError as error:
            problem = str(error)
    hosts.check("the journal", problem)
    known = {} if file is None else {line["batch"]: perplexity.from_json(line["scored"]) for line in file.lines}
    numbers = json.loads(hosts.exchange("scored", json.dumps(list(known)))[0])
    known = known or dict.fromkeys(numbers, perplexity.UNSEEN)
    if known:
        console.print(f"going on: {len(known):,} batches were scored before", markup=False)

    def keep(number: int, batch: perplexity.Batch) -> None:
        if file is not None:
            file.add({"batch": number, "scored": dataclasses.asdict(batch)})

    columns = TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TimeRemainingColumn()
    with Bars(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        batches = perplexity.measure(
            scorer.model,
            scorer.trainable,
            scorer.frozen,
            scorer.mesh,
            prepared.texts,
            config.batch_size,
            known,
            keep,
            lambda done, all_of_them: bar.update(task, completed=done, total=all_of_them),
        )
    if file is not None:
        file.close()
    sums = {key: sum(getattr(batch, key) for batch in batches) for key in ("loss", "correct", "tokens")}
    return perplexity.by_text(prepared.texts, batches), sums


def save(path: Path, prepared: Prepared, sums: Mapping[str, float]) -> None:
    """Writes --save_file."""
    from jaxlm.evaluation.perplexity import figures

    size, characters = (prepared.saved[key] for key in ("bytes", "characters"))
    values = figures(sums["loss"], int(sums["tokens"]), sums["correct"], size, characters)
    content = {**prepared.saved, **dataclasses.asdict(values)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tell(prepared: Prepared, sums: Mapping[str, float]) -> None:
    """Says on standard output what was scored."""
    from rich.console import Console

    about = prepared.saved
    console = Console(highlight=False, soft_wrap=True)
    everything = about["template"] == "text" or about["train_on_inputs"]
    scored = "all of them" if everything else "the answers"
    if isinstance(about["template"], list) and not everything:
        scored = "the answers of instructions, all of plain texts"
    amounts = f"{int(sums['tokens']):,} tokens, {about['bytes']:,} bytes"
    console.print(
        f"perplexity of {prepared.facts['data']}: {about['records']:,} records, {scored}; {amounts}", markup=False
    )
    if about["empty"]:
        console.print(f"{about['empty']:,} of them have nothing to score", style="bold")
    if about["long"]:
        length, stride = about["sequence_length"], about["stride"]
        console.print(f"{about['long']:,} are longer than {length:,} tokens: in windows, {stride:,} new tokens each")
    if about["unscored"]:
        console.print(f"{about['unscored']:,} first tokens have nothing before them and are not scored (no bos)")
