"""How much of a dense feed-forward layer lies in the experts that its tokens use.

With h = act(gate) * up, [N, F]: the share of a token's sum of |h| that is in its experts; and how far the output is
from the dense layer's, ||down(h * weights) - down(h)|| / ||down(h)||. Means over tokens, not ratios of sums: a few
tokens of a LLaMA (the first of a row, for one) have activations a thousand times those of the others. The model runs
dense from layer to layer, so each layer is judged by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.analysis.observe import Observed, by_expert, down, masked, walk
from convert.analysis.sample import Sample
from convert.transforms.experts import ROUTER
from jaxlm.fonts import any_script
from jaxlm.nn.routers import released_mask, route_by_modality, route_by_scores, route_learned
from jaxlm.spec import ExpertsSpec
from jaxlm.weights.leaves import ParamSource

_TINY = 1e-30
VERSION = 1  # of coverage.json


@dataclass(frozen=True)
class Coverage:
    """What was found; arrays are [L, modalities], NaN for a modality that the sample does not have.

    Args:
        moe: the model's experts.
        rule: what chose the experts.
        tokens: number of tokens of each modality.
        used: experts that a token used, mean over layers, [modalities].
        chosen: share of |h| in the experts that the rule chooses.
        best: share of |h| in as many experts, those with most of it: no rule can have more.
        error: the output's, in relation to the dense layer's.
    """

    moe: ExpertsSpec
    rule: str
    tokens: tuple[int, ...]
    used: np.ndarray
    chosen: np.ndarray
    best: np.ndarray
    error: np.ndarray

    @property
    def chance(self) -> np.ndarray:
        """Share of the neurons that are in a token's experts, [modalities]."""
        return self.used / self.moe.num_experts

    @property
    def present(self) -> list[int]:
        """Modalities that the sample has tokens of."""
        return [number for number, count in enumerate(self.tokens) if count]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: by modality, lists over layers; a modality without tokens is null."""
        by_modality: dict[str, Any] = dict.fromkeys(self.moe.modalities)
        for number in self.present:
            values = {"chosen": self.chosen, "best": self.best, "error": self.error}
            by_modality[self.moe.modalities[number]] = {
                "tokens": self.tokens[number],
                "k": self.moe.top_k[number],
                "chance": round(float(self.chance[number]), 6),
                **{name: [round(float(value), 6) for value in array[:, number]] for name, array in values.items()},
            }
        return {
            "experts": self.moe.num_experts,
            "router": self.moe.router,
            "rule": self.rule,
            "modalities": by_modality,
        }


def choose_rule(source: ParamSource) -> str:
    """How a model's tokens find their experts: its router, but by activation for a learned one that is still zero."""
    moe = source.config.experts
    assert moe is not None
    if moe.router == "learned":
        layers = range(source.config.num_layers)
        if not any(source.read(ROUTER, (slice(layer, layer + 1),)).any() for layer in layers):
            return "activation"
    return moe.router


def expert_weights(moe: ExpertsSpec, rule: str, mlp: Any, seen: Observed) -> jax.Array:
    """The factor of each expert's output, [N, E]; 0 where a token does not use it."""
    if rule == "modality":
        return route_by_modality(moe, seen.modality).mask(moe.num_experts)
    if rule == "learned":
        return route_learned(moe, seen.x @ mlp["router"], None, seen.modality).mask(moe.num_experts)
    scores = by_expert(seen.h, moe.num_experts).sum(axis=-1)
    if rule == "activation_released":
        return released_mask(moe, scores, seen.modality)
    return route_by_scores(moe, scores, seen.modality).mask(moe.num_experts)


