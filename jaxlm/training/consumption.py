"""What a run has consumed of each source: figures for metrics.jsonl, and a plot of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.fonts import any_script

STATE = "consumed"  # in data.json: tokens of each source


class Consumption:
    """Counts the tokens of each source, and goes on where a checkpoint left off.

    Args:
        names: of the sources.
        tokens: that each source has.
        data_state: position in the data that the run goes on from. That of a version without counts gives no figures.
    """

    def __init__(self, names: Sequence[str], tokens: Sequence[int], data_state: Mapping[str, Any]) -> None:
        self._names, self._tokens = tuple(names), tuple(tokens)
        self._consumed: NDArray[np.int64] | None = None
        if STATE in data_state or data_state["step"] == 0:
            self._consumed = np.array(data_state.get(STATE, [0] * len(names)), np.int64)

    def add(self, tokens: NDArray[np.int64]) -> None:
        """Counts a step, by source."""
        if self._consumed is not None:
            self._consumed = self._consumed + tokens

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {} if self._consumed is None else {STATE: self._consumed.tolist()}

    def figures(self) -> dict[str, dict[str, float]]:
        """consumed_tokens and passes, by source, from the run's first step on."""
        if self._consumed is None:
            return {}
        counts = zip(self._names, self._consumed.tolist(), self._tokens, strict=True)
        tokens, passes = {}, {}
        for name, count, whole in counts:
            tokens[name] = count
            passes[name] = round(count / whole, 4) if whole else 0.0
        return {"consumed_tokens": tokens, "passes": passes}


@any_script()
def plot_consumption(metrics: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Tokens of each source, and passes over it, by step, as a PNG; nothing where the metrics have no such figures."""
    lines = [line for line in metrics if "consumed_tokens" in line]
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [lines[at] for at in np.unique(np.linspace(0, len(lines) - 1, 1000).astype(int))]
    steps = [line["step"] for line in lines]
    names = list(lines[-1]["consumed_tokens"])
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), dpi=120, sharex=True)
    tokens = [[line["consumed_tokens"].get(name, 0) for line in lines] for name in names]
    areas = above.stackplot(steps, tokens, alpha=0.8)
    for name in names:
        below.plot(steps, [line["passes"].get(name, 0.0) for line in lines])
    above.set(ylabel="tokens consumed")
    below.set(xlabel="step", ylabel="passes")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    # A name may begin with '_', which matplotlib leaves out, or hold '$', which it takes for a formula.
    shown = [f"{lines[-1]['passes'][name]:.2f} x {name if len(name) <= 50 else f'…{name[-49:]}'}" for name in names]
    for text in above.legend(areas, shown, loc="upper left", fontsize="small").get_texts():
        text.set_parse_math(False)
    above.set_title(target.absolute().parent.name, parse_math=False)
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)
