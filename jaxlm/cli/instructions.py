"""`jaxlm prepare instructions`: instructions that a model writes after seed tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.parser import parse_config
from jaxlm.config.instructions import InstructionsConfig, check

if TYPE_CHECKING:
    from jaxlm.data.prepare.instructions.rounds import Round

SUMMARY = "instructions that a model writes after seed tasks (Self-Instruct)"
DESCRIPTION = (
    "Lets a model write instructions with inputs and outputs after seed tasks, as Self-Instruct and Alpaca do, and "
    "keeps what is of the form, breaks no rule and is new: "
    "jaxlm prepare instructions --seed_tasks FILE --output_dir DIR [--url http://127.0.0.1:8000/v1]. The model answers "
    "at an endpoint that talks like OpenAI's, such as that of jaxlm serve. Replies are kept as they come: the same "
    "command goes on after a kill, and with another --count or other filters it asks only for what is missing."
)


def run(words: Sequence[str], prog: str) -> int:
    """Exit status: 0 when as many as wanted are there; 1 when nothing new came any more."""
    config = parse_config(words, InstructionsConfig, prog=f"{prog} instructions", description=DESCRIPTION, aliases={})
    check(config)

    from jaxlm.data.prepare.instructions import report, rounds
    from jaxlm.lock import Lock

    seeds = rounds.seeds_of(config)
    rounds.request_text(config)  # a mistake is told before anything is asked
    folder = Path(config.output_dir)
    with Lock(folder / ".lock", f"output_dir: {folder}", "wait for it, or name another --output_dir"):
        result = asyncio.run(_run(config, seeds, folder))
        written = report.write(result, folder)
    _show(written)
    files = [report.INSTRUCTIONS, report.REPORT, *([report.FIGURE] if written["verbs"] else [])]
    print(f"written to {folder}: {', '.join(files)}")
    if result.is_full:
        return 0
    most = max(result.dropped, key=result.dropped.__getitem__, default="nothing was written")
    print(
        f"stopped at {len(result.kept):,} of {config.count:,}: the last {result.fruitless:,} replies brought nothing "
        f"new (mostly: {most}); {folder / rounds.REPLIES} shows what the model writes; a larger --patience tries on"
    )
    return 1


async def _run(config: InstructionsConfig, seeds: Any, folder: Path) -> Round:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    from jaxlm.data.prepare.instructions import rounds
    from jaxlm.data.prepare.instructions.endpoint import Endpoint
    from jaxlm.screen import Bars

    endpoint = Endpoint(
        config.url, config.model, config.chat, config.key, config.retries, config.timeout, rounds.request_fields(config)
    )
    try:
        settings = rounds.settings_of(config, seeds, await endpoint.find_model())
        replies = rounds.Replies(folder / rounds.REPLIES, settings)
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Bars(*columns, TextColumn("{task.fields[more]}"), console=console, transient=True) as bar:
                task = bar.add_task("instructions", total=config.count, more="")

                def progress(result: Round) -> None:
                    more = f"{result.replies:,} replies, {result.tokens_out:,} tokens"
                    bar.update(task, completed=len(result.kept), more=more)

                return await rounds.run_round(config, seeds, endpoint, replies, progress)
        finally:
            replies.close()
    finally:
        await endpoint.close()


def _show(written: dict[str, Any]) -> None:
    from jaxlm.screen import new_table, print_table

    table = new_table("instructions", "number")
    table.add_row("replies", f"{written['replies']:,}")
    table.add_row("tokens in", f"{written['tokens_in']:,}")
    table.add_row("tokens out", f"{written['tokens_out']:,}")
    table.add_row("written", f"{written['written']:,}")
    for rule, number in written["dropped"].items():
        table.add_row(f"- {rule}", f"{number:,}")
    table.add_row("kept", f"{written['kept']:,}")
    table.add_row("kept share", f"{written['keep_rate']:.1%}")
    table.add_row("tokens out per kept", f"{written['tokens_out_per_kept']:,.0f}")
    table.add_row("begin with a verb", f"{written['begin_with_a_verb']:.1%}")
    table.add_row("verbs, with objects", f"{written['verbs']:,}, {written['verb_noun_pairs']:,}")
    print_table(table)
