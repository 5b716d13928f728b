"""`python -m jaxlm.evaluate --task NAME --model DIR --data FILE | --task NAME --predictions FILE`.

LPM-24's two tasks are here, the others in `jaxlm.cli.tasks`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.cli.hub import with_commits
from jaxlm.cli.parser import parse_config
from jaxlm.config import EvaluateConfig
from jaxlm.errors import UserError, exit_status, show
from jaxlm.locate import on_disk

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
    for key in ("output", "limit"):
        if getattr(config, key) is not None:
            way_out = "name the file with --save_file" if key == "output" else "leave it out"
            raise UserError(f"{key}: is not for {alone}; {way_out}")
    if config.options:
        raise UserError(f"options.{next(iter(config.options))}: {alone} has no options")
    return _lpm24(config, alone)


def _task_help(argv: Sequence[str], prog: str) -> str | None:
    """The options of the tasks that the words name; None where they name none that has options."""
    from jaxlm.cli.help import options_text
    from jaxlm.evaluation.registry import ALONE, TEXTS, get_task

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
        if name and name not in (*ALONE, *TEXTS):  # whose keys are listed with the others
            task = get_task(name)
            parts.append(options_text(f"--task {name}", f"{task.summary} Data: {task.expects}.", task.options))
    return "\n\n".join([*parts, f"`{prog} --help` lists all other keys."]) if parts else None


def _lpm24(config: EvaluateConfig, task: str) -> int:
    from rich.console import Console

    from jaxlm.evaluation import lpm24
    from jaxlm.evaluation.pairs import read_pairs
    from jaxlm.screen import new_table, print_table

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
    table = new_table("figure", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    print_table(table)
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


if __name__ == "__main__":
    sys.exit(main())
