"""Several adapters on one base: a fixed number of places for them in every linear layer, filled and freed by name.

The places are part of the weights' shapes, so no program is compiled anew when an adapter comes or goes. An adapter
that is dropped keeps its place until the last answer that uses it has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxlm.devices.finite import check_finite
from jaxlm.devices.mesh import tree_shardings
from jaxlm.errors import UserError
from jaxlm.inference.model import load_adapter
from jaxlm.inference.paged.followers import Orders, packed, unpacked
from jaxlm.inference.rows import DeviceModel
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder, abstract_layer
from jaxlm.nn.feed_forward import LINEARS
from jaxlm.nn.linear import BANK, AdapterBank, dora_ratio, is_bank
from jaxlm.nn.lora import FUSED, LoraSpec
from jaxlm.sharding import WHOLE_IF_UNEVEN
from jaxlm.weights.leaves import AdapterSource

Opener = Callable[[Path], AdapterSource]


@dataclasses.dataclass(frozen=True)
class Places:
    """What there is room for.

    Args:
        count: A, adapters at once.
        rank: R, the largest rank.
        targets: jaxlm's names of the linear layers that may be adapted; parts of those that are stored as one.
        dora: whether adapters may be DoRA's.
    """

    count: int
    rank: int
    targets: tuple[str, ...]
    dora: bool

    @classmethod
    def holding(cls, decoder: Decoder, adapters: Mapping[str, AdapterSource], count: int | None = None) -> Places:
        """Room for these, by name, and for others of their kind.

        Args:
            count: the number of adapters at once; None: as many as these.

        Raises:
            UserError: one of them cannot be served beside others.
        """
        specs = {name: _specs(decoder, name, adapter) for name, adapter in adapters.items()}
        every = [spec for own in specs.values() for spec in own.values()]
        targets = sorted({part for own in specs.values() for target in own for part in FUSED.get(target, (target,))})
        return cls(
            max(len(adapters), count or 0, 1),
            max((spec.rank for spec in every), default=1),
            tuple(targets),
            any(spec.dora for spec in every),
        )


def _specs(decoder: Decoder, name: str, adapter: AdapterSource) -> dict[str, LoraSpec]:
    """The adapter of each linear layer, refused where tokens of different adapters could not be computed together."""
    if adapter.lora.modules_to_save:
        raise UserError(
            f"adapter {name}: it has whole modules of its own ({', '.join(adapter.lora.modules_to_save)}), which "
            "cannot share a base with other adapters; serve it by itself, as the model"
        )
    specs = resolve_lora(decoder.spec, adapter.lora, adapter.layers)
    of_experts = sorted(set(specs) & {*LINEARS, "gate_up_proj"}) if decoder.spec.experts is not None else []
    if of_experts:
        raise UserError(
            f"adapter {name}: it adapts experts ({', '.join(of_experts)}), which several adapters at once cannot; "
            "serve it by itself, as the model"
        )
    return specs


@dataclasses.dataclass
class _Loaded:
    """An adapter in a place. `number` is its own, never used again; `users` counts the answers under way."""

    place: int
    number: int
    users: int = 0
    dropped: bool = False


class Adapters:
    """The adapters of a served model; every method may be called from any thread.

    Args:
        model: the base, without an adapter of its own; its weights are given the places.
        places: room for how many, and of which kind.

    Raises:
        UserError: the model has an encoder or an adapter of its own.
    """

    def __init__(self, model: DeviceModel, places: Places) -> None:
        model.decoder.spec.refuse_encoder("serving several adapters")
        if model.decoder.adapters:
            raise UserError("adapters: the model has an adapter of its own; name its base as the model, or merge it")
        self.places, self._model = places, model
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._loaded: dict[str, _Loaded] = {}
        self._leaving: list[_Loaded] = []
        self._count = 0
        self._orders: Orders | None = None
        boxed = abstract_banks(model.decoder, places)
        model.weights = {**model.weights, "lora": [_zeros(layer, model.mesh) for layer in boxed]}

    @property
    def names(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._loaded)

    def lead(self, orders: Orders) -> None:
        """Process 0: what is loaded from now on, the other processes of the server load too (see `acts`)."""
        self._orders = orders

    def acts(self, open: Opener, orders: Orders) -> dict[str, Callable[..., None]]:
        """The other processes' part in loading, by the names of the orders: whether they can, then the act."""
        sources: dict[str, AdapterSource] = {}

        def see(content: np.ndarray) -> None:
            name, path, _ = unpacked(content)
            try:
                sources[name] = open(Path(path))
                self._check(name, _specs(self._model.decoder, name, sources[name]))
                orders.answer("adapter/see")
            except (UserError, OSError) as error:
                orders.answer("adapter/see", str(error))

        def put(content: np.ndarray) -> None:
            name, _, place = unpacked(content)
            # What is wrong with the numbers, all processes find; process 0 says it.
            with contextlib.suppress(UserError):
                self._put(name, sources.pop(name), place)

        return {"adapter/see": see, "adapter/put": put}

    def load(self, name: str, adapter: AdapterSource) -> None:
        """Reads an adapter into a free place.

        Raises:
            UserError: no place is free, the name is taken, or the adapter does not fit the places or is damaged.
        """
        specs = _specs(self._model.decoder, name, adapter)
        self._check(name, specs)
        with self._loading:
            self._load(name, adapter)

    def _load(self, name: str, adapter: AdapterSource) -> None:
        with self._lock:
            if name in self._loaded:
                raise UserError(f"adapter {name}: there is one of that name; drop it first")
            taken = {each.place for each in (*self._loaded.values(), *self._leaving)}
            free = sorted(set(range(self.places.count)) - taken)
            if not free:
                raise UserError(
                    f"adapter {name}: all {self.places.count} places are taken (by {', '.join(self._loaded)}); drop "
                    "one, or start with more places"
                )
            self._count += 1
            loaded = _Loaded(free[0], self._count)
            self._leaving.append(loaded)  # its place is taken, but no query finds it yet
        try:
            put = partial(self._put, name, adapter, loaded.place)
            if self._orders is None:
                put()
            else:
                words = [packed([name, str(Path(adapter.path).absolute()), loaded.place])]
                self._orders.ask("adapter/see", words)
                self._orders.lead("adapter/put", words, put)
        except BaseException:
            with self._lock:
                self._leaving.remove(loaded)
            raise
        with self._lock:
            self._leaving.remove(loaded)
            self._loaded[name] = loaded

    def _put(self, name: str, adapter: AdapterSource, place: int) -> None:
        """Reads an adapter into a place of the weights."""
        banks = self._with(name, adapter, _specs(self._model.decoder, name, adapter), place)
        with self._lock:
            self._model.weights = {**self._model.weights, "lora": banks}

    def drop(self, name: str) -> None:
        """Takes an adapter away; answers under way end with it.

        Raises:
            UserError: there is none of that name.
        """
        with self._lock:
            loaded = self._find(name)
            del self._loaded[name]
            loaded.dropped = True
            if loaded.users:
                self._leaving.append(loaded)

    def acquire(self, name: str | None) -> tuple[int, int]:
        """Takes an adapter for an answer, which keeps it in its place until `release`.

        Returns:
            What its tokens choose (`AdapterBank.chosen`), and a number of this very adapter: keys and values are shared
            between texts of the same number only. Both are 0 for the base.

        Raises:
            UserError: there is none of that name.
        """
        if name is None:
            return 0, 0
        with self._lock:
            loaded = self._find(name)
            loaded.users += 1
            return loaded.place + 1, loaded.number

    def release(self, number: int) -> None:
        """Gives back what `acquire` gave under this number."""
        if number == 0:
            return
        with self._lock:
            loaded = next(each for each in (*self._loaded.values(), *self._leaving) if each.number == number)
            loaded.users -= 1
            if loaded.dropped and not loaded.users:
                self._leaving.remove(loaded)

    def _find(self, name: str) -> _Loaded:
        if name not in self._loaded:
            there = ", ".join(self._loaded) or "none"
            raise UserError(f"adapter {name!r} is not loaded; there are: {there}")
        return self._loaded[name]

    def _check(self, name: str, specs: Mapping[str, LoraSpec]) -> None:
        """Whether an adapter fits the places."""
        targets = {part for target in specs for part in FUSED.get(target, (target,))}
        missing = sorted(targets - set(self.places.targets))
        if missing:
            raise UserError(
                f"adapter {name}: it adapts {', '.join(missing)}, there is room in {', '.join(self.places.targets)}; "
                "name an adapter of these layers at the start"
            )
        rank = max(spec.rank for spec in specs.values())
        if rank > self.places.rank:
            raise UserError(
                f"adapter {name}: rank {rank}, there is room for {self.places.rank}; name an adapter of that rank at "
                "the start"
            )
        if any(spec.dora for spec in specs.values()) and not self.places.dora:
            raise UserError(f"adapter {name}: is DoRA, for which there is no room; name a DoRA adapter at the start")

    def _with(self, name: str, adapter: AdapterSource, specs: Mapping[str, LoraSpec], place: int) -> list[Any]:
        """The layers' banks with an adapter in a place."""
        model = self._model
        layers = load_adapter(model.decoder.clone(adapters=dict(specs)), model.mesh, adapter)
        check_finite({"layers": layers}, model.mesh, f"adapter {name}: {adapter.path}", "the file is damaged")
        banks = []
        for number, (old, factors) in enumerate(zip(model.weights["lora"], layers, strict=True)):
            params, new = model.weights["params"]["layers"][number], {}
            for path, bank in traverse_util.flatten_dict(old, is_leaf=lambda _, leaf: is_bank(leaf), sep="/").items():
                linear = path.removesuffix(f"/{BANK}")
                kernel = _at(params, linear)["kernel"] if self.places.dora else None
                filled = _filled(bank, place, kernel, *_factors(specs, factors, linear, number))
                # Compiled programs take the shards that they were compiled for.
                new[path] = jax.tree.map(lambda leaf, old: jax.device_put(leaf, old.sharding), filled, bank)
            banks.append(traverse_util.unflatten_dict(new, sep="/"))
        return banks


