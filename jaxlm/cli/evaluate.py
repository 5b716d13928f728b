"""`python -m jaxlm.evaluate --task NAME --model DIR --data FILE | --task NAME --predictions FILE`.

`--task perplexity` and LPM-24's two tasks are here, the others in `jaxlm.cli.tasks`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.hub import with_commits
from jaxlm.cli.parser import parse_config
from jaxlm.config import EvaluateConfig
from jaxlm.errors import UserError, exit_status, show
from jaxlm.locate import on_disk

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.evaluation.perplexity import Perplexity, Settings, Texts
    from jaxlm.tokenizer import Tokenizer
    from jaxlm.weights.native.prompt_json import PromptFile

DESCRIPTION = (
    "Asks a model the questions of a benchmark's file and says how good its answers are, with standard errors; or, "
    "with --predictions, how good the answers of a file are. With --task perplexity, says how well a model predicts "
    "the texts of a file, or the answers of instructions. `evaluate compare A B ...` compares evaluations. "
    "`--task NAME --help` lists a task's options."
)
ALIASES = {
    "data": "data.path",
    "template": "data.template",
    "base_model": "model.path",
    "adapter": "model.adapter",
    "dtype": "model.dtype",
    **{name: f"distributed.{name}" for name in ("coordinator", "num_processes", "process_id")},
}
CONTEXT = 2048  # tokens of a row at most, unless more are asked for


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.evaluate") -> int:
    """Exit status: 0 done, 2 for a mistake in the input."""
    return exit_status(
        lambda: _main(sys.argv[1:] if argv is None else argv, prog),
        interrupted="interrupted; nothing was written",
    )


def _main(argv: Sequence[str], prog: str) -> int:
    if argv and argv[0] == "compare":
        from jaxlm.cli.compare import compare

        return compare(argv[1:], prog)
    if {"--help", "-h", "--options.help"} & set(argv) and (text := _task_help(argv, prog)):
        show(text + "\n")
        return 0
    config = parse_config(argv, EvaluateConfig, prog=prog, description=DESCRIPTION, aliases=ALIASES)
    config = with_commits(config, lambda line: print(line, file=sys.stderr))
    if config.predictions is not None:
        predictions = on_disk(config.predictions, "data", "predictions")
        config = dataclasses.replace(config, predictions=str(predictions))
    if config.metric_tokenizer is not None:
        metric_tokenizer = on_disk(config.metric_tokenizer, "small", "metric_tokenizer")
        config = dataclasses.replace(config, metric_tokenizer=str(metric_tokenizer))
    if config.harness is not None:
        from jaxlm.cli.harness import run_harness

        return run_harness(config)
    from jaxlm.evaluation.registry import ALONE
    from jaxlm.evaluation.registry import names as known

    names = [name.strip() for name in (config.task or "").split(",") if name.strip()]
    if not names:
        raise UserError(f"task: name one or several, e.g. --task multiple_choice; there are {', '.join(known())}")
    if len(set(names)) < len(names):
        raise UserError(f"task: {config.task}: a task stands twice; name each once")
    alone = next((name for name in names if name in ALONE), None)
    if alone is None:
        from jaxlm.cli.tasks import run_tasks

        return run_tasks(config, names)
    if len(names) > 1:
        raise UserError(f"task: {alone} is run by itself; leave the others out, and evaluate them in a second command")
    if len(config.data) > 1:
        raise UserError(f"data: {len(config.data)} files; {alone} takes one")
    for key in ("output", "limit"):
        if getattr(config, key) is not None:
            way_out = "name the file with --save_file" if key == "output" else "for texts there is --data.limit"
            raise UserError(f"{key}: is not for {alone}; {way_out}")
    if config.options:
        raise UserError(f"options.{next(iter(config.options))}: {alone} has no options")
    return _perplexity(config) if alone == "perplexity" else _lpm24(config, alone)


def _task_help(argv: Sequence[str], prog: str) -> str | None:
    """The options of the tasks that the words name; None where they name none that has options."""
    from jaxlm.cli.help import options_text
    from jaxlm.evaluation.registry import ALONE, get_task

    named = {"--task": "", "--harness": ""}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        key, equals, value = word.partition("=")
        if key in named:
            named[key] = value if equals else following if not following.startswith("-") else ""
    parts = []
    if named["--harness"]:
        from jaxlm.cli.harness import HarnessOptions

        parts.append(options_text(f"--harness {named['--harness']}", "Tasks of lm_eval.", HarnessOptions))
    for name in (name.strip() for name in named["--task"].split(",")):
        if name and name not in ALONE:
            task = get_task(name)
            parts.append(options_text(f"--task {name}", f"{task.summary} Data: {task.expects}.", task.options))
    return "\n\n".join([*parts, f"`{prog} --help` lists all other keys."]) if parts else None


def _lpm24(config: EvaluateConfig, task: str) -> int:
    from rich.console import Console
    from rich.table import Table

    from jaxlm.evaluation import lpm24
    from jaxlm.evaluation.pairs import read_pairs

    if config.predictions is None:
        raise UserError(f"predictions: name the file of the answers, --predictions FILE; {task} asks no model")
    if config.data:
        raise UserError(f"data: is not for {task}, which compares the answers in --predictions")
    pairs, missing = read_pairs(Path(config.predictions), task, config.reference, config.prediction)
    if task == "text2smiles":
        metrics = lpm24.molecule_metrics(pairs)
        how = "fingerprints by RDKit, Morgan radius 2"
    else:
        tokens = lpm24.word_tokens if config.metric_tokenizer is None else lpm24.hf_tokens(config.metric_tokenizer)
        metrics = lpm24.caption_metrics(pairs, tokens)
        how = f"BLEU over {'words and signs' if config.metric_tokenizer is None else config.metric_tokenizer}"
    console = Console()
    console.print(f"{task}: {len(pairs):,} answers ({how})", highlight=False)
    if missing:
        console.print(f"{missing:,} of them were not answered (see their 'error'); they count as wrong", style="bold")
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    if config.save_file is not None:
        content = {
            "task": task,
            "predictions": config.predictions,
            "answers": len(pairs),
            "missing": missing,
            "how": how,
            **metrics,
        }
        Path(config.save_file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


# --- perplexity -------------------------------------------------------------------------------------------------------


def _perplexity(config: EvaluateConfig) -> int:
    if config.model.path is None and config.model.adapter is None:
        raise UserError("model: name one, e.g. --model out/run")
    if not config.data:
        raise UserError("data: name a file of texts or instructions, e.g. --data heldout.jsonl")
    if config.predictions is not None:
        raise UserError("predictions: are not for perplexity; its texts are --data")
    if config.distributed.num_processes not in (None, 1):
        raise UserError("distributed: perplexity is measured by one process; start one")
    if config.model.int8:
        raise UserError("model.int8: perplexity is measured with the weights as they are; leave it out")
    if config.batch_size < 1:
        raise UserError(f"batch_size: {config.batch_size} must be at least 1")
    if config.save_file is not None:
        folder = Path(config.save_file).absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"save_file: {config.save_file}: nothing can be written in {folder}")

    # JAX and everything above it is imported only here: --help and mistakes in the words answer at once.
    from rich.console import Console

    from jaxlm.cli.start import quiet_logs, use_compilation_cache

    quiet_logs()
    use_compilation_cache(config.compilation_cache)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    figures, texts, facts = _score(config, console)
    _show(figures, texts, facts)
    if config.save_file is not None:
        counts = {
            name: getattr(texts, name) for name in ("records", "empty", "long", "characters", "bytes", "unscored")
        }
        content = {"task": config.task, **facts, **counts, **dataclasses.asdict(figures)}
        Path(config.save_file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _show(figures: Perplexity, texts: Texts, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    scored = "all of them" if facts["template"] == "text" or facts["train_on_inputs"] else "the answers"
    console.print(f"perplexity of {facts['data']}: {texts.records:,} records, {scored}", markup=False)
    if texts.empty:
        console.print(f"{texts.empty:,} of them have nothing to score", style="bold")
    if texts.long:
        length, stride = facts["sequence_length"], facts["stride"]
        console.print(f"{texts.long:,} are longer than {length:,} tokens: in windows, {stride:,} new tokens each")
    if texts.unscored:
        console.print(f"{texts.unscored:,} first tokens have nothing before them and are not scored (no bos)")
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in dataclasses.asdict(figures).items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        table.add_row(name, shown)
    console.print(table)


def _score(config: EvaluateConfig, console: Console) -> tuple[Perplexity, Texts, dict[str, Any]]:
    """Loads the model and runs it over the texts; also what says which model and data these are."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from convert.source import open_with_adapter
    from jaxlm.data.prefix import check_prefix
    from jaxlm.evaluation import perplexity
    from jaxlm.evaluation.scorer import place
    from jaxlm.tokenizer import load_tokenizer
    from jaxlm.weights.native.prompt_json import trained_prompt

    data = config.data[0]
    files = open_with_adapter(config.model.path, config.model.adapter)
    path, adapter_path = files.path, files.adapter_path
    source, adapter = files.parts(config.model.merge_adapter)
    trained = trained_prompt(files.trained_path)
    spec = source.config
    tokenizer = load_tokenizer(config.tokenizer or files.merged.tokenizer_dir)
    tokenizer.complete(spec.bos_token_id, spec.eos_token_id, spec.pad_token_id)
    template, why = perplexity.choose(data, tokenizer, trained.template)
    settings = _settings(config, tokenizer, trained, template, spec.max_length)
    with console.status("reading and tokenising"):
        texts = perplexity.read_texts(data, template, tokenizer, settings, spec.vocab_size)
    check_prefix(spec.prefix, texts.examples, tokenizer, "rows")

    longest = perplexity.row_length(texts.examples, int(texts.examples.lengths.max()))
    with console.status("loading"):
        scorer = place(source, adapter, config.model, config.mesh, longest)
    console.print(
        f"model      {path}{'' if adapter_path is None else f' + {adapter_path}'} in {scorer.dtype}", markup=False
    )
    console.print(f"template   {template}: {why}", markup=False)
    console.print(f"attention  {scorer.attention_reason}", markup=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("scoring", total=None)
        figures = perplexity.measure(
            scorer.model,
            scorer.trainable,
            scorer.frozen,
            scorer.mesh,
            texts,
            config.batch_size,
            lambda done, all_of_them: bar.update(task, completed=done, total=all_of_them),
        )
    facts = {
        "model": str(path),
        "adapter": adapter_path,
        "data": data.path,
        "template": template,
        "dtype": scorer.dtype,
        "sequence_length": settings.length,
        **{key: value for key, value in dataclasses.asdict(settings).items() if key != "length"},
    }
    return figures, texts, facts


def _settings(
    config: EvaluateConfig, tokenizer: Tokenizer, trained: PromptFile, template: str, context: int
) -> Settings:
    """Lengths, and whether bos and eos stand around texts: as asked for, else as in training."""
    from jaxlm.evaluation.perplexity import Settings

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


if __name__ == "__main__":
    sys.exit(main())
