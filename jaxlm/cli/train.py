"""`python -m jaxlm.train --config FILE [--key value ...]`: pretrain, fine-tune or LoRA-tune a LLaMA."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.parser import parse_run
from jaxlm.cli.words import Flag
from jaxlm.config import DistributedConfig, RunConfig
from jaxlm.config.files import dump_yaml
from jaxlm.errors import UserError, exit_status

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.data.loader import Data
    from jaxlm.processes.distributed import Hosts
    from jaxlm.tokenizer import Tokenizer
    from jaxlm.training.job import Outcome
    from jaxlm.training.stop import Stop

DESCRIPTION = (
    "Trains a LLaMA-family model: continued pretraining, full or LoRA instruction tuning, by one configuration. "
    "Run the same command again to go on after an interruption."
)
# Named as in `jax.distributed.initialize`, and as launchers of other systems have them.
ALIASES = {name: f"distributed.{name}" for name in ("coordinator", "num_processes", "process_id")}
# Parameters below which a model is no source of knowledge, whatever it was trained on.
SMALL_MODEL = 50e6
FLAGS = {
    "preview": Flag("show so many rows (3 without a number) as text, trained tokens marked, then exit", int, 3),
    "verbose": Flag("say at start-up also what choices rest on"),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.train") -> int:
    """Exit status.

    0 done; distributed.interrupted_status (0) after a signal, all saved; that or 128 + the signal's number when nothing
    was saved; 2 a mistake in the input.
    """
    from jaxlm.training.stop import Stop

    # Around all of it: importing JAX and compiling take their time too, and a signal in it is to be answered.
    with Stop() as stop:
        return exit_status(lambda: _main(sys.argv[1:] if argv is None else argv, prog, stop))


def _main(argv: Sequence[str], prog: str, stop: Stop) -> int:
    configs, flags, origins = parse_run(argv, prog=prog, description=DESCRIPTION, flags=FLAGS, aliases=ALIASES)
    with origins.explained():
        preview = flags.get("preview")
        if preview is not None and preview < 1:
            raise UserError(f"--preview: {preview} must be at least 1")
        from jaxlm.training.checks import check_config, check_files, check_stage

        for config in configs:
            check_config(config)
        if "stage" in flags:
            check_stage(configs[0], flags["stage"])
        if preview is not None:
            check_files(configs, first_host=False)
            _preview(configs[0], preview)
            return 0
        return _run(configs, stop, bool(flags.get("verbose")))


def _run(configs: list[RunConfig], stop: Stop, verbose: bool) -> int:
    # JAX and everything above it is imported only here: --help and mistakes in the config answer at once.
    from rich.console import Console

    from jaxlm.cli.start import quiet_logs, use_compilation_cache
    from jaxlm.processes.distributed import run_settings, start, versions
    from jaxlm.training.checks import check_files
    from jaxlm.training.fit import check_without_model

    stop.exit_status = configs[0].distributed.interrupted_status
    terminal = Console(soft_wrap=True)
    quiet_logs()
    use_compilation_cache(configs[0].train.compilation_cache)
    with start(configs[0].distributed, terminal.print) as hosts:
        stop.starting(Path(configs[0].output_dir), hosts, last=False)
        console = hosts.console(terminal)
        hosts.agree("versions", versions())
        for config in configs:
            hosts.agree("configuration", run_settings(config))
        hosts.check("files", _problem(check_files, configs, hosts.process == 0))
        # Also those of later stages: whoever starts the same command again is told at once.
        for config in configs:
            hosts.take_directory(Path(config.output_dir), console.print)
        hosts.check("devices and settings", _problem(check_without_model, configs))
        for number, config in enumerate(configs):
            last = number + 1 == len(configs)
            stop.starting(Path(config.output_dir), hosts, last)
            hosts.check_shared(Path(config.output_dir))
            hosts.open_log(Path(config.output_dir))
            if len(configs) > 1:
                console.rule(f"stage {number + 1} of {len(configs)}: {Path(config.output_dir).name}")
            outcome = _train(config, console, hosts, stop, verbose)
            if outcome.interrupted is not None:
                if not outcome.saved:
                    return stop.status(signal.Signals[outcome.interrupted.split()[0]])
                return 0 if outcome.complete and last else config.distributed.interrupted_status
    return 0


def _problem(check: Callable[..., None], *what: Any) -> str | None:
    try:
        check(*what)
    except UserError as error:
        return str(error)
    return None


def _train(config: RunConfig, console: Console, hosts: Hosts, stop: Stop, verbose: bool) -> Outcome:
    from convert.source import open_model
    from jaxlm.training.fit import check_with_model
    from jaxlm.training.job import Job
    from jaxlm.training.loop import train
    from jaxlm.weights.names import tensor_name
    from jaxlm.weights.native.layout import HF_CONFIG
    from jaxlm.weights.native.model_json import json_bytes
    from jaxlm.weights.partition import PARTITION_FILE, npy_bytes

    source = None if config.model.path is None else open_model(config.model.path)
    tokenizer, tokenizer_files = _tokenizer(config, source)
    config = _with_date(config, tokenizer, hosts)
    shape = _shape(config, source, tokenizer)
    # What can be known without the data, which may take hours to read.
    adapter = _adapter(config, shape, source)
    check_with_model(config, shape, hosts, console.print)
    prompts = _prompts(config, tokenizer, shape)
    data = _data(config, tokenizer, shape, console)
    config = dataclasses.replace(config, data=data.config)  # with what it leaves to the tokenizer
    if source is None:
        shape = _with_special_ids(shape, tokenizer)
    files = {f"tokenizer/{name}": content for name, content in tokenizer_files.items()}
    if source is not None and source.hf_config is not None:
        files[HF_CONFIG] = json_bytes(source.hf_config)
    if source is not None and source.config.moe is not None and source.partition is not None:
        files[PARTITION_FILE] = npy_bytes(source.partition)
    files |= _prompt_files(data, tokenizer)
    job = Job(
        config=config,
        run_yaml=dump_yaml(dataclasses.replace(config, distributed=DistributedConfig())),  # of this start, not the run
        model=shape,
        source=source,
        adapter=adapter,
        data=data,
        files=files,
        verbose=verbose,
        tensor_name=tensor_name,
    )
    outcome = train(job, console, hosts, stop)
    if outcome.interrupted is None:
        _samples(config, data, outcome, prompts, tokenizer, console)
        _summary(config, outcome, console)
    return outcome


def _prompt_files(data: Data, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What tells `jaxlm.generate` how to ask: the first template that is not plain text; a user's own comes along.

    Of a task it is the conversation that the task is put into: whoever asks words the question. `stop_ids` are the
    tokens that ended the answers.
    """
    from jaxlm.data.templates import for_questions, load_template
    from jaxlm.weights.native.prompt_json import PromptFile

    templates = [report.template for report in data.report.train]
    name = next((name for name in templates if name != "text"), "text")
    name = for_questions(load_template(name, tokenizer)).name
    stops = sorted(frozenset().union(*(report.end_ids for report in data.report.train)))
    return PromptFile(name, data.config.add_bos, data.config.add_eos, tuple(stops)).files()