def _factors(
    specs: Mapping[str, LoraSpec], factors: Mapping[str, Any], linear: str, number: int
) -> tuple[float, jax.Array | None, jax.Array | None, jax.Array | None]:
    """Scale, A, B and magnitude of a linear layer ('self_attn/q_proj') of layer `number`; None where there is none."""
    parent, _, target = linear.rpartition("/")
    shared = next((name for name, parts in FUSED.items() if target in parts and name in specs), None)
    entry = shared or target
    if entry not in specs or not specs[entry].ranks[number]:
        return 0.0, None, None, None
    own = _at(factors, linear)
    first = own if shared is None else _at(factors, f"{parent}/{shared}")
    return specs[entry].scales[number], first["lora_A"], own["lora_B"], own.get("magnitude")


def _at(tree: Mapping[str, Any], path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


@partial(jax.jit, static_argnums=1)
def _filled(
    bank: AdapterBank,
    place: int,
    kernel: Any,
    scale: float,
    a: jax.Array | None,
    b: jax.Array | None,
    magnitude: jax.Array | None,
) -> AdapterBank:
    """A bank with the factors a [*in, r], b [r, *out] of an adapter in a place, or with nothing there."""
    ratio = bank.ratio
    if a is None or b is None:
        if ratio is not None:
            ratio = ratio.at[place].set(1.0)
        return AdapterBank(bank.a.at[..., place, :].set(0), bank.b.at[place].set(0), ratio)
    if ratio is not None:
        ratio = ratio.at[place].set(1.0 if magnitude is None else dora_ratio(kernel, a * scale, b, magnitude))
    rest = bank.b.shape[1] - len(b)
    wide = jnp.pad(a * scale, [(0, 0)] * (a.ndim - 1) + [(0, rest)])
    tall = jnp.pad(b, [(0, rest)] + [(0, 0)] * (b.ndim - 1))
    return AdapterBank(
        bank.a.at[..., place, :].set(wide.astype(bank.a.dtype)), bank.b.at[place].set(tall.astype(bank.b.dtype)), ratio
    )


def abstract_banks(decoder: Decoder, places: Places) -> list[Any]:
    """For each layer the boxed shapes, dtypes and logical axes of its banks: {"self_attn": {"q_proj": {BANK: …}}}."""
    count = decoder.spec.num_layers
    spec = LoraSpec((places.rank,) * count, (1.0,) * count, 0.0, False)
    adapted = decoder.clone(adapters=dict.fromkeys(places.targets, spec))

    def bank(tree: Any) -> dict[str, AdapterBank]:
        a, b = tree["lora_A"], tree["lora_B"]
        *inputs, rank = a.value.shape
        outputs = b.value.shape[1:]

        def box(shape: tuple[int, ...], dtype: Any, names: tuple[str | None, ...]) -> Any:
            return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, dtype), names)

        return {
            BANK: AdapterBank(
                box((*inputs, places.count, rank), decoder.dtype, (*a.names[:-1], None, a.names[-1])),
                box((places.count, rank, *outputs), decoder.dtype, (None, *b.names)),
                box((places.count, *outputs), jnp.float32, (None, *b.names[1:])) if places.dora else None,
            )
        }

    def banks(number: int) -> Any:
        lora = abstract_layer(adapted, number).get("lora", {})
        return {part: {name: bank(tree) for name, tree in linears.items()} for part, linears in lora.items()}

    by_period = [banks(p) for p in range(min(len(decoder.spec.period), count))]
    return [by_period[number % len(decoder.spec.period)] for number in range(count)]


