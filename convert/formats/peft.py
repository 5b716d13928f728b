"""PEFT adapter directories: `adapter_config.json` with `adapter_model.safetensors` (or .bin)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.transforms.adapter_order import in_original_order
from convert.transforms.fused_adapter import as_stored
from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.jsonfields import checked
from jaxlm.jsontext import read_object
from jaxlm.models.adapters import (
    adapted_linears,
    as_one_adapter,
    fits,
    hf_linears,
    hf_names,
    in_hf_names,
    is_named,
    linears_of,
    places,
    resolve_lora,
    saveable,
    saved_modules,
    short_name,
)
from jaxlm.models.families import family_of
from jaxlm.models.families.base import Row
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import DecoderSpec
from jaxlm.tokenizer import find_tokenizer_files
from jaxlm.weights.files import read_tensors
from jaxlm.weights.hf import StackedTensors, copy_files, match_tensors, split_fused
from jaxlm.weights.leaves import AdapterSource
from jaxlm.weights.names import (
    PEFT_PREFIX,
    Entry,
    FusedEntry,
    adapter_shapes,
    fused_factors,
    grows,
    outside_layout,
    peft_entries,
)
from jaxlm.weights.native.read import of_another_base
from jaxlm.weights.output import Advance
from jaxlm.weights.safetensors import write_safetensors_file
from jaxlm.weights.tensors import Tensor, TensorSpec, same_bytes

# Keys of adapter_config.json that say nothing about what the adapter computes.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode", "layers_pattern",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "enable_lora", "merge_weights",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora", "modules_to_save", "bias", "fan_in_fan_out", "init_lora_weights",
}  # fmt: skip
_TEXTS = tuple[str, ...] | str | None
_TYPES: dict[str, Any] = {
    "r": int,
    "lora_dropout": float | None,
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "layers_to_transform": tuple[int, ...] | int | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
    "modules_to_save": tuple[str, ...] | None,
    "base_model_name_or_path": str | None,
}
# These initialisations also change the base model's weights, so such an adapter fits no published base.
_PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")


class PeftSource(StackedTensors):
    """A PEFT LoRA adapter for a base of the shape `config`.

    Raises:
        UserError: for another kind of adapter, an unsupported feature, or any tensor missing, unexpected or of another
            shape than the configuration says.
    """

    def __init__(self, path: Path, config: DecoderSpec) -> None:
        super().__init__()
        self.path = path
        self.config = config
        self.tokenizer_files = find_tokenizer_files(path)
        where = path / "adapter_config.json"
        peft_config = read_object(where)
        self.peft_config: dict[str, Any] | None = peft_config
        check_types(peft_config, where)
        weights = find_adapter_weights(path)
        tensors: dict[str, Tensor] = dict(read_tensors(weights))
        if not tensors:
            raise UserError(f"{weights}: holds no tensors; the adapter was saved empty, so save it again")
        self.base: str | None = peft_config.get("base_model_name_or_path")
        saved = _saved_modules(peft_config.get("modules_to_save"), config, where)
        tensors = _canonical_names(tensors, weights)
        saved = _saved_in_file(saved, tensors, config, weights)
        self.lora, self.layers = parse_config(peft_config, saved, config, where)
        specs = _resolved(config, self.lora, self.layers, where)
        entries = peft_entries(config, specs)
        if not any(entry.name in tensors for entry in entries):
            raise UserError(f"{weights}: holds none of the LoRA tensors, e.g. no {entries[0].name!r}; save it again")
        shapes = adapter_shapes(config, specs)
        for module in self.lora.modules_to_save:
            for entry in _saved_entries(module, tensors, config):
                entries.append(entry)
                shapes[entry.path] = entry.layout.shape
        _check_outside_layers(weights, tensors, config)
        try:
            for whole in fused_factors(config, specs):
                parts = [(part.name, rows) for part, rows in zip(whole.parts, whole.rows, strict=True)]
                if not split_fused(weights, tensors, whole.name, parts, whole.repeats):
                    raise UserError(f"{weights}: tensor {whole.name!r} is missing")
            match_tensors(weights, tensors, entries)
        except UserError as error:
            raise UserError(f"{error}; {of_another_base(self.base)}") from None
        self.add(weights, shapes, tensors, entries)


def find_adapter_weights(path: Path) -> Path:
    """adapter_model.safetensors, or .bin."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: has adapter_config.json but neither adapter_model.safetensors nor adapter_model.bin")


