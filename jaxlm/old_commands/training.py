"""The training scripts of the old systems: one table each, and what their code does besides its flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.old_commands.flags import Flag, Line, Translation, Values, idle, key, read_flags, refused, shown, translate
from jaxlm.old_commands.launchers import Launch
from jaxlm.old_commands.trainer import TRAINING_ARGUMENTS, batch, optimizer, read_deepspeed, schedule

# Their losses are means of the micro-batches' means.
MEANS: Values = {"train.loss_normalisation": "mean_of_means"}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def source(template: str) -> Any:
    """The meaning of a data path whose records have this template."""
    return lambda path: {"data.train": [{"path": _file(path), "template": template}]}


def _file(path: str) -> str:
    """A hub data set's name as an address."""
    is_name = path.count("/") == 1 and not path.startswith(("/", ".", "~")) and not Path(path).exists()
    return f"hf://datasets/{path}" if is_name and "." not in path.rpartition("/")[2] else path


def _finetune(**changed: Flag) -> dict[str, Flag]:
    """alpaca-lora's finetune.py; K2, KnowLM and others changed some of its flags and defaults."""
    wandb = idle("wandb's own variables set it: WANDB_…")
    table = {
        "base_model": key("model.path"),
        "data_path": Flag(str, source("alpaca"), "yahma/alpaca-cleaned"),
        "output_dir": key("output_dir", str, "./lora-alpaca"),
        "batch_size": key("train.global_batch_size", int, 128),
        "micro_batch_size": key("train.micro_batch_size", int, 4),
        "num_epochs": key("train.epochs", float, 3.0),
        "learning_rate": key("optimizer.learning_rate", float, 3e-4),
        "cutoff_len": key("data.sequence_length", int, 256),
        "val_set_size": key("data.validation", int, 2000),
        "lora_r": key("lora.rank", int, 8),
        "lora_alpha": key("lora.alpha", float, 16.0),
        "lora_dropout": key("lora.dropout", float, 0.05),
        "lora_target_modules": key("lora.targets", list, ["q_proj", "v_proj"]),
        "train_on_inputs": key("data.train_on_inputs", bool, True),
        "add_eos_token": Flag(bool, _eos, False),
        "group_by_length": idle("rows are padded to one length, or packed with data.packing", bool),
        "wandb_project": Flag(str, lambda value: {"train.wandb": value} if value else {}),
        **dict.fromkeys(("wandb_run_name", "wandb_watch", "wandb_log_model"), wandb),
        "resume_from_checkpoint": key("lora.init_from"),
        "prompt_template_name": Flag(str, lambda value: {"_template": value or "alpaca"}),
        "cuda_id": idle("JAX takes the devices that it sees; CUDA_VISIBLE_DEVICES chooses"),
    }
    return {name: changed.pop(name, flag) for name, flag in table.items()} | changed


def _eos(value: bool) -> Values:
    # Without it answers end where max_new_tokens does, as there.
    return {"data.add_eos": value} | ({} if value else {"data.allow_no_end": True})


_LORA_DOES: Values = {
    "data.packing": False,
    "optimizer.schedule": "linear",
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    **MEANS,
}
_STEPS_200: Values = {"optimizer.warmup_steps": 100, "train.eval_every": 200, "train.save_every": 200, "train.keep": 3}
_STEPS_10: Values = {"optimizer.warmup_steps": 10, "train.eval_every": 10, "train.save_every": 10, "train.keep": 5}

ALPACA_LORA = _finetune()
K2 = _finetune(
    num_epochs=key("train.epochs", float, 1.0),
    cutoff_len=key("data.sequence_length", int, 512),
    lora_target_modules=key("lora.targets", list, ["q_proj", "k_proj"]),
)
_KNOWLM_CHANGES = {
    "data_path": Flag(str, source("alpaca"), "./data/"),
    "output_dir": key("output_dir", str, "./checkpoint"),
    "cutoff_len": key("data.sequence_length", int, 512),
    "lora_r": key("lora.rank", int, 16),
    "lora_alpha": key("lora.alpha", float, 32.0),
    "lora_target_modules": key("lora.targets", list, ALL_LINEAR),
    "train_on_inputs": key("data.train_on_inputs", bool, False),
}
KNOWLM = _finetune(**_KNOWLM_CHANGES, add_eos_token=Flag(bool, lambda value: {}, True))
KNOWLM_OTHERS = _finetune(
    **_KNOWLM_CHANGES,
    val_set_size=idle("this script has val_set_ratio"),
    val_set_ratio=key("data.validation", float, 0.2),
    add_eos_token=idle("answers end with eos", bool),
    warmup_ratio=key("optimizer.warmup_ratio", float, 0.03),
    logging_steps=key("train.log_every", int, 1),
    save_steps=key("train.save_every", int, 10),
    save_total_limit=key("train.keep", int, 5),
    eval_steps=key("train.eval_every", int, 10),
    seed=key("train.seed", int, 42),
)
# Their templates by name; the prompt of ours is the same to the byte.
_TEMPLATES = {"alpaca": "alpaca", "alpaca_legacy": "alpaca_legacy", "qwen": "chat", "chatglm3": "chat"}