def _zeros(boxed: Any, mesh: Mesh) -> Any:
    """A layer's banks without an adapter."""
    bare, shardings = nn.unbox(boxed), tree_shardings(boxed, mesh, WHOLE_IF_UNEVEN)
    return jax.tree.map(lambda leaf, place: jnp.zeros(leaf.shape, leaf.dtype, device=place), bare, shardings)


# --- names and paths --------------------------------------------------------------------------------------------------


def named_paths(names: Sequence[str], directory: str | Path | None = None) -> dict[str, Path]:
    """Where the adapters of a command line lie: NAME=PATH each, and every directory of a directory, by its name.

    Raises:
        UserError: for a word that is not NAME=PATH, a name that cannot be one or is given twice, or no such directory.
    """
    paths: dict[str, Path] = {}
    for word in names:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise UserError(f"adapter: expected NAME=PATH, found {word!r}")
        if name in paths:
            raise UserError(f"adapter: {name} is given twice")
        paths[name] = Path(path)
    if directory is not None:
        folder = Path(directory)
        if not folder.is_dir():
            raise UserError(f"adapter_dir: {directory} is not a directory")
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                if entry.name in paths:
                    raise UserError(f"adapter: {entry.name} is given twice, once in {directory}")
                paths[entry.name] = entry
    for name in paths:
        if ":" in name or any(c.isspace() for c in name):
            raise UserError(
                f"adapter: {name!r} cannot be a name, as models are called BASE:NAME; leave out ':' and blanks"
            )
    return paths