def parse_config(
    values: dict[str, Any], saved: tuple[str, ...], config: DecoderSpec, where: Path
) -> tuple[LoraConfig, tuple[int, ...] | None]:
    """The adapter and its layers (None: all) that an adapter_config.json describes."""
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {values.get('peft_type')!r}; only LORA adapters are read")
    for key in sorted(values.keys() - _READ - _IGNORED):
        if values[key]:
            raise UserError(f"{where}: {key} ({values[key]!r}) is not supported")
    if values.get("bias", "none") != "none":
        raise UserError(f"{where}: bias {values['bias']!r}; only adapters with bias 'none' are read")
    if values.get("fan_in_fan_out"):
        raise UserError(f"{where}: fan_in_fan_out is true; the model's layers are linear, so it must be false")
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INIT:
        raise UserError(
            f"{where}: init_lora_weights {init!r} changes the base model's weights too; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    check_types(values, where)
    rank, alpha = values.get("r"), values.get("lora_alpha", 8)
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: r is {rank!r}; the rank of an adapter is at least 1")
    checked(alpha, float, f"{where}: lora_alpha")
    targets, layers = _targets(values, config, where)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in values.get(key) or {}:
            if not places(hf_linears(config), pattern, fits, (0,)):
                raise UserError(f"{where}: {key}: {pattern!r} matches no linear layer ({hf_names(config)})")
    lora = LoraConfig(
        rank=rank,
        alpha=float(alpha),
        dropout=float(values.get("lora_dropout") or 0.0),
        targets=targets,
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern={key: float(value) for key, value in (values.get("alpha_pattern") or {}).items()},
        rslora=bool(values.get("use_rslora")),
        dora=bool(values.get("use_dora")),
        modules_to_save=saved,
    )
    return lora, layers


def check_types(values: dict[str, Any], where: Path) -> None:
    """Refuses values of an adapter_config.json that are of another type than PEFT writes, by name."""
    for key, kind in _TYPES.items():
        if key in values:
            checked(values[key], kind, f"{where}: {key}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in values.get(key) or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: {key}: {pattern!r} is not a regular expression ({error})") from None


def _matches(wanted: Any, module: str, where: Path) -> bool:
    # PEFT's rule: a string is a regular expression for the whole name, a list holds names or their last parts.
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, module) is not None
        except re.error as error:
            raise UserError(f"{where}: {wanted!r} is not a regular expression ({error})") from None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _targets(
    values: dict[str, Any], config: DecoderSpec, where: Path
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    wanted, excluded = values.get("target_modules"), values.get("exclude_modules") or []
    named = values.get("layers_to_transform")
    named = [named] if isinstance(named, int) else named or None  # an empty list means all, as in PEFT
    if not wanted:
        raise UserError(f"{where}: target_modules is {wanted!r}; name the layers, e.g. ['q_proj', 'v_proj']")
    linears = hf_linears(config)
    modules = {
        (name, layer): linear.hf_module.format(layer) for name, linear in linears.items() for layer in linear.layers
    }
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = list(modules.values())
    if isinstance(wanted, list):
        for name in wanted:
            if not any(_matches([name], module, where) for module in modules.values()):
                raise UserError(
                    f"{where}: target_modules names {name!r}, which is not a linear layer of the base model's "
                    f"{config.num_layers} layers ({hf_names(config)}); an adapter on another module has PEFT's "
                    "merge_and_unload fold it in: take the merged model"
                )
    numbers = {layer for _, layer in modules}
    for layer in named or []:
        if type(layer) is not int or layer not in numbers:
            raise UserError(f"{where}: layers_to_transform names {layer!r}; the base has {len(numbers)} layers")
    targeted = {
        key
        for key, module in modules.items()
        if _matches(wanted, module, where)
        and not _matches(excluded, module, where)
        and (named is None or key[1] in named)
    }
    if not targeted:
        raise UserError(f"{where}: target_modules {wanted!r} match no linear layer of the base model")
    layers = {layer for _, layer in targeted}
    having = {name: set(linear.layers) for name, linear in linears_of(config).items()}
    own = {name: {layer for layer in linear.layers if (name, layer) in targeted} for name, linear in linears.items()}
    # Encoder and decoder have linear layers of one name, which mean all of them.
    apart = {_short(name) for name in linears if own[name]} & {_short(name) for name in linears if not own[name]}
    if not apart and all(own[name] in (set(), layers & having[name]) for name in linears):
        names = dict.fromkeys(_short(name) for name in linears if own[name])
        return tuple(names), None if layers == numbers else tuple(sorted(layers))
    # Layers of their own for some of the linear layers: these are named one by one.
    targets: list[str] = []
    for name in linears:
        whole = own[name] == having[name] and _short(name) not in apart
        targets += [_short(name)] if whole else [modules[name, layer] for layer in sorted(own[name])]
    return tuple(targets), None


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _modules(config: DecoderSpec) -> dict[str, tuple[Row, ...]]:
    """What an adapter may save in full: a tied head too, which PEFT stores beside its embedding."""
    return saveable(dataclasses.replace(config, tied_head=False))


def _saved_modules(names: Any, config: DecoderSpec, where: Path) -> tuple[str, ...]:
    modules, saved = _modules(config), set[str]()
    for wanted in names or []:
        own = {name for name, rows in modules.items() if is_named(str(wanted), rows[0].hf_module)}
        if not own:
            supported = ", ".join(short_name(config, rows[0].hf_module, is_named) for rows in modules.values())
            raise UserError(f"{where}: modules_to_save names {wanted!r}; supported: {supported}")
        saved |= own
    return tuple(module for module in modules if module in saved)


def _canonical_names(tensors: dict[str, Tensor], weights: Path) -> dict[str, Tensor]:
    """Tensors by the names that PEFT writes today.

    Older versions wrote the wrapper's own name, and `.weight` behind DoRA's magnitudes. With save_embedding_layers PEFT
    writes a module saved in full under both names, and beside it the base's (`original_module`).
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if re.search(r"\.original_module(\.default)?\.(weight|bias)$", name):
            continue
        new = re.sub(r"\.modules_to_save(\.default)?\.(weight|bias)$", r".\2", name)
        new = re.sub(r"\.lora_magnitude_vector(\.default)?\.weight$", ".lora_magnitude_vector", new)
        if new in result and not same_bytes(result[new], tensor):
            raise UserError(
                f"{weights}: {name!r} and {result[new].name!r} are one tensor, but differ; save the adapter again, or "
                "remove the one that was not trained"
            )
        result.setdefault(new, tensor)
    return result


def _saved_in_file(
    saved: tuple[str, ...], tensors: dict[str, Tensor], config: DecoderSpec, weights: Path
) -> tuple[str, ...]:
    # PEFT stores resized embeddings even when modules_to_save does not name them.
    names = {module: f"{PEFT_PREFIX}{rows[0].hf}" for module, rows in _modules(config).items()}
    saved = tuple(module for module in names if module in saved or names[module] in tensors)
    if not config.tied_head or not {"embed_tokens", "lm_head"} & set(saved):
        return saved
    embedding, head = tensors.get(names["embed_tokens"]), tensors.get(names["lm_head"])
    if embedding is None or head is None or not same_bytes(embedding, head):
        raise UserError(
            f"{weights}: the base model ties its head to the embedding, but the adapter saves them apart (PEFT's "
            "ensure_weight_tying was off); untie the base first (tie_word_embeddings false, lm_head.weight stored)"
        )
    del tensors[names["lm_head"]]
    return tuple(module for module in saved if module != "lm_head")


def _saved_entries(module: str, tensors: Mapping[str, Tensor], config: DecoderSpec) -> Iterator[Entry]:
    for row in saveable(config)[module]:
        name, spec = f"{PEFT_PREFIX}{row.hf}", config
        if grows(row) and name in tensors and len(tensors[name].shape) == 2:
            spec = dataclasses.replace(config, vocab_size=tensors[name].shape[0])  # added tokens
        yield Entry(name, f"modules_to_save/{row.path}", None, outside_layout(spec, row))


def _check_outside_layers(weights: Path, tensors: Mapping[str, Tensor], config: DecoderSpec) -> None:
    """Refuses modules of layers that are saved in full."""
    rows = [row for row in family_of(config).rows if row.in_layer]
    inside = {f"{PEFT_PREFIX}{row.hf.format(number)}" for row in rows for number in range(config.total_layers)}
    for name in tensors:
        if name in inside:
            outside = (short_name(config, rows[0].hf_module, _is_saved) for rows in saveable(config).values())
            raise UserError(
                f"{weights}: saves {name!r} (PEFT takes 'norm' in modules_to_save for the layers' norms too); nothing "
                "in the layers can be saved in full, only the final norm and other modules outside of them: "
                f"{', '.join(outside)}"
            )


def _is_saved(wanted: str, module: str) -> bool:
    # PEFT's rule for modules_to_save: a bare 'norm' also means the layers' norms.
    return module.endswith(wanted)


def peft_config_for(source: AdapterSource, where: Path) -> dict[str, Any]:
    """The adapter_config.json of an adapter: the one it came with where that still holds, otherwise updated or new."""
    source = as_stored(source)
    lora = as_one_adapter(source.config, source.lora)
    lora = in_hf_names(source.config, lora, adapted_linears(source.config, lora, source.layers), source.layers)
    saved, tied = _saved_names(source.config, lora)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "exclude_modules": None,
        "layers_to_transform": None if source.layers is None else list(source.layers),
        "layers_pattern": None,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "modules_to_save": saved or None,
        "ensure_weight_tying": tied,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    original = source.peft_config
    if original is None:
        return values
    own = source.path / "jaxlm" / "adapter_config.json"
    where = own if own.is_file() else where
    parsed, layers = parse_config(original, lora.modules_to_save, source.config, where)
    same = _resolved(source.config, parsed, layers, where) == resolve_lora(source.config, lora, source.layers)
    return original if same else original | values


def _resolved(
    config: DecoderSpec, lora: LoraConfig, layers: tuple[int, ...] | None, where: Path
) -> dict[str, LoraSpec]:
    """`resolve_lora`; errors name the adapter_config.json."""
    try:
        return resolve_lora(config, lora, layers)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _saved_names(config: DecoderSpec, lora: LoraConfig) -> tuple[list[str], bool]:
    """PEFT's names of the modules saved in full, and whether there is a tied head among them."""
    modules = [
        module
        for wanted in lora.modules_to_save
        for module in saved_modules(config, dataclasses.replace(lora, modules_to_save=(wanted,)))
    ]
    if config.encoder is not None and "embed_tokens" in modules:
        name = _modules(config)["embed_tokens"][0].hf_module
        raise UserError(
            f"lora.modules_to_save: {name} is not what transformers computes with, but copies of it in encoder and "
            "decoder, so PEFT has no place for it; make one model of base and adapter (convert merge)"
        )
    tied = config.tied_head and "embed_tokens" in modules
    rows = [_modules(config)[module][0] for module in dict.fromkeys([*modules, "lm_head"] if tied else modules)]
    return [short_name(config, row.hf_module, _is_saved) for row in rows], tied


def _check_experts(source: AdapterSource) -> None:
    family = family_of(source.config)
    if family.experts is None or source.config.experts is None:
        return
    divided = {name for name, row in family.linears.items() if row.path.removesuffix("/kernel") in family.experts.names}
    targets = sorted(divided & set(source.lora.targets))
    if targets:
        raise UserError(
            f"{source.path}: its factors of {', '.join(targets)} are those of all experts of a layer together, but "
            f"{family.architecture} has each expert by itself; fold it into the model instead: convert merge BASE "
            f"{source.path} OUT"
        )


def peft_tensors(source: AdapterSource) -> list[TensorSpec]:
    """The tensors of an adapter as PEFT names and lays them out, neurons in the dense model's order.

    Raises:
        UserError: it is on linear layers of experts that the model's files, and so PEFT, hold each by itself.
    """
    _check_experts(source)
    source = as_stored(in_original_order(source))
    specs = resolve_lora(source.config, as_one_adapter(source.config, source.lora), source.layers)
    wholes = {part.name: whole for whole in fused_factors(source.config, specs) for part in whole.parts}
    tensors = []
    for entry in peft_entries(source.config, specs):
        dtype, whole = source.leaves[entry.path].dtype, wholes.get(entry.name)
        if whole is None:
            tensors.append(TensorSpec(entry.name, entry.layout.stored, dtype, _Factor(source, entry)))
        elif entry.name == whole.parts[0].name:
            tensors.append(TensorSpec(whole.name, whole.stored, dtype, _FusedFactor(source, whole)))
    for module, rows in saved_modules(source.config, source.lora).items():
        for row in rows:
            path = f"modules_to_save/{row.path}"
            leaf, names = source.leaves[path], [row.hf]
            if module == "embed_tokens" and source.config.tied_head:
                # PEFT stores a tied head beside its embedding.
                names.append(_modules(source.config)["lm_head"][0].hf)
            spec = dataclasses.replace(source.config, vocab_size=leaf.shape[0]) if grows(row) else source.config
            for name in names:
                entry = Entry(f"{PEFT_PREFIX}{name}", path, None, outside_layout(spec, row))
                tensors.append(TensorSpec(entry.name, entry.layout.stored, leaf.dtype, _Factor(source, entry)))
    return tensors


def write_peft(source: AdapterSource, directory: Path, advance: Advance) -> None:
    """Writes an adapter as a PEFT directory, in the dtype it is stored in."""
    config = peft_config_for(source, directory / "adapter_config.json")
    write_safetensors_file(directory / "adapter_model.safetensors", peft_tensors(source), advance)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    copy_files(source.tokenizer_files, directory)


class _Factor:
    """One tensor of the adapter, read when it is written; rows above the layer's own rank are dropped."""

    def __init__(self, source: AdapterSource, entry: Entry) -> None:
        self._source = source
        self._entry = entry

    def __iter__(self) -> Iterator[np.ndarray]:
        entry = self._entry
        inner = tuple(slice(0, size) for size in entry.layout.shape)
        if entry.layer is None:
            leaf = self._source.read(entry.path, inner)
        else:
            leaf = self._source.read(entry.path, (slice(entry.layer, entry.layer + 1), *inner))[0]
        yield entry.layout.to_stored(np.ascontiguousarray(leaf))


class _FusedFactor:
    """One tensor of the adapter that holds the factors of several linear layers, read when it is written."""

    def __init__(self, source: AdapterSource, whole: FusedEntry) -> None:
        self._source = source
        self._whole = whole

    def __iter__(self) -> Iterator[np.ndarray]:
        whole = self._whole
        parts = [
            np.concatenate(list(_Factor(self._source, part))).reshape(whole.repeats, rows, *whole.stored[1:])
            for part, rows in zip(whole.parts, whole.rows, strict=True)
        ]
        yield np.concatenate(parts, axis=1).reshape(whole.stored)
