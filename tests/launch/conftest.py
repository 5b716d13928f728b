"""Clusters' programs, played: on PATH before the real ones, they note how they were called and do a little of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Notes its words and standard input, then does what the file SCRIPTS/<name> says, a piece of Python with `words`.
FAKE = """#!{python}
import json, os, subprocess, sys
from pathlib import Path
name, words = Path(sys.argv[0]).name, sys.argv[1:]
text = sys.stdin.read() if "-f" in words and "-" in words else ""
with open({calls!r}, "a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
if text:
    Path({calls!r}).with_name("stdin").write_text(text)
{does}
"""


class Cluster:
    """A folder of played programs, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.home = folder / "home"
        self.home.mkdir()
        self.variables: dict[str, str] = {}
        for name in ("gcloud", "kubectl", "sbatch", "srun", "squeue", "scontrol", "sudo", "systemctl", "systemd-run"):
            self.play(name, f"sys.exit('{name} is not played here')")  # never the real one of who runs the tests

    def play(self, name: str, does: str = "", folder: Path | None = None) -> Path:
        file = (folder or self.bin) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(FAKE.format(python=sys.executable, calls=str(self.folder / "calls"), does=does))
        file.chmod(0o755)
        return file

    def environment(self) -> dict[str, str]:
        # Of the shell that runs the tests only what programs need: its variables could be a script's.
        kept = {key: value for key, value in os.environ.items() if key.startswith(("JAX_", "XLA_")) or key == "LANG"}
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        return kept | {"PATH": path, "HOME": str(self.home), "PYTHONPATH": str(ROOT)} | self.variables

    def run(self, *words: str | Path, status: int = 0, cwd: Path = ROOT) -> str:
        """Standard output; with another status than 0 standard error."""
        done = subprocess.run(
            ["bash", *map(str, words)], env=self.environment(), cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stderr if status else done.stdout

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def asked(self) -> list[Sequence[Any]]:
        """The calls, without which project and where."""
        return [[w for w in call if w not in ("--project", "--zone", "p", "z")] for call in self.calls()]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)
