"""The adapter of one kind of linear layer. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass


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
