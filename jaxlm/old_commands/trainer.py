"""transformers' TrainingArguments and DeepSpeed's JSON file in jaxlm's keys.

Defaults are those of transformers 4.28 to 4.32, which the systems ran with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.old_commands.flags import Flag, Line, Values, idle, key, refused, shown

_SCHEDULES: dict[str, Values] = {
    "linear": {"optimizer.schedule": "linear"},
    "cosine": {"optimizer.schedule": "cosine"},
    "polynomial": {"optimizer.schedule": "polynomial", "optimizer.power": 1.0},
    "constant": {"optimizer.schedule": "constant", "optimizer.warmup_ratio": 0.0, "optimizer.warmup_steps": 0},
    "constant_with_warmup": {"optimizer.schedule": "constant"},
}
_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_hf", "adamw_torch_fused", "adamw_apex_fused", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), "lion"),
    "adafactor": "adafactor",
}


def schedule(name: str) -> Values:
    """Keys of a `lr_scheduler_type`."""
    return _known("lr_scheduler_type", name, _SCHEDULES)


def optimizer(name: str) -> Values:
    """Keys of an `optim`."""
    return {"optimizer.name": _known("optim", name, _OPTIMIZERS)}


def _known(flag: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise UserError(f"--{flag}: {name!r} is not known here; there are {', '.join(table)}")
    return table[name]


def _strategy(unit: str) -> Flag:
    """save_strategy and evaluation_strategy; the number of steps is another flag's."""
    return Flag(str, lambda value: {f"train.{unit}_every": 0} if value == "no" else {})


def _report(value: str) -> Values:
    known: dict[str, Values] = {
        "none": {},
        "tensorboard": {"train.tensorboard": True},
        "wandb": {"train.wandb": "run-as"},
    }
    return _known("report_to", value, {**known, "all": {"train.tensorboard": True}})


_MEMORY = "memory of a GPU; `jaxlm plan` says what a run needs"
_LOADER = "how torch's loader works; rows are made in a thread or in data.workers processes"

# per_device_train_batch_size and gradient_accumulation_steps are joined by `batch`.
TRAINING_ARGUMENTS: dict[str, Flag] = {
    "output_dir": key("output_dir"),
    "num_train_epochs": key("train.epochs", float, 3.0),
    "max_steps": Flag(int, lambda value: {"train.steps": value} if value > 0 else {}),
    "per_device_train_batch_size": key("train.micro_batch_size", int, 8),
    "gradient_accumulation_steps": Flag(int, lambda value: {"_accumulation": value}, 1),
    "learning_rate": key("optimizer.learning_rate", float, 5e-5),
    "lr_scheduler_type": Flag(str, schedule, "linear"),
    "lr_scheduler": Flag(str, schedule),  # argparse's short form, as KnowLM's script has it
    "warmup_ratio": key("optimizer.warmup_ratio", float),
    "warmup_steps": key("optimizer.warmup_steps", int),
    "weight_decay": key("optimizer.weight_decay", float, 0.0),
    "adam_beta1": key("optimizer.beta1", float, 0.9),
    "adam_beta2": key("optimizer.beta2", float, 0.999),
    "adam_epsilon": key("optimizer.eps", float, 1e-8),
    "max_grad_norm": key("optimizer.clip_norm", float, 1.0),
    "optim": Flag(str, optimizer, "adamw_torch"),
    "seed": key("train.seed", int, 42),
    "data_seed": idle("the data's order follows from train.seed"),
    "bf16": Flag(bool, lambda value: {"model.dtype": "bfloat16"} if value else {}),
    "fp16": Flag(bool, lambda value: {"model.dtype": "bfloat16"} if value else {}),
    "tf32": idle("bfloat16 products are summed in float32; on a GPU float32 products are exact", bool),
    "save_steps": key("train.save_every", int, 500),
    "save_strategy": _strategy("save"),
    "save_total_limit": key("train.keep", int),
    "evaluation_strategy": _strategy("eval"),
    "eval_strategy": _strategy("eval"),
    "eval_steps": key("train.eval_every", int),
    "logging_steps": key("train.log_every", int, 500),
    "logging_strategy": idle("train.log_every counts steps"),
    "logging_first_step": idle("the first step is logged", bool),
    "logging_dir": idle("metrics.jsonl and plots lie in output_dir"),
    "report_to": Flag(str, _report),
    "run_name": idle("a run is its output_dir"),
    "gradient_checkpointing": Flag(bool, lambda value: {"model.remat": "full" if value else "none"}),
    "resume_from_checkpoint": Flag(str, lambda value: {"train.resume": value not in ("False", "false")}),
    "load_best_model_at_end": idle("the best checkpoint is kept beside the newest", bool),
    "metric_for_best_model": Flag(str, lambda value: {} if value in ("loss", "eval_loss") else {"train.best": value}),
    "greater_is_better": idle("each figure knows it", bool),
    "fsdp": Flag(str, lambda value: {"mesh.fsdp": -1} if value.strip() else {"mesh.fsdp": 1, "mesh.data": -1}),
    "fsdp_transformer_layer_cls_to_wrap": idle("every layer is gathered by itself, of any model"),
    "fsdp_config": idle("every layer is gathered by itself, of any model"),
    "deepspeed": Flag(str, lambda value: {}),
    "per_device_eval_batch_size": idle("validation rows are packed into batches of the step's size"),
    "eval_accumulation_steps": idle("no logits are kept"),
    "do_train": idle("it trains", bool),
    "do_eval": idle("data.validation decides", bool),
    "overwrite_output_dir": idle("a directory with a run goes on; train.resume false refuses it", bool),
    "remove_unused_columns": idle("a template names the columns", bool),
    "group_by_length": idle("rows are packed (data.packing), or padded to one length", bool),
    "length_column_name": idle("see group_by_length"),
    "dataloader_num_workers": idle(_LOADER),
    "dataloader_pin_memory": idle(_LOADER, bool),
    "dataloader_drop_last": idle(_LOADER, bool),
    "ddp_find_unused_parameters": idle("one program computes all gradients", bool),
    "ddp_timeout": idle("distributed.timeout"),
    "log_on_each_node": idle("process 0 writes", bool),
    "disable_tqdm": idle("the bar is off where the output is no terminal", bool),
    "local_rank": idle("processes find each other (docs/multi_host.md)"),
    "cache_dir": idle("hub files lie in the cache of huggingface_hub (HF_HOME)"),
    "torch_dtype": idle("trained parameters are float32 (model.param_dtype)"),
    "low_cpu_mem_usage": idle("files are read by slices", bool),
    "use_auth_token": idle("huggingface_hub's own login is used", bool),
    "push_to_hub": refused("`jaxlm push` sends a model to the hub when it is done", bool, unless=False),
    "label_smoothing_factor": refused("the loss has no label smoothing; leave it out", float, unless=0.0),
    "neftune_noise_alpha": refused("no noise is added to embeddings; leave it out", float),
}


