"""Whether a run may go on from a checkpoint: the settings that make the numbers must not have changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from jaxlm.config import RunConfig, flatten, to_dict
from jaxlm.errors import UserError
from jaxlm.models.shapes import LlamaConfig
from jaxlm.training.state import Readable

# Keys that may differ: where and how long it runs and what it tells, not what is computed from which data.
FREE = (
    "mesh",
    "model.attention",
    "model.remat",
    "lora.init_from",
    "data.workers",
    "data.allow_no_end",
    "train.epochs",
    "train.steps",
    "train.micro_batch_size",
    "train.eval_every",
    "train.save_every",
    "train.local_checkpoints",
    "train.local_every",
    "train.keep",
    "train.log_every",
    "train.on_nonfinite",
    "train.resume",
    "train.sample_prompts",
    "train.sample_tokens",
    "train.tensorboard",
    "train.wandb",
    "train.compilation_cache",
    "train.compiler_options",
    "distributed",
    "output_dir",
    "stages",
)


def base_fingerprint(model: LlamaConfig, source: Readable) -> str:
    """Hash of a base model's shape and norm weights: small to read, and training changes them all."""
    digest = hashlib.sha256(json.dumps(model.to_dict(), sort_keys=True).encode())
    for leaf in ("norm/scale", "layers/input_layernorm/scale", "layers/post_attention_layernorm/scale"):
        digest.update(source.read(leaf, ()).tobytes())
    return digest.hexdigest()


def check_unchanged(files: Mapping[str, bytes], config: RunConfig, prints: Mapping[str, str], checkpoint: Path) -> None:
    """Compares a run with the one that wrote a checkpoint.

    Args:
        files: small files of the checkpoint.
        config: the run that wants to go on.
        prints: fingerprints of its inputs: 'data', and 'base' where only an adapter trains.
        checkpoint: for the message.

    Raises:
        UserError: naming each changed key with both values.
    """
    # Under mean_of_means the micro batch is part of the loss.
    fixed = {"train.micro_batch_size"} if config.train.loss_normalisation == "mean_of_means" else set()
    free = [key for key in FREE if key not in fixed]
    before, now = flatten(yaml.safe_load(files["run.yaml"])), flatten(to_dict(config))
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} was written with other settings ({'; '.join(changed)}); "
            f"set them back, or choose another output_dir"
        )
    kept = json.loads(files["fingerprints.json"])
    for kind, what in (("data", "the training data are"), ("base", "the base model at model.path is")):
        if kept.get(kind) != prints.get(kind):
            raise UserError(
                f"{checkpoint}: {what} not what this run began with (same settings, other content); "
                f"bring the files back, or choose another output_dir"
            )
