"""What mkdocs does for this site beside rendering docs/: links out of it, the reference, the notebooks.

A page links to files of the repository as it must on a code host (`../configs/k2/sft.yaml`). Here each file that is
linked to becomes a page below tree/, so that the site is whole without a network, and links lead there.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "docs" / "site"))

import notebooks  # noqa: E402
import reference  # noqa: E402

LINK = re.compile(r"(\]\(|src=\"|href=\")(?!https?:|mailto:|#)([^)\s\"#]+)(#[^)\s\"]*)?")
FENCE = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2 *$|(?<!`)(`+)(?!`).+?(?<!`)\3(?!`))", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}
PICTURES = (".png", ".svg", ".gif", ".jpg")


def on_config(config: Any) -> Any:
    """Puts the generated pages into the navigation."""
    section = next(part["Reference"] for part in config["nav"] if "Reference" in part)
    section += [
        {"Every key of a run": reference.KEYS},
        {"Tasks of evaluate": "reference/tasks.md"},
        {"Commands": [{f"jaxlm {name}": reference.command_path(name)} for name in reference.VERBS]},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds pages that are made: the reference, notebooks, and the files of the repository that are linked to."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.remove(files.get_file_from_path(f"notebooks/{notebook.name}"))  # type: ignore[arg-type]
        for path, content in notebooks.as_pages(notebook).items():
            files.append(File.generated(config, path, content=content))
    named = [path for path in _paths(config["nav"]) if path.startswith("tree/")]
    waiting = [path.removeprefix("tree/") for path in named]
    for file in files:
        if file.src_uri.endswith(".md"):
            waiting += _targets(file.src_uri, file.content_string)
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or path.startswith("docs/") or not (ROOT / path).exists():
            continue
        seen.add(path)
        content = _content(path)
        files.append(File.generated(config, _uri(path), content=content))
        if isinstance(content, str):
            waiting += _targets(_uri(path), content)
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links to their pages."""
    here = page.file.src_uri

    def replaced(kind: str, target: str, anchor: str) -> str:
        path = _resolved(here, target)
        uri = path.removeprefix("docs/").replace(".ipynb", ".md") if path.startswith("docs/") else _uri(path)
        if files.get_file_from_path(uri) is None:
            uri = f"missing/{path}"  # which mkdocs tells, with the page
        return f"{kind}{posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor}"

    return _with_links(markdown, replaced)


def on_page_content(html: str, page: Page, config: Any, files: Files) -> str:
    """In a table `a\\|b` shows the bar alone, as on a code host, and may break behind it."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace("\\|", "|<wbr>"), html, flags=re.DOTALL)


def _targets(uri: str, text: str) -> list[str]:
    """Files of the repository that a page links to."""
    found: list[str] = []
    _with_links(text, lambda kind, target, anchor: found.append(_resolved(uri, target)) or "")  # type: ignore[func-returns-value]
    return found


def _with_links(text: str, replaced: Callable[[str, str, str], str]) -> str:
    """`text` with each relative link outside of code replaced."""
    parts = FENCE.split(text)
    # A match of FENCE puts its text and its two fences into the list; only text between matches has links.
    for number in range(0, len(parts), 4):
        parts[number] = LINK.sub(lambda match: replaced(match[1], match[2], match[3] or ""), parts[number])
        parts[number + 2 : number + 4] = ["", ""][: len(parts[number + 2 : number + 4])]
    return "".join(parts)


def _resolved(uri: str, target: str) -> str:
    """The path within the repository that a link on a page of the site means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_repository_path(uri)), target))


def _repository_path(uri: str) -> str:
    return uri.removeprefix("tree/") if uri.startswith("tree/") else f"docs/{uri}"


def _uri(path: str) -> str:
    """Where a file or folder of the repository stands in the site."""
    if (ROOT / path).is_dir():
        readme = (ROOT / path / "README.md").exists()
        return posixpath.normpath(f"tree/{path}/README.md" if readme else f"tree/{path}/folder.md")
    return f"tree/{path}" if path.endswith((".md", *PICTURES)) else f"tree/{path}.md"


def _content(path: str) -> str | bytes:
    file = ROOT / path
    if file.is_dir():
        if (file / "README.md").exists():
            return (file / "README.md").read_text(encoding="utf-8")
        listed = subprocess.run(["git", "ls-files", path], cwd=ROOT, capture_output=True, text=True, check=True)
        names = sorted({line[len(path) + 1 :] for line in listed.stdout.splitlines()})
        return f"# {path}/\n\n" + "".join(f"- `{name}`\n" for name in names)
    if path.endswith(PICTURES):
        return file.read_bytes()
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if len(text) > 60_000:
        raise PluginError(
            f"{path}: a linked file becomes a page, and this one is too large for that; link to its folder"
        )
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"# {path}\n\n{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [path for part in (nav.values() if isinstance(nav, dict) else nav) for path in _paths(part)]
