"""How modules import each other, beyond the layers and circles that `lint-imports` checks (pyproject.toml)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Modules whose names are imported late, so that `--help` and `import jaxlm` answer at once.
COMMANDS = (
    "jaxlm/cli/",
    "jaxlm/__init__.py",
    "jaxlm/train.py",
    "jaxlm/api.py",
    "convert/commands/",
    "convert/__init__.py",
)
# Elsewhere only where the import is heavy and seldom needed; the reason stands beside it.
HEAVY = {
    ("jaxlm/kernels/backend.py", "jaxlm.kernels"),  # Pallas
    # Mosaic for GPUs, which every other start would wait for
    ("jaxlm/kernels/flash_attention/__init__.py", "jaxlm.kernels.flash_attention"),
    ("jaxlm/kernels/grouped_matmul.py", "jaxlm.kernels.grouped_matmul_gpu"),
    ("jaxlm/nn/dispatch.py", "jaxlm.kernels.grouped_matmul_gpu"),
    ("jaxlm/nn/nf4.py", "jaxlm.kernels.nf4_matmul_gpu"),  # Triton, which a JAX to come will not have
}


def own_imports(tree: ast.AST, inside: bool = False) -> Iterator[str]:
    """The modules of jaxlm and convert that are imported inside functions."""
    for node in ast.iter_child_nodes(tree):
        if inside and isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif inside and isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from own_imports(node, inside or function)


def test_functions_import_nothing_of_ours_outside_the_commands() -> None:
    found = set()
    for room in ("jaxlm", "convert"):
        for file in sorted((ROOT / room).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            if name.startswith((*COMMANDS, "jaxlm/configs/")):
                continue
            modules = own_imports(ast.parse(file.read_text(encoding="utf-8")))
            found |= {(name, module) for module in modules if module.split(".")[0] in ("jaxlm", "convert")}
    assert found <= HEAVY
