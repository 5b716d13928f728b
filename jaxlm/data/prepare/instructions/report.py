"""What a round of instructions leaves: the instructions, a report, and the figure of verbs and their objects."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlm.data.prepare.instructions.rounds import Round
from jaxlm.data.prepare.instructions.verbs import verb_and_noun
from jaxlm.fonts import any_script

INSTRUCTIONS, REPORT, FIGURE = "instructions.json", "report.json", "diversity.png"
VERBS, NOUNS = 20, 4  # shown, as in Self-Instruct's figure 2
Verbs = dict[str, collections.Counter[str]]


def count_verbs(instructions: Iterable[str]) -> Verbs:
    """Objects by verb, the most frequent verbs first; "" counts those without an object."""
    counts: Verbs = {}
    for instruction in instructions:
        if (pair := verb_and_noun(instruction)) is not None:
            counts.setdefault(pair[0], collections.Counter())[pair[1] or ""] += 1
    return dict(sorted(counts.items(), key=lambda each: (-each[1].total(), each[0])))


def summary(result: Round) -> dict[str, Any]:
    """The report: counts, costs, keep rate, likeness and verbs."""
    verbs = count_verbs(task.instruction for task, _, _ in result.kept)
    written, kept = len(result.kept) + result.dropped.total(), len(result.kept)
    with_verb = sum(nouns.total() for nouns in verbs.values())
    pairs = sum(len([noun for noun in nouns if noun]) for nouns in verbs.values())
    return {
        "seed_tasks": len(result.seeds),
        "replies": result.replies,
        "tokens_in": result.tokens_in,
        "tokens_out": result.tokens_out,
        "written": written,
        "kept": kept,
        "keep_rate": round(kept / max(written, 1), 4),
        "tokens_in_per_kept": round(result.tokens_in / max(kept, 1), 1),
        "tokens_out_per_kept": round(result.tokens_out / max(kept, 1), 1),
        "dropped": dict(result.dropped.most_common()),
        "examples_of_dropped": result.samples,
        "mean_similarity": round(sum(score for _, score, _ in result.kept) / max(kept, 1), 4),
        "begin_with_a_verb": round(with_verb / max(kept, 1), 4),
        "verbs": len(verbs),
        "verb_noun_pairs": pairs,
        "most_frequent": {verb: dict(nouns.most_common(NOUNS)) for verb, nouns in list(verbs.items())[:VERBS]},
    }


def write(result: Round, folder: Path) -> dict[str, Any]:
    """Writes the three files, each in one operation; returns the report."""
    records = [
        {
            "instruction": task.instruction, "input": task.input, "output": task.output,
            "similarity": round(score, 4), "most_similar": nearest,
        }
        for task, score, nearest in result.kept
    ]  # fmt: skip
    report = summary(result)
    for name, value in ((INSTRUCTIONS, records), (REPORT, report)):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(folder / name)
    verbs = count_verbs(task.instruction for task, _, _ in result.kept)
    if verbs:
        draw(verbs, folder / FIGURE, len(records))
    return report


@any_script()
def draw(verbs: Verbs, path: Path, total: int) -> None:
    """Two rings: the most frequent verbs, and for each its most frequent objects."""
    import matplotlib  # slow to import, and needed only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = dict(list(verbs.items())[:VERBS])
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    inner, outer = [], []
    for place, (verb, nouns) in enumerate(shown.items()):
        colour = colours[place % len(colours)]
        named = [(noun, number) for noun, number in nouns.most_common() if noun][:NOUNS]
        rest = nouns.total() - sum(number for _, number in named)
        inner.append((verb, nouns.total(), colour))
        outer += [(noun, number, (*colour, 0.55)) for noun, number in named]
        if rest:
            outer.append(("", rest, (*colour, 0.15)))
    figure, axes = pyplot.subplots(figsize=(9, 9), dpi=110)
    for ring, radius, distance in ((outer, 1.0, 0.8), (inner, 0.62, 0.68)):
        whole = sum(number for _, number, _ in ring)
        _, labels = axes.pie(
            [number for _, number, _ in ring], labels=[name for name, _, _ in ring], colors=[c for _, _, c in ring],
            radius=radius, labeldistance=distance, startangle=90, counterclock=False, rotatelabels=True,
            textprops={"fontsize": 8, "va": "center", "ha": "center"},
            wedgeprops={"width": 0.38 if radius == 1 else 0.36, "edgecolor": "white", "linewidth": 0.7},
        )[:2]  # fmt: skip
        for label, (_, number, _) in zip(labels, ring, strict=True):
            label.set_horizontalalignment("center")
            if number / whole < (0.009 if radius == 1 else 0.016):
                label.set_visible(False)  # there is no room for it
    counted = sum(number for _, number, _ in inner)
    axes.set_title(
        f"The {len(shown)} most frequent verbs of {total:,} instructions, and their objects\n"
        f"({counted / max(total, 1):.0%} of the instructions; pale: other objects, or none)",
        fontsize=11,
    )
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
