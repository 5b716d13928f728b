"""Comparing two models or adapters of any formats, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from convert.formats.peft import peft_tensors
from convert.transforms.fused_adapter import as_stored
from jaxlm.models.adapters import resolve_lora, saved_modules
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import DecoderSpec, differences
from jaxlm.weights.hf import hf_tensors
from jaxlm.weights.leaves import AdapterSource, Index, ParamSource
from jaxlm.weights.names import Shape, hf_entries
from jaxlm.weights.partition import order_name
from jaxlm.weights.tensors import TensorSpec

# Numbers compared at a time, so that everything between stays in the cache.
_STEP = 1 << 14
# Numbers of a leaf that are read at a time.
_ROWS = 1 << 22
# Fields of a configuration that change nothing in what a model computes for a text.
_NOT_COMPUTED = {
    "family",
    "initializer_range",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
# Settings that say where an adapter is, at which ranks and scales.
_PLACES = {"rank", "alpha", "targets", "rank_pattern", "alpha_pattern", "rslora", "modules_to_save"}


@dataclass
class Difference:
    """How one tensor differs between two models.

    Args:
        dtypes: of the tensor in each of them. Where they differ, numbers are compared in float32, and ulps are counted
            after rounding to the one with fewer significant digits.
        different: elements that are not equal: bit by bit, or as numbers where the dtypes differ.
        max_ulp: largest distance in units in the last place, i.e. in representable numbers.
        max_abs: largest absolute difference; infinite where only one of the two is a number.
        max_rel: largest difference in relation to the larger of the two.
    """

    name: str
    shape: Shape
    dtypes: tuple[str, str]
    different: int = 0
    max_ulp: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass
class Report:
    """What a comparison found.

    Args:
        tensors: those that both have, in the same shape.
        only: names that only the first or only the second one has.
        shapes: name -> the two shapes, where they differ.
        config: field -> the two values, where they differ and the difference changes what is computed.
        notes: field -> the two values, where it does not.
    """

    tensors: list[Difference] = field(default_factory=list)
    only: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    notes: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def exact(self) -> list[Difference]:
        return [tensor for tensor in self.tensors if not tensor.different]

    @property
    def worst(self) -> list[Difference]:
        """The tensors that differ, the largest difference first."""
        return sorted((t for t in self.tensors if t.different), key=lambda t: (-t.max_abs, -t.max_ulp))

    def same(self, tolerance: float | None) -> bool:
        """Whether the two are equal.

        Args:
            tolerance: largest absolute difference of two numbers that is let pass; None: none, and -0 is not 0.
        """
        if any(self.only) or self.shapes or self.config:
            return False
        return all(not t.different if tolerance is None else t.max_abs <= tolerance for t in self.tensors)


def compare_models(first: ParamSource, second: ParamSource, advance: Callable[[int], None]) -> Report:
    """Compares two models; memory stays small. `advance` gets the bytes read of the first one.

    Those of two families, whose files have other names and join other layers, are compared by jaxlm's own leaves.
    """
    tensors = hf_tensors if first.config.family == second.config.family else leaf_tensors
    report = _compare(tensors(first), tensors(second), advance)
    _compare_fields(first.config, second.config, report)
    orders = order_name(first.partition), order_name(second.partition)
    if orders[0] != orders[1]:
        report.config["partition"] = orders
    return report


def leaf_tensors(source: ParamSource) -> list[TensorSpec]:
    """The leaves of a model, layer by layer, to be read once: `layers/mlp/up_proj/kernel[3]`."""
    tensors = []
    for entry in hf_entries(source.config):
        leaf = source.leaves[entry.path]
        name = entry.path if entry.layer is None else f"{entry.path}[{entry.layer}]"
        shape = leaf.shape if entry.layer is None else leaf.shape[1:]
        tensors.append(TensorSpec(name, shape, leaf.dtype, _leaf_blocks(source, entry.path, entry.layer, shape)))
    return tensors


def _leaf_blocks(source: ParamSource, path: str, layer: int | None, shape: Shape) -> Iterator[np.ndarray]:
    first: Index = () if layer is None else (slice(layer, layer + 1),)
    rows = max(1, _ROWS * shape[0] // math.prod(shape))
    for start in range(0, shape[0], rows):
        yield source.read(path, (*first, slice(start, min(start + rows, shape[0])))).reshape(-1)


def compare_adapters(first: AdapterSource, second: AdapterSource, advance: Callable[[int], None]) -> Report:
    """Compares two low-rank adapters, their ranks and scales too."""
    report = _compare(peft_tensors(first), peft_tensors(second), advance)
    # The same ranks and scales of the same linear layers may be written in other words.
    same = _placed(first) == _placed(second)
    for option in dataclasses.fields(first.lora):
        values = getattr(first.lora, option.name), getattr(second.lora, option.name)
        if values[0] != values[1] and not (same and option.name in _PLACES):
            (report.notes if option.name == "dropout" else report.config)[option.name] = values
    if first.layers != second.layers and not same:
        report.config["layers"] = first.layers, second.layers
    return report


def _placed(adapter: AdapterSource) -> tuple[dict[str, LoraSpec], list[str]]:
    """Where an adapter is, at which ranks and scales, and which modules it saves whole."""
    stored = as_stored(adapter)
    specs = resolve_lora(stored.config, dataclasses.replace(stored.lora, dropout=0.0), stored.layers)
    return specs, sorted(saved_modules(stored.config, stored.lora))


def _compare_fields(first: DecoderSpec, second: DecoderSpec, report: Report) -> None:
    for name, *values in differences(first, second):
        (report.notes if name in _NOT_COMPUTED else report.config)[name] = (values[0], values[1])


def _compare(first: list[TensorSpec], second: list[TensorSpec], advance: Callable[[int], None]) -> Report:
    report = Report()
    others = {spec.name: spec for spec in second}
    names = {spec.name for spec in first}
    report.only = (
        [spec.name for spec in first if spec.name not in others],
        [name for name in others if name not in names],
    )
    for spec in first:
        other = others.get(spec.name)
        if other is None:
            continue
        if other.shape != spec.shape:
            report.shapes[spec.name] = spec.shape, other.shape
            continue
        difference = Difference(spec.name, spec.shape, (spec.dtype.name, other.dtype.name))
        for a, b in _pairs(spec.blocks, other.blocks):
            compare_blocks(a, b, difference)
            advance(a.nbytes)
        report.tensors.append(difference)
    return report


def _pairs(first: Iterable[np.ndarray], second: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)  # sources cut tensors of one layout in the same way
        yield a, b


def compare_blocks(first: np.ndarray, second: np.ndarray, difference: Difference) -> None:
    """Adds the differences between two blocks of numbers to `found`."""
    if first.dtype == second.dtype:
        bits = np.dtype(f"u{first.dtype.itemsize}")
        unequal = first.view(bits) != second.view(bits)
    else:
        unequal = first.astype(np.float32) != second.astype(np.float32)
    count = int(np.count_nonzero(unequal))
    if not count:
        return
    difference.different += count
    if 2 * count < first.size:
        first, second = first[unequal], second[unequal]
    first, second = first.reshape(-1), second.reshape(-1)
    for start in range(0, first.size, _STEP):
        _measure(first[start : start + _STEP], second[start : start + _STEP], difference)


def coarser(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype with fewer significant digits: bfloat16 before float16 before float32, in either order."""
    return min(first, second, key=lambda dtype: ml_dtypes.finfo(dtype).nmant)


