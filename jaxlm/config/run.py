"""A training run: optimizer, loop, devices, processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxlm.config.data import DataConfig
from jaxlm.config.model import LoraConfig, ModelConfig, MoeRunConfig, TokenizerConfig
from jaxlm.config.preference import GrpoConfig, PreferenceConfig
from jaxlm.locate import ReadPath, WrittenPath


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule.

    Args:
        name: adamw, adamw_8bit (its moments in a byte each), adafactor, lion, muon (on matrices; adamw on the rest) or
            schedule_free (adamw that averages instead of lowering the learning rate).
        learning_rate: the peak.
        schedule: after warm-up: cosine, linear, polynomial or constant; log_warmup is DeepSpeed's WarmupLR
            (log warm-up, then constant), which K2 ran with.
        warmup_steps: steps of warm-up; give this or warmup_ratio.
        warmup_ratio: warm-up as a share of all steps.
        end_ratio: the last learning rate as a share of the peak.
        power: exponent of the polynomial schedule.
        beta1: first moment decay (adamw, lion); schedule_free's share of the average in the weights that gradients are
            taken at.
        beta2: second moment decay (adamw, lion, schedule_free).
        momentum: muon's, of matrices.
        eps: adamw's epsilon; of muon and schedule_free too.
        weight_decay: decoupled weight decay.
        decay: what decays: matrices (not norms and biases) or all.
        clip_norm: clip the global gradient norm to this; 0 switches it off.
    """

    name: Literal["adamw", "adamw_8bit", "adafactor", "lion", "muon", "schedule_free"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "polynomial", "constant", "log_warmup"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    end_ratio: float = 0.0
    power: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "matrices"
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task of `jaxlm evaluate` that is run on the model while it is trained.

    Args:
        task: its name.
        data: the file of its questions.
        every: steps between runs, and one before the first step; there is one at the end.
        limit: use only this number of records, the first ones.
        options: of the task.
        batch_size: questions asked together.
    """

    task: str
    data: ReadPath
    every: int = 500
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Steps that are traced, to see where their time goes (docs/profiling.md).

    Args:
        start: the first of them; 1 is the run's first step.
        steps: the number of steps.
    """

    start: int = 10
    steps: int = 5


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, evaluation, checkpoints.

    Args:
        epochs: passes over the data; ignored when steps is given.
        steps: optimizer steps.
        global_batch_size: rows per optimizer step, over all devices and hosts.
        micro_batch_size: most rows per device at a time; the rest is gradient accumulation.
        seed: seed of initialisation, data order, split and dropout.
        loss_normalisation: tokens weighs every target token of the global batch alike; mean_of_means
            averages the means of micro-batches, as alpaca-lora, K2 and KnowLM do.
        eval_every: steps between evaluations on the validation data, and one before the first step; 0 evaluates only at
            the end.
        tasks: tasks of `jaxlm evaluate` that are run in between; their figures go to metrics.jsonl.
        best: the figure by which the best checkpoint is kept, TASK/FIGURE, of checkpoints at whose step the task was
            run; null: the validation loss.
        save_every: steps between checkpoints; 0 saves only at the end.
        local_checkpoints: a folder on each host's own disk for emergency copies of the state, from which a restart on
            the same hosts and devices goes on when they are newer; null: none.
        local_every: steps between those.
        keep: newest checkpoints to keep; the best one is kept besides.
        log_every: steps between lines in metrics.jsonl.
        on_nonfinite: stop saves and ends the run; skip goes on and counts the step. Neither lets the step touch
            the parameters.
        resume: continue from output_dir when it holds a checkpoint; false refuses to touch such a directory.
        sample_prompts: instructions to answer at the end of the run, shown as text.
        sample_tokens: length of those answers.
        tensorboard: also write TensorBoard events to output_dir/tensorboard.
        wandb: also log to this Weights & Biases project.
        profile: trace some steps into output_dir/profile, for XProf, TensorBoard and Perfetto; absent: none.
        compilation_cache: directory of compiled programs; null means $JAX_COMPILATION_CACHE_DIR or the user's cache
            directory; none (as text) keeps nothing.
        compiler_options: XLA's options by name, e.g. {xla_tpu_scoped_vmem_limit_kib: 65536}; added to those that
            jaxlm sets by device (devices/compiler_options.py).
    """

    epochs: float = 1.0
    steps: int | None = None
    global_batch_size: int = 128
    micro_batch_size: int = 4
    seed: int = 42
    loss_normalisation: Literal["tokens", "mean_of_means"] = "tokens"
    eval_every: int = 200
    tasks: tuple[TaskConfig, ...] = ()
    best: str | None = None
    save_every: int = 200
    local_checkpoints: WrittenPath | None = None
    local_every: int = 20
    keep: int = 3
    log_every: int = 1
    on_nonfinite: Literal["stop", "skip"] = "stop"
    resume: bool = True
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    tensorboard: bool = False
    wandb: str | None = None
    profile: ProfileConfig | None = None
    compilation_cache: WrittenPath | None = None
    compiler_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one may be -1 to take what is left.

    Args:
        data: replicas that see different rows.
        fsdp: shards of parameters and optimizer state, which also see different rows.
        expert: shards of experts.
        sequence: shards of long rows.
        tensor: shards of heads, feed-forward neurons and vocabulary.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes as one run. On a TPU pod, GKE, Slurm and Open MPI nothing need be given.

    Args:
        coordinator: HOST:PORT of process 0, as all hosts reach it; null: $JAX_COORDINATOR_ADDRESS, or the cluster's.
        num_processes: the number of processes; null: $JAX_NUM_PROCESSES, or the cluster's number.
        process_id: the number of this process, from 0; null: $JAX_PROCESS_ID, or the cluster's number.
        timeout: seconds to wait for the others at start-up and at barriers.
        heartbeat: seconds without a sign of life after which a host counts as dead.
        interrupted_status: exit status when a signal ended the run, everything saved. A cluster that takes 0 for a
            run that is done, and would not start it again, wants another, e.g. 75 (3 to 125: 1 and 2 are failures).
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300
    heartbeat: int = 100
    interrupted_status: int = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Args:
        model: the model.
        lora: adapters; absent means full fine-tuning.
        moe: experts in the feed-forward layer; absent means as the model is.
        tokenizer: the tokenizer.
        data: the data.
        objective: what is minimised: cross_entropy of answers; preference, a loss over pairs of answers or labelled
            ones; reward, which makes a reward model of pairs; grpo, which learns from rewards of the model's own
            answers.
        preference: settings of objective preference; absent means its defaults.
        grpo: settings of objective grpo.
        optimizer: the optimizer.
        train: the loop.
        mesh: the devices.
        distributed: several processes.
        output_dir: where checkpoints, metrics and plots go.
        stages: several runs in a row, e.g. pretraining then instruction tuning: each entry has a name and
            the keys that differ; a stage starts from the one before it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = None
    moe: MoeRunConfig | None = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Literal["cross_entropy", "preference", "reward", "grpo"] = "cross_entropy"
    preference: PreferenceConfig | None = None
    grpo: GrpoConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    output_dir: WrittenPath = "out"
    stages: list[dict[str, Any]] | None = None
