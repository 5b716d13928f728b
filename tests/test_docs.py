"""The documentation names files, modules and functions that exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "configs", "convert", "docs", "jaxlm", "launch", "tests")
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (
        *ROOT.glob("*.md"),
        *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
        *(
            page
            for folder in ("configs", "launch")
            for suffix in ("yaml", "sh")
            for page in (ROOT / folder).rglob(f"*.{suffix}")
        ),
    )
)
TREE = [f"/{path.relative_to(ROOT).as_posix()}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
# Pages that set the steps of other projects beside ours, with the names of their scripts.
ABOUT_OTHERS = ("docs/systems/", "docs/zh/")
# Scripts of other projects, and names that stand for any.
OTHERS = {
    "finetune.py",
    "llama_preprocess_2.py",
    "llama_transformer.py",
    "tools/weight_diff.py",
    "tools/download.py",
    "run_clm.py",
    "run_clm_resume.py",
    "preprocess.py",
    "train.py",
    "evaluation/run_eval.py",
    "apply_delta.py",
    "jaxlm/NAME.py",
    "jaxlm.X",
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_links_lead_to_pages_and_headings(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_tree_exist(page: str) -> None:
    """Those below the root's folders, and Python files by the end of their path ('training/loop.py')."""
    paths = re.findall(r"(?<![\w./~<*-])[\w./*-]+\.(?:py|md|yaml|sh)\b(?![\w*])", text_of(page))
    for path in {path for path in paths if path not in OTHERS}:
        if path.split("/")[0] in FOLDERS and "/" in path:
            assert any(ROOT.glob(path)), path
        elif path.endswith(".py") and not path.startswith(".") and not page.startswith(ABOUT_OTHERS):
            local = (ROOT / page).parent / path
            assert local.exists() or any(file.endswith(f"/{path}") for file in TREE), path


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_functions_exist(page: str) -> None:
    text = text_of(page)
    for name in set(re.findall(r"python3? -m ((?:jaxlm|convert|tests)[\w.]*\w)", text)) - OTHERS:
        assert importlib.util.find_spec(name) is not None, name
    for name in re.findall(r"`((?:jaxlm|convert)(?:\.\w+)+)", text):
        assert exists(name), name


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name) is not None


def test_the_tree_of_the_architecture_is_the_real_one() -> None:
    """Each room of its list is there, and each room that is there is in the list."""
    block = text_of("docs/architecture.md").split("```")[1]
    listed, below = set(), ""
    for line in block.strip().splitlines():
        names = re.match(r" *(\S+(?:  \S+)*)", line)
        assert names is not None
        for name in names[1].split("  "):
            if name.endswith(("/", ".py")):
                if not line.startswith(" "):
                    below = name
                path = name if not line.startswith(" ") else below + name
                listed.add(path if path.startswith(("jaxlm/", "convert/")) else f"jaxlm/{path}")
    assert all((ROOT / path).exists() for path in listed), listed
    rooms = {
        path.relative_to(ROOT).as_posix() + "/" for path in ROOT.glob("jaxlm/*/") if (path / "__init__.py").exists()
    }
    rooms |= {
        path.relative_to(ROOT).as_posix() + "/" for path in ROOT.glob("convert/*/") if (path / "__init__.py").exists()
    }
    assert rooms <= listed