def _with_date(config: RunConfig, tokenizer: Tokenizer, hosts: Hosts | None = None) -> RunConfig:
    """The run with the day that its chat template is told, which stays that of its first start."""
    date = config.data.date
    if date is None and tokenizer.asks_for_date:
        date = _kept_date(Path(config.output_dir))
        date = date if hosts is None else hosts.exchange("date", date)[0]
    if date:
        try:
            tokenizer.date = datetime.fromisoformat(date)
        except ValueError:
            raise UserError(f"data.date: {date!r} is no date; write it like 2026-11-27, or 2026-11-27 12:00") from None
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date or None))


def _kept_date(out: Path) -> str:
    """The date that a run began with: of its newest checkpoint or its config.yaml, else now.

    Empty for a checkpoint from before the date was kept: such a run goes on as it was.
    """
    import yaml

    newest = _newest_checkpoint(out / "checkpoints")
    for file in (*(() if newest is None else (newest / "run.yaml",)), out / "config.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        kept = (content.get("data") or {}).get("date") if isinstance(content, dict) else None
        if kept is not None:
            return str(kept)
        if newest is not None:
            return ""
    return datetime.now().isoformat(sep=" ", timespec="seconds")


def _shape(config: RunConfig, source: Any, tokenizer: Tokenizer) -> Any:
    from jaxlm.models.shapes import load_shape, resolve_moe

    ranges = {modality.name: modality.range for modality in tokenizer.modalities}
    if source is not None:
        return resolve_moe(source.config, config.moe, fresh=False, ranges=ranges)
    assert config.model.shape is not None
    return resolve_moe(load_shape(config.model.shape), config.moe, fresh=True, ranges=ranges)


def _with_special_ids(shape: Any, tokenizer: Tokenizer) -> Any:
    return dataclasses.replace(
        shape, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
    )


def _tokenizer(config: RunConfig, source: Any) -> tuple[Tokenizer, dict[str, bytes]]:
    """The tokenizer, and its files by name, to be kept with every checkpoint."""
    from jaxlm.tokenizer import load_tokenizer, train_sentencepiece

    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer.path)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            return _with_modalities(config, tokenizer, Path(folder), new=source is None)
    if source is not None:
        tokenizer = load_tokenizer(source.tokenizer_dir)
        with tempfile.TemporaryDirectory() as folder:
            for path in source.tokenizer_files:
                shutil.copyfile(path, Path(folder) / path.name)
            return _with_modalities(config, tokenizer, Path(folder), new=False)
    if not config.tokenizer.train_on:
        raise UserError("tokenizer: a fresh model has none; set tokenizer.path, or tokenizer.train_on to train one")
    files = _kept_tokenizer(Path(config.output_dir) / "checkpoints")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        if not files:
            train_sentencepiece(_text_files(config.tokenizer.train_on), config.tokenizer.vocab_size, directory)
        return _with_modalities(config, load_tokenizer(directory), directory, new=True)


