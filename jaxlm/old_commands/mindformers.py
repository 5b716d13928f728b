"""MindFormers' run_mindformer.py and its YAML file, as SciMind uses them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.old_commands.flags import Flag, Line, Translation, Values, idle, key, read_flags, refused, shown
from jaxlm.old_commands.launchers import Launch
from jaxlm.yamltext import read_yaml

_ASCEND = "JAX takes the devices that it sees"
_TABLE: dict[str, Flag] = {
    "config": key("config"),
    "run_mode": key("run_mode"),
    "mode": idle("everything is compiled"),
    "device_id": idle(_ASCEND),
    "device_target": idle(_ASCEND),
    "use_parallel": idle(_ASCEND),
    "do_eval": idle("data.validation decides", bool),
    "train_dataset_dir": key("train"),
    "eval_dataset_dir": key("validation"),
    "predict_data": key("predict_data"),
    "save_file": key("save_file"),
    "predict_batch_size": key("batch_size", int),
    "load_checkpoint": key("load_checkpoint"),
    "auto_trans_ckpt": idle("a checkpoint is read into any mesh"),
    "src_strategy_path_or_dir": idle("a checkpoint is read into any mesh"),
    "strategy_load_checkpoint": idle("a checkpoint is read into any mesh"),
    "only_save_strategy": idle("a checkpoint is read into any mesh"),
    "resume_training": idle("a run goes on at its very step when it is started again"),
    "remote_save_url": idle("output_dir"),
    "profile": key("profile", bool),
    "sink_mode": idle("batches are placed ahead of their step"),
    "num_samples": key("limit", int),
    "seed": key("seed", int),
    "epochs": key("epochs", float),
    "batch_size": key("micro", int),
    "options": refused("--options: give the keys to the configuration that is written"),
}


def run_mindformer(launch: Launch) -> Translation:
    """run_mindformer.py: its YAML file, and the flags that win over it."""
    given = read_flags(launch.words, _TABLE)
    lines = [
        Line(f"--{name} {shown(value)}", "not needed" if isinstance(flag.meaning, str) else "taken", "")
        for name, value in given.items()
        for flag in (_TABLE[name],)
    ]
    lines = [
        Line(line.word, "refused" if _TABLE[name].refused else line.verdict, _said(name))
        for name, line in zip(given, lines, strict=True)
    ]
    content = _read(given.get("config", "configs/llama2/run_llama2_7b_finetune.yaml"))
    mode = given.get("run_mode", content.get("run_mode", "train"))
    if mode == "predict":
        return _predict(content, given, lines)
    if mode in ("train", "finetune"):
        return _train(content, given, lines)
    raise UserError(f"--run_mode: {mode!r}: expected train, finetune or predict; `jaxlm evaluate` evaluates")


def run_distribute(launch: Launch) -> Translation:
    """scripts/run_distribute.sh RANK_TABLE CONFIG [FIRST,LAST] MODE."""
    words = list(launch.words)
    if len(words) != 4:
        raise UserError(f"run_distribute.sh: expected RANK_TABLE CONFIG [0,8] MODE, found {' '.join(words)!r}")
    table, config, devices, mode = words
    translation = run_mindformer(
        Launch("run_mindformer", ("--config", config, "--run_mode", mode), None, launch.launcher)
    )
    more = [
        Line(table, "not needed", "processes find each other (docs/multi_host.md)"),
        Line(devices, "not needed", "the mesh is over all devices that JAX sees"),
    ]
    return Translation(translation.verb, translation.values, [*more, *translation.lines])


def _said(name: str) -> str:
    meaning = _TABLE[name].meaning
    return meaning if isinstance(meaning, str) else "wins over the file"


def _read(path: str) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config: there is no file {path!r}: give the YAML file of the old command")
    content = read_yaml(file.read_text())
    if not isinstance(content, dict):
        raise UserError(f"--config: {path} holds no keys")
    return content


def _at(content: Mapping[str, Any], path: str, default: Any = None) -> Any:
    value: Any = content
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return default if value in (None, "") else value


def _checkpoint(content: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    path = given.get("load_checkpoint") or _at(content, "load_checkpoint")
    if not path:
        raise UserError(
            "load_checkpoint: the file and the command name none; add --load_checkpoint DIR, a model converted by "
            "`convert mindspore-to-jax`"
        )
    return str(path)


def _predict(content: Mapping[str, Any], given: Mapping[str, Any], lines: list[Line]) -> Translation:
    model = _at(content, "model.model_config", {})
    values: Values = {
        "model.path": _checkpoint(content, given),
        "predict_data": given.get("predict_data"),
        "save_file": given.get("save_file", "text_generation_result.txt"),
        "max_new_tokens": int(_at(model, "max_decode_length", 512)),
    }
    if values["predict_data"] is None:
        raise UserError("--predict_data: missing; a file with a prompt a line")
    if "batch_size" in given:
        values["batch_size"] = given["batch_size"]
    if _at(model, "do_sample", False):
        values |= {"temperature": 1.0, "top_k": int(_at(model, "top_k", 0)), "top_p": float(_at(model, "top_p", 1.0))}
    penalty = float(_at(model, "repetition_penalty", 1.0))
    if penalty != 1.0:
        values["repetition_penalty"] = penalty
    said = "max_decode_length counts the prompt there, max_new_tokens does not; greedy unless do_sample"
    return Translation(("generate",), values, [*lines, Line("model.model_config", "taken", said)])


def _train(content: Mapping[str, Any], given: Mapping[str, Any], lines: list[Line]) -> Translation:
    parallel = _at(content, "parallel_config", {})
    data, micro_batches = int(_at(parallel, "data_parallel", 1)), int(_at(parallel, "micro_batch_num", 1))
    rows = int(given.get("micro") or _at(content, "runner_config.batch_size", 1))
    pipelines = int(_at(parallel, "pipeline_stage", 1))
    train = given.get("train") or _at(content, "train_dataset.data_loader.dataset_dir")
    if not train:
        raise UserError(
            "train_dataset.data_loader.dataset_dir: the file and the command name no data: --train_dataset_dir"
        )
    schedule = _at(content, "lr_schedule", {})
    names = {"CosineWithWarmUpLR": "cosine", "LinearWithWarmUpLR": "linear", "ConstantWarmUpLR": "constant"}
    kind = str(_at(schedule, "type", "CosineWithWarmUpLR"))
    if kind not in names:
        raise UserError(f"lr_schedule.type: {kind!r} is not known here; there are {', '.join(names)}")
    values: Values = {
        "model.path": _checkpoint(content, given),
        "data.train": [{"path": str(train)}],
        "data.sequence_length": int(_at(content, "model.model_config.seq_length", 2048)),
        "optimizer.schedule": names[kind],
        "optimizer.learning_rate": float(_at(schedule, "learning_rate", _at(content, "optimizer.learning_rate", 1e-3))),
        "optimizer.warmup_ratio": float(_at(schedule, "warmup_ratio", 0.0)),
        "optimizer.beta1": float(_at(content, "optimizer.beta1", 0.9)),
        "optimizer.beta2": float(_at(content, "optimizer.beta2", 0.999)),
        "optimizer.eps": float(_at(content, "optimizer.eps", 1e-8)),
        "optimizer.clip_norm": 1.0 if _at(content, "runner_wrapper.use_clip_grad", False) else 0.0,
        "train.epochs": float(given.get("epochs") or _at(content, "runner_config.epochs", 1)),
        # Each of the data-parallel groups feeds micro_batch_num batches of these rows through its pipeline.
        "train.global_batch_size": rows * data * (micro_batches if pipelines > 1 else 1),
        "train.micro_batch_size": rows,
        "train.seed": int(given.get("seed", _at(content, "seed", 0))),
        "mesh.tensor": int(_at(parallel, "model_parallel", 1)),
        "model.remat": "full" if _at(content, "recompute_config.recompute", True) else "none",
        "output_dir": "out/scimind",
    }
    if "limit" in given:
        values["data.train"][0]["limit"] = given["limit"]
    if given.get("profile", content.get("profile", False)):
        first, last = (int(_at(content, f"profile_{end}_step", step)) for end, step in (("start", 1), ("stop", 10)))
        values["train.profile"] = {"start": max(first, 1), "steps": min(max(last - first + 1, 1), 100)}
    for callback in content.get("callbacks") or []:
        if callback.get("type") == "CheckpointMointor":  # as it is spelled there
            values["train.save_every"] = int(callback.get("save_checkpoint_steps", 0))
            values["train.keep"] = int(callback.get("keep_checkpoint_max", 5))
    said = [
        Line("parallel_config", "taken", f"a step's batch is {rows} x {data} x {micro_batches} rows"),
        Line(f"pipeline_stage {pipelines}", "not needed", "parameters are divided over the devices (mesh.fsdp)"),
        Line("compute_dtype, scale_sense", "not needed", "bfloat16 products need no loss scale"),
        Line("lr_schedule, optimizer, runner_config, callbacks", "taken", "see the configuration"),
    ]
    return Translation(("train",), values, [*lines, *said])
