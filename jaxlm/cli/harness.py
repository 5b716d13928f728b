"""lm-evaluation-harness: `jaxlm evaluate --harness TASKS`, and jaxlm as a model of `lm_eval` (`jaxlm.harness`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import EvaluateConfig, InferenceModelConfig, MeshConfig
from jaxlm.config.reading import build
from jaxlm.errors import UserError
from jaxlm.locate import ReadPath
from jaxlm.machine import limit_heaps

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.evaluation.harness import JaxlmModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """What `--options.NAME` may be; named as in lm_eval.

    Args:
        include_path: a folder of further task files (YAML).
        num_fewshot: examples before each question; null: as the task has it.
        apply_chat_template: ask in the tokenizer's chat template.
        fewshot_as_multiturn: examples are earlier turns of the conversation.
        system_instruction: the system message.
        gen_kwargs: settings of generation that replace the tasks', {max_gen_toks: 64}.
        metadata: values that replace those of the task files' metadata, e.g. {data: sii40.json} for a suite of jaxlm.
        bootstrap_iters: resamples for the standard errors that need some.
        seed: of random, NumPy, and the choice of examples.
    """

    include_path: ReadPath | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    bootstrap_iters: int = 100_000
    seed: int = 1234


def make_model(
    model: InferenceModelConfig,
    console: Console,
    tokenizer: str | None = None,
    add_bos: bool | None = None,
    mesh: MeshConfig | None = None,
    batch_size: int = 8,
) -> JaxlmModel:
    """Loads a model for the harness; arguments as in `EvaluateConfig`.

    Raises:
        UserError: it cannot be loaded, or lm_eval is not installed.
    """
    from jaxlm.cli.opening import model_settings, open_model
    from jaxlm.evaluation.harness import JaxlmModel
    from jaxlm.processes.distributed import Hosts

    limit_heaps()
    # The harness writes prompts itself: as they stand, or by the tokenizer's chat template.
    opened = open_model(model, tokenizer, "text", add_bos, mesh, console)
    digest = hashlib.sha256(json.dumps(model_settings(opened, batch_size), sort_keys=True).encode()).hexdigest()
    generator = opened.load(Hosts(), console)
    return JaxlmModel(generator, opened.prompter, batch_size, digest)


def run_harness(config: EvaluateConfig) -> int:
    """Runs tasks of lm_eval on a model, and writes results.json, samples and report.md.

    Raises:
        UserError: for what cannot be meant.
    """
    if config.task is not None or config.data or config.predictions is not None:
        raise UserError("harness: has tasks and data of its own; leave --task, --data and --predictions out")
    if config.model.path is None and config.model.adapter is None:
        raise UserError("model: name one, e.g. --model out/run")
    if config.distributed.num_processes not in (None, 1):
        raise UserError("distributed: lm_eval is run by one process; start one (it may have several devices)")
    from jaxlm.config.reading import check_keys

    check_keys(config.options, HarnessOptions, "options")
    options = build(config.options, HarnessOptions)
    assert config.harness is not None
    tasks = [name.strip() for name in config.harness.split(",") if name.strip()]
    name = Path(config.model.adapter or config.model.path or "").absolute().name
    output = (Path("evaluation") / name if config.output is None else Path(config.output)) / "harness"

    from rich.console import Console

    from jaxlm.cli.start import quiet_logs, use_compilation_cache

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    quiet_logs()
    use_compilation_cache(config.compilation_cache)
    from jaxlm.evaluation.harness import drop_advice, without_bars

    drop_advice()
    manager = _manager(options, tasks)
    model = make_model(config.model, console, config.tokenizer, config.add_bos, config.mesh, config.batch_size)
    from lm_eval import simple_evaluate  # an extra, and slow to import

    output.mkdir(parents=True, exist_ok=True)
    # What has been answered is kept here by the harness, so that a run that was killed goes on; for this model alone.
    cache = output / f"answers-{model.digest[:16]}"
    with without_bars():
        results = simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            batch_size=config.batch_size,
            limit=config.limit,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn and options.apply_chat_template,
            system_instruction=options.system_instruction,
            gen_kwargs=options.gen_kwargs or None,
            bootstrap_iters=options.bootstrap_iters,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
            task_manager=manager,
            use_cache=str(cache),
            log_samples=True,
        )
    _write(output, results, model)
    for file in output.glob(f"{cache.name}*"):
        file.unlink()
    show_results(results)
    console.print(f"wrote {output}", markup=False)
    return 0


def show_results(results: Mapping[str, Any]) -> None:
    """The figures as a table on standard output; report.md has them as lm_eval writes them."""
    from rich.text import Text

    from jaxlm.screen import new_table, print_table

    table = new_table("task", "figure", "value", "stderr", "n", "shots", left=["figure"])
    for task, figures in results["results"].items():
        name = figures.get("alias", task)
        count = results.get("n-samples", {}).get(task, {}).get("effective")  # a group of tasks has none
        for key, value in sorted(figures.items()):
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue  # the name, the number of questions, and what stands beside a figure
            stderr = figures.get(f"{metric}_stderr,{kind}")
            table.add_row(
                Text(name),
                Text(metric if kind == "none" else f"{metric} ({kind})"),
                f"{value:.4f}" if isinstance(value, float) else str(value),
                f"{stderr:.4f}" if isinstance(stderr, float) else "",
                "" if count is None else f"{count:,}",
                str(results.get("n-shot", {}).get(task, "")),
            )
            name = ""
    print_table(table)


def _manager(options: HarnessOptions, tasks: list[str]) -> Any:
    """lm_eval's tasks, and those here; the files of ours are read before a model is."""
    from jaxlm import evaluation

    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(f"harness: needs {error.name}: pip install 'jaxlm[harness]'") from None
    own = Path(evaluation.__file__).parent / "lm_eval"
    include_path = [str(own), *([options.include_path] if options.include_path else [])]
    manager = TaskManager(include_path=include_path, metadata=options.metadata or None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        what = f"{unknown[0]!r} is not a task of lm_eval" if unknown else "no task is named"
        raise UserError(f"harness: {what}; `lm_eval ls tasks` lists them, --options.include_path DIR adds yours")
    matching = manager.match_tasks(tasks)
    suites = [task for task in matching if task.startswith("jaxlm_")]
    if suites and options.num_fewshot:
        raise UserError(
            f"options.num_fewshot: {suites[0]} is asked without examples; for GeoBench's there is a file of them: "
            "--options.metadata '{options: {few_shot: FILE}}'"
        )
    from jaxlm.evaluation.suites import METADATA

    unknown = [key for key in options.metadata if key not in METADATA]
    if unknown and len(suites) == len(matching):  # tasks of others may read keys of their own
        raise UserError(f"options.metadata: {unknown[0]!r} is not a key of {suites[0]}; known: {', '.join(METADATA)}")
    if suites:
        manager.load(suites)
    return manager


def _write(output: Path, results: Mapping[str, Any], model: JaxlmModel) -> None:
    from lm_eval.utils import make_table

    from jaxlm.evaluation.outputs import write_file

    samples = results.get("samples", {})
    kept = {key: value for key, value in results.items() if key != "samples"}
    kept |= {"bos": model.get_model_info()["model_bos"], "first_request": model.first_fed}
    write_file(output / "results.json", (json.dumps(kept, indent=1, default=str, ensure_ascii=False) + "\n").encode())
    write_file(output / "report.md", f"# lm_eval\n\n{make_table(results)}\n".encode())
    for task, rows in samples.items():
        lines = (json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)
        write_file(output / f"samples_{task.replace('/', '_')}.jsonl", "".join(lines).encode())


def register() -> None:
    """Makes jaxlm a model of lm_eval: `--model jaxlm --model_args path=DIR,adapter=DIR,dtype=float32`."""
    from rich.console import Console

    from jaxlm.evaluation.harness import JaxlmModel, register_model

    @register_model("jaxlm")
    class Registered(JaxlmModel):
        """`JaxlmModel` by the words of a command line."""

        def __init__(self, path: str | None = None, batch_size: int | str = 8, **words: Any) -> None:
            for name in ("device", "max_batch_size"):  # what lm_eval passes to every model
                words.pop(name, None)
            own = {name: words.pop(name, None) for name in ("tokenizer", "add_bos")}
            config = build({"path": path, **words}, InferenceModelConfig)
            loaded = make_model(config, Console(stderr=True, soft_wrap=True), batch_size=_size(batch_size), **own)
            super().__init__(loaded._generator, loaded._prompter, loaded.batch_size, loaded.digest)


def run_lm_eval() -> None:
    """lm_eval's own command line, with jaxlm among its models and without bars beside jaxlm's."""
    register()
    from lm_eval.__main__ import cli_evaluate

    from jaxlm.evaluation.harness import drop_advice, without_bars

    drop_advice()
    with without_bars():
        cli_evaluate()


def _size(batch_size: int | str) -> int:
    try:
        return int(batch_size)
    except ValueError:
        raise UserError(f"batch_size: {batch_size!r} must be a whole number; jaxlm does not choose one") from None