def _measure(first: np.ndarray, second: np.ndarray, difference: Difference) -> None:
    narrow = coarser(first.dtype, second.dtype)
    # float32 holds what 16-bit numbers differ by to more than their own digits.
    wide: Any = np.float64 if first.dtype == second.dtype == np.float32 else np.float32
    a, b = first.astype(wide), second.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        absolute = np.abs(a - b)
        if not np.isfinite(absolute.max()):
            absolute[np.isnan(absolute)] = np.inf
            absolute[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        # Where both are 0 anything will do but 0.
        larger = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.finfo(wide).tiny)
        relative = absolute / larger
        ulps = np.abs(_ordered(first.astype(narrow, copy=False)) - _ordered(second.astype(narrow, copy=False)))
    difference.max_ulp = max(difference.max_ulp, int(ulps.max()))
    difference.max_abs = max(difference.max_abs, float(absolute.max()))
    difference.max_rel = max(difference.max_rel, float(np.nan_to_num(relative.max(), nan=np.inf, posinf=np.inf)))


def _ordered(numbers: np.ndarray) -> np.ndarray:
    """Integers in the order of the numbers, neighbours one apart; -0 and 0 are both 0."""
    width = numbers.dtype.itemsize
    bits: np.ndarray = numbers.view(f"i{width}").astype(np.int64 if width == 4 else np.int32)
    return np.where(bits < 0, -(bits & ((1 << (8 * width - 1)) - 1)), bits)
