"""From opened files to a model on its devices: how it computes, where it lies, and how it is asked.

Nothing here opens a path of a model: `convert.source` does, and hands over what can be read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.finite import check_finite
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.fit import check_tokenizer
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights
from jaxlm.inference.options import check_decoding
from jaxlm.inference.prompts import Prompter
from jaxlm.jsonfields import build
from jaxlm.jsontext import read_object
from jaxlm.kernels.backend import AttentionBackend, ShapeKey, choose_for_layers
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.nn.nf4 import weight_type
from jaxlm.nn.rounding import Kind
from jaxlm.nn.routers import choose_compute
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import Tokenizer, load_tokenizer, main_file
from jaxlm.weights.leaves import ModelFiles, ParamSource
from jaxlm.weights.names import tensor_name
from jaxlm.weights.native.prompt_json import PromptFile, trained_prompt
from jaxlm.weights.quantized import QuantizedSource


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """How a model is asked: the tokenizer, the template and why it is that one.

    Args:
        trained: what the model's own files say of its training.
        warnings: what speaks against the tokenizer.
        for_encoder: an encoder reads the prompts.
    """

    tokenizer: Tokenizer
    template: str
    reason: str
    add_bos: bool | None
    trained: PromptFile
    warnings: list[str]
    for_encoder: bool = False

    def prompter(self, columns: Mapping[str, str] | None = None, system: str | None = None) -> Prompter:
        eos, encoder = self.trained.add_eos, self.for_encoder
        return Prompter(self.template, self.tokenizer, columns, self.add_bos, system, eos, encoder)


def prompt_settings(
    files: ModelFiles, tokenizer: str | None = None, template: str = "auto", add_bos: bool | None = None
) -> PromptSettings:
    """How to ask a model.

    Args:
        tokenizer: path of another tokenizer than the model's own.
        template: a name or file; auto: the one of its training, else the tokenizer's chat template, else plain text.
        add_bos: begin with bos; None: as in training, else as the tokenizer does.

    Raises:
        UserError: the tokenizer is another model's, or cannot be read.
    """
    spec = files.merged.config
    loaded = load_tokenizer(tokenizer or files.merged.tokenizer_dir)
    loaded.complete(spec.bos_token_id, spec.eos_token_id, spec.pad_token_id)
    own = _own_tokenizer(files.merged) if tokenizer else None
    warnings = check_tokenizer(loaded, spec, own, "tokenizer" if tokenizer else "")
    trained = trained_prompt(files.trained_path)
    name, reason = _template(template, trained, loaded)
    bos, encoder = trained.add_bos if add_bos is None else add_bos, files.merged.config.encoder is not None
    return PromptSettings(loaded, name, reason, bos, trained, warnings, encoder)


def _own_tokenizer(source: ParamSource) -> Tokenizer | None:
    """The tokenizer that came with a model, to compare another with; None where there is none to be read."""
    if main_file([file.name for file in source.tokenizer_files]) is None:
        return None
    try:
        return load_tokenizer(source.tokenizer_dir)
    except UserError:  # that may be why another was named
        return None


def _template(asked: str, trained: PromptFile, tokenizer: Tokenizer) -> tuple[str, str]:
    """The template's name, and why it is that one."""
    if asked != "auto":
        return asked, "as asked for"
    if trained.template is not None:
        return trained.template, "the one it was trained with"
    if tokenizer.chat_template is not None:
        return "chat", "the tokenizer's chat template"
    return "text", "the prompt as it is; --template alpaca and others ask a question"


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a model computes and where; `place` reads its weights.

    Args:
        quantize: what the linear layers' kernels are kept in; None: arrays.
        merge: the adapter is folded into the weights while they are read.
        shape: what the choice of the attention rests on.
        attention_reason, experts_reason: why these implementations; empty without experts.
    """

    files: ModelFiles
    decoder: Decoder
    quantize: Kind | None
    mesh: Mesh
    merge: bool
    attention: AttentionBackend
    shape: ShapeKey
    attention_reason: str
    experts_reason: str

    @property
    def kept_in(self) -> str:
        """The dtype of the weights, in words."""
        return f"{self.decoder.dtype}{'' if self.quantize is None else f', linear layers in {self.quantize}'}"

    def place(self, prompts: PromptSettings) -> Generator:
        """Reads the weights onto the devices.

        Raises:
            UserError: they hold numbers that are not finite.
        """
        files = self.files
        model, on_the_fly = files.parts(self.merge)
        weights = load_weights(self.decoder, self.mesh, model, on_the_fly, weight_type(self.quantize))
        cause = "the file is damaged, or of a run that diverged"
        check_finite(weights, self.mesh, f"model: {files.where}", cause, partial(tensor_name, model.config))
        stop_ids = {*_stop_ids(files.merged, prompts.tokenizer), *prompts.trained.stop_ids}
        return Generator(self.decoder, weights, self.mesh, sorted(stop_ids))


def placement(
    files: ModelFiles,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    quantize: Kind | None = None,
    merge: bool = False,
    attention: str = "auto",
    mesh: MeshConfig | None = None,
) -> Placement:
    """Chooses how a model computes on the devices that are here.

    Args:
        dtype: of weights and compute; auto: bfloat16 on GPU and TPU, float32 on a CPU.
        quantize: keep the linear layers in this form; None: as the model is stored.
        merge: fold the adapter into the weights; else it is applied on the fly.
        attention: implementation that reads prompts.
        mesh: the devices; None: as many as the heads allow along tensor, the rest along data.

    Raises:
        UserError: for a mesh or an adapter that cannot be used so.
    """
    spec = files.merged.config
    compute = compute_dtype(dtype)
    # Prompts have any length; the longest ones are what takes time.
    backend, reason, shape = choose_for_layers(attention, spec.attention_layers, compute, spec.max_length, False)
    if merge and isinstance(files.base, QuantizedSource):
        raise UserError(
            f"model.merge_adapter: {files.base.path} holds rounded weights ({files.base.kind}), and an adapter is "
            "merged into the original ones; leave it out, or merge with `convert merge`"
        )
    model, adapter = files.parts(merge)
    quantize = kept_in(model, quantize)
    if quantize is not None:
        spec.refuse_encoder("model.int8" if quantize == "int8" else "model.quantize")
    specs: Any = {} if adapter is None else resolve_lora(files.base.config, adapter.lora, adapter.layers)
    experts, why = (
        ("dense", "")
        if spec.experts is None
        else choose_compute("auto", jax.devices()[0], spec.experts, specs, compute)
    )
    decoder = Decoder(spec, specs, compute, compute, backend, experts=experts)
    axes = mesh or auto_mesh(spec, jax.device_count())
    if axes.sequence != 1:
        raise UserError(
            f"mesh.sequence: {axes.sequence}: one new token at a time is not a row to divide; set it to 1, and "
            "data or tensor higher"
        )
    devices = make_mesh(axes, experts=None if spec.experts is None else spec.experts.num_experts)
    return Placement(files, decoder, quantize, devices, merge, backend, shape, reason, why)


def kept_in(model: ParamSource, asked: Kind | None) -> Kind | None:
    """What the kernels are kept in.

    Raises:
        UserError: they are stored in another form.
    """
    if not isinstance(model, QuantizedSource):
        return asked
    if asked not in (None, model.kind):
        raise UserError(
            f"model.quantize: {asked}, but {model.path} is stored in {model.kind}: numbers that are rounded once are "
            "not rounded again; name the original, or leave quantize out"
        )
    if asked is not None:
        model.check_kept()
    return model.kind if model.stays_quantized else asked


def compute_dtype(dtype: str) -> str:
    """The dtype of weights and compute; auto: bfloat16 on GPU and TPU, float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def auto_mesh(spec: DecoderSpec, devices: int) -> MeshConfig:
    """Heads over as many devices as divide them, the rest see different prompts."""
    sizes = [spec.experts.num_experts] if spec.experts else [layer.feed_forward.size for layer in spec.period]
    tensor = math.gcd(devices, *(layer.attention.num_kv_heads for layer in spec.period), *sizes)
    return MeshConfig(data=devices // tensor, fsdp=1, tensor=tensor)


def _stop_ids(source: ParamSource, tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: those of config.json, generation_config.json and the tokenizer."""
    named: list[Any] = [source.config.eos_token_id, tokenizer.end_ids]
    for file in source.tokenizer_files:
        if file.name == "generation_config.json":
            own = read_object(file).get("eos_token_id")
            ids = own if isinstance(own, list) else [own]
            if not all(index is None or type(index) is int for index in ids):
                raise UserError(f"{file}: eos_token_id is {own!r}; it must be a token id or a list of them")
            named.append(ids)
    flat = [index for value in named for index in (value if isinstance(value, (list, tuple)) else [value])]
    return sorted({index for index in flat if index is not None})


# What a generation_config.json may say of decoding: fields of `Decoding`, by transformers' names, which are the same.
_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_DECODING = (*_DRAWING, "max_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty")


def own_decoding(source: ParamSource) -> Decoding:
    """How a model's own generation_config.json decodes; our defaults where there is none, or it does not say.

    With `do_sample` false, what only drawing needs is left out, as transformers does.

    Raises:
        UserError: a value that cannot be meant, with file and key.
    """
    file = next((file for file in source.tokenizer_files if file.name == "generation_config.json"), None)
    if file is None:
        return Decoding()
    content = read_object(file)
    values = {name: content[name] for name in _DECODING if content.get(name) is not None}
    if content.get("do_sample") is False or values.get("num_beams", 1) != 1:
        values = {name: value for name, value in values.items() if name not in _DRAWING}
    elif content.get("do_sample") is True:
        values.setdefault("temperature", 1.0)
    if values.get("temperature", 0) == 0:
        values = {name: value for name, value in values.items() if name not in _DRAWING}
    if values.get("num_beams", 1) == 1:
        values.pop("length_penalty", None)
    if values.get("top_k") == -1:  # off, in some models' files
        values["top_k"] = 0
    own = build(Decoding, values, f"{file}:")
    try:
        check_decoding(own)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return own


def same_place(recorded: str, path: str | Path) -> bool:
    """Whether a recorded base is this one; a name of the hub and a local copy of it count as the same."""
    return Path(recorded).resolve() == Path(path).resolve() or Path(recorded).name == Path(path).name
