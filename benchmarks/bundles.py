"""The length of a Pallas kernel's code for a TPU, of which the compiler estimates no cycles.

A bundle is what a TPU core begins in one cycle. A kernel's code for a grid step is a straight piece between branches,
so its bundles times the number of steps are the cycles that it takes if nothing stalls. Products may stall for the
matrix units, which take their number of FLOPs over those of a cycle: where that is more, it counts.
"""

from __future__ import annotations

import re
from pathlib import Path


def dump_options(folder: str) -> str:
    """LIBTPU_INIT_ARGS with which the compiler writes the code of what it compiles."""
    options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    return f"{options} --xla_jf_dump_llo_pass_label_regex=final"


def straight_pieces(folder: Path, kernel: str) -> list[int]:
    """Bundles of the pieces between branches of a kernel's code, in order, from its first label on.

    Args:
        folder: that `dump_options` named; with one kernel of this name.
        kernel: the beginning of the name in its `pallas_call`.

    Raises:
        ValueError: the folder has no such kernel, or several.
    """
    paths = [path for path in folder.glob(f"*-{kernel}*-final_bundles.txt") if "schedule" not in path.name]
    if len(paths) != 1:
        raise ValueError(f"{folder}: {len(paths)} files with the code of {kernel}, one is needed")
    bundles = [m for m in (re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?\s*:", line) for line in paths[0].open()) if m]
    cuts = [int(m[1], 16) for m in bundles if m[2] or "sbr.rel" in m.string]
    return [after - before for before, after in zip(cuts, [*cuts[1:], len(bundles)], strict=True)]
