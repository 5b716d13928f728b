"""The experts that the tokens of each modality use, as figures and as a plot."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.fonts import any_script
from jaxlm.spec import ExpertsSpec

WINDOW = 100  # steps that the plot shows


class RoutingReport:
    """Collects the routers' decisions; does nothing for a dense model.

    Args:
        moe: the experts; None for a dense model.
    """

    def __init__(self, moe: ExpertsSpec | None) -> None:
        self._moe = moe
        self._steps: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=WINDOW)

    def take(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Takes a step's counts out of its metrics; returns figures for the metrics file.

        Args:
            metrics: of a model of experts, `expert_use` [L, modalities, E], the tokens that used each expert, and
                `modality_tokens` [modalities], the tokens there were. Both are removed.

        Returns:
            {} where there are none. expert_share: by modality, the share of its tokens that used each expert, mean over
            layers (sums to k); router_entropy: by modality, 0 when all use the same experts, 1 when every expert is
            used alike, mean over layers; dropped: tokens that got fewer experts than their k, which is 0 by
            construction, and counted.
        """
        if self._moe is None or "expert_use" not in metrics:
            return {}
        use, tokens = metrics.pop("expert_use"), metrics.pop("modality_tokens")
        self._steps.append((use, tokens))
        shares: dict[str, list[float]] = {}
        entropy: dict[str, float] = {}
        for number, name in enumerate(self._moe.modalities):
            if tokens[number] == 0:
                continue
            share = use[:, number] / tokens[number]
            shares[name] = [round(float(value), 4) for value in share.mean(axis=0)]
            entropy[name] = round(float(np.mean([_evenness(row, self._moe.num_experts) for row in share])), 4)
        expected = (tokens * np.array(self._moe.top_k)).sum() * len(use)
        dropped = 0 if self._moe.router == "activation_released" else int(expected - use.sum())
        return {"expert_share": shares, "router_entropy": entropy, "dropped": dropped}

    @any_script()
    def plot(self, target: Path) -> None:
        """A PNG: for each modality, layers x experts, the share of its tokens in the last steps."""
        if self._moe is None or not self._steps:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        use = np.sum([step[0] for step in self._steps], axis=0)
        tokens = np.sum([step[1] for step in self._steps], axis=0)
        present = [number for number in range(len(tokens)) if tokens[number]]
        layers, _, experts = use.shape
        size = (1.2 + len(present) * max(2.2, 0.22 * experts), 1.4 + max(1.2, 0.22 * layers))
        figure, grid = pyplot.subplots(1, len(present), figsize=size, dpi=120, squeeze=False, layout="constrained")
        image = None
        for axes, number in zip(grid[0], present, strict=True):
            share = use[:, number] / tokens[number]
            image = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            name = self._moe.modalities[number]
            axes.set(xlabel="expert", title=f"{name}, k {self._moe.top_k[number]} ({int(tokens[number]):,} tokens)")
            axes.title.set_fontsize(9)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
        grid[0][0].set_ylabel("layer")
        assert image is not None
        figure.colorbar(image, ax=list(grid[0]), label="share of tokens")
        figure.savefig(target)
        pyplot.close(figure)


def _evenness(share: np.ndarray, experts: int) -> float:
    """Entropy of the use of experts [E], as a share of the largest possible entropy."""
    if experts == 1 or share.sum() == 0:
        return 1.0
    p = share / share.sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum() / np.log(experts))
