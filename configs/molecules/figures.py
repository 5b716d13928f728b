"""What the answers of each step are worth: python configs/molecules/figures.py OUT

Reads OUT/sft.json, OUT/dpo.json and OUT/grpo.json, drawn answers to captions, and OUT/grpo/metrics.jsonl. Prints a
table, and writes OUT/figures.json and the curve, OUT/valid.png. Chance is the share of molecules among the right ones
with their signs in another order.

Needs RDKit: pip install 'jaxlm[science]'
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

try:
    from rdkit import Chem, RDLogger
except ModuleNotFoundError:
    sys.exit("figures.py needs RDKit: pip install 'jaxlm[science]'")

STEPS = ("sft", "dpo", "grpo")
ORDERS = 20  # of each right molecule's signs


def canonical(smiles: str) -> str | None:
    """RDKit's form of a SMILES, or null where it reads none."""
    molecule = Chem.MolFromSmiles(smiles) if smiles else None
    return None if molecule is None else Chem.MolToSmiles(molecule)


def figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """Shares over all answers; their standard error is that of means over captions."""
    forms = [[canonical(answer.strip()) for answer in record["answers"]] for record in records]
    shares = [statistics.mean(form is not None for form in of_record) for of_record in forms]
    readable = [form for of_record in forms for form in of_record if form is not None]
    right = [
        form == canonical(record["molecule"])
        for record, of_record in zip(records, forms, strict=True)
        for form in of_record
    ]
    return {
        "valid": statistics.mean(shares),
        "standard_error": statistics.stdev(shares) / math.sqrt(len(shares)),
        "different": len(set(readable)) / max(len(readable), 1),
        "right": statistics.mean(right),
        "signs": statistics.mean(len(answer.strip()) for record in records for answer in record["answers"]),
        "answers": float(len(right)),
    }


def chance(records: list[dict[str, Any]]) -> float:
    """The share of molecules among the right ones' signs in random orders (seed 0)."""
    order = random.Random(0)
    texts = [
        "".join(order.sample(record["molecule"], len(record["molecule"]))) for record in records for _ in range(ORDERS)
    ]
    return statistics.mean(canonical(text) is not None for text in texts)


def plot(found: dict[str, Any], out: Path) -> None:
    """Left the share after each step, right what GRPO's own answers were worth while it went on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (out / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [(line["step"], line["reward"]) for line in lines if "reward" in line]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), dpi=100, sharey=True)
    shares, errors = ([found[step][key] for step in STEPS] for key in ("valid", "standard_error"))
    names = ("instruction tuning", "DPO", "GRPO")
    left.bar(names, shares, yerr=[2 * error for error in errors], width=0.6, capsize=4, color="C0")
    left.axhline(found["chance"], color="0.3", linestyle="--", linewidth=1, label="signs in random order")
    left.set(ylabel="share of answers that are a molecule", ylim=(0, 1.05), title="held-out captions, after each step")
    left.legend()
    right.plot(*zip(*points, strict=True), color="C1", alpha=0.35, label="a step's 64 answers")
    width = 9
    steps, means = [], []
    for middle in range(width // 2, len(points) - width // 2):
        window = points[middle - width // 2 : middle + width // 2 + 1]
        steps.append(points[middle][0])
        means.append(statistics.mean(reward for _, reward in window))
    right.plot(steps, means, color="C1", label=f"mean of {width} steps")
    right.set(xlabel="step of GRPO", title="training captions, during GRPO")
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "valid.png")
    pyplot.close(figure)


def main(out: Path) -> None:
    RDLogger.DisableLog("rdApp.*")
    answers = {step: json.loads((out / f"{step}.json").read_text(encoding="utf-8")) for step in STEPS}
    found: dict[str, Any] = {step: figures(answers[step]) for step in STEPS}
    found["chance"] = chance(answers["sft"])
    (out / "figures.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, out)
    print(f"{'after':8}{'valid':>16}{'different':>12}{'right':>8}{'signs':>8}")
    for step in STEPS:
        line = found[step]
        valid = f"{line['valid']:.1%} ± {line['standard_error']:.1%}"
        print(f"{step:8}{valid:>16}{line['different']:>12.0%}{line['right']:>8.1%}{line['signs']:>8.1f}")
    print(f"{'chance':8}{found['chance']:>11.1%}")
    print(f"{int(found['sft']['answers'])} drawn answers each; wrote {out / 'figures.json'} and {out / 'valid.png'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
