"""`jaxlm report OUT`: a run as one HTML file: settings, data, curves, tasks, memory, checkpoints, and how to go on.

The file needs nothing beside it and asks the network for nothing, so that it can be sent or kept as it is. Of a run of
several stages it has them all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxlm.errors import UserError, exit_status


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.report") -> int:
    """Exit status: 0 written, 2 a mistake in the input."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("directory", metavar="OUT", help="output_dir of a run, or the directory of its stages")
    parser.add_argument("--to", metavar="FILE", help="the file (default: OUT/report.html)")
    options = parser.parse_args(argv)
    return exit_status(lambda: _report(options))


def _report(options: argparse.Namespace) -> None:
    from jaxlm.locate import at_home
    from jaxlm.runs.html import MARK, REPORT, page
    from jaxlm.runs.overview import Observer, find_runs

    directory = at_home(options.directory)
    target = at_home(options.to) if options.to else directory / REPORT
    runs = find_runs(directory)
    if target.is_dir() or target.suffix not in (".html", ".htm"):
        raise UserError(f"--to: {target}: name a file that ends in .html")
    if not target.absolute().parent.is_dir():
        raise UserError(f"--to: {target.parent}: no such directory; make it, or name another")
    if target.exists() and MARK not in target.read_text(encoding="utf-8", errors="replace")[:200]:
        raise UserError(f"--to: {target}: is there, and is not a report of jaxlm; name another file")
    text = page([Observer(run).look() for run in runs], directory.absolute().name)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    print(target)
