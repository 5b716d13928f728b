"""The run configuration: one YAML file, one tree of frozen dataclasses, strict.

Every key can be given on the command line (`--optimizer.learning_rate 1e-4`). No JAX is
imported here, so `--help` and `--print_config` answer at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxlm.locate import NameOrPath, ReadPath, WrittenPath


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it computes.

    Args:
        path: directory of the model to start from: Hugging Face, converted jaxlm, a run directory or one of
            its checkpoints.
        shape: instead of a path, a fresh model: a known shape (llama-2-7b) or a JSON file like HF's config.json.
        dtype: compute dtype of matrix products; softmax, norms and loss are always float32.
        param_dtype: dtype in which parameters are kept. Trained parameters and the optimizer are exact only
            in float32.
        attention: which implementation runs; auto takes the fastest that python -m jaxlm.tune measured on this
            kind of device, else one by rule, and says at start-up why it and why not the others.
        remat: what the backward pass recomputes: none, dots (keep matrix products), qkv_out (keep q, k, v
            and attention output), qkv (keep those three), full.
    """

    path: ReadPath | None = None
    shape: NameOrPath | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    attention: Literal["auto", "pallas_tpu", "pallas_gpu", "cudnn", "xla", "reference"] = "auto"
    remat: Literal["none", "dots", "qkv_out", "qkv", "full"] = "full"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, with PEFT's meaning of every number.

    Args:
        rank: R of the two factors.
        alpha: the adapter is scaled by alpha / rank (alpha / sqrt(rank) with rslora).
        dropout: probability of dropping an input of the adapter while training.
        targets: linear layers by name: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj.
        rank_pattern: other ranks by module name or regular expression, as in PEFT, e.g.
            {"layers.0.self_attn.q_proj": 16}.
        alpha_pattern: other alphas, likewise.
        rslora: rank-stabilised scaling.
        dora: weight-decomposed adapters (DoRA).
        modules_to_save: modules trained in full beside the adapter, e.g. [embed_tokens, lm_head] after adding tokens.
        per_expert: of a model of experts: gate_proj, up_proj and down_proj have an adapter of this rank for each
            expert, not one for all.
        init_from: start from the weights of this adapter (PEFT directory or LoRA run directory) with a
            fresh optimizer.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    per_expert: bool = False
    init_from: ReadPath | None = None


