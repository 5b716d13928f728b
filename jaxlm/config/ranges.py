"""Which numbers a key may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxlm.config.data import DataConfig, MixingConfig
from jaxlm.config.preference import GrpoConfig, PreferenceConfig
from jaxlm.config.run import RunConfig
from jaxlm.errors import UserError


def check_ranges(config: RunConfig) -> None:
    """Refuses numbers out of their range.

    Raises:
        UserError: with the key, the value and the range.
    """
    checks: list[tuple[str, Any, Callable[[Any], bool], str]] = [
        ("data.sequence_length", config.data.sequence_length, lambda v: v >= 2, "at least 2"),
        ("data.workers", config.data.workers, lambda v: v >= 0, "0 or more"),
        ("optimizer.learning_rate", config.optimizer.learning_rate, lambda v: 0 <= v <= 1000, "between 0 and 1000"),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps, lambda v: v >= 0, "0 or more"),
        ("optimizer.weight_decay", config.optimizer.weight_decay, lambda v: v >= 0, "0 or more"),
        ("optimizer.beta1", config.optimizer.beta1, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ("optimizer.beta2", config.optimizer.beta2, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ("optimizer.momentum", config.optimizer.momentum, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ("optimizer.eps", config.optimizer.eps, lambda v: v > 0, "more than 0"),
        ("optimizer.warmup_ratio", config.optimizer.warmup_ratio, lambda v: 0 <= v <= 1, "between 0 and 1"),
        ("optimizer.end_ratio", config.optimizer.end_ratio, lambda v: 0 <= v <= 1, "between 0 and 1"),
        ("optimizer.power", config.optimizer.power, lambda v: v >= 0, "0 or more"),
        ("optimizer.clip_norm", config.optimizer.clip_norm, lambda v: v >= 0, "0 (off) or more"),
        ("train.epochs", config.train.epochs, lambda v: v > 0, "more than 0"),
        ("train.steps", config.train.steps, lambda v: v is None or 1 <= v < 2**31, "between 1 and 2147483647"),
        ("train.global_batch_size", config.train.global_batch_size, lambda v: 1 <= v < 2**31, "at least 1, below 2^31"),
        ("train.micro_batch_size", config.train.micro_batch_size, lambda v: v >= 1, "at least 1"),
        ("train.seed", config.train.seed, lambda v: 0 <= v < 2**63, "between 0 and 2^63 - 1"),
        ("train.eval_every", config.train.eval_every, lambda v: v >= 0, "0 or more"),
        ("train.save_every", config.train.save_every, lambda v: v >= 0, "0 or more"),
        ("train.keep", config.train.keep, lambda v: v >= 1, "at least 1"),
        ("train.log_every", config.train.log_every, lambda v: v >= 1, "at least 1"),
        ("train.sample_tokens", config.train.sample_tokens, lambda v: v >= 1, "at least 1"),
        ("distributed.timeout", config.distributed.timeout, lambda v: v >= 1, "at least 1 (seconds)"),
        ("distributed.heartbeat", config.distributed.heartbeat, lambda v: v >= 5, "at least 5 (seconds)"),
        (
            "distributed.interrupted_status",
            config.distributed.interrupted_status,
            lambda v: v == 0 or 3 <= v <= 125,
            "0 or 3 to 125",
        ),
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, lambda v: v >= 300, "at least 300"),
    ]
    if config.lora is not None:
        checks.append(("lora.rank", config.lora.rank, lambda v: v >= 1, "at least 1"))
        checks.append(("lora.dropout", config.lora.dropout, lambda v: 0 <= v < 1, "at least 0 and below 1"))
    if config.train.profile is not None:
        checks.append(("train.profile.start", config.train.profile.start, lambda v: 1 <= v < 2**31, "at least 1"))
        checks.append(("train.profile.steps", config.train.profile.steps, lambda v: 1 <= v <= 100, "between 1 and 100"))
    for task in config.train.tasks:
        checks.append((f"train.tasks: {task.task}: every", task.every, lambda v: v >= 1, "at least 1"))
        checks.append((f"train.tasks: {task.task}: batch_size", task.batch_size, lambda v: v >= 1, "at least 1"))
    for source in config.data.train:
        wanted = "more than 0, at most 1e6"
        checks.append((f"data.train: {source.path}: weight", source.weight, lambda v: 0 < v <= 1e6, wanted))
        for name in ("tokens", "max_passes"):
            value = getattr(source, name)
            checks.append((f"data.train: {source.path}: {name}", value, lambda v: v is None or 0 < v < 1e15, "above 0"))
    if config.data.mixing is not None and config.data.mixing.alpha is not None:
        checks.append(("data.mixing.alpha", config.data.mixing.alpha, lambda v: 0 <= v <= 1, "between 0 and 1"))
    for source in config.data.validation if isinstance(config.data.validation, tuple) else ():
        wanted = "1: every validation record counts once"
        checks.append((f"data.validation: {source.path}: weight", source.weight, lambda v: v == 1, wanted))
        for name in ("tokens", "max_passes"):
            value = getattr(source, name)
            checks.append(
                (f"data.validation: {source.path}: {name}", value, lambda v: v is None, f"left out; {wanted}")
            )
    for key, value, holds, wanted in checks:
        if not holds(value):
            raise UserError(f"{key}: {value} must be {wanted}")
    _check_mixing(config.data)
    _check_objective(config)
    per_batch = () if config.data.mixing is None else config.data.mixing.per_batch
    if per_batch and sum(per_batch) != config.train.global_batch_size:
        raise UserError(
            f"data.mixing.per_batch: {' + '.join(map(str, per_batch))} rows are {sum(per_batch)}, but "
            f"train.global_batch_size is {config.train.global_batch_size}; make the two the same"
        )
    if config.optimizer.warmup_steps and config.optimizer.warmup_ratio:
        raise UserError("optimizer: give warmup_steps or warmup_ratio, not both")
    if config.optimizer.name == "schedule_free":
        _check_schedule_free(config)


def _check_schedule_free(config: RunConfig) -> None:
    """Refuses what schedule_free cannot be run with.

    Raises:
        UserError: the first of them.
    """
    optimizer = config.optimizer
    if optimizer.schedule not in ("constant", "log_warmup"):
        raise UserError(
            f"optimizer.schedule: {optimizer.schedule} lowers the learning rate, in whose place schedule_free averages "
            "the weights; set it to constant (after warm-up)"
        )
    if optimizer.beta1 == 0:
        raise UserError("optimizer.beta1: 0 leaves no average in schedule_free; 0.9 is its usual value")
    if config.lora is None and config.model.param_dtype == "bfloat16":
        raise UserError(
            "model.param_dtype: an average over steps stands still in bfloat16, and here schedule_free trains all "
            "parameters; set it to float32, or choose another optimizer.name"
        )


def _check_objective(config: RunConfig) -> None:
    """Refuses settings of another objective, and those that this one has no use for.

    Raises:
        UserError: the first of them.
    """
    if config.preference is not None and config.objective != "preference":
        raise UserError(f"preference: given, but objective is {config.objective}; set objective: preference")
    if config.grpo is not None and config.objective != "grpo":
        raise UserError(f"grpo: given, but objective is {config.objective}; set objective: grpo")
    if config.objective in ("cross_entropy", "grpo") and config.data.records != "answers":
        raise UserError(f"data.records: {config.data.records} goes with another objective; set that, and leave it out")
    if config.objective == "cross_entropy":
        return
    for key, value, instead in (
        ("data.packing", config.data.packing == "group_texts", "true or false"),
        ("data.too_long", config.data.too_long in ("truncate", "split"), "drop or error"),
        ("data.train_on_inputs", config.data.train_on_inputs, "false"),
        ("data.drop_unknown", config.data.drop_unknown, "false"),
        ("train.loss_normalisation", config.train.loss_normalisation != "tokens", "tokens"),
    ):
        if value:
            raise UserError(f"{key}: is not supported with objective {config.objective}; set it to {instead}")
    if config.objective == "preference":
        _check_preference(config, config.preference or PreferenceConfig())
    if config.objective == "grpo":
        _check_grpo(config, config.grpo or GrpoConfig())


def _check_grpo(config: RunConfig, settings: GrpoConfig) -> None:
    rows = config.train.global_batch_size
    for key, value, holds, wanted in (
        ("grpo.rewards", list(settings.rewards), bool(settings.rewards), "one name at least, e.g. [exact]"),
        (
            "grpo.weights",
            list(settings.weights),
            len(settings.weights) in (0, len(settings.rewards)),
            "one for each of grpo.rewards",
        ),
        ("grpo.group", settings.group, settings.group >= 2, "at least 2: an answer is measured against others"),
        ("grpo.epsilon", settings.epsilon, 0 < settings.epsilon < 1, "above 0 and below 1"),
        ("grpo.kl", settings.kl, 0 <= settings.kl < 1e6, "0 (off) or more"),
        (
            "grpo.max_new_tokens",
            settings.max_new_tokens,
            1 <= settings.max_new_tokens < config.data.sequence_length,
            f"at least 1 and below data.sequence_length, {config.data.sequence_length}",
        ),
        ("train.global_batch_size", rows, rows % settings.group == 0, f"a multiple of grpo.group, {settings.group}"),
        ("data.validation", config.data.validation, not config.data.validation, "0; use train.tasks instead"),
        ("mesh.sequence", config.mesh.sequence, config.mesh.sequence == 1, "1: answers are not divided"),
    ):
        if not holds:
            raise UserError(f"{key}: {value} must be {wanted}")
    if config.lora is not None and config.lora.dropout:
        raise UserError(
            f"lora.dropout: {config.lora.dropout} must be 0 with objective grpo, which trains what drew the answers"
        )
    if config.lora is not None and config.lora.init_from is not None and settings.kl:
        raise UserError(
            f"grpo.kl: the adapter starts from {config.lora.init_from}, so that the model with it off is not what the "
            "run begins with; merge the two first (convert merge), or leave it out"
        )


def _check_preference(config: RunConfig, settings: PreferenceConfig) -> None:
    for key, holds, wanted in (
        ("beta", 0 < settings.beta < 1e6, "above 0"),
        ("label_smoothing", 0 <= settings.label_smoothing < 0.5, "at least 0 and below 0.5"),
        ("sft", 0 <= settings.sft_weight < 1e6, "0 or more"),
        ("margin", 0 <= settings.margin < 1e6, "0 or more"),
        ("wanted", 0 <= settings.wanted < 1e6, "0 or more"),
        ("unwanted", 0 <= settings.unwanted < 1e6, "0 or more"),
    ):
        if not holds:
            raise UserError(f"preference.{key}: {getattr(settings, key)} must be {wanted}")
    default = PreferenceConfig()
    for key, losses in (
        ("label_smoothing", ("sigmoid", "robust")),
        ("margin", ("simpo",)),
        ("wanted", ("kto",)),
        ("unwanted", ("kto",)),
    ):
        value = getattr(settings, key)
        if value != getattr(default, key) and settings.loss not in losses:
            raise UserError(f"preference.{key}: {value} has no meaning for loss {settings.loss}; leave it out")
    if settings.loss == "kto" and settings.sft_weight:
        raise UserError("preference.sft: has no meaning for loss kto, whose answers are not chosen ones; leave it out")
    if settings.needs_reference and settings.reference == "live":
        if config.lora is None:
            why = "all parameters train, so that the model before its first step is gone after it"
        elif config.lora.init_from is not None:
            why = f"the adapter starts from {config.lora.init_from}: with it off, the model is not what it was"
        else:
            return
        raise UserError(f"preference.reference: live is not the model before its first step: {why}; set it to stored")


def _check_mixing(data: DataConfig) -> None:
    """Refuses ways to share a run that exclude each other.

    Raises:
        UserError: the first of them.
    """
    mixing = data.mixing or MixingConfig()
    for source in data.train:
        if source.tokens is not None and source.weight != 1:
            raise UserError(
                f"data.train: {source.path}: weight {source.weight:g} and tokens {source.tokens:g} both say how often "
                "it is seen; leave one of them out"
            )
        for name, value in (("tokens", source.tokens), ("weight", None if source.weight == 1 else source.weight)):
            if mixing.per_batch and value is not None:
                raise UserError(
                    f"data.train: {source.path}: {name}: {value:g} has no meaning with data.mixing.per_batch, which "
                    "says how much of a source there is in every batch; leave one of them out"
                )
        if mixing.alpha is not None and source.tokens is not None:
            raise UserError(
                f"data.train: {source.path}: tokens: {source.tokens:g} has no meaning with data.mixing.alpha, which "
                "gives each source its share; leave one of them out"
            )
    if mixing.per_batch and mixing.alpha is not None:
        raise UserError("data.mixing: give per_batch or alpha, not both")
    if data.mixing is not None and not mixing.per_batch and mixing.alpha is None:
        raise UserError(
            "data.mixing: needs per_batch, e.g. [424, 80], or alpha, e.g. 0.3; leave it out to go by each source's "
            "weight"
        )
    if mixing.per_batch and len(mixing.per_batch) != len(data.train):
        raise UserError(
            f"data.mixing.per_batch: {list(mixing.per_batch)} has {len(mixing.per_batch)} numbers, data.train has "
            f"{len(data.train)} sources; give the rows of each, in that order"
        )
    if mixing.per_batch and min(mixing.per_batch) < 1:
        raise UserError(
            f"data.mixing.per_batch: {list(mixing.per_batch)} must be 1 or more for each source; leave a source out of "
            "data.train that has none"
        )
