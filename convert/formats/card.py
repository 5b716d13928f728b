"""The model card, README.md, of what a conversion writes: what is known of where a model comes from, and nothing else.

The head of the file is what the Hugging Face hub reads (https://huggingface.co/docs/hub/model-cards). A card that a
user wrote beside a model goes along with it as it is; nothing is ever written over one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from convert.formats.chat_template import TrainedTemplate
from jaxlm.config import LoraConfig, RunConfig
from jaxlm.config.files import load_run_yaml
from jaxlm.errors import UserError
from jaxlm.hub import is_address, read_address
from jaxlm.jsontext import read_object
from jaxlm.models.adapters import method_name
from jaxlm.models.families import family_of
from jaxlm.version import __version__
from jaxlm.weights.leaves import AdapterSource, ParamSource
from jaxlm.weights.names import num_params
from jaxlm.weights.native.layout import CHECKPOINTS, RUN_YAML, SMALL_FILES

FILE = "README.md"
MARK = "<!-- written by jaxlm -->"  # in every card that is not a user's
SCORES, SCORES_KEY = "scores.json", "jaxlm scores"
_LIBRARIES = {"hf": "transformers", "peft": "peft", "gguf": "gguf"}
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Args:
        base: the model that it was made of, as it is recorded; None: not known.
        run: the settings of its training; None: not known.
        license: of the base, as keys of a card's head; empty: not known.
        scores: figures of evaluations by task.
        name: of the run; None: there is none.
    """

    base: str | None = None
    run: RunConfig | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    name: str | None = None


def find_origin(source: ParamSource | AdapterSource) -> Origin:
    """What the files around a model or adapter say about where it comes from.

    Raises:
        UserError: one of them is damaged.
    """
    small = source.prompt_files[0].parent if source.prompt_files else source.path / SMALL_FILES
    recipe, run = small / RUN_YAML, None
    if recipe.is_file():
        run = load_run_yaml(recipe.read_text(encoding="utf-8"), str(recipe))
    base = None if run is None else run.model.path
    if base is None:
        base = getattr(source, "base", None)
    folder = small.parent
    if folder.parent.name == CHECKPOINTS:
        folder = folder.parents[1]
    # A merged model's own path is its base's.
    places = [Path(base)] if base is not None and not is_address(base) else []
    return Origin(
        base, run, read_license([*places, source.path]), find_scores(folder), None if run is None else folder.name
    )


def read_license(places: list[Path]) -> dict[str, str]:
    """The licence that the first model card says which has one; empty without."""
    for place in places:
        card = (place if place.is_dir() else place.parent) / FILE
        head = _head(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}
        if head.get("license"):
            return {key: str(head[key]) for key in _LICENSE_KEYS if head.get(key)}
    return {}


def _head(text: str) -> dict[str, Any]:
    """The YAML between --- at the beginning of a card; empty where there is none."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}  # somebody else's file, of which a line is wanted
    return values if isinstance(values, dict) else {}


def find_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of evaluations whose directories lie below a folder, by task.

    Raises:
        UserError: a scores.json is damaged.
    """
    scores = {}
    for depth in ("*", "*/*", "*/*/*"):
        for file in sorted(folder.glob(f"{depth}/{SCORES}")):
            content = read_object(file)
            if SCORES_KEY in content and isinstance(content.get("figures"), dict):
                scores[file.parent.relative_to(folder).as_posix()] = content["figures"]
    return scores


def write_card(
    source: ParamSource | AdapterSource,
    form: str,
    directory: Path,
    template: TrainedTemplate | None,
    is_as_it_came: bool,
) -> None:
    """Writes README.md, or takes along the one that a user wrote.

    Args:
        form: the format of what is in the directory.
        template: what the model was trained with, if it records that.
        is_as_it_came: the model is the source's, not one made of it, so that the source's card tells of it.

    Raises:
        UserError: a file that tells of the source is damaged.
    """
    card = directory / FILE
    if card.exists():
        return
    theirs = (source.path if source.path.is_dir() else source.path.parent) / FILE
    if is_as_it_came and theirs.is_file() and MARK not in theirs.read_text(encoding="utf-8", errors="replace"):
        shutil.copyfile(theirs, card)
        return
    origin = find_origin(source)
    if origin.base is None and not is_as_it_came:
        origin = replace(origin, base=str(source.path))
    card.write_text(card_text(source, form, origin, template), encoding="utf-8")


