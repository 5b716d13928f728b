"""A model as `generate` and `evaluate` open it: which one, how it is asked and computed; then its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxlm.config import InferenceModelConfig, MeshConfig

if TYPE_CHECKING:
    from rich.console import Console

    from jaxlm.inference.best_of import Judge
    from jaxlm.inference.generator import Generator
    from jaxlm.inference.loading import Placement, PromptSettings
    from jaxlm.inference.prompts import Prompter
    from jaxlm.processes.distributed import Hosts
    from jaxlm.spec import DecoderSpec


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model whose weights have not been read.

    Attributes:
        prompter: what makes prompts for it.
        facts: what identifies the model and how it is asked.
    """

    placed: Placement
    prompts: PromptSettings
    prompter: Prompter
    facts: dict[str, Any]

    @property
    def spec(self) -> DecoderSpec:
        return self.placed.files.merged.config

    def load(self, hosts: Hosts, console: Console, verbose: bool = False) -> Generator:
        """Reads the weights onto the devices, and says what the model is."""
        from jaxlm.weights.fingerprint import base_fingerprint

        base = self.placed.files.base
        # Hosts have tables of their own; with different programs they would wait for each other for ever.
        hosts.agree("attention", {"model.attention": self.placed.attention.name})
        if hosts.processes > 1:
            hosts.agree("model", {"hash of the norms": base_fingerprint(base.config, base)})
        started = time.perf_counter()
        with console.status("loading"):
            generator = self.placed.place(self.prompts)
        seconds = time.perf_counter() - started
        _announce(self.placed, self.prompts, self.prompter, generator, seconds, verbose, console)
        return generator


def open_model(
    model: InferenceModelConfig,
    tokenizer: str | None,
    template: str,
    add_bos: bool | None,
    mesh: MeshConfig | None,
    console: Console,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
) -> OpenModel:
    """Opens a model; arguments as in `GenerateConfig`.

    Raises:
        UserError: it cannot be read, or used so.
    """
    from convert.source import open_with_adapter
    from jaxlm.inference.loading import placement, prompt_settings, same_place

    files = open_with_adapter(model.path, model.adapter)
    base, adapter = files.base, files.adapter
    if adapter is not None and adapter.base and not same_place(adapter.base, files.path):
        console.print(f"note       the adapter records another base, {adapter.base}; its shapes fit", markup=False)
    prompts = prompt_settings(files, tokenizer, template, add_bos)
    for problem in prompts.warnings:
        console.print(f"warning    {problem}", markup=False)
    prompter = prompts.prompter(columns, system)
    placed = placement(files, model.dtype, model.kind, model.merge_adapter, model.attention, mesh)
    trained_on = (getattr(adapter, "rounding", None) or "").partition("-")[0]
    if trained_on and placed.quantize != trained_on:
        console.print(
            f"note       the adapter was trained on weights in {trained_on}; here they are "
            f"{'as stored' if placed.quantize is None else f'in {placed.quantize}'} (--model.quantize {trained_on})",
            markup=False,
        )
    facts = {
        "model": str(base.path),
        "adapter": None if adapter is None else str(adapter.path),
        "dtype": placed.kept_in,
        "merge_adapter": placed.merge,
        "template": prompts.template,
        "add_bos": prompts.add_bos,
        "tokenizer": str(prompts.tokenizer.path),
    }
    return OpenModel(placed, prompts, prompter, facts)


def open_judge(
    path: str,
    model: InferenceModelConfig,
    opened: OpenModel,
    mesh: MeshConfig | None,
    batch_size: int,
    console: Console,
) -> Judge:
    """A reward model on the devices, as the judge of what another model writes.

    Args:
        path: of the reward model.
        model: how the other one computes: dtype and attention are taken from there.
        opened: the other one.
        batch_size: texts that are read together.

    Raises:
        UserError: it cannot be read, or has other tokens.
    """
    from jaxlm.inference.best_of import check_tokens
    from jaxlm.inference.loaded import LoadedModel
    from jaxlm.weights.names import num_params

    how = dataclasses.replace(model, path=path, adapter=None, merge_adapter=False, quantize=None, int8=False)
    judge = open_model(how, None, "auto", None, mesh, console)
    judge.spec.refuse_encoder("reward_model")
    check_tokens(opened.spec, judge.spec, opened.prompts.tokenizer, judge.prompts.tokenizer)
    with console.status("loading the reward model"):
        loaded = LoadedModel(judge.placed.place(judge.prompts), judge.prompter)
    console.print(f"judge      {path}, {num_params(judge.spec):,} parameters", markup=False)
    return loaded.judge(opened.spec, batch_size)


def model_settings(opened: OpenModel, batch_size: int) -> dict[str, Any]:
    """What decides a model's answers: its numbers, by hashes, and how it is asked. Paths may change."""
    from jaxlm.weights.fingerprint import base_fingerprint

    files = opened.placed.files
    adapter = None if files.adapter is None else base_fingerprint(files.base.config, files.adapter)
    asked = {key: opened.facts[key] for key in ("dtype", "merge_adapter", "template", "add_bos")}
    return {
        "weights (hash of samples)": base_fingerprint(files.base.config, files.base),
        "adapter (hash of samples)": adapter,
        **asked,
        "template (sha256)": template_hash(opened),
        "batch_size": batch_size,
    }


def template_hash(opened: OpenModel) -> str:
    """sha256 of the ids that a fixed question becomes in the model's template, and of a chat template's source."""
    ids = opened.prompter.question("What is a rock?")
    chat = opened.prompts.tokenizer.chat_template if opened.prompts.template == "chat" else None
    return hashlib.sha256(json.dumps([ids, chat]).encode()).hexdigest()


def _announce(
    placed: Placement,
    prompts: PromptSettings,
    prompter: Prompter,
    generator: Generator,
    seconds: float,
    verbose: bool,
    console: Console,
) -> None:
    """The start-up lines: which model, where it lies, how it is asked and how it computes."""
    import jax

    from jaxlm.devices.mesh import axis_sizes
    from jaxlm.inference.model import weight_bytes
    from jaxlm.kernels.backend import attention_details
    from jaxlm.units import memory_size
    from jaxlm.weights.names import num_params

    files, config = placed.files, placed.files.merged.config
    how = "merged" if placed.merge else "on the fly"
    lora = "" if files.adapter is None else f" + {files.adapter.path} ({how})"
    axes = ", ".join(f"{axis} {size}" for axis, size in axis_sizes(placed.mesh).items() if size > 1) or "1 device"
    size = memory_size(weight_bytes(generator.weights))
    console.print(f"model      {files.base.path}{lora}", markup=False)
    console.print(
        f"           {num_params(config):,} parameters, {size} in {placed.kept_in}, on {jax.default_backend()} "
        f"({axes}), loaded in {seconds:.1f} s; context {config.max_length:,} tokens",
        markup=False,
    )
    console.print(f"template   {prompts.template}: {prompts.reason}; {prompter.beginning}", markup=False)
    kernel = placed.attention.name == "pallas_tpu"
    while_generating = "a kernel that reads the slots in use" if kernel else "plain, over all of the cache"
    console.print(f"attention  {placed.attention_reason}; while writing: {while_generating}", markup=False)
    if verbose:
        console.print(f"           {attention_details(placed.attention, placed.shape)}", markup=False)
    if config.experts is not None:
        kind = f"{config.experts.num_experts}, router {config.experts.router}"
        console.print(f"experts    {kind}; {placed.decoder.experts}: {placed.experts_reason}", markup=False)
    if not generator.stop_ids:
        console.print("warning    neither model nor tokenizer names an end token: answers end at max_new_tokens only")
