"""The public functions of `import jaxlm`; docs/python_api.md shows them at work."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from convert.source import open_with_adapter
from jaxlm.config import GenerateConfig, MeshConfig, to_dict
from jaxlm.config.plain import plain
from jaxlm.config.reading import build, check_keys
from jaxlm.errors import UserError
from jaxlm.inference.loaded import LoadedModel
from jaxlm.inference.loading import placement, prompt_settings
from jaxlm.locate import locate_paths


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    quantize: Literal["int8", "nf4"] | None = None,
    int8: bool = False,
    merge_adapter: bool = False,
    attention: Literal["auto", "pallas_tpu", "pallas_gpu", "cudnn", "xla", "reference"] = "auto",
    mesh: MeshConfig | None = None,
    tokenizer: str | Path | None = None,
    template: str = "auto",
    system: str | None = None,
) -> LoadedModel:
    """Loads a model onto the devices of this process.

    Args:
        path: a Hugging Face directory, a converted one, a run directory or one of its checkpoints. An adapter that
            records its base may stand alone.
        adapter: a LoRA adapter on the model: a PEFT directory, a converted one, or a LoRA run.
        dtype: of weights and compute; auto: bfloat16 on GPU and TPU, float32 on a CPU.
        quantize: keep the linear layers in int8, with a factor per output (half the memory of bfloat16), or in nf4,
            four bits in blocks of 64; None: as the model is stored.
        int8: the same as quantize='int8'.
        merge_adapter: fold the adapter into the weights while reading them; the same text up to rounding, faster.
        attention: implementation that reads prompts.
        mesh: the devices, e.g. `MeshConfig(data=2, fsdp=1, tensor=4)`; None: as many as the heads allow along tensor,
            the rest along data.
        tokenizer: a directory or SentencePiece .model file; None: the model's own.
        template: how `generate` turns a question into a prompt: a template's name or JSON file, chat for the
            tokenizer's chat template, text for the prompt as it is; auto: the one of its training, else chat, else
            text.
        system: the system message of templates for conversations.

    Raises:
        UserError: the model, adapter or tokenizer cannot be read or do not fit each other, or the mesh does not fit
            the devices. The message names what to change.
    """
    if path is None:
        raise UserError("path: name a model, found None")
    model = {"path": path, "adapter": adapter, "dtype": dtype, "quantize": quantize, "int8": int8}
    model |= {"merge_adapter": merge_adapter, "attention": attention}
    values = {"model": model, "tokenizer": tokenizer, "template": template, "system": system}
    values["mesh"] = to_dict(mesh) if isinstance(mesh, MeshConfig) else mesh
    config = build(locate_paths(check_keys(plain(values), GenerateConfig, "load"), GenerateConfig), GenerateConfig)
    files = open_with_adapter(config.model.path, config.model.adapter)
    prompts = prompt_settings(files, config.tokenizer, config.template)
    prompter = prompts.prompter(system=config.system)
    how = config.model
    placed = placement(files, how.dtype, how.kind, how.merge_adapter, how.attention, config.mesh)
    return LoadedModel(placed.place(prompts), prompter)