def measure(source: ParamSource, sample: Sample) -> Coverage:
    """Runs a model of experts over a sample; memory is that of one layer and the sample's hidden states.

    Args:
        source: `config.experts` is not None.
    """
    moe, rule = source.config.experts, choose_rule(source)
    assert moe is not None

    def run(mlp: Any, seen: Observed) -> tuple[jax.Array, jax.Array]:
        out = down(mlp, seen.h)
        weights = expert_weights(moe, rule, mlp, seen)
        figures = jnp.stack(_figures(weights, by_expert(jnp.abs(seen.h), moe.num_experts).sum(axis=-1)))
        change = masked(seen.h, weights) - seen.h
        lost = jnp.linalg.norm(change @ mlp["down_proj"]["kernel"], axis=1)
        error = lost / jnp.maximum(jnp.linalg.norm(out, axis=1), _TINY)
        kinds = jax.nn.one_hot(seen.modality, len(moe.modalities))  # none for padding
        return out, jnp.concatenate([figures, error[None]]) @ kinds

    layers = []
    for _, _, found in walk(source, sample, run, "coverage"):
        layers.append(np.sum([np.asarray(part, np.float64) for part in found], axis=0))
    with np.errstate(invalid="ignore"):
        used, chosen, best, error = np.moveaxis(np.array(layers), 1, 0) / np.array(sample.tokens)
    return Coverage(moe, rule, sample.tokens, used.mean(axis=0), chosen, best, error)


def _figures(weights: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each token: experts used, and the shares of |h| in these and in as many of the best; sizes [N, E] is |h|."""
    used = weights > 0
    count = used.sum(axis=1)
    total = jnp.maximum(sizes.sum(axis=1), _TINY)
    first = jnp.arange(sizes.shape[1]) < count[:, None]
    best = jnp.where(first, jnp.sort(sizes, axis=1, descending=True), 0.0)
    chosen = jnp.where(used, sizes, 0.0)
    return count.astype(jnp.float32), chosen.sum(axis=1) / total, best.sum(axis=1) / total


# --- showing it -------------------------------------------------------------------------------------------------------


def describe_rule(coverage: Coverage) -> str:
    """'router learned', or what stands in for it."""
    if coverage.rule == coverage.moe.router:
        return f"the router {coverage.rule}"
    return f"{coverage.rule}, as the {coverage.moe.router} router is still zero"


def write_coverage(coverage: Coverage, directory: Path, about: dict[str, Any]) -> None:
    """Writes coverage.json, with `about` at its beginning, and coverage.png into a directory."""
    text = json.dumps({"version": VERSION} | about | coverage.to_dict(), indent=1, ensure_ascii=False)
    (directory / "coverage.json").write_text(text + "\n", encoding="utf-8")
    _plot(coverage, directory / "coverage.png")


@any_script()
def _plot(coverage: Coverage, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    moe, count = coverage.moe, len(coverage.present)
    columns = min(count, 3)
    rows = -(-count // columns)
    size = (1.0 + 4.0 * columns, 1.2 + 3.0 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, dpi=120, squeeze=False, layout="constrained")
    layers = np.arange(len(coverage.chosen))
    top = max(1.0, float(np.nanmax(coverage.error)))
    for axes, number in zip(grid.flat, coverage.present, strict=False):
        axes.plot(layers, coverage.best[:, number], color="tab:green", marker=".", label="|h| in the best experts")
        axes.plot(layers, coverage.chosen[:, number], color="tab:blue", marker=".", label="|h| in the experts chosen")
        axes.axhline(coverage.chance[number], color="gray", linestyle=":", label="share of the neurons")
        axes.plot(
            layers, coverage.error[:, number], color="tab:red", linestyle="--", marker=".", label="error of the output"
        )
        name = f"{moe.modalities[number]}: {coverage.used[number]:.3g} of {moe.num_experts} experts"
        axes.set_title(f"{name} ({coverage.tokens[number]:,} tokens)", fontsize=9)
        axes.set(xlabel="layer", ylim=(0, 1.03 * top))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    for axes in grid.flat[count:]:
        axes.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if columns > 1 else 2, fontsize=8)
    figure.suptitle(f"chosen by: {describe_rule(coverage)}", fontsize=9)
    figure.savefig(target)
    pyplot.close(figure)
