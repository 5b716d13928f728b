"""Notebooks of docs/notebooks: as pages of the site, and run from their first cell to their last.

python docs/site/notebooks.py [NAME ...]          runs them, and writes what they print back into them
python docs/site/notebooks.py --check [NAME ...]  runs them, and fails where a cell does
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "notebooks"


def as_pages(notebook: Path) -> dict[str, str | bytes]:
    """Path within the site -> content: the notebook as Markdown, with its outputs, and its pictures."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(notebook))
    folder = f"{notebook.stem}_files"
    text = text.replace("![png](", f"![what the cell draws]({folder}/")
    pages: dict[str, str | bytes] = {f"notebooks/{notebook.stem}.md": text}
    for name, picture in resources.get("outputs", {}).items():
        pages[f"notebooks/{folder}/{name}"] = picture
    return pages


def run(notebook: Path, write: bool) -> float:
    """Runs a notebook in an empty folder; returns seconds.

    Args:
        notebook: the file.
        write: whether its outputs are written into it.
    """
    import nbformat
    from nbclient import NotebookClient

    document = nbformat.read(notebook, as_version=4)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(document, timeout=300, resources={"metadata": {"path": folder}}).execute()
    errors = [output for cell in document.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    if errors:  # under %%capture a cell that fails does not end the run
        raise SystemExit(f"{notebook.name}: {errors[0].ename}: {errors[0].evalue}")
    if write:
        for cell in document.cells:
            cell.metadata.pop("execution", None)  # times of this run
        nbformat.write(document, notebook)
    return time.monotonic() - start


if __name__ == "__main__":
    names = [word for word in sys.argv[1:] if word != "--check"] or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for file in (FOLDER / f"{name}.ipynb" for name in names):
        print(f"{file.name}: {run(file, write='--check' not in sys.argv):.0f} s", flush=True)
