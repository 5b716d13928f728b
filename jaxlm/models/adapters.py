"""Which linear layers of a model carry an adapter, at which rank and scale. No JAX here.

A linear layer goes by two names: jaxlm's ('o_proj', of its leaf) and the one that its module has in Hugging Face's
implementation of the family ('out_proj', 'dense'). PEFT knows the second, and by PEFT's rule: in full or by its last
parts. Either may stand in a configuration. Layers that a family's files keep as one ('query_key_value') are one linear
layer to PEFT: its adapter is a first factor that they share, and a second one of which each has its rows. jaxlm can
adapt them one by one too.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.models.families import FAMILIES, family_of
from jaxlm.models.families.base import Family, Fused, Row
from jaxlm.nn.lora import FUSED, LoraSpec
from jaxlm.spec import ENCODER, DecoderSpec

ALL = "all-linear"  # every linear layer of the model's layers, as in PEFT


@dataclasses.dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer that can carry an adapter.

    Args:
        name: jaxlm's: 'q_proj'; 'qkv_proj' for layers that are stored as one.
        rows: of its matrix, or of the matrices that are stored as one.
        layers: numbers of the layers that have it.
        hf_layers: those of them in which it is a linear layer to Hugging Face's implementation: not a part of one, and
            not experts that are matrices of their own there.
        fused: how the matrices are stored as one; None where there is one.
        part_of: the linear layer that it is stored in, or empty.
    """

    name: str
    rows: tuple[Row, ...]
    layers: tuple[int, ...]
    hf_layers: tuple[int, ...]
    fused: Fused | None = None
    part_of: str = ""

    @property
    def path(self) -> str:
        """Where its leaves are, below the layer's stack: 'self_attn/q_proj'; an encoder's begin with 'encoder/'."""
        return f"{self.rows[0].path.rpartition('/')[0].rpartition('/')[0]}/{self.name.rpartition('/')[2]}"

    @property
    def feed_forward(self) -> bool:
        """Whether it belongs to a feed-forward layer."""
        return self.path.startswith("mlp/")

    @property
    def hf_module(self) -> str:
        """Hugging Face's name, with '{}' for the number of the layer; for a part what it is called by itself."""
        return self.rows[0].hf_module if self.fused is None else _module(self.fused)

    def names(self, layer: int) -> tuple[str, str]:
        """Hugging Face's name in a layer, and jaxlm's."""
        part, path = (ENCODER, self.path.removeprefix(ENCODER)) if self.rows[0].in_encoder else ("", self.path)
        return self.hf_module.format(layer), f"{part}layers/{layer}/{path}".replace("/", ".")


def linears_of(model: DecoderSpec) -> dict[str, AdaptedLinear]:
    """Every linear layer of a model by jaxlm's name; those stored as one come before their parts."""
    family, linears = family_of(model), dict[str, AdaptedLinear]()
    fused = _fused_linears(family)
    for row in (row for row in family.rows if row.linear):
        layers = _layers_with(model, (row,))
        whole = fused.get(row.path)
        together: tuple[int, ...] = ()
        if whole is not None:
            rows = tuple(family.linears[path.split("/")[-2]] for path in whole[1].paths)
            together = _layers_with(model, rows)
            if together:
                linears.setdefault(whole[0], AdaptedLinear(whole[0], rows, together, together, whole[1]))
        assert not together or together == layers, f"{row.path}: stored by itself in some layers only"
        if whole is not None and together:
            linears[row.linear] = AdaptedLinear(row.linear, (row,), layers, (), part_of=whole[0])
        elif layers:
            linears[row.linear] = AdaptedLinear(row.linear, (row,), layers, _outside_experts(model, row, layers))
    return linears


