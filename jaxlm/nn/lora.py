"""The adapter of one kind of linear layer. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass

# Linear layers of one input that a checkpoint may keep as one, which an adapter then takes as one: a first factor for
# all of them, under this name, and the rows of the second factor that are each one's own.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class LoraSpec:
    """The adapter of one kind of linear layer over all L layers.

    The factors of all layers are stacked, so they share the largest rank; a layer of a
    smaller rank (or none: 0) has zeros behind it in both factors. Their gradients are
    exactly zero, so they stay zero.
    """

    ranks: tuple[int, ...]  # [L]
    scales: tuple[float, ...]  # [L]
    dropout: float
    dora: bool
    experts: int = 1  # adapters of this number of experts, as one of their ranks together that is zero across them

    @property
    def rank(self) -> int:
        return max(self.ranks)
