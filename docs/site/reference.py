"""The reference pages, made from the commands' own `--help`, so that they cannot be older than the code."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from unittest import mock

from jaxlm.cli.main import VERBS
from jaxlm.cli.main import main as jaxlm
from jaxlm.cli.prepare import STEPS
from jaxlm.evaluation.registry import ALONE, names

# Every key of a run stands on one page; commands that take them all name only their own flags.
KEYS = "reference/configuration.md"
TAKE_ALL_KEYS = ("train", "plan")
# The first line of an entry of a help text: a flag, or a key with its default.
HEAD = re.compile(r"  (--\S|[\w.]+: .+ = )")


def pages() -> dict[str, str]:
    """Path within the site -> Markdown, for every command, every key of a run and every task of `jaxlm evaluate`."""
    found = {command_path(name): _command(name) for name in VERBS}
    found[KEYS] = _keys()
    found["reference/tasks.md"] = _tasks()
    return found


def command_path(name: str) -> str:
    """Where the page of a command stands."""
    return f"reference/{name}.md"


def help_of(*words: str) -> str:
    """What `jaxlm WORDS --help` prints at a terminal of 88 columns, as many as the page has."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": "88", "NO_COLOR": "1"}), contextlib.redirect_stdout(printed):
        try:
            jaxlm([*words, "--help"])
        except SystemExit as end:
            if end.code not in (0, None):
                raise RuntimeError(f"jaxlm {' '.join(words)} --help ended with {end.code}") from end
    return printed.getvalue().strip("\n")


def verbs_of(name: str) -> list[str]:
    """The verbs of a command that have a help of their own."""
    if name in ("prepare", "convert"):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
            jaxlm([name, "?"])  # whose message lists them
        verbs = errors.getvalue().split("there are ")[-1].strip().split(", ")
        return [verb for verb in verbs if verb not in STEPS]
    return ["compare"] if name == "evaluate" else []


def _command(name: str) -> str:
    text = help_of(name)
    parts = [f"# jaxlm {name}", f"{_sentence(VERBS[name].summary)} `jaxlm {name} --help` prints what stands here."]
    if name in TAKE_ALL_KEYS:
        text = text.split("\n\nkeys\n")[0]
        parts += [as_markdown(text), "It takes [every key of a run](configuration.md) as `--key value`."]
    else:
        parts.append(as_markdown(text))
    for verb in verbs_of(name):
        parts += [f"## {name} {verb}", f"```text\n{help_of(name, verb)}\n```"]
    if name == "evaluate":
        parts.append("The tasks and their options are [a page of their own](tasks.md).")
    return "\n\n".join(parts) + "\n"


def _keys() -> str:
    keys = "keys\n" + help_of("train").split("\n\nkeys\n")[1]
    return (
        "# Every key of a run\n\nThe keys of a configuration file, which `jaxlm train` and `jaxlm plan` "
        "take on the command line too "
        "(`--optimizer.learning_rate 1e-4`), with their types, defaults and meanings. `jaxlm train --print_config` "
        "shows what a run would use.\n\n" + as_markdown(keys) + "\n"
    )


def _tasks() -> str:
    parts = ["# Tasks of jaxlm evaluate", "`jaxlm evaluate --task NAME --help` prints the same."]
    for name in names():
        if name not in ALONE:
            title, _, rest = help_of("evaluate", "--task", name).partition("\n")
            parts += [
                f"## {name}",
                as_markdown(rest) if title == f"--task {name}" else f"```text\n{title}\n{rest}\n```",
            ]
    return "\n\n".join(parts) + "\n"


def as_markdown(text: str) -> str:
    """A help text with keys as tables, where it has the form of `jaxlm.cli.help`; any other in a block of code.

    That form: sections of `  --name: type = default` or `  --flag VALUE`, each with its meaning below it.
    """
    if not re.search(r"^  \S.*\n {6}\S", text, re.MULTILINE) or "\noptions:\n" in text:
        return f"```text\n{text}\n```"
    return "\n\n".join(_block(block) for block in text.split("\n\n"))


def _block(block: str) -> str:
    if block.startswith("usage: "):
        return f"```text\n{block}\n```"
    lines = block.split("\n")
    if not lines[0].startswith("  "):
        if len(lines) == 1 or not lines[1].startswith("  "):
            return _escape(" ".join(lines))
        return f"## {lines[0]}\n\n{_block(chr(10).join(lines[1:]))}"
    first = next((number for number, line in enumerate(lines) if HEAD.match(line)), len(lines))
    prose = [_escape(" ".join(line.strip() for line in lines[:first]))] if first else []
    entries = list(_entries(lines[first:]))
    if not entries:
        return "".join(prose)
    has_types = any(kind for _, kind, _, _ in entries)
    rows = (
        ["| key | type | default | meaning |", "|---|---|---|---|"]
        if has_types
        else ["| option | meaning |", "|---|---|"]
    )
    for head, kind, default, meaning in entries:
        cells = [_code(head), _code(kind), _code(default)] if has_types else [_code(head)]
        rows.append(f"| {' | '.join([*cells, _escape(meaning)])} |")
    return "\n\n".join([*prose, "\n".join(rows)])


def _entries(lines: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each entry of a section."""
    starts = [number for number, line in enumerate(lines) if not line.startswith(" " * 6)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        head, meaning = lines[start].strip(), " ".join(line.strip() for line in lines[start + 1 : end])
        if match := re.fullmatch(r"([\w.-]+): (.*?) = (.*)", head):
            yield match[1], match[2], match[3], meaning
        elif match := re.fullmatch(r"(--\w+): (--.+)", head):
            yield match[1], "", "", f"`{match[2]}`"
        else:
            yield head, "", "", meaning


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _escape(text: str) -> str:
    """Text within Markdown: signs that would be markup stand as they are, but for code in backquotes."""
    parts = re.split(r"(`[^`]+`)", text)
    plain = [re.sub(r"([\\<>*_\[\]])", r"\\\1", part) if number % 2 == 0 else part for number, part in enumerate(parts)]
    return "".join(plain).replace("|", "\\|")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