@dataclass(frozen=True, kw_only=True)
class MoeRunConfig:
    """The feed-forward layer divided into experts. What is not given is as the model has it.

    Args:
        experts: into how many equal blocks the neurons are divided.
        router: which experts a token uses: activation (those whose neurons respond most), activation_released (as
            SciMind's published code has it), learned (a trained linear router), modality (a fixed set for each).
        top_k: experts that a token uses, by modality, e.g. {text: 14, smiles: 2}; text is every token of no other.
        ranges: the token ids [first, last + 1] of each modality but text, e.g. {smiles: [32000, 32066]}.
        shared: router modality: the first so many experts serve every modality.
        balance_loss: weight of the learned router's load-balance loss.
        z_loss: weight of the learned router's z loss.
        noise: standard deviation of noise on the learned router's logits while training.
        compute: dense computes every neuron and masks; the others compute those that are used: loop by blocks of rows
            (CPU), ragged by XLA's grouped product, pallas_tpu by jaxlm's own; auto picks by device.
    """

    experts: int | None = None
    router: Literal["activation", "activation_released", "learned", "modality"] | None = None
    top_k: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: int | None = None
    balance_loss: float = 0.01
    z_loss: float = 0.001
    noise: float = 0.0
    compute: Literal["auto", "dense", "loop", "ragged", "pallas_tpu"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """A kind of thing that has tokens of its own: molecules, proteins, ...; see `jaxlm.modalities`.

    Args:
        preset: start from smiles, nucleic, protein (SciMind's alphabets) or smiles_atoms (atoms as tokens).
        name: what it is called in moe.top_k.
        tokens: its alphabet, in the order of ids.
        tokens_file: instead of tokens, a file with one on each line.
        pattern: regular expression that finds the tokens in a text; null: every character is one.
        delimiters: what stands before and after a token in the vocabulary, e.g. {|C|}.
        tags: what opens and closes it in a text; null: <name> and </name>.
        tag_tokens: the tags are tokens too; null: as the preset, else true.
        strip: drop white space beside it, as SciMind's tokenizer does.
        fallback: for a character outside of the alphabet: error, or text: all from tag to tag is read as plain text.
    """

    preset: str | None = None
    name: str | None = None
    tokens: tuple[str, ...] = ()
    tokens_file: ReadPath | None = None
    pattern: str | None = None
    delimiters: tuple[str, str] = ("{|", "|}")
    tags: tuple[str, str] | None = None
    tag_tokens: bool | None = None
    strip: bool = False
    fallback: Literal["error", "text"] = "error"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where the tokenizer comes from.

    Args:
        path: a directory or SentencePiece .model file; null means the model's own.
        modalities: kinds of things with tokens of their own; a fresh model's tokenizer gets them, another's must have
            them (`convert extend-vocab` adds them). Empty: as recorded beside the tokenizer.
        train_on: text files (or folders) to train a SentencePiece model on, when a fresh model has none.
        vocab_size: pieces of the tokenizer trained on train_on.
    """

    path: ReadPath | None = None
    modalities: tuple[ModalityConfig, ...] = ()
    train_on: tuple[ReadPath, ...] = ()
    vocab_size: int = 4096


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data source.

    Args:
        path: file, folder, glob, or directory written by HF datasets' save_to_disk.
        format: json, jsonl, csv, parquet, text or hf; auto goes by the file name.
        template: how a record becomes text: a template name or JSON file, `chat` for the tokenizer's own
            chat template, `text` for plain text; auto goes by the columns found.
        weight: how often a record is seen per epoch: 2.0 twice, 0.5 a seeded half.
        columns: the template's field names mapped to the columns of this file, e.g. {instruction: question,
            output: answer}.
        split: split of an HF datasets directory that has several.
        documents: for text files, whether a document is a line or a whole file.
        limit: use only the first so many records.
    """

    path: ReadPath
    format: Literal["auto", "json", "jsonl", "csv", "parquet", "text", "hf"] = "auto"
    template: NameOrPath = "auto"
    weight: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    documents: Literal["line", "file"] = "line"
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how records become rows.

    Args:
        train: the sources.
        validation: a number of records split off the training sources (seeded), a share of them (0.1), or a list of
            sources.
        sequence_length: tokens of a row.
        packing: first_fit (or true) puts whole records into rows with segment ids; group_texts concatenates
            and cuts like HF's run_clm; false pads one record a row.
        train_on_inputs: also learn the prompt, not only the answer.
        add_bos: begin each record with the tokenizer's bos token; null: if the tokenizer itself does so. A chat
            template has its own.
        add_eos: end each answer and each document with the tokenizer's eos token, and learn it; null: if it has one.
        allow_no_end: train also when nothing that ends an answer is learnt.
        date: day and time (2026-11-27 12:00) that chat templates are told which ask for it; null: when the run was
            first started.
        drop_unknown: leave out records with a token that the tokenizer does not know, as SciMind does.
        too_long: what to do with a record longer than a row: truncate, split into pieces, drop (each reported) or
            error; auto splits plain text and truncates the rest.
        workers: loader processes; 0 loads in a thread.
    """

    train: tuple[SourceConfig, ...] = ()
    validation: int | float | tuple[SourceConfig, ...] = 0
    sequence_length: int = 512
    packing: bool | Literal["first_fit", "group_texts"] = True
    train_on_inputs: bool = False
    add_bos: bool | None = None
    add_eos: bool | None = None
    allow_no_end: bool = False
    date: str | None = None
    drop_unknown: bool = False
    too_long: Literal["auto", "truncate", "split", "drop", "error"] = "auto"
    workers: int = 0

    @property
    def packing_mode(self) -> str:
        """One of 'first_fit', 'group_texts', 'none'."""
        if isinstance(self.packing, bool):
            return "first_fit" if self.packing else "none"
        return self.packing

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents, told apart by segment ids."""
        return self.packing_mode == "first_fit"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule.

    Args:
        name: adamw, adafactor or lion.
        learning_rate: the peak.
        schedule: after warm-up: cosine, linear, polynomial or constant; log_warmup is DeepSpeed's WarmupLR
            (log warm-up, then constant), which K2 ran with.
        warmup_steps: steps of warm-up; give this or warmup_ratio.
        warmup_ratio: warm-up as a share of all steps.
        end_ratio: the last learning rate as a share of the peak.
        power: exponent of the polynomial schedule.
        beta1: first moment decay (adamw, lion).
        beta2: second moment decay (adamw, lion).
        eps: adamw's epsilon.
        weight_decay: decoupled weight decay.
        decay: what decays: matrices (not norms and biases) or all.
        clip_norm: clip the global gradient norm to this; 0 switches it off.
    """

    name: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "polynomial", "constant", "log_warmup"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    end_ratio: float = 0.0
    power: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "matrices"
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, evaluation, checkpoints.

    Args:
        epochs: passes over the data; ignored when steps is given.
        steps: optimizer steps.
        global_batch_size: rows per optimizer step, over all devices and hosts.
        micro_batch_size: most rows per device at a time; the rest is gradient accumulation.
        seed: of initialisation, data order, split and dropout.
        loss_normalisation: tokens weighs every target token of the global batch alike; mean_of_means
            averages the means of micro-batches, as alpaca-lora, K2 and KnowLM do.
        eval_every: steps between evaluations on the validation data, and one before the first step; 0 evaluates only at
            the end.
        save_every: steps between checkpoints; 0 saves only at the end.
        local_checkpoints: a folder on each host's own disk for emergency copies of the state, from which a restart on
            the same hosts and devices goes on when they are newer; null: none.
        local_every: steps between those.
        keep: newest checkpoints to keep; the one with the best validation loss is kept besides.
        log_every: steps between lines in metrics.jsonl.
        on_nonfinite: stop saves and ends the run; skip goes on and counts the step. Neither lets the step touch
            the parameters.
        resume: continue from output_dir when it holds a checkpoint; false refuses to touch such a directory.
        sample_prompts: instructions to answer at the end of the run, shown as text.
        sample_tokens: length of those answers.
        tensorboard: also write TensorBoard events to output_dir/tensorboard.
        wandb: also log to this Weights & Biases project.
        compilation_cache: directory of compiled programs; null means the user's cache directory; none
            (as text) keeps nothing.
        compiler_options: of XLA, by name, e.g. {xla_tpu_scoped_vmem_limit_kib: 65536}; added to those that jaxlm sets
            by device (parallel/compiler_options.py).
    """

    epochs: float = 1.0
    steps: int | None = None
    global_batch_size: int = 128
    micro_batch_size: int = 4
    seed: int = 42
    loss_normalisation: Literal["tokens", "mean_of_means"] = "tokens"
    eval_every: int = 200
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
        num_processes: how many there are; null: $JAX_NUM_PROCESSES, or the cluster's number.
        process_id: which this is, from 0; null: $JAX_PROCESS_ID, or the cluster's number.
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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    output_dir: WrittenPath = "out"
    stages: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decoding parameters, named as in transformers.

    Args:
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the most probable token (greedy, or beam search with num_beams); above 0 tokens are drawn.
        top_k: draw from the k most probable tokens; 0 is off.
        top_p: draw from the most probable tokens that together have this probability; 1 is off.
        min_p: leave out tokens less probable than this share of the best one's probability; 0 is off.
        repetition_penalty: divide the score of every token that stands in the text already; 1 is off.
        no_repeat_ngram_size: let no n-gram of this size occur twice; 0 is off.
        num_beams: beam search over this many beams; 1 is off.
        length_penalty: of beam search: scores are divided by length to this power; above 0 favours longer answers.
        early_stopping: of beam search: true ends when num_beams answers are complete, false when a better one is
            unlikely, never when none is possible.
        samples: answers per prompt: drawn ones, or the best beams.
        stop: texts that end an answer; they are left out of it.
        stop_ids: token ids that end an answer, beside the model's own.
        seed: of what is drawn; the same seed gives the same text, whatever the batch.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    samples: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class InferenceModelConfig:
    """Which model, and how it computes.

    Args:
        path: directory of the model: Hugging Face, converted jaxlm, a run directory or one of its checkpoints. A LoRA
            run brings its base along.
        adapter: LoRA adapter to apply on the fly: a PEFT directory, a converted one, or a LoRA run.
        merge_adapter: fold the adapter into the weights while loading; the same text (up to rounding), faster.
        dtype: of weights and compute; auto takes bfloat16 on GPU and TPU, float32 on a CPU.
        int8: keep the linear layers in int8, with a factor per output; half the memory of bfloat16.
        attention: which implementation reads prompts, as in training.
    """

    path: ReadPath | None = None
    adapter: ReadPath | None = None
    merge_adapter: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    int8: bool = False
    attention: Literal["auto", "pallas_tpu", "pallas_gpu", "cudnn", "xla", "reference"] = "auto"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Decoding):
    """Using a model to write.

    Args:
        model: the model.
        tokenizer: a directory or SentencePiece .model file; null means the model's own.
        prompt: answer this.
        input: goes with the prompt where the template has a place for it (alpaca's input).
        system: the system message of chat templates.
        interactive: a conversation; /help lists what can be typed.
        predict_data: answer every prompt of this file: .json (records, or a list of texts), .jsonl, .csv, or .txt with
            a prompt a line, where \\n stands for a line break.
        save_file: where the answers go: .json, .jsonl, .csv or .txt. An interrupted run goes on when started again.
        overwrite: replace a save_file that exists, and begin anew.
        template: how a prompt becomes text: a template name or JSON file, chat for the tokenizer's chat template, text
            for the prompt as it is; auto takes the one that the model was trained with here, else the chat template,
            else text.
        columns: the template's field names mapped to those of predict_data, e.g. {instruction: question}.
        add_bos: begin with the tokenizer's bos token; null: as in training, else if the tokenizer itself does so.
        batch_size: prompts answered together.
        mesh: the devices; absent: as many as the model's heads allow along tensor, the rest along data.
        distributed: several processes.
        compilation_cache: directory of compiled programs; null means the user's cache directory; none keeps nothing.
        verbose: say at start-up also what choices rest on.
    """

    model: InferenceModelConfig = field(default_factory=InferenceModelConfig)
    tokenizer: ReadPath | None = None
    prompt: str | None = None
    input: str | None = None
    system: str | None = None
    interactive: bool = False
    predict_data: ReadPath | None = None
    save_file: WrittenPath | None = None
    overwrite: bool = False
    template: NameOrPath = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    add_bos: bool | None = None
    batch_size: int = 8
    mesh: MeshConfig | None = None
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    compilation_cache: WrittenPath | None = None
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Figures of a file of answers, or of a model on a file of texts.

    Args:
        task: smiles2text (captions of molecules) or text2smiles (molecules for captions), with LPM-24's figures;
            perplexity of a model on texts.
        predictions: the file: .json, .jsonl or .csv as `jaxlm.generate` writes it, or LPM-24's table (.tsv or .txt).
        reference: column of the right answers; null: caption or molecule, or "ground truth".
        prediction: column of the model's answers; null: prediction, answer or output.
        metric_tokenizer: directory of the Hugging Face tokenizer whose pieces BLEU counts (LPM-24: SciBERT's); null:
            words and signs.
        save_file: the figures as JSON.
        model: perplexity: the model.
        tokenizer: perplexity: a directory or SentencePiece .model file; null means the model's own.
        data: perplexity: the texts, as a source of `data.train`; of instructions the answers are scored.
        sequence_length: perplexity: most tokens of a row; null: the model's context, at most 2048.
        stride: perplexity: new tokens of each further window of a longer text, the others are context; null:
            sequence_length - 1.
        train_on_inputs: perplexity: score prompts too.
        add_bos: perplexity: begin each text with bos; null: as the model was trained, else as its tokenizer does.
        add_eos: perplexity: score the end of each text too; null: of answers, not of plain texts.
        batch_size: perplexity: rows of a device at a time.
        mesh: perplexity: the devices; absent: rows and parameters over all of them.
        compilation_cache: directory of compiled programs; null means the user's cache directory; none keeps nothing.
    """

    task: Literal["smiles2text", "text2smiles", "perplexity"] | None = None
    predictions: ReadPath | None = None
    reference: str | None = None
    prediction: str | None = None
    metric_tokenizer: ReadPath | None = None
    save_file: WrittenPath | None = None
    model: InferenceModelConfig = field(default_factory=InferenceModelConfig)
    tokenizer: ReadPath | None = None
    data: SourceConfig | None = None
    sequence_length: int | None = None
    stride: int | None = None
    train_on_inputs: bool = False
    add_bos: bool | None = None
    add_eos: bool | None = None
    batch_size: int = 8
    mesh: MeshConfig | None = None
    compilation_cache: WrittenPath | None = None


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain YAML or JSON values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level: {'a': {'b': 1}} as {'a.b': 1}."""
    if isinstance(values, dict) and values:
        return {key: v for name, inner in values.items() for key, v in flatten(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): values}