def _with_modalities(
    config: RunConfig, tokenizer: Tokenizer, files: Path, new: bool
) -> tuple[Tokenizer, dict[str, bytes]]:
    """The tokenizer with the modalities that the run names, and its files.

    Args:
        files: directory with copies of the tokenizer's files; a new tokenizer (`new`) gets the tokens it lacks.
    """
    from jaxlm.modalities import resolve, save
    from jaxlm.tokenizer import load_tokenizer
    from jaxlm.tokenizer.extending import write_extended

    entries = config.tokenizer.modalities
    if entries:
        tokens = [token for modality in resolve(entries, 0) for token in modality.tokens()]
        first = tokenizer.id_of(tokens[0])
        modalities = resolve(entries, tokenizer.vocab_size if first is None else first)
        if tokenizer.modalities:
            # How texts are read may be changed; what the tokens are may not.
            kept = [
                dataclasses.replace(old, strip=new_one.strip, fallback=new_one.fallback)
                for old, new_one in zip(tokenizer.modalities, modalities, strict=False)
            ]
            if kept != modalities or len(kept) != len(tokenizer.modalities):
                raise UserError(
                    "tokenizer.modalities: differ from those that the tokenizer has "
                    f"({', '.join(m.name for m in tokenizer.modalities)}, in {tokenizer.path}) in more than fallback "
                    "and strip; leave them out, or give all of them as they are there"
                )
            save(modalities, files)
            tokenizer = load_tokenizer(files)
        elif first is not None:
            save(modalities, files)  # loading checks the ids of all tokens
            tokenizer = load_tokenizer(files)
        elif new:
            write_extended(sorted(files.iterdir()), tokenizer, tokens, False, files, modalities)
            tokenizer = load_tokenizer(files)
        else:
            names = " ".join(f"--modality {shlex.quote(entry.preset or 'FILE')}" for entry in entries)
            raise UserError(
                f"tokenizer.modalities: {tokenizer.path} has no token {tokens[0]!r}; add them to model and tokenizer: "
                f"convert extend-vocab {shlex.quote(str(config.model.path))} OUT {names}"
            )
    return tokenizer, _read_files(files)