def finetune(launch: Launch, table: Mapping[str, Flag], does: Values) -> Translation:
    """alpaca-lora's finetune.py and its children.

    Args:
        does: what the script does besides its flags.
    """
    values, lines = translate(read_flags(launch.words, table), table)
    if "model.path" not in values:
        raise UserError("--base_model: missing; the script needs the model to start from")
    name = values.pop("_template", "alpaca")
    values["data.train"][0]["template"] = _TEMPLATES.get(name, name)
    done = _LORA_DOES | does
    lines += [Line("(in its code)", "taken", ", ".join(f"{k}: {shown(v)}" for k, v in done.items()))]
    return Translation(("train",), done | values, lines)


def k2_finetune(launch: Launch) -> Translation:
    return finetune(launch, K2, _STEPS_200)


def alpaca_lora_finetune(launch: Launch) -> Translation:
    return finetune(launch, ALPACA_LORA, _STEPS_200)


def knowlm_finetune(launch: Launch) -> Translation:
    """finetune/lora/knowlm, or finetune/lora/Others, whose flags are more."""
    words = {word.lstrip("-").partition("=")[0] for word in launch.words}
    others = words & {
        "val_set_ratio",
        "warmup_ratio",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "seed",
    }
    return finetune(launch, KNOWLM_OTHERS if others else KNOWLM, {} if others else _STEPS_10)


# --- stanford_alpaca's train.py and its children ----------------------------------------------------------------------

_TRAINER_DOES: Values = {"data.packing": False, **MEANS}


def _trainer(launch: Launch, own: Mapping[str, Flag], does: Values) -> Translation:
    """A script around transformers' Trainer."""
    table = {**TRAINING_ARGUMENTS, **own}
    given = read_flags(launch.words, table)
    values, lines = translate(given, table)
    for name in ("model.path", "output_dir"):
        if name not in values:
            raise UserError(f"--{'output_dir' if name == 'output_dir' else 'model_name_or_path'}: missing")
    values = batch(does | values, launch.devices)
    if "deepspeed" in given:
        wins, more = read_deepspeed(given["deepspeed"])
        values |= wins
        lines += more
    if not {"bf16", "fp16"} & given.keys() and "model.dtype" not in values:
        values["model.dtype"] = "float32"
    if given.get("fp16"):
        lines.append(Line("--fp16 true", "taken", "bfloat16 has float32's range: no loss scale is needed"))
    lines.append(Line("(in its code)", "taken", ", ".join(f"{k}: {shown(v)}" for k, v in does.items())))
    return Translation(("train",), values, lines)


def alpaca_train(launch: Launch, length: int = 512) -> Translation:
    """stanford_alpaca's train.py, Darwin's (2,048 tokens) and LLM4Academic's."""
    own = {
        "model_name_or_path": key("model.path", str, "facebook/opt-125m"),
        "data_path": Flag(str, source("alpaca_legacy")),
        "model_max_length": key("data.sequence_length", int, length),
        "n_gpu": idle("the launcher says on how many devices it runs"),
    }
    return _trainer(launch, own, {**_TRAINER_DOES, "data.train_on_inputs": False})


def darwin_train(launch: Launch) -> Translation:
    return alpaca_train(launch, 2048)


