"""An adapter in memory, for what reads and writes adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from jaxlm.config import LoraConfig
from jaxlm.models.adapters import linears_of, resolve_lora
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.spec import DecoderSpec
from jaxlm.weights.leaves import LeafInfo
from tests.models.compare import random_tree


class InMemory:
    """An adapter as a run would have trained it.

    Args:
        tree: its leaves; None: every factor random.
    """

    path, base, layers, partition, peft_config = Path("memory"), None, None, None, None

    def __init__(self, spec: DecoderSpec, lora: LoraConfig, tree: Any = None) -> None:
        self.tokenizer_files, self.prompt_files = list[Path](), list[Path]()
        self.config, self.lora, self.specs = spec, lora, resolve_lora(spec, lora)
        leaves = self._random() if tree is None else traverse_util.flatten_dict(tree, sep="/")
        self.arrays = leaves
        self.tree = traverse_util.unflatten_dict(leaves, sep="/")
        self.leaves = {path: LeafInfo(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[path][index].copy()

    def _random(self) -> dict[str, np.ndarray]:
        spec = self.config
        tree = random_tree(nn.unbox(abstract_variables(Decoder(spec, self.specs)))["lora"], 3)
        leaves = {path: 0.3 * np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
        linears = linears_of(spec)
        for path, leaf in leaves.items():
            *_, linear, factor = path.split("/")
            own = self.specs.get(linear) or self.specs[linears[linear].part_of]
            numbers = next(stack.numbers for stack in spec.stacks if path.startswith(f"{stack.path}/"))
            for n, rank in enumerate(own.ranks[number] for number in numbers):
                if factor == "magnitude":
                    leaf[n] = np.abs(leaf[n]) + 0.5
                else:
                    leaf[n][(..., slice(rank, None)) if factor == "lora_A" else slice(rank, None)] = 0
        return leaves