def _kept_tokenizer(checkpoints: Path) -> dict[str, bytes]:
    """The tokenizer of the run that is resumed; empty when there is none yet."""
    newest = _newest_checkpoint(checkpoints)
    return {} if newest is None else _read_files(newest / "tokenizer")


def _newest_checkpoint(checkpoints: Path) -> Path | None:
    """The folder with the small files of a run's newest checkpoint."""
    steps = [path for path in checkpoints.glob("*") if path.name.isdigit() and (path / "jaxlm" / "tokenizer").is_dir()]
    newest = max(steps, key=lambda path: int(path.name), default=None)
    return None if newest is None else newest / "jaxlm"


def _read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _text_files(names: Sequence[str]) -> list[Path]:
    """Files as given; of a folder, every .txt file below it."""
    files: list[Path] = []
    for path in map(Path, names):
        found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"tokenizer.train_on: no .txt file below {path}")
        files += found
    return files


def _data(config: RunConfig, tokenizer: Tokenizer, shape: Any, console: Console) -> Data:
    from jaxlm.data.loader import build_data

    with console.status("reading and tokenising"):
        data = build_data(
            config.data,
            tokenizer,
            seed=config.train.seed,
            vocab_size=shape.vocab_size,
            max_positions=shape.max_length,
            ranges=None if shape.moe is None else shape.moe.ranges,
        )
    console.print("\n".join([*data.report.lines(), *data.report.remarks()]), highlight=False, markup=False)
    return data


def _adapter(config: RunConfig, shape: Any, source: Any) -> Any:
    """The adapter that lora.init_from names, checked against what is asked for now."""
    if config.lora is None or config.lora.init_from is None:
        return None
    from convert.source import open_adapter
    from jaxlm.nn.lora import SAVEABLE
    from jaxlm.weights.names import leaf_shapes

    adapter = open_adapter(config.lora.init_from, source or shape)
    if adapter.layers is not None:
        raise UserError(f"lora.init_from: {config.lora.init_from} adapts only the layers {list(adapter.layers)}")
    for module in config.lora.modules_to_save:
        leaf = SAVEABLE[module]
        found, wanted = adapter.leaves.get(f"modules_to_save/{leaf}"), leaf_shapes(shape)[leaf]
        if found is not None and found.shape != wanted:
            raise UserError(
                f"lora.init_from: {config.lora.init_from} saved {module} with shape {found.shape}, "
                f"the model has {wanted}; merge it into its base first (`convert merge`)"
            )
    decisive = ("rank", "alpha", "rslora", "targets", "rank_pattern", "alpha_pattern", "dora", "per_expert")
    for key in (*decisive, "modules_to_save"):
        mine, theirs = getattr(config.lora, key), getattr(adapter.lora, key)
        same = set(mine) == set(theirs) if isinstance(mine, tuple) else mine == theirs
        if not same:
            raise UserError(
                f"lora.{key}: {mine!r}, but the adapter {config.lora.init_from} has {theirs!r}; set it to that"
            )
    return adapter


def _preview(config: RunConfig, rows: int) -> None:
    from rich.console import Console

    from convert.source import open_model
    from jaxlm.cli.start import quiet_logs
    from jaxlm.data.preview import preview

    quiet_logs()
    console = Console(soft_wrap=True)
    source = None if config.model.path is None else open_model(config.model.path)
    tokenizer, _ = _tokenizer(config, source)
    config = _with_date(config, tokenizer)
    data = _data(config, tokenizer, _shape(config, source, tokenizer), console)
    train = data.train_batches(config.train.global_batch_size, 1, config.train.epochs, config.train.steps)
    shown = 0
    for number in range(len(train)):
        shown += preview(train[number], tokenizer, console, shown, rows)
        if shown == rows:
            break
    console.rule(f"{shown} rows of a run of {len(train):,} steps of {config.train.global_batch_size}", align="left")


