"""`jaxlm run-as SYSTEM -- old command …`: an old system's command line, said in jaxlm's words and run."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxlm.errors import UserError, exit_status, show
from jaxlm.old_commands.flags import Line, Translation
from jaxlm.old_commands.systems import SYSTEMS, translate

USAGE = """\
usage: {prog} SYSTEM [--dry_run] [--save FILE] [--devices N] -- the old command ...

Reads a command line of another system as it stands, prints what each of its words means here (taken,
not needed, or refused, with the reason), writes the configuration that it comes to, and runs it.

  SYSTEM        {systems}
  --dry_run     print and write, and run nothing
  --save FILE   where the configuration goes (default: run-as-SYSTEM.yaml)
  --devices N   how many devices the old command ran on, where it does not say so itself
"""


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.run_as") -> int:
    """Exit status: that of the command that is run; 2 for a mistake or a refused word."""
    return exit_status(lambda: _main(list(sys.argv[1:] if argv is None else argv), prog))


def _main(argv: list[str], prog: str) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        show(USAGE.format(prog=prog, systems=", ".join(SYSTEMS)))
        return 0
    if "--" not in argv:
        raise UserError("put -- between jaxlm's words and the old command: jaxlm run-as k2 -- python finetune.py …")
    own, old = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    system, options = own[0] if own else "", _options(own[1:])
    devices = options.get("devices")
    if devices is not None and not (devices.isdigit() and int(devices)):
        raise UserError(f"--devices: {devices!r} is not a number of devices")
    translation = translate(system, old, int(devices) if devices else None)
    show(_table(translation.lines))
    bad = [line for line in translation.lines if line.verdict == "refused"]
    if bad:
        raise UserError("; ".join(f"{line.word}: {line.text}" for line in bad))
    if not translation.verb:
        return 0
    words = _words(translation, Path(options.get("save") or f"run-as-{system}.yaml"), " ".join(old))
    verb, *rest = [*translation.verb, *words]
    show(f"\n{shlex.join(['jaxlm', verb, *rest])}\n")
    if "dry_run" in options:
        return 0
    module = "convert.commands.main" if verb == "convert" else f"jaxlm.cli.{verb}"
    status: int = importlib.import_module(module).main(rest, f"jaxlm {verb}")
    return status


def _options(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).removeprefix("--").replace("-", "_").partition("=")
        if name not in ("dry_run", "save", "devices"):
            raise UserError(f"--{name}: not an option of run-as; there are --dry_run, --save FILE, --devices N")
        if name != "dry_run" and not equals:
            if not rest:
                raise UserError(f"--{name}: needs a value")
            value = rest.pop(0)
        found[name] = value
    return found


def _table(lines: Sequence[Line]) -> str:
    width = min(60, max((len(line.word) for line in lines), default=0))
    return "".join(f"{line.word:{width}}  {line.verdict:10}  {line.text}".rstrip() + "\n" for line in lines)


def _words(translation: Translation, file: Path, old: str) -> list[str]:
    """The words of our command; its configuration is written to `file` first."""
    words = list(translation.words)
    if translation.values:
        comment = f"# {' '.join(old.split())}\n"
        text = comment + yaml.safe_dump(nested(translation.values), sort_keys=False, allow_unicode=True, width=120)
        if file.is_file() and file.read_text() != text:
            raise UserError(f"--save: {file} is there already, with other settings; name another file, or remove it")
        file.write_text(text)
        words = ["--config", str(file), *words]
    return words


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return tree
