"""`python -m jaxlm.generate --model DIR --prompt TEXT | --interactive | --predict_data FILE --save_file FILE`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.hub import download_all, with_commits
from jaxlm.cli.parser import parse_config
from jaxlm.config import Decoding, GenerateConfig
from jaxlm.errors import UserError, exit_status
from jaxlm.locate import on_disk

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.inference.batch import FilePrompt, Result
    from jaxlm.inference.best_of import Judge
    from jaxlm.inference.generator import Generator
    from jaxlm.inference.prompts import Prompter
    from jaxlm.processes.distributed import Hosts

DESCRIPTION = (
    "Generates with a model: the answer to one prompt, a conversation, or the answers to a file of prompts. "
    "Takes a Hugging Face directory, a converted one, a run directory or checkpoint, alone or with a LoRA adapter."
)
# What the systems that jaxlm follows call these keys.
ALIASES = {
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "adapter": "model.adapter",
    "lora_weights": "model.adapter",
    "quantize": "model.quantize",
    "int8": "model.quantize=int8",
    "load_8bit": "model.quantize=int8",
    "load_4bit": "model.quantize=nf4",
    "dtype": "model.dtype",
    "prompt_template": "template",
    "num_return_sequences": "samples",
    **{name: f"distributed.{name}" for name in ("coordinator", "num_processes", "process_id")},
}
INTERRUPTED = "interrupted; with --predict_data the same command goes on where it was"


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.generate") -> int:
    """Exit status: 0 done, 1 some prompts of a file have no answer, 2 a mistake in the input, 130 interrupted."""
    return exit_status(lambda: _main(sys.argv[1:] if argv is None else argv, prog), interrupted=INTERRUPTED)


def _main(argv: Sequence[str], prog: str) -> int:
    config = parse_config(argv, GenerateConfig, prog=prog, description=DESCRIPTION, aliases=ALIASES)
    _check_config(config)
    return _run(config)


def _check_config(config: GenerateConfig) -> None:
    """Checks what can be known without the model."""
    from jaxlm.inference.options import check_best_of, check_decoding

    check_decoding(config)
    if (config.best_of is None) != (config.reward_model is None):
        raise UserError("best_of and reward_model go together: the number of answers, and the model that chooses one")
    if config.best_of is not None:
        check_best_of(config.best_of, config)
        if config.interactive:
            raise UserError("best_of: goes with --prompt or --predict_data; a conversation shows answers as they come")
    if config.model.path is None and config.model.adapter is None:
        raise UserError("model: name one, e.g. --model out/run")
    modes = {
        "--prompt": config.prompt is not None,
        "--interactive": config.interactive,
        "--predict_data": config.predict_data is not None,
    }
    if sum(modes.values()) != 1:
        given = " and ".join(name for name, is_given in modes.items() if is_given) or "none"
        raise UserError(f"what to do: give one of {', '.join(modes)}; found {given}")
    if (config.predict_data is None) != (config.save_file is None):
        raise UserError(
            "predict_data and save_file go together: prompts are read from the one, answers go to the other"
        )
    if config.batch_size < 1:
        raise UserError(f"batch_size: {config.batch_size} must be at least 1")
    if config.input is not None and config.prompt is None:
        raise UserError("input: goes with --prompt; in a file, records have a field `input`")
    if config.prompt is not None and not config.prompt.strip():
        raise UserError("prompt: it is empty: there is nothing to answer")
    if config.save_file is not None:
        _check_save_file(Path(config.save_file), config.overwrite)
        if config.predict_data is not None and Path(config.save_file).resolve() == Path(config.predict_data).resolve():
            raise UserError(f"save_file: {config.save_file} is predict_data; the prompts would be lost")


def _check_save_file(path: Path, overwrite: bool) -> None:
    from jaxlm.inference.batch import KINDS

    if path.suffix.lower() not in KINDS:
        raise UserError(f"save_file: {path}: the ending must be one of {', '.join(KINDS)}")
    if path.exists() and not overwrite:
        raise UserError(f"save_file: {path} exists already; name another file, or replace it with --overwrite")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"save_file: {path}: nothing can be written in {folder}")


def _run(config: GenerateConfig) -> int:
    # JAX and everything above it is imported only here: --help and mistakes in the words answer at once.
    from rich.console import Console

    from jaxlm.cli.start import quiet_logs, use_compilation_cache
    from jaxlm.processes.distributed import SharedError, run_settings, start, versions
    from jaxlm.training.stop import StopAtOnce

    terminal = Console(stderr=True, soft_wrap=True, highlight=False)
    quiet_logs()
    use_compilation_cache(config.compilation_cache)
    with contextlib.ExitStack() as around:
        stop = None
        if config.predict_data is not None:  # a conversation takes Ctrl-C itself
            stop = around.enter_context(StopAtOnce(INTERRUPTED))
        hosts = around.enter_context(start(config.distributed, terminal.print))
        if stop is not None:
            stop.starting(Path(config.save_file or ""), hosts)
        if hosts.processes > 1:
            if config.best_of is not None:
                raise SharedError("best_of: one process judges its answers; start one process")
            hosts.agree("versions", versions())
            hosts.agree("configuration", run_settings(config))
        config = with_commits(config, hosts.console(terminal).print, hosts)
        download_all([config], hosts)
        if config.predict_data is not None:
            config = dataclasses.replace(config, predict_data=str(on_disk(config.predict_data, "data", "predict_data")))
        if config.save_file is not None:
            _take(Path(config.save_file), config.overwrite, hosts)
        if hosts.processes == 1:
            return _answer(config, hosts, terminal)
        if config.interactive:
            raise SharedError(
                f"interactive: a conversation is with one process, here are {hosts.processes}; give --prompt or "
                "--predict_data, or start one process"
            )
        try:
            return _answer(config, hosts, hosts.console(terminal))
        except KeyboardInterrupt:
            raise UserError(INTERRUPTED) from None


def _take(path: Path, overwrite: bool, hosts: Hosts) -> None:
    """Locks a save_file before the model is read, which takes its time; process 0 does so for all."""
    from jaxlm.lock import Lock

    resolved = path.resolve()
    lock = Lock(resolved.with_name(f".{resolved.name}.lock"), f"save_file: {path}", "name another save_file")
    problem = None
    if hosts.process == 0:
        try:
            hosts.take(lock)
            _check_save_file(path, overwrite)  # another run may have written it by now
        except OSError as error:
            problem = f"save_file: {path}: {error.filename or resolved.parent}: cannot write there ({error.strerror})"
        except UserError as error:
            problem = str(error)
    hosts.check("save_file is free", problem)


def _answer(config: GenerateConfig, hosts: Hosts, console: Console) -> int:
    prompts = None
    if config.predict_data is not None:
        from jaxlm.inference.batch import read_prompts

        prompts = read_prompts(Path(config.predict_data))
    generator, prompter, facts, judge = _load(config, hosts, console)
    options = Decoding(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Decoding)})
    if config.best_of is not None:
        options = dataclasses.replace(options, samples=config.best_of)
    if prompts is not None:
        return _batch(config, options, generator, prompter, facts, judge, prompts, hosts, console)
    if config.interactive:
        _chat(options, generator, prompter, console)
    elif judge is not None:
        _best(config, options, generator, prompter, judge, console)
    else:
        _single(config, options, generator, prompter, console, _show if hosts.process == 0 else _hide)
    return 0


def _load(
    config: GenerateConfig, hosts: Hosts, console: Console
) -> tuple[Generator, Prompter, dict[str, Any], Judge | None]:
    """The model on its devices, how to ask it, the facts that identify both in the journal of a file, and a judge."""
    from jaxlm.cli.opening import open_judge, open_model
    from jaxlm.inference.options import check_stop_ids

    opened = open_model(
        config.model,
        config.tokenizer,
        config.template,
        config.add_bos,
        config.mesh,
        console,
        columns=config.columns,
        system=config.system,
    )
    check_stop_ids(config, opened.spec.vocab_size)
    generator = opened.load(hosts, console, config.verbose)
    facts = {**opened.facts, "columns": config.columns, "system": config.system}
    judge = None
    if config.reward_model is not None:
        judge = open_judge(config.reward_model, config.model, opened, config.mesh, config.batch_size, console)
        facts["reward_model"] = config.reward_model
    return generator, opened.prompter, facts, judge


def _single(
    config: GenerateConfig,
    options: Decoding,
    generator: Generator,
    prompter: Prompter,
    console: Console,
    show: Callable[[str], None],
) -> None:
    from jaxlm.inference.chat import stream_answer
    from jaxlm.inference.text import answer_text, cut_at_stop

    assert config.prompt is not None
    ids = prompter.question(config.prompt, config.input)
    session = generator.start([ids], options, flush=8)
    started = time.perf_counter()
    if options.samples == 1:
        answer = stream_answer(session, prompter, options, show)
        show("\n")
        answers = [answer]
    else:
        for _ in session.steps():
            pass
        answers = session.answers()[0]
        for number, answer in enumerate(answers, 1):
            text = cut_at_stop(answer_text(prompter.tokenizer, session.beginnings[0], answer.ids), options.stop)[0]
            show(f"[{number}] {text.strip()}\n")
    seconds = time.perf_counter() - started
    tokens = sum(len(answer.ids) for answer in answers)
    console.print(
        f"{len(ids)} tokens read, {tokens} written in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s, compilation "
        f"included); ended by {', '.join(dict.fromkeys(answer.finish for answer in answers))}"
    )


def _best(
    config: GenerateConfig, options: Decoding, generator: Generator, prompter: Prompter, judge: Judge, console: Console
) -> None:
    """The best of several answers to one prompt."""
    from jaxlm.inference.answering import complete

    assert config.prompt is not None
    ids = prompter.question(config.prompt, config.input)
    generator.check_prompt(ids, "the prompt")
    judge.check_prompt(len(ids), options, generator.max_length, "the prompt")
    (answers,) = complete(generator, prompter.tokenizer, {0: ids}, options, 1, strip=not prompter.is_text)
    best, reward = judge.best({0: ids}, answers)[0]
    _show(f"{best.text}\n")
    console.print(f"reward {reward:.3f}, the highest of {options.samples}; ended by {best.finish}", markup=False)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _hide(text: str) -> None:
    """For all processes but one."""


def _chat(options: Decoding, generator: Generator, prompter: Prompter, console: Console) -> None:
    from jaxlm.inference.chat import Chat

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history)
    if not prompter.takes_turns:
        kind = "continues a text" if prompter.is_text else "takes one question"
        console.print(f"this template {kind}: earlier turns are not seen by the model", markup=False)
    console.print("type a question; /help lists the commands, Ctrl-D leaves", markup=False)

    def say(text: str) -> None:
        console.print(text, style="dim", markup=False)

    Chat(generator, prompter, options, lambda: input("> "), _show, say).run()


def _batch(
    config: GenerateConfig,
    options: Decoding,
    generator: Generator,
    prompter: Prompter,
    facts: dict[str, Any],
    judge: Judge | None,
    prompts: Sequence[FilePrompt],
    hosts: Hosts,
    console: Console,
) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from jaxlm.inference.batch import Answers, Journal, Result, answer_all, settings_of, write_results
    from jaxlm.screen import Bars

    assert config.predict_data is not None and config.save_file is not None
    save_file = Path(config.save_file)
    journal_path = save_file.with_name(f"{save_file.name}.partial")
    settings = settings_of(Path(config.predict_data), options, facts)
    hosts.agree("prompts", {"sha256 of predict_data": settings["predict_data (sha256)"]})
    # What an interrupted run has answered is kept, also under --overwrite, as long as the settings are the same.
    file = Journal(journal_path, settings, discard=config.overwrite) if hosts.process == 0 else None
    done = json.loads(hosts.exchange("answered", json.dumps([] if file is None else list(file.results)))[0])
    journal = Answers(dict.fromkeys(done, Result())) if file is None else file
    if journal.results:
        console.print(f"going on: {len(journal.results)} of {len(prompts)} prompts were answered before", markup=False)
    columns = TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    started, written = time.perf_counter(), 0
    with Bars(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(prompts), completed=len(journal.results), speed="")

        def advance(prompts: int, tokens: int) -> None:
            nonlocal written
            written += tokens
            speed = f"{written / (time.perf_counter() - started):.1f} tokens/s"
            progress.update(task, advance=prompts, speed=speed)

        answer_all(prompts, generator, prompter, options, config.batch_size, journal, advance, judge)
    if file is None:
        return 0  # process 0 tells
    write_results(save_file, prompts, file.results)
    file.close(remove=True)
    return _report(save_file, file.results, console)


def _report(save_file: Path, results: dict[int, Result], console: Console) -> int:
    failed = [results[number] for number in sorted(results) if results[number].error is not None]
    endings = [finish for result in results.values() for finish in result.finish]
    console.print(f"{len(results) - len(failed)} answered; wrote {save_file}", markup=False)
    for kind, limit in (("length", "max_new_tokens"), ("context", "the model's context")):
        if endings.count(kind):
            console.print(f"{endings.count(kind)} answers end because of {limit}", markup=False)
    for result in failed[:5]:
        console.print(f"not answered: {result.error}", markup=False)
    if len(failed) > 5:
        console.print(f"and {len(failed) - 5} more; each has its error in {save_file}", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
