"""Using a model: decoding, generation, evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxlm.config.data import SourceConfig
from jaxlm.config.run import DistributedConfig, MeshConfig
from jaxlm.errors import UserError
from jaxlm.locate import NameOrPath, ReadPath, WrittenPath


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
        length_penalty: for beam search: scores are divided by length to this power; above 0 favours longer answers.
        early_stopping: for beam search: true ends when num_beams answers are complete, false when a better one is
            unlikely, never when none is possible.
        samples: answers per prompt: drawn ones, or the best beams.
        stop: texts that end an answer; they are left out of it.
        stop_ids: token ids that end an answer, beside the model's own.
        seed: for what is drawn; the same seed gives the same text, whatever the batch.
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
        path: directory of the model: Hugging Face, converted jaxlm, a run directory or one of its checkpoints; or a
            name of the Hugging Face hub, hf://owner/name[@revision]. A LoRA run brings its base along.
        adapter: LoRA adapter to apply on the fly: a PEFT directory, a converted one, or a LoRA run.
        merge_adapter: fold the adapter into the weights while loading; the same text (up to rounding), faster.
        dtype: dtype of weights and compute; auto takes bfloat16 on GPU and TPU, float32 on a CPU.
        quantize: keep the linear layers in int8, with a factor per output (half the memory of bfloat16), or in nf4,
            QLoRA's four bits in blocks of 64 (little more than a quarter). null: as the model is stored.
        int8: the same as quantize: int8.
        attention: which implementation reads prompts, as in training.
    """

    path: ReadPath | None = None
    adapter: ReadPath | None = None
    merge_adapter: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantize: Literal["int8", "nf4"] | None = None
    int8: bool = False
    attention: Literal["auto", "pallas_tpu", "pallas_gpu", "cudnn", "xla", "reference"] = "auto"

    @property
    def kind(self) -> Literal["int8", "nf4"] | None:
        """What the linear layers are to be kept in.

        Raises:
            UserError: two keys say it differently.
        """
        if self.int8 and self.quantize not in (None, "int8"):
            raise UserError(f"model.int8: true, and model.quantize is {self.quantize}; leave one of them out")
        return "int8" if self.int8 else self.quantize


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
        best_of: draw this number of answers to each prompt, and give the one that reward_model prefers.
        reward_model: a model of a run with objective reward, with the tokens of this model.
        batch_size: prompts answered together.
        mesh: the devices; absent: as many as the model's heads allow along tensor, the rest along data.
        distributed: several processes.
        compilation_cache: directory of compiled programs; null means $JAX_COMPILATION_CACHE_DIR or the user's cache
            directory; none keeps nothing.
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
    best_of: int | None = None
    reward_model: ReadPath | None = None
    batch_size: int = 8
    mesh: MeshConfig | None = None
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    compilation_cache: WrittenPath | None = None
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A model behind HTTP.

    Args:
        model: the model.
        tokenizer: a directory or SentencePiece .model file; null means the model's own.
        template: how a chat becomes text, as in generate.
        add_bos: begin with the tokenizer's bos token; null: as in training, else if the tokenizer itself does so.
        name: the model's id for clients; null: the last part of its path.
        adapter: LoRA adapters beside the base, as NAME=PATH; clients ask for the model BASE:NAME.
        adapter_dir: a directory whose directories are adapters; one that comes or goes is loaded or dropped meanwhile.
        max_adapters: places for adapters, of which each takes memory; null: for those that are there at the start.
        reward_model: a model of a run with objective reward, with the tokens of this model: what chooses where clients
            ask for best_of.
        host: where to listen. Beyond this machine (0.0.0.0) an api_key is needed, or no_api_key.
        port: 0 takes any that is free.
        api_key: what clients must send; null: $JAXLM_API_KEY, where it is set.
        no_api_key: whoever reaches the host may ask.
        cors_origin: web pages from elsewhere that may ask, as https://lab.example.
        rows: answers that are written at a time.
        pages: pages of keys and values; null: what the device's memory has room for.
        context: most tokens of a prompt and its answer together; null: the model's.
        speculate: most tokens that are guessed of an answer in a step, by what followed its last tokens before; no
            answer changes by it. For answers that repeat their prompts, on a server with more rows than answers; 0
            guesses nothing.
        max_queue: answers that may wait; beyond that clients are told to come back (429).
        timeout_s: the longest that an answer may take, waiting included, in seconds.
        mesh: the devices; absent: as many as the model's heads allow along tensor, the rest along data.
        distributed: several processes: the first one listens, all compute.
        compilation_cache: directory of compiled programs; null means $JAX_COMPILATION_CACHE_DIR or the user's cache
            directory; none keeps nothing.
        verbose: say at start-up also what choices rest on.
    """

    model: InferenceModelConfig = field(default_factory=InferenceModelConfig)
    tokenizer: ReadPath | None = None
    template: NameOrPath = "auto"
    add_bos: bool | None = None
    name: str | None = None
    adapter: tuple[str, ...] = ()
    adapter_dir: ReadPath | None = None
    max_adapters: int | None = None
    reward_model: ReadPath | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    no_api_key: bool = False
    cors_origin: tuple[str, ...] = ()
    rows: int = 16
    pages: int | None = None
    context: int | None = None
    speculate: int = 0
    max_queue: int = 256
    timeout_s: float = 600.0
    mesh: MeshConfig | None = None
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    compilation_cache: WrittenPath | None = None
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Figures of a model on the questions of a file, of a file of answers, or of a model on texts.

    Args:
        task: names with commas between them; smiles2text (captions of molecules) or text2smiles (molecules for
            captions) of --predictions, with LPM-24's figures, stand alone.
        data: the questions. With several tasks one each, in their order, or as NAME=FILE. For perplexity: the texts, as
            sources of `data.train`, one or several; of instructions the answers are scored.
        limit: use only this number of records, the first ones; for perplexity, of each source.
        options: of the tasks, e.g. --options.shots 5; `--task NAME --help` lists them.
        output: a directory, in which each task has one: predictions.jsonl, scores.json, report.md, figures.png; null:
            evaluation/ and the model's name. An interrupted run goes on when started again.
        overwrite: begin anew where the directory has an evaluation with other settings.
        predictions: score the answers of this file, without a model: a predictions.jsonl, or records with a column
            prediction, answer or output. For LPM-24 also its table (.tsv or .txt).
        harness: run these tasks of lm-evaluation-harness, with commas between them; see docs/evaluating.md.
        reference: LPM-24: column of the right answers; null: caption or molecule, or "ground truth".
        prediction: LPM-24: column of the model's answers; null: prediction, answer or output.
        metric_tokenizer: LPM-24: directory of the Hugging Face tokenizer whose pieces BLEU counts (SciBERT's there);
            null: words and signs.
        save_file: LPM-24 and perplexity: the figures as JSON. For perplexity without --output, this file is all that is
            written.
        model: the model.
        tokenizer: a directory or SentencePiece .model file; null means the model's own.
        sequence_length: perplexity: most tokens of a row; null: the model's context, at most 2048.
        stride: perplexity: new tokens of each further window of a longer text, the others are context; null:
            sequence_length - 1.
        train_on_inputs: perplexity: score prompts too.
        add_bos: begin each text with bos; null: as the model was trained, else as its tokenizer does.
        add_eos: perplexity: score the end of each text too; null: of answers, not of plain texts.
        batch_size: questions asked together; for perplexity, rows of a device at a time.
        mesh: the devices; absent: as many as the model's heads allow along tensor, the rest along data; for perplexity
            rows and parameters over all of them.
        distributed: several processes.
        compilation_cache: directory of compiled programs; null means $JAX_COMPILATION_CACHE_DIR or the user's cache
            directory; none keeps nothing.
    """

    task: str | None = None
    data: tuple[SourceConfig, ...] = ()
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    output: WrittenPath | None = None
    overwrite: bool = False
    predictions: ReadPath | None = None
    harness: str | None = None
    reference: str | None = None
    prediction: str | None = None
    metric_tokenizer: ReadPath | None = None
    save_file: WrittenPath | None = None
    model: InferenceModelConfig = field(default_factory=InferenceModelConfig)
    tokenizer: ReadPath | None = None
    sequence_length: int | None = None
    stride: int | None = None
    train_on_inputs: bool = False
    add_bos: bool | None = None
    add_eos: bool | None = None
    batch_size: int = 8
    mesh: MeshConfig | None = None
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    compilation_cache: WrittenPath | None = None