def _samples(
    config: RunConfig, data: Data, outcome: Outcome, prompts: list[list[int]], tokenizer: Tokenizer, console: Console
) -> None:
    if not prompts:
        return
    from jaxlm.inference.samples import greedy_answers

    stops = sorted({*tokenizer.end_ids, *frozenset().union(*(report.end_ids for report in data.report.train))})
    answers = greedy_answers(outcome.model, outcome.variables, outcome.mesh, prompts, config.train.sample_tokens, stops)
    console.print()
    for text, answer in zip(config.train.sample_prompts, answers, strict=True):
        console.print(f"> {text}", style="bold", highlight=False, markup=False)
        console.print(f"  {tokenizer.decode(answer).strip()}", highlight=False, markup=False)
    if (parameters := outcome.model.config.num_params()) < SMALL_MODEL:
        console.print(
            f"  ({parameters / 1e6:.1f} M parameters have learnt a little text by heart, mistakes included; ask them "
            "nothing else)",
            style="dim",
            highlight=False,
        )


def _prompts(config: RunConfig, tokenizer: Tokenizer, shape: Any) -> list[list[int]]:
    """The sample prompts as tokens."""
    prompts = [_prompt_ids(config, tokenizer, text) for text in config.train.sample_prompts]
    for text, prompt in zip(config.train.sample_prompts, prompts, strict=True):
        if not 0 < len(prompt) < shape.max_length:
            raise UserError(
                f"train.sample_prompts: {text[:40]!r} is {len(prompt)} tokens, the model takes 1 to "
                f"{shape.max_length - 1}"
            )
    return prompts


def _prompt_ids(config: RunConfig, tokenizer: Tokenizer, text: str) -> list[int]:
    """A question in the template of the first source, as tokens up to where the answer begins."""
    from jaxlm.data.examples import chosen_template, prompt_ids
    from jaxlm.data.sources import Record
    from jaxlm.data.templates import for_questions, load_template

    name, _ = chosen_template(config.data.train[0], tokenizer)
    # Whatever schema the template reads, it finds the question.
    fields = {"instruction": text, "text": text, "messages": [{"role": "user", "content": text}]}
    template = for_questions(load_template(name, tokenizer))
    return prompt_ids(
        template, Record("train.sample_prompts", fields), tokenizer, config.data.add_bos, config.data.add_eos
    )


def _summary(config: RunConfig, outcome: Outcome, console: Console) -> None:
    from jaxlm.training.report import print_pairs

    out = Path(config.output_dir)
    pairs = []
    pairs.append(("adapter" if config.lora else "model", str(outcome.checkpoint)))
    if outcome.best is not None and outcome.best[0] != outcome.step:
        pairs.append(("best", f"{out / 'checkpoints' / str(outcome.best[0])} (validation loss {outcome.best[1]:.4f})"))
    pairs.append(("metrics", str(out / "metrics.jsonl")))
    pairs.append(("loss curve", str(out / "loss.png")))
    if len(outcome.validation) > 1:
        first, last = outcome.validation[0], outcome.validation[-1]
        pairs.append(("validation loss", f"{first[1]:.4f} at step {first[0]}, {last[1]:.4f} at step {last[0]}"))
    run, beside = shlex.quote(str(out)), str(out.parent / out.name)
    pairs.append(("ask it", f"python -m jaxlm.generate --model {run} --interactive"))
    if config.lora is None:
        pairs.append(("next", f"convert jax-to-hf {run} {shlex.quote(f'{beside}-hf')}"))
    else:
        pairs.append(("next", f"convert jax-to-peft {run} {shlex.quote(f'{beside}-peft')}"))
        base = shlex.quote(str(config.model.path))
        pairs.append(("or", f"convert merge {base} {run} {shlex.quote(f'{beside}-merged')}"))
    console.print()
    print_pairs(console, pairs)


if __name__ == "__main__":
    sys.exit(main())
