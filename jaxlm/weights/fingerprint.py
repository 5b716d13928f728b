"""A hash that tells one model from another, at little reading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.models.version1 import ModelFields
from jaxlm.spec import DecoderSpec, is_stacked
from jaxlm.weights.leaves import LeafReader

BLOCK = 16  # elements along each of the last two dims of a sample


def base_fingerprint(model: DecoderSpec, source: LeafReader) -> str:
    """Hash of a base model's shape and of a sample of each of its leaves.

    A sample is a block of a few elements, at a place that the leaf's name and shape decide, in the first, the last and
    one other layer; norms are taken whole. It takes little reading of any format, and a merged adapter or training of
    any kind changes some of it. Fields of the spec that have their default value are left out: they may be newer than
    the hash that this one is compared with. A spec is hashed in the words of model.json's version 1 if these suffice.
    """
    digest = hashlib.sha256(json.dumps(_given(ModelFields.of(model) or model), sort_keys=True).encode())
    for path in sorted(source.leaves):
        for index in _sample(path, tuple(source.leaves[path].shape)):
            piece = np.ascontiguousarray(source.read(path, index))
            digest.update(f"{path} {piece.shape} {piece.dtype}".encode() + piece.tobytes())
    return digest.hexdigest()


def _given(config: Any) -> Any:
    """The fields of a dataclass that do not have their default value, as plain values."""
    if isinstance(config, tuple):
        return [_given(entry) for entry in config]
    if not dataclasses.is_dataclass(config):
        return config
    given = {}
    for field in dataclasses.fields(config):
        factory, value = field.default_factory, getattr(config, field.name)
        if value != (field.default if factory is dataclasses.MISSING else factory()):
            given[field.name] = _given(value)
    return given


def _sample(path: str, shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The slices of a leaf that its fingerprint is made of."""
    stacked = is_stacked(path)
    dims = shape[1:] if stacked else shape
    name = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
    block = []
    for number, dim in enumerate(dims):
        size = dim if len(dims) == 1 else min(dim, BLOCK if number >= len(dims) - 2 else 1)
        start = (name >> (8 * number)) % (dim - size + 1)
        block.append(slice(start, start + size))
    layers = sorted({0, shape[0] - 1, name % shape[0]}) if stacked else [None]
    for layer in layers:
        yield tuple(block) if layer is None else (slice(layer, layer + 1), *block)
