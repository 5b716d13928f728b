"""Tasks on a model while it is trained: on the run's own devices, with its layers in stacks as training has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm.config import RunConfig, TaskConfig
from jaxlm.errors import UserError
from jaxlm.evaluation.asking import Plan, Writing, ask, by_record, check_requests, make_plan
from jaxlm.evaluation.job import Job, check_options, read_job
from jaxlm.evaluation.journal import Answered
from jaxlm.evaluation.registry import TEXTS, get_task
from jaxlm.evaluation.task import Answer, Figure, Generate
from jaxlm.inference.generator import Generator
from jaxlm.inference.prompts import Prompter
from jaxlm.inference.samples import greedy_answers, stacked_weights
from jaxlm.inference.text import answer_text, cut_at_stop
from jaxlm.models.decoder import Decoder
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import Tokenizer
from jaxlm.weights.native.prompt_json import PromptFile


def read_jobs(config: RunConfig) -> list[Job]:
    """The tasks of a run with their data; without any model.

    Raises:
        UserError: for a task, an option or a file that cannot be used.
    """
    jobs = []
    for given in config.train.tasks:
        if given.task in TEXTS:
            raise UserError(
                f"train.tasks: {given.task} is what data.validation gives while training (validation_perplexity); put "
                "its texts there"
            )
        try:
            task = get_task(given.task)
            check_options([task], given.options)
            jobs.append(read_job(task, Path(given.data), given.options, given.limit))
        except UserError as error:
            raise UserError(f"train.tasks: {error}") from None
    names = [job.task.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"train.tasks: {twice} stands there twice; its figures would have the same names")
    best = config.train.best
    if best is not None and best.partition("/")[0] not in names:
        known = ", ".join(f"{name}/…" for name in names) or "none"
        raise UserError(f"train.best: {best!r} is not TASK/FIGURE of one of train.tasks ({known})")
    if jobs and config.mesh.sequence != 1:
        raise UserError(f"train.tasks: need mesh.sequence 1, found {config.mesh.sequence}: answers are not divided")
    return jobs


def training_tasks(
    config: RunConfig, spec: DecoderSpec, tokenizer: Tokenizer, asked: PromptFile
) -> tuple[TaskWhileTraining, ...]:
    """The tasks of a run, ready to be run.

    Args:
        spec: the model.
        asked: how the run's records ask, which questions follow.

    Raises:
        UserError: as `read_jobs`; also for answers that are drawn, or searched with beams.
    """
    jobs = read_jobs(config)
    if not jobs:
        return ()
    encoder = spec.encoder is not None
    prompter = Prompter(
        asked.template or "text", tokenizer, None, asked.add_bos, add_eos=asked.add_eos, for_encoder=encoder
    )
    stops = sorted({*tokenizer.end_ids, *asked.stop_ids})
    return tuple(
        TaskWhileTraining(given, job, prompter, stops) for given, job in zip(config.train.tasks, jobs, strict=True)
    )


class TaskWhileTraining:
    """A task of a run: see `jaxlm.training.job.TrainingTask`.

    Attributes:
        name: the task's.
        every: steps between runs.
    """

    def __init__(self, config: TaskConfig, job: Job, prompter: Prompter, stop_ids: Sequence[int]) -> None:
        self.name, self.every = job.task.name, config.every
        self._job, self._prompter, self._stop_ids = job, prompter, stop_ids
        self._batch_size = config.batch_size
        self._requests = job.task.requests(job.records, job.options, prompter.tokenizer)
        check_requests(self._requests, len(job.records))
        for request in self._requests:
            if isinstance(request, Generate) and not _is_greedy(request):
                raise UserError(
                    f"train.tasks: {self.name}: its answers are drawn, or searched with beams; while training they are "
                    "the most probable tokens. Evaluate checkpoints with `jaxlm evaluate` instead"
                )
        self._plan: Plan | None = None

    def __call__(self, model: Decoder, variables: Any, mesh: Mesh) -> Mapping[str, Figure]:
        """The figures of variables, as `Decoder.apply` takes them."""
        generator = Generator(model, stacked_weights(model, variables), mesh, self._stop_ids)
        if self._plan is None:
            self._plan = make_plan(self._requests, generator, self._prompter, self._batch_size, self._job.names)
        answered = Answered()

        def write(plan: Plan, batch: Sequence[int]) -> dict[int, Answer]:
            return self._written(plan, batch, model, variables, mesh, generator)

        ask(self._plan, generator, self._prompter.tokenizer, answered, lambda _: None, write)
        return self._job.score(by_record(len(self._job.records), self._requests, answered.answers))

    def _written(
        self, plan: Plan, batch: Sequence[int], model: Decoder, variables: Any, mesh: Mesh, generator: Generator
    ) -> dict[int, Answer]:
        fed = [each for number in batch if isinstance(each := plan.fed[number], Writing)]
        first, tokenizer = fed[0], self._prompter.tokenizer
        stops = sorted({*self._stop_ids, *first.settings.stop_ids})
        answers: dict[int, Answer] = {}
        prompts = [each.prompt for each in fed]
        most = first.settings.max_new_tokens
        for number, prompt, ids in zip(
            batch, prompts, greedy_answers(model, variables, mesh, prompts, most, stops), strict=True
        ):
            text, stopped = cut_at_stop(answer_text(tokenizer, generator.beginning(prompt), ids), first.settings.stop)
            finish = "length" if len(ids) == most and not stopped else "stop"
            answers[number] = Answer(texts=(text.strip() if first.strip else text,), finishes=(finish,))
        return answers


def _is_greedy(request: Generate) -> bool:
    settings = request.settings
    plain = settings.repetition_penalty == 1 and settings.no_repeat_ngram_size == 0
    return settings.temperature == 0 and settings.num_beams == 1 and plain
