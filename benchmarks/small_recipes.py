"""Runs the small recipes, configs/SYSTEM/small.sh, with several seeds, and keeps the table in configs/README.md.

    python benchmarks/small_recipes.py k2 alpaca --seeds 0 1      # run these two, twice each; then rewrite the table
    python benchmarks/small_recipes.py --all                      # every recipe that there is
    python benchmarks/small_recipes.py k2 --seeds 1 --more        # one more seed beside those that were measured
    python benchmarks/small_recipes.py --table                    # rewrite the table alone, from what was measured
    python benchmarks/small_recipes.py --check                    # exit 1 where the table is not what was measured

What a run came to (OUT/result.json, by configs/result.py), its minutes and its memory are kept in
configs/SYSTEM/small.measured.json. Memory is the largest sum of the resident sizes of all processes that the script
started, looked at ten times a second (Linux, psutil): pages that two processes share count twice. Minutes and tokens/s
are those of the quickest run, since other programs on a machine only add to them; other figures are means. The exit
status is 1 where a script fails, or where a metric is not better than by chance and than before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
README = CONFIGS / "README.md"
BEGIN, END = "<!-- written by benchmarks/small_recipes.py -->", "<!-- end of what is written -->"
HEAD = (
    "recipe", "metric", "by chance", "before", "after", "seed to seed", "minutes", "peak memory", "tokens/s",
    "validation loss",
)  # fmt: skip
MIB = 2**20


def names() -> list[str]:
    """The recipes that there are."""
    return sorted(path.parent.name for path in CONFIGS.glob("*/small.sh"))


def measured_file(name: str) -> Path:
    return CONFIGS / name / "small.measured.json"


# --- runs -------------------------------------------------------------------------------------------------------------


def resident_bytes(process: Any) -> int:
    """Resident bytes of a process and of all that it started."""
    import psutil  # only where something is run: the table needs nothing but Python

    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # it ended between the two looks
    return total


def run_recipe(name: str, seed: int, output: Path) -> dict[str, Any]:
    """Runs a recipe anew; what it came to, its seconds and its peak memory in bytes.

    Raises:
        SystemExit: the script failed, or left no result; its log is named.
    """
    import psutil

    folder = output / f"{name}-{seed}"
    if folder.exists():
        raise SystemExit(f"{folder} exists; remove it, or give another --output")
    folder.mkdir(parents=True)
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]  # the script's python is this one
    log, peak, start = folder / "log.txt", 0, time.perf_counter()
    with log.open("wb") as file:
        script = subprocess.Popen(
            ["bash", f"configs/{name}/small.sh", str(folder / "run")],
            cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "SEED": str(seed), "PATH": os.pathsep.join(path)},
        )  # fmt: skip
        process = psutil.Process(script.pid)
        while script.poll() is None:
            try:
                peak = max(peak, resident_bytes(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
    seconds = time.perf_counter() - start
    if script.wait() != 0:
        raise SystemExit(f"configs/{name}/small.sh failed with {script.returncode}; see {log}")
    result: dict[str, Any] = json.loads((folder / "run/result.json").read_text(encoding="utf-8"))
    return {"seconds": round(seconds), "peak_bytes": peak, **result, "run": str(Path(result["run"]).name)}


def machine() -> str:
    """This machine in words: its processor and the number of cores that may be used."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def by(metric: dict[str, Any], other: str) -> float:
    """By how much a metric is better than before, or than by chance."""
    gain: float = metric["after"] - metric[other]
    return -gain if metric["less_is_better"] else gain


def told(run: dict[str, Any], metric: dict[str, Any]) -> str:
    """A run and a metric of it in a line."""
    figures = f"{metric['name']} {metric['before']:.3f} -> {metric['after']:.3f}, chance {metric['chance']:.3f}"
    return f"{run['seconds'] / 60:.1f} minutes, {run['peak_bytes'] / MIB:,.0f} MiB, {figures}"