def batch(values: Values, devices: int | None) -> Values:
    """Joins rows of a device, accumulation and devices into train.global_batch_size.

    Raises:
        UserError: where the command does not say on how many devices it ran.
    """
    rest = dict(values)
    accumulation = rest.pop("_accumulation")
    if devices is None:
        raise UserError(
            "the command takes every device of its machine, so it does not say how large a step's batch is; "
            "add --devices N in front of --, the number of devices that it ran on"
        )
    rest["train.global_batch_size"] = rest["train.micro_batch_size"] * accumulation * devices
    if rest.get("optimizer.warmup_steps"):
        rest.pop("optimizer.warmup_ratio", None)  # transformers lets the steps win
    if rest.get("optimizer.schedule") == "polynomial":
        rest["optimizer.end_ratio"] = 1e-7 / rest["optimizer.learning_rate"]  # transformers' lr_end
    return rest


def read_deepspeed(path: str) -> tuple[Values, list[Line]]:
    """Keys of a DeepSpeed configuration that win over the flags, and what becomes of each section.

    Raises:
        UserError: for a file that is missing or not such a configuration.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--deepspeed: there is no file {path!r}; give the path of the JSON file of the old command")
    try:
        config = read_object(file)
    except ValueError as error:
        raise UserError(f"--deepspeed: {path}: {error}") from None
    values: Values = {}
    lines: list[Line] = []

    def say(section: str, text: str, new: Values | None = None) -> None:
        values.update(new or {})
        keys = ", ".join(f"{name}: {shown(value)}" for name, value in (new or {}).items())
        lines.append(Line(f"{file.name}: {section}", "taken" if new else "not needed", keys or text))

    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    say(f"ZeRO stage {stage}", "", {"mesh.fsdp": -1} if stage else {"mesh.fsdp": 1, "mesh.data": -1})
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device", "none") != "none":
            say(name, f"{_MEMORY}, with the state divided over all devices")
    kind = config.get("scheduler", {}).get("type")
    if kind == "WarmupLR":
        # DeepSpeed's default warm-up is logarithmic, and its scheduler takes the place of the Trainer's.
        say("scheduler WarmupLR", "", {"optimizer.schedule": "log_warmup"})
    elif kind == "WarmupDecayLR":
        # Its warm-up is logarithmic too, ours before a linear decay is not: the same peak after the same steps.
        say("scheduler WarmupDecayLR", "", {"optimizer.schedule": "linear"})
    elif kind is not None:
        raise UserError(f"{path}: scheduler.type: {kind!r} is not known here; there are WarmupLR and WarmupDecayLR")
    parameters = config.get("optimizer", {}).get("params", {})
    adam: Values = {}
    for name, target in (("lr", "learning_rate"), ("eps", "eps"), ("weight_decay", "weight_decay")):
        if parameters.get(name, "auto") != "auto":
            adam[f"optimizer.{target}"] = float(parameters[name])
    if parameters.get("betas", "auto") != "auto":
        adam |= {f"optimizer.beta{i}": float(beta) for i, beta in enumerate(parameters["betas"], 1)}
    if "optimizer" in config:
        say(f"optimizer {config['optimizer'].get('type')}", "all auto: the flags'", adam)
    clip = config.get("gradient_clipping")
    # Without the key DeepSpeed does not clip, whatever max_grad_norm says.
    if clip != "auto":
        say("gradient_clipping", "", {"optimizer.clip_norm": float(clip or 0.0)})
    for name in ("fp16", "bf16"):
        if config.get(name, {}).get("enabled") is True:
            say(name, "", {"model.dtype": "bfloat16"})
    return values, lines