def card_text(source: ParamSource | AdapterSource, form: str, origin: Origin, template: TrainedTemplate | None) -> str:
    """A card's text."""
    run: RunConfig | None = origin.run
    lora: LoraConfig | None = getattr(source, "lora", None)  # an adapter's
    head: dict[str, Any] = {}
    base = None if origin.base is None else _hub_name(origin.base)
    if base is not None:
        head["base_model"] = base
    head |= origin.license
    if form in _LIBRARIES:
        head["library_name"] = _LIBRARIES[form]
    names = [_hub_name(each.path) for each in run.data.train] if run is not None else []
    datasets = sorted({each for each in names if each is not None})
    if datasets:
        head["datasets"] = datasets
    head["tags"] = ["jaxlm", *(["lora"] if lora is not None else [])]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        MARK,
        "",
        f"# {origin.name or family_of(source.config).architecture}",
        "",
    ]
    spec = source.config
    kind = "A LoRA adapter for" if lora is not None else "A model of"
    lines += [
        f"{kind} {family_of(spec).architecture}, {num_params(spec):,} parameters; written by jaxlm {__version__}."
    ]
    lines += ["", *_table(_facts(origin, template, lora))]
    if run is not None:
        lines += ["", "## Data", "", *_table(_data(run)), "", "## Training", "", *_table(_recipe(run))]
    if origin.scores:
        lines += ["", "## Scores", "", "| task | figure | value | standard error | records |", "|---|---|---|---|---|"]
        for task, figures in origin.scores.items():
            for figure, said in figures.items():
                values = (said.get(key) for key in ("value", "stderr", "n"))
                cells = ("" if value is None else f"{value:.6g}" for value in values)
                lines.append(f"| {task} | {figure} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(rows: Iterator[tuple[str, Any]]) -> list[str]:
    cells = ((name, str(value).replace("|", "\\|").replace("\n", " ")) for name, value in rows)
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]


def _hub_name(path: str) -> str | None:
    """owner/name of an address of the hub; None for a path."""
    try:
        return read_address(path, "path").repo if is_address(path) else None
    except UserError:
        return None  # an address that is none any more


def _shown(path: str) -> str:
    """A path as others may see it: the hub's names in full, of a machine's own the last part."""
    return path if is_address(path) else Path(path).name


def _facts(origin: Origin, template: TrainedTemplate | None, lora: LoraConfig | None) -> Iterator[tuple[str, Any]]:
    yield "base", "not recorded" if origin.base is None else _shown(origin.base)
    said = origin.license.get("license_name") or origin.license.get("license")
    yield "licence of the base", said or "not known here; see the base"
    if template is not None:
        yield "prompt template", "the tokenizer's own" if template.own else _shown(template.name)
    if lora is not None:
        yield "adapter", f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"
        if lora.modules_to_save:
            yield "saved in full", ", ".join(lora.modules_to_save)


def _data(run: RunConfig) -> Iterator[tuple[str, Any]]:
    for source in run.data.train:
        weight = "" if source.weight == 1 else f", weight {source.weight:g}"
        yield _shown(source.path), f"template {_shown(source.template)}{weight}"
    if not run.data.train:
        yield "training data", "not recorded"


def _recipe(run: RunConfig) -> Iterator[tuple[str, Any]]:
    if run.lora is None:
        yield "method", f"all parameters, {run.objective}"
    else:
        yield "method", f"{method_name(run.lora)}, rank {run.lora.rank}, alpha {run.lora.alpha:g}, {run.objective}"
    optimizer, train = run.optimizer, run.train
    yield "optimizer", f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}"
    warmup = optimizer.warmup_steps or (f"{optimizer.warmup_ratio:.3g} of all" if optimizer.warmup_ratio else 0)
    yield "warm-up steps, weight decay", f"{warmup}, {optimizer.weight_decay:g}"
    yield "length", f"{train.epochs:g} epochs" if train.steps is None else f"{train.steps} steps"
    yield "rows of a step, tokens of a row", f"{train.global_batch_size}, {run.data.sequence_length}"
    yield "seed", train.seed