# --- the table --------------------------------------------------------------------------------------------------------


def number(values: list[float]) -> str:
    """The mean of what the seeds gave."""
    return f"{statistics.mean(values):.3f}"


def rows(name: str, measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each metric of a recipe."""
    runs = measured["runs"]
    minutes = min(run["seconds"] for run in runs) / 60
    peak = max(run["peak_bytes"] for run in runs) / MIB
    speed = max(run["tokens_per_second"] for run in runs)
    losses = [number([run["validation_loss"][key] for run in runs]) for key in ("before", "after")]
    cost = (f"{minutes:.1f}", f"{peak:,.0f} MiB", f"{speed:,.0f}", " → ".join(losses))
    lines = []
    for at, metric in enumerate(runs[0]["metrics"]):
        values = {key: [run["metrics"][at][key] for run in runs] for key in ("chance", "before", "after")}
        after = values["after"]
        spread = f"{min(after):.3f} to {max(after):.3f} ({len(after)})" if len(after) > 1 else "one seed"
        figures = tuple(number(values[key]) for key in ("chance", "before", "after"))
        name_of_metric = metric["name"] + (" (less is better)" if metric["less_is_better"] else "")
        named, paid = (f"`{name}`", cost) if at == 0 else ("", ("",) * len(cost))
        lines.append((named, name_of_metric, *figures, spread, *paid))
    return lines


def table() -> str:
    """The table, and the machines that it was measured on."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    machines: dict[str, list[str]] = {}
    for name in names():
        if measured_file(name).is_file():
            measured = json.loads(measured_file(name).read_text(encoding="utf-8"))
            lines += [f"| {' | '.join(row)} |" for row in rows(name, measured)]
            machines.setdefault(measured["machine"], []).append(f"`{name}`")
    where = "; ".join(f"{machine}: {', '.join(recipes)}" for machine, recipes in machines.items())
    return "\n".join([*lines, "", f"Measured on: {where or 'nothing yet'}."])


def with_table(text: str) -> str:
    """The page with the table as it is now."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README}: there is no {BEGIN} … {END}")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names())}")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--more", action="store_true", help="keep what was measured with other seeds")
    parser.add_argument("--output", type=Path, default=ROOT / "out/small", help="where the runs are kept")
    parser.add_argument("--note", default="", help="what should be known of the machine, e.g. 'others working'")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(names()))
    if unknown:
        parser.error(f"{unknown} are none of {', '.join(names())}")
    chosen = names() if given.all else given.names
    if not chosen and not given.table and not given.check:
        parser.error("nothing is asked for: name recipes, or give --all, --table or --check")
    if given.check:
        text = README.read_text(encoding="utf-8")
        if with_table(text) != text:
            print(f"{README} is not what was measured: python benchmarks/small_recipes.py --table")
            return 1
        return 0
    weak = False
    for name in chosen:
        where, runs = f"{datetime.date.today()}, {machine()}" + (f", {given.note}" if given.note else ""), []
        if given.more and measured_file(name).is_file():
            known = json.loads(measured_file(name).read_text(encoding="utf-8"))
            runs = [run for run in known["runs"] if run["seed"] not in given.seeds]
            where = where if known["machine"] == where else f"{known['machine']}; more seeds: {where}"
        for seed in given.seeds:
            run = run_recipe(name, seed, given.output.resolve())
            runs.append(run)
            for metric in run["metrics"]:
                better = min(by(metric, "before"), by(metric, "chance")) > 0
                weak |= not better
                print(f"{name}, seed {seed}: {told(run, metric)}{'' if better else ': NOT BETTER'}", flush=True)
        measured = json.dumps({"machine": where, "runs": runs}, indent=1, ensure_ascii=False)
        measured_file(name).write_text(measured + "\n", encoding="utf-8")
    # Read now: what was written around the table while the recipes ran stays.
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    return int(weak)


if __name__ == "__main__":
    sys.exit(main())
