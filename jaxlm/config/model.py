"""Which model is trained, what is trained of it, and the tokenizer it reads with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxlm.locate import NameOrPath, ReadPath


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it computes.

    Args:
        path: directory of the model to start from: Hugging Face, converted jaxlm, a run directory or one of
            its checkpoints; or a name of the Hugging Face hub, hf://owner/name[@revision].
        shape: instead of a path, a fresh model: a known shape (llama-2-7b) or a JSON file like HF's config.json.
        dtype: compute dtype of matrix products; softmax, norms and loss are always float32.
        param_dtype: dtype in which parameters are kept. Trained parameters and the optimizer are exact only
            in float32.
        attention: which implementation runs; auto takes the fastest that python -m jaxlm.tune measured on this
            kind of device, else one by rule, and says at start-up why it and why not the others.
        quantize: what the frozen linear layers under an adapter are kept in: int8, with a factor for each output, or
            nf4, QLoRA's four bits in blocks of 64 with magnitudes in 8 bits. They are rounded while they are read,
            unless `convert quantize` did so. null: as the model is stored.
        offload: frozen keeps the matrices of an adapter's frozen layers in the hosts' memory, from which a device
            fetches a layer at a time, forward and backward: a step takes longer, and its memory does not grow with the
            base. null: on the devices.
        remat: what the backward pass recomputes: none, dots (keep matrix products), qkv_out (keep q, k, v
            and attention output), qkv (keep those three), full.
    """

    path: ReadPath | None = None
    shape: NameOrPath | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    attention: Literal["auto", "pallas_tpu", "pallas_gpu", "cudnn", "xla", "reference"] = "auto"
    quantize: Literal["int8", "nf4"] | None = None
    offload: Literal["frozen"] | None = None
    remat: Literal["none", "dots", "qkv_out", "qkv", "full"] = "full"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, with PEFT's meaning of every number.

    Args:
        rank: R of the two factors.
        alpha: the adapter is scaled by alpha / rank (alpha / sqrt(rank) with rslora).
        dropout: probability of dropping an input of the adapter while training.
        targets: linear layers by name, jaxlm's (q_proj k_proj v_proj o_proj gate_proj up_proj down_proj) or those of
            the family's modules in Hugging Face's code (query_key_value, fc1), in full or by their last parts;
            all-linear: all that are linear layers there, as in PEFT.
        rank_pattern: other ranks by module name or regular expression, as in PEFT, e.g.
            {"layers.0.self_attn.q_proj": 16}.
        alpha_pattern: other alphas, likewise.
        rslora: rank-stabilised scaling.
        dora: weight-decomposed adapters (DoRA).
        modules_to_save: modules trained in full beside the adapter, e.g. [embed_tokens, lm_head] after adding tokens;
            by jaxlm's names or Hugging Face's.
        per_expert: in a model of experts, gate_proj, up_proj and down_proj have an adapter of this rank for each
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
        experts: the number of equal blocks that the neurons are divided into.
        router: which experts a token uses: activation (those whose neurons respond most), activation_released (as
            SciMind's published code has it), learned (a trained linear router), modality (a fixed set for each).
        top_k: the number of experts that a token uses, by modality, e.g. {text: 14, smiles: 2}; text is every token of
            no other.
        ranges: the token ids [first, last + 1] of each modality but text, e.g. {smiles: [32000, 32066]}.
        shared: router modality: the number of experts, from the first, that serve every modality.
        balance_loss: weight of the learned router's load-balance loss.
        z_loss: weight of the learned router's z loss.
        noise: standard deviation of noise on the learned router's logits while training.
        compute: dense computes every neuron and masks; the others compute those that are used: loop by blocks of rows
            (CPU), ragged by XLA's grouped product, pallas_tpu and pallas_gpu by jaxlm's own; auto picks by device.
    """

    experts: int | None = None
    router: Literal["activation", "activation_released", "learned", "modality"] | None = None
    top_k: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: int | None = None
    balance_loss: float = 0.01
    z_loss: float = 0.001
    noise: float = 0.0
    compute: Literal["auto", "dense", "loop", "ragged", "pallas_tpu", "pallas_gpu"] = "auto"


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
        path: a directory, a SentencePiece .model file, or a name of the hub; null means the model's own.
        modalities: kinds of things with tokens of their own; a fresh model's tokenizer gets them, another's must have
            them (`convert extend-vocab` adds them). Empty: as recorded beside the tokenizer.
        train_on: text files (or folders) to train a SentencePiece model on, when a fresh model has none.
        vocab_size: pieces of the tokenizer trained on train_on.
    """

    path: ReadPath | None = None
    modalities: tuple[ModalityConfig, ...] = ()
    train_on: tuple[ReadPath, ...] = ()
    vocab_size: int = 4096
