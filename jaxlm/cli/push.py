"""`jaxlm push DIR owner/name`: a converted model, adapter or GGUF file becomes a repository of the Hugging Face hub.

What is pushed is what `convert` wrote, and what lies beside it, as one commit. `--dry-run` lists it, without a network.
After an interruption the same command again sends only what the hub does not have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import UserError, exit_status

CARD = "README.md"
# Other programs' and ours: locks, journals, caches.
_LEFT_OUT = ("__pycache__",)
# What tells that a directory is of use to others; the first that is there names the kind.
_KINDS = {
    "a Hugging Face model": ("config.json", ("*.safetensors", "*.bin")),
    "a PEFT adapter": ("adapter_config.json", ("adapter_model.*",)),
    "a GGUF file": ("", ("*.gguf",)),
    "a jaxlm model": ("jaxlm/model.json", ("model/*",)),
    "a checkpoint in Meta's format": ("params.json", ("consolidated.*.pth",)),
    "a MindSpore checkpoint": ("config.json", ("*.ckpt",)),
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxlm.push") -> int:
    """Exit status: 0 done, 2 a mistake in the input."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("directory", metavar="DIR", help="what convert wrote")
    parser.add_argument("repo", metavar="NAME", help="owner/name of the repository, made if there is none")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if there is none (default: main)")
    parser.add_argument("--message", metavar="TEXT", default="Pushed by jaxlm", help="of the commit")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="list files and sizes; send nothing")
    parser.add_argument("--json", action="store_true", help="what is sent, and where it is then, as one JSON object")
    options = parser.parse_args(argv)
    return exit_status(lambda: _push(options), prefix="push", interrupted="push: interrupted; the same command goes on")


def _push(options: argparse.Namespace) -> None:
    from jaxlm.hub import push_name, upload
    from jaxlm.units import disk_size

    name = push_name(options.repo, "NAME")
    directory = Path(options.directory).expanduser()
    kind, files = files_to_push(directory)
    total = sum(files.values())
    where = f"{name.repo}{f'@{options.revision}' if options.revision else ''}"
    if not options.json:
        print(f"{kind}, {len(files)} files, {disk_size(total)} -> {where}{', private' if options.private else ''}")
        width = max(map(len, files))
        for file, size in files.items():
            print(f"  {file:{width}}  {disk_size(size):>9}")
        if CARD not in files:
            print(f"note: there is no {CARD}, the model's card; convert writes one, and the hub shows it")
    url = None
    if not options.dry_run:
        url = upload(name, directory, list(files), options.private, options.revision, options.message)
    if options.json:
        facts = {
            "what": kind,
            "repo": name.repo,
            "revision": options.revision,
            "private": options.private,
            "files": files,
            "bytes": total,
            "has_card": CARD in files,
            "url": url,
        }
        print(json.dumps(facts, indent=1))
    else:
        print("nothing was sent (--dry-run)" if url is None else f"pushed: {url}")


def files_to_push(directory: Path) -> tuple[str, dict[str, int]]:
    """(what a directory holds, bytes of its files by name).

    Raises:
        UserError: it is none, holds no model, is a run, or has other bytes than its manifest says.
    """
    from jaxlm.weights.manifest import MANIFEST, read_manifest

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; push takes one that convert wrote")
    if (directory / "checkpoints").is_dir():
        raise UserError(
            f"{directory}: is a run, with its checkpoints and logs; push what others can use: convert jax-to-hf "
            f"{directory} OUT (a LoRA run: convert jax-to-peft)"
        )
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    names = {path.relative_to(directory): path.stat().st_size for path in found}
    kept = {path.as_posix(): size for path, size in names.items() if not _is_left_out(path)}
    kind = next((kind for kind, (main, weights) in _KINDS.items() if _is_kind(directory, kept, main, weights)), None)
    if kind is None:
        raise UserError(f"{directory}: holds no model or adapter ({', '.join(list(kept)[:6]) or 'no files'})")
    if MANIFEST in kept:
        for name, entry in read_manifest(directory)["files"].items():
            # A card may be written anew.
            if name != CARD and not _is_left_out(Path(name)) and kept.get(name) != entry["bytes"]:
                raise UserError(
                    f"{directory}: {name} has {kept.get(name, 'no')} bytes, and {MANIFEST} says {entry['bytes']}; see "
                    f"convert verify {directory}, and convert again"
                )
    return kind, kept


def _is_left_out(path: Path) -> bool:
    return any(part.startswith(".") or part in _LEFT_OUT for part in path.parts)


def _is_kind(directory: Path, names: dict[str, int], main: str, weights: tuple[str, ...]) -> bool:
    return (not main or main in names) and any(next(directory.glob(pattern), None) for pattern in weights)