def _outside_experts(model: DecoderSpec, row: Row, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the layers in which the family's files have a matrix as it is, and not one for each expert."""
    experts = family_of(model).experts
    if experts is None or row.path.removesuffix("/kernel") not in experts.names:
        return layers
    return tuple(number for number in layers if model.layer(number).feed_forward.experts is None)


def _fused_linears(family: Family) -> dict[str, tuple[str, Fused]]:
    """Path of a matrix -> the name of the linear layer that it is stored in, and how."""
    names = {frozenset(parts): name for name, parts in FUSED.items()}
    return {
        path: (names[frozenset(each.split("/")[-2] for each in fused.paths)], fused)
        for fused in family.fused
        if all(path.endswith("/kernel") for path in fused.paths)
        for path in fused.paths
    }


def _layers_with(model: DecoderSpec, rows: tuple[Row, ...]) -> tuple[int, ...]:
    """Numbers of the layers that have all of these tensors."""
    part = model.part(rows[0].in_encoder)
    kinds = [all(row.when(model, layer) for row in rows) for layer in part.period]
    return tuple(number for number in range(part.num_layers) if kinds[number % len(kinds)])


def hf_linears(model: DecoderSpec) -> dict[str, AdaptedLinear]:
    """Those that Hugging Face's implementation has, which are the ones that PEFT can adapt."""
    linears = linears_of(model).items()
    return {name: dataclasses.replace(each, layers=each.hf_layers) for name, each in linears if each.hf_layers}


def hf_names(model: DecoderSpec) -> str:
    """What Hugging Face's implementation calls a model's linear layers, for messages."""
    return ", ".join(dict.fromkeys(_last(linear.hf_module) for linear in hf_linears(model).values()))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _module(fused: Fused) -> str:
    return fused.hf.rpartition(".")[0]


def method_name(lora: LoraConfig) -> str:
    """What a run's first lines, exports and cards call it."""
    return "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA"


def check_names(lora: LoraConfig) -> None:
    """Whether an adapter names layers and modules that there are in any family; needs no model.

    Raises:
        UserError: for an unknown target or module, or a pattern that is not a regular expression.
    """
    linears, saved = dict[str, None](), set[str]()
    for family in FAMILIES.values():
        fused = _fused_linears(family).values()
        matrices = [row for row in family.rows if row.linear]
        linears |= dict.fromkeys([*(row.linear.rpartition("/")[2] for row in matrices), *(name for name, _ in fused)])
        modules = [*(row.hf_module for row in matrices), *(_module(each) for _, each in fused)]
        linears |= dict.fromkeys(map(_last, modules))
        outside = [row for row in family.rows if not row.in_layer]
        saved |= {_saved_name(row) for row in outside} | {_last(row.hf_module) for row in outside}
    for target in lora.targets:
        if target != ALL and _last(target) not in linears:
            if _last(target) in saved:
                raise UserError(
                    f"lora.targets: {target!r} is not a linear layer of the model's layers, which take adapters; "
                    f"to train it in full: lora.modules_to_save: [{target}]"
                )
            raise _unknown_target(target, ", ".join(linears), linears)
    for module in lora.modules_to_save:
        if _last(module) not in saved:
            raise UserError(f"lora.modules_to_save: {module!r} is not one of {', '.join(sorted(saved))}")
    _check_patterns(lora)


def _check_patterns(lora: LoraConfig) -> None:
    if not lora.targets:
        raise UserError("lora.targets is empty: name at least one linear layer, e.g. [q_proj, v_proj]")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            try:
                re.compile(rf"(.*\.)?({pattern})")
            except re.error as error:
                raise UserError(f"lora.{key}: {pattern!r} is not a regular expression: {error}") from None


def _unknown_target(target: str, there_are: str, names: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(target, list(names), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"lora.targets: {target!r} is not a linear layer of the model ({there_are}){hint}")


# ---- which layers


def is_named(wanted: str, module: str) -> bool:
    """PEFT's rule for a name in a list: the module's name in full, or its last parts."""
    return module == wanted or module.endswith(f".{wanted}")


def fits(pattern: str, module: str) -> bool:
    """PEFT's rule for a key of rank_pattern and alpha_pattern: a regular expression for the last parts of the name."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


Place = tuple[str, int]  # a linear layer by jaxlm's name, and the number of the layer


def places(
    linears: Mapping[str, AdaptedLinear], wanted: str, rule: Callable[[str, str], bool], names: Sequence[int] = (0, 1)
) -> set[Place]:
    """What a name or a pattern means: by Hugging Face's names or, where it is none of these, by jaxlm's.

    Args:
        names: indices of `AdaptedLinear.names` that are looked at, in turn.
    """
    for kind in names:
        found = {
            (name, layer)
            for name, linear in linears.items()
            for layer in linear.layers
            if rule(wanted, linear.names(layer)[kind])
        }
        if found:
            return found
    return set()


def targeted(model: DecoderSpec, lora: LoraConfig) -> set[Place]:
    """Where `lora.targets` puts an adapter.

    Raises:
        UserError: for a target that the model does not have, or that is a part of another one.
    """
    linears, result = linears_of(model), set[Place]()
    for target in lora.targets:
        if target == ALL:
            own = {(name, layer) for name, linear in hf_linears(model).items() for layer in linear.layers}
        else:
            own = places(linears, target, is_named)
        if not own:
            known = [name for linear in linears.values() for name in (_last(linear.hf_module), linear.name)]
            raise _unknown_target(target, hf_names(model), known)
        result |= own
    names = {name for name, _ in result}
    for name in sorted(names):
        whole = linears[name].part_of
        if whole in names:
            raise UserError(
                f"lora.targets: {name} is a part of {_last(linears[whole].hf_module)}, which is targeted too; name one"
            )
    return result


# ---- ranks and scales


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The adapter of a linear layer over all L layers.

    Args:
        ranks, alphas: [L]; 0 where a layer carries none.
    """

    linear: AdaptedLinear
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    def scales(self, rslora: bool) -> tuple[float, ...]:
        """What each layer's product of factors is multiplied with, [L]."""
        pairs = zip(self.ranks, self.alphas, strict=True)
        return tuple(alpha / (math.sqrt(rank) if rslora else rank) if rank else 0.0 for rank, alpha in pairs)


def adapted_linears(model: DecoderSpec, lora: LoraConfig, layers: tuple[int, ...] | None = None) -> dict[str, Adapted]:
    """The linear layers that carry an adapter, by jaxlm's name, with PEFT's rank and alpha patterns applied.

    Args:
        model: the base model's shape.
        lora: what the user asked for.
        layers: only these layers carry an adapter (PEFT's layers_to_transform); None means all.

    Raises:
        UserError: for an unknown target, a pattern that matches nothing, or a rank below 1.
    """
    _check_patterns(lora)
    saved_modules(model, lora)
    lora = as_one_adapter(model, lora)
    carrying, linears = targeted(model, lora), linears_of(model)
    if layers is not None:
        carrying = {place for place in carrying if place[1] in layers}
    patterns = {
        key: {pattern: places(linears, pattern, fits) & carrying for pattern in getattr(lora, key)}
        for key in ("rank_pattern", "alpha_pattern")
    }
    unused = sorted(key for found in patterns.values() for key, where in found.items() if not where)
    if unused:
        raise UserError(f"lora.rank_pattern / alpha_pattern: {', '.join(unused)} match no targeted layer")

    def value(key: str, place: Place, default: float) -> float:
        return next((getattr(lora, key)[name] for name, where in patterns[key].items() if place in where), default)

    result = {}
    for name, linear in linears.items():
        count = model.part(linear.rows[0].in_encoder).num_layers
        ranks, alphas = [0] * count, [0.0] * count
        for number in range(count):
            if (name, number) in carrying:
                ranks[number] = int(value("rank_pattern", (name, number), lora.rank))
                alphas[number] = value("alpha_pattern", (name, number), lora.alpha)
                if ranks[number] < 1:
                    module = linear.hf_module.format(number)
                    raise UserError(f"lora.rank: {ranks[number]} for {module}; a rank is at least 1")
        if any(ranks):
            result[name] = Adapted(linear, tuple(ranks), tuple(alphas))
    return result


def resolve_lora(model: DecoderSpec, lora: LoraConfig, layers: tuple[int, ...] | None = None) -> dict[str, LoraSpec]:
    """The adapter of each targeted linear ('q_proj', ...); arguments and errors as those of `adapted_linears`."""
    experts = model.experts.num_experts if lora.per_expert and model.experts is not None else 1
    specs = {}
    for name, adapted in adapted_linears(model, lora, layers).items():
        of_experts = experts if adapted.linear.feed_forward else 1
        specs[name] = LoraSpec(adapted.ranks, adapted.scales(lora.rslora), lora.dropout, lora.dora, of_experts)
    return specs


def in_hf_names(
    model: DecoderSpec, lora: LoraConfig, adapted: Mapping[str, Adapted], layers: tuple[int, ...] | None
) -> LoraConfig:
    """The same adapter in names that PEFT reads so: as it is written, where that says the same there.

    Args:
        adapted: what `lora` comes to; no parts of linear layers that are stored as one.
        layers: as for `adapted_linears`.

    Raises:
        UserError: it adapts experts, which are not linear layers to PEFT.
    """
    hf, every = hf_linears(model), linears_of(model)
    carrying = {(name, n) for name, each in adapted.items() for n, rank in enumerate(each.ranks) if rank}
    for name, n in sorted(carrying):
        if n not in every[name].hf_layers:
            raise UserError(
                f"lora.targets: {name} of layer {n} belongs to experts, which are not linear layers in transformers, "
                "so PEFT has no adapter of them; make one model of base and adapter (convert merge)"
            )

    def same(wanted: str, rule: Callable[[str, str], bool]) -> bool:
        # In a list it is a name to PEFT, and by itself also means linear layers outside of the layers.
        return wanted != ALL and places(hf, wanted, rule, (0,)) & carrying == places(every, wanted, rule) & carrying

    patterns = (*lora.rank_pattern, *lora.alpha_pattern)
    if model.encoder is not None:
        lora = dataclasses.replace(lora, targets=tuple(_hf_word(target, hf, every) for target in lora.targets))
    if all(same(target, is_named) for target in lora.targets) and all(same(pattern, fits) for pattern in patterns):
        return lora
    return in_full(model, lora, adapted, layers)


def _hf_word(target: str, hf: Mapping[str, AdaptedLinear], every: Mapping[str, AdaptedLinear]) -> str:
    """The last part of Hugging Face's names that means what a target means, which encoder and decoder may both have."""
    meant = places(every, target, is_named)
    words = {_last(every[name].hf_module) for name, _ in meant}
    return next((word for word in words if places(hf, word, is_named, (0,)) == meant), target)


def in_full(
    model: DecoderSpec, lora: LoraConfig, adapted: Mapping[str, Adapted], layers: tuple[int, ...] | None
) -> LoraConfig:
    """The targets and patterns of adapters, written out in Hugging Face's names; arguments as for `in_hf_names`."""
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for each in adapted.values():
        own = {n for n, rank in enumerate(each.ranks) if rank}
        targets += _names_for_peft(
            model, each.linear, own, {n for n in each.linear.layers if layers is None or n in layers}
        )
        for n in sorted(own):
            having = {m for m in own if (each.ranks[m], each.alphas[m]) == (each.ranks[n], each.alphas[n])}
            names = _names_for_peft(model, each.linear, having, own)
            ranks |= dict.fromkeys(names, each.ranks[n]) if each.ranks[n] != lora.rank else {}
            alphas |= dict.fromkeys(names, each.alphas[n]) if each.alphas[n] != lora.alpha else {}
    return dataclasses.replace(lora, targets=tuple(targets), rank_pattern=ranks, alpha_pattern=alphas)


def _names_for_peft(model: DecoderSpec, linear: AdaptedLinear, layers: set[int], of: set[int]) -> tuple[str, ...]:
    """The last parts of its name for all layers `of` that are in question; else each layer's in full."""
    short = short_name(model, linear.hf_module, is_named)
    if layers == of and "{}" not in short:
        return (short,)
    return tuple(linear.hf_module.format(n) for n in sorted(layers))


def short_name(model: DecoderSpec, module: str, rule: Callable[[str, str], bool]) -> str:
    """As few last parts of a module's name as mean no other module of the model.

    Args:
        rule: whether a name means a module.
    """
    rows = family_of(model).rows
    others = {name.format(0) for name in (row.hf_module for row in rows) if name != module}
    words = module.split(".")
    return next(
        (
            name
            for count in range(1, len(words))
            if "{}" not in (name := ".".join(words[-count:])) and not any(rule(name, other) for other in others)
        ),
        module,
    )


def as_one_adapter(model: DecoderSpec, lora: LoraConfig) -> LoraConfig:
    """The same adapter without `per_expert`.

    Adapters of E experts are one of E times the rank, whose factor on the neurons' side is zero between the ranks of
    one expert and the neurons of another.

    Raises:
        UserError: for a dense model, no feed-forward target, or patterns, which could not be told from these.
    """
    if not lora.per_expert:
        return lora
    linears = linears_of(model)
    targets = list(dict.fromkeys(name for name, _ in sorted(targeted(model, lora)) if linears[name].feed_forward))
    if model.experts is None:
        raise UserError("lora.per_expert: the model is not divided into experts; `convert moefy` does that")
    if not targets:
        named = [_last(linear.hf_module) for linear in hf_linears(model).values() if linear.feed_forward]
        raise UserError(f"lora.per_expert: lora.targets has none of {', '.join(named)}")
    if lora.rank_pattern or lora.alpha_pattern:
        raise UserError("lora.per_expert: cannot be had together with rank_pattern or alpha_pattern")
    experts = model.experts.num_experts
    alpha = lora.alpha * (math.sqrt(experts) if lora.rslora else experts)
    return dataclasses.replace(
        lora,
        per_expert=False,
        rank_pattern=dict.fromkeys(targets, experts * lora.rank),
        alpha_pattern=dict.fromkeys(targets, alpha),
    )


# ---- modules saved in full


def saveable(model: DecoderSpec) -> dict[str, tuple[Row, ...]]:
    """What PEFT's modules_to_save may name: the modules outside of the layers, by jaxlm's name, with their tensors."""
    modules: dict[str, tuple[Row, ...]] = {}
    for row in sorted((row for row in family_of(model).rows if not row.in_layer), key=lambda row: row.path):
        if row.when(model, model.part(row.in_encoder).period[0]):
            name = _saved_name(row)
            modules[name] = (*modules.get(name, ()), row)
    return modules


def _saved_name(row: Row) -> str:
    return row.path.rpartition("/")[0]


def saved_modules(model: DecoderSpec, lora: LoraConfig) -> dict[str, tuple[Row, ...]]:
    """Those of `saveable` that `lora.modules_to_save` names, by jaxlm's names or by Hugging Face's.

    Raises:
        UserError: for one that the model does not have, or does not have by itself.
    """
    modules, named = saveable(model), set[str]()
    for wanted in lora.modules_to_save:
        own = {name for name, rows in modules.items() if is_named(wanted, rows[0].hf_module)}
        if not own and wanted in modules:
            own = {wanted}
        if not own and model.tied_head and _last(wanted) == "lm_head":
            raise UserError("lora.modules_to_save: lm_head is tied to embed_tokens in this model; name embed_tokens")
        if not own:
            known = dict.fromkeys(name for own, rows in modules.items() for name in (own, _last(rows[0].hf_module)))
            raise UserError(f"lora.modules_to_save: {wanted!r} is not one of {', '.join(known)}")
        named |= own
    return {name: rows for name, rows in modules.items() if name in named}
