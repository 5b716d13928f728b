"""Adapters of single parts of a linear layer that Hugging Face stores as one, as an adapter of all of it.

jaxlm can adapt the q_proj of a `query_key_value` alone. To PEFT that is an adapter of `query_key_value`: the first
factors side by side, and in the second one the part's rows of its own ranks, zero everywhere else, which computes the
same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from jaxlm.errors import UserError
from jaxlm.models.adapters import (
    Adapted,
    AdaptedLinear,
    adapted_linears,
    as_one_adapter,
    in_full,
    is_named,
    linears_of,
    resolve_lora,
    short_name,
)
from jaxlm.weights.leaves import AdapterSource, Index, LeafInfo, full_index, index_shape
from jaxlm.weights.names import adapter_leaves


def as_stored(adapter: AdapterSource) -> AdapterSource:
    """The adapter with none of single parts; itself where it has none."""
    adapted = adapted_linears(adapter.config, adapter.lora, adapter.layers)
    return FusedAdapter(adapter, adapted) if any(each.linear.part_of for each in adapted.values()) else adapter


class FusedAdapter:
    """An adapter in which those of parts are one of the linear layer that they are stored in.

    Args:
        adapted: its linear layers.

    Raises:
        UserError: for DoRA on some parts only: the lengths of the others' columns are the base's, and not known here.
    """

    def __init__(self, adapter: AdapterSource, adapted: Mapping[str, Adapted]) -> None:
        self._adapter = adapter
        self.config = adapter.config.with_experts(None)  # to PEFT a layer of experts is the dense one
        self.partition = None
        self.path = adapter.path
        self.layers = adapter.layers
        self.base = adapter.base
        self.peft_config = adapter.peft_config
        self.tokenizer_files = adapter.tokenizer_files
        self.prompt_files = adapter.prompt_files
        lora, linears = as_one_adapter(adapter.config, adapter.lora), linears_of(self.config)
        self._rslora = lora.rslora
        self._parts: dict[str, dict[str, Adapted]] = {}
        for name, each in adapted.items():
            if each.linear.part_of:
                self._parts.setdefault(each.linear.part_of, {})[name] = each
        for whole, parts in self._parts.items():
            missing = [row.linear for row in linears[whole].rows if row.linear not in parts]
            if lora.dora and missing:
                raise UserError(
                    f"{adapter.path}: has DoRA on {', '.join(parts)}, not on {', '.join(missing)}; to PEFT they are "
                    "one linear layer, whose magnitudes need the base's weights. Make one model of the two (convert "
                    f"merge), or train {short_name(self.config, linears[whole].hf_module, is_named)} as a whole"
                )
        self._wholes = {whole: self._together(linears[whole], parts) for whole, parts in self._parts.items()}
        own = {name: each for name, each in adapted.items() if not each.linear.part_of} | self._wholes
        stored = {name: own[name] for name in linears if name in own}
        self.lora = in_full(self.config, lora, stored, self.layers)
        # What is made of parts: path -> the linear layer it belongs to, and the layers stacked.
        self._made: dict[str, tuple[str, range]] = {}
        leaves = {path: leaf for path, leaf in adapter.leaves.items() if path.startswith("modules_to_save/")}
        dtype = next(leaf.dtype for path, leaf in adapter.leaves.items() if path.endswith("/lora_A"))
        for leaf in adapter_leaves(self.config, resolve_lora(self.config, self.lora, self.layers)):
            *_, linear, factor = leaf.path.split("/")
            whole = linears[linear].part_of or linear
            if whole in self._parts and factor != "magnitude":
                assert leaf.layers is not None
                self._made[leaf.path] = whole, leaf.layers
                leaves[leaf.path] = LeafInfo(leaf.shape, dtype)
            else:
                leaves[leaf.path] = adapter.leaves[leaf.path]
        self.leaves = leaves

    def _together(self, linear: AdaptedLinear, parts: Mapping[str, Adapted]) -> Adapted:
        """The adapter of all parts: its scale is that of the first one."""
        ranks, alphas = [], []
        for n in range(self.config.num_layers):
            rank = sum(each.ranks[n] for each in parts.values())
            first = next((each for each in parts.values() if each.ranks[n]), None)
            more = 1.0 if first is None else rank / first.ranks[n]
            ranks.append(rank)
            alphas.append(0.0 if first is None else first.alphas[n] * (math.sqrt(more) if self._rslora else more))
        return Adapted(linear, tuple(ranks), tuple(alphas))

    def read(self, path: str, index: Index) -> np.ndarray:
        if path not in self._made:
            return self._adapter.read(path, index)
        leaf, (whole, layers) = self.leaves[path], self._made[path]
        full = full_index(leaf.shape, index)
        out = np.zeros(index_shape((full[0],)) + leaf.shape[1:], leaf.dtype)
        for layer, place in zip(out, range(full[0].start, full[0].stop, full[0].step), strict=True):
            self._fill(layer, path, whole, place, layers[place])
        return out[(slice(None), *full[1:])]

    def _fill(self, out: np.ndarray, path: str, whole: str, place: int, number: int) -> None:
        """One layer of a first factor [*in, R], or of a part's second one [R, *out]."""
        stem, linear, factor = path.rsplit("/", 2)
        scale, start = self._wholes[whole].scales(self._rslora)[number], 0
        for name, each in self._parts[whole].items():
            rank = each.ranks[number]
            if rank and factor == "lora_A":
                every = (slice(None),) * (out.ndim - 1)
                index = (slice(place, place + 1), *every, slice(0, rank))
                out[..., start : start + rank] = self._adapter.read(f"{stem}/{name}/lora_A", index)[0]
            elif rank and linear == name:
                own = self._adapter.read(path, (slice(place, place + 1), slice(0, rank)))[0]
                ratio = each.scales(self._rslora)[number] / scale
                # Parts of one rank and alpha have one scale; of other ones the factor takes the difference.
                same = math.isclose(ratio, 1.0, rel_tol=1e-12)
                out[start : start + rank] = own if same else own.astype(np.float32) * np.float32(ratio)
            start += rank