class Followed:
    """Adapters that follow what lies in a directory: `update` loads what is new or changed and drops what is gone.

    Args:
        adapters: what they are loaded into.
        open: opens an adapter of the base.
        names, directory: see `named_paths`.
    """

    def __init__(
        self, adapters: Adapters, open: Opener, names: Sequence[str] = (), directory: str | Path | None = None
    ) -> None:
        self._adapters, self._open, self._names, self._directory = adapters, open, tuple(names), directory
        self._stamps: dict[str, tuple[Path, int]] = {}
        self._told: dict[str, str] = {}

    def update(self) -> dict[str, UserError]:
        """Brings the adapters up to date; what could not be loaded, by name, where it was not told before.

        Raises:
            UserError: see `named_paths`.
        """
        paths, errors = named_paths(self._names, self._directory), dict[str, UserError]()
        wanted = {name: (path, _newest(path)) for name, path in paths.items()}
        for name in [name for name, stamp in self._stamps.items() if wanted.get(name) != stamp]:
            del self._stamps[name]
            if name in self._adapters.names:
                self._adapters.drop(name)
        for name, stamp in wanted.items():
            if name not in self._stamps:
                try:
                    self._adapters.load(name, self._open(stamp[0]))
                    self._stamps[name] = stamp
                except UserError as error:
                    errors[name] = error
        new = {name: error for name, error in errors.items() if self._told.get(name) != str(error)}
        self._told = {name: str(error) for name, error in errors.items()}
        return new


def _newest(path: Path) -> int:
    """When a directory's files last changed, in nanoseconds."""
    times = [entry.stat().st_mtime_ns for entry in (path, *path.rglob("*")) if entry.exists()] if path.exists() else []
    return max(times, default=0)