def k2_run_clm(launch: Launch) -> Translation:
    """K2's run_clm.py, which sets most flags in its own code; what is given comes behind them and wins."""
    fixed = {
        "per_device_train_batch_size": "2",
        "learning_rate": "1e-5",
        "gradient_accumulation_steps": "16" if launch.script == "run_clm_resume" else "1",
        "gradient_checkpointing": "True",
        "lr_scheduler_type": "polynomial",
        "warmup_ratio": "0.01",
        "num_train_epochs": "1",
        "logging_steps": "1",
        "save_steps": "2740" if launch.script == "run_clm_resume" else "10961",
        "save_total_limit": "3",
        "report_to": "tensorboard",
        "output_dir": "outputs/llama",
    }
    given = {word.lstrip("-").partition("=")[0] for word in launch.words if word.startswith("--")}
    before = tuple(word for name, value in fixed.items() if name not in given for word in (f"--{name}", value))
    own = {
        "model_name_or_path": key("model.path"),
        "train_file": Flag(str, source("text")),
        "validation_file": Flag(str, lambda path: {"data.validation": [{"path": path, "template": "text"}]}),
        "validation_split_percentage": Flag(int, lambda value: {"data.validation": value / 100}, 5),
        "block_size": key("data.sequence_length", int, 1024),
        "max_train_samples": refused("give data.train.limit in the configuration that is written", int),
        **dict.fromkeys(
            ("data_cache_dir", "overwrite_cache", "preprocessing_num_workers", "keep_linebreaks"),
            idle("data.cache keeps tokens (docs/data_at_scale.md)"),
        ),
        "tokenizer_name": key("tokenizer.path"),
    }
    if "model_name_or_path" not in given or "train_file" not in given:
        raise UserError(
            "run_clm.py has its authors' own paths in its code: add --model_name_or_path DIR --train_file FILE.jsonl"
        )
    does = {"data.packing": "group_texts", "data.add_eos": False, **MEANS}
    return _trainer(Launch(launch.script, (*before, *launch.words), launch.devices, launch.launcher), own, does)


_KINDS = (
    "which example of a merged store is of which kind is not read; in the configuration name the stores that it was "
    "merged from, and this list as their rows in a batch: data.train: [{path: a.idx}, {path: b.idx}], data.mixing: "
    "{per_batch: [424, 80]}"
)


def knowlm_train(launch: Launch) -> Translation:
    """KnowLM's pretrain/train.py and pretrain/preview/train.py (batches by proportion)."""
    own = {
        "model_name_or_path": key("model.path"),
        "data_path": Flag(str, lambda path: {"data.train": [{"path": f"{path}.idx", "format": "knowlm"}]}),
        "model_max_length": key("data.sequence_length", int, 512),
        "resume_path": Flag(str, lambda value: {"train.resume": True}),
        "global_batch_distributed": refused(_KINDS, list),
        "resume_epoch": idle("a run goes on at its very step (docs/training.md)"),
        "resume_global": idle("a run goes on at its very step (docs/training.md)"),
    }
    return _trainer(launch, own, dict(_TRAINER_DOES))


def knowlm_qlora(launch: Launch) -> Translation:
    """KnowLM's finetune/qlora/train.py."""
    table = {
        "model_name_or_path": key("model.path"),
        "output_dir": key("output_dir"),
        "dataset": Flag(str, source("alpaca")),
        "dataset_format": refused("records are of alpaca's form there", unless="alpaca"),
        "eval_dataset_size": key("data.validation", int, 1024),
        "source_max_len": Flag(int, lambda value: {"_source": value}, 128),
        "target_max_len": Flag(int, lambda value: {"_target": value}, 384),
        "lora_r": key("lora.rank", int, 64),
        "lora_alpha": key("lora.alpha", float, 16.0),
        "lora_dropout": key("lora.dropout", float, 0.0),
        "double_quant": idle("nf4 has it always", bool),
        "bits": Flag(int, lambda value: {"_bits": value}, 4),
        "quant_type": refused("4 bits are nf4 here", unless="nf4"),
        "optim": Flag(str, optimizer, "paged_adamw_32bit"),
        "lr_scheduler_type": Flag(str, schedule, "constant"),
    }
    table = {**TRAINING_ARGUMENTS, **table}
    given = read_flags(launch.words, table)
    values, lines = translate(given, table)
    # A row holds the question and the answer, each cut there by itself.
    values["data.sequence_length"] = values.pop("_source") + values.pop("_target")
    bits = values.pop("_bits")
    if bits not in (4, 8, 16):
        raise UserError(f"--bits: {bits} is not 4, 8 or 16")
    values |= {"data.packing": False, **MEANS}
    if bits < 16:
        values["model.quantize"] = "nf4" if bits == 4 else "int8"
    values["lora.targets"] = ALL_LINEAR
    return Translation(("train",), batch(values, launch.devices), lines)
