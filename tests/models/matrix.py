"""The table of what each family can do: `pytest tests/models/test_matrix.py --matrix` writes docs/models.md from it.

Cells whose tests did not run (`-k bloom`) stay as they were; every run of a test compares its cell.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# Capability -> what the test of its column did.
CAPABILITIES = {
    "convert": "into jaxlm's format and back: every tensor bit-equal, `config.json` read by transformers",
    "verify": "`convert verify` says equal of the two forms, and names the tensor of which one number differs",
    "deltas": "`make-delta` and `apply-delta` give a tuned model back, bit for bit",
    "logits": "of whole, packed and padded rows, scanned, with caches and streamed, against transformers in float32",
    "gradients": "the gradient of the summed loss by every parameter, against PyTorch",
    "train": "full fine-tuning: the loss of a batch falls with every step",
    "LoRA↔PEFT": "an adapter of PEFT on every linear layer: its logits, and its files there and back bit-equal",
    "LoRA training": "of all linear layers: the loss falls, and PEFT's form of the adapter gives the same logits",
    "generate": "greedy tokens, against transformers' `generate`",
    "beams": "tokens of a beam search with penalties, against transformers' `generate`",
    "evaluate": "`jaxlm evaluate`: log-likelihoods, next tokens and greedy text, against PyTorch's",
    "plan": "`jaxlm plan` of a directory counts its parameters, and `convert inspect` names its architecture",
    "int8": "generation from int8 weights: the model with rounded weights, in a third of the bytes",
    "experts": "`convert moefy`: feed-forward layers divided into experts, with all of them the dense model",
    "sharded": "train steps on eight devices over `data`, `fsdp` and `tensor`: the losses and parameters of one device",
    "TPU compile": "a train step compiled for four chips of a v5e, with the attention that `auto` chooses",
    "GGUF": "a file of llama.cpp, and back: every number (those of a packed file are rounded)",
}
YES, REFUSED, NOT_RUN = "yes", "refused", "not run"
HEADER = "| family |"
_TESTS = ("models/test_matrix.py", "models/test_t5.py", "evaluation/test_families.py", "convert/test_gguf.py")
COMMAND = f"{' '.join(f'tests/{file}' for file in _TESTS)} --matrix"


def read_page() -> dict[str, dict[str, tuple[str, str]]]:
    """Family -> capability -> what the page says: the outcome, and the words of a refusal."""
    if not PAGE.is_file():
        return {}
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line[:1] == "|"]
    notes = dict(found.groups() for line in lines if (found := re.fullmatch(r"(\d+)\. `(.+)`", line)))

    def read(cell: str) -> tuple[str, str]:
        outcome, _, number = cell.rstrip("]").partition(" [")
        return outcome, notes[number] if number else ""

    names, _, *families = rows
    return {
        family: {name: read(cell) for name, cell in zip(names[1:], cells, strict=True)} for family, *cells in families
    }


def settle(request: pytest.FixtureRequest, family: str, *capabilities: str, refused: str = "") -> None:
    """Notes the capabilities that hold, or one and the words in which it is refused.

    The page must say the same or that it was not run, unless it is being written.
    """
    words = " ".join(refused.split())
    for capability in capabilities:
        outcome = REFUSED if words else YES
        assert capability in CAPABILITIES
        request.node.user_properties.append(("matrix", (family, capability, outcome, words)))
        said, _ = read_page().get(family, {}).get(capability, (outcome, ""))
        if not request.config.getoption("--matrix"):
            assert said in (outcome, NOT_RUN), f"docs/models.md says {said}; write it: pytest {COMMAND}"


class Matrix:
    """The plugin of `--matrix`: gathers what tests settled, from the workers of xdist too."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, tuple[str, str]]] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "matrix":
                    family, capability, outcome, words = value
                    self.cells.setdefault(family, {})[capability] = (outcome, words)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if hasattr(terminalreporter.config, "workerinput"):
            return
        known = read_page()
        cells = {family: {**known.get(family, {}), **self.cells.get(family, {})} for family in {*known, *self.cells}}
        PAGE.write_text(page_of(cells), encoding="utf-8")
        terminalreporter.write_line(f"written: {PAGE}, but for what failed: {', '.join(self.failed) or 'nothing'}")


def page_of(cells: dict[str, dict[str, tuple[str, str]]]) -> str:
    """The page, as Markdown."""
    from jaxlm.models.families import FAMILIES

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    names = ("jaxlm", "jax", "transformers", "peft", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    notes: list[str] = []
    lines = [f"{HEADER} {' | '.join(CAPABILITIES)} |", f"|---|{'---|' * len(CAPABILITIES)}"]
    for family in FAMILIES:
        row = []
        for capability in CAPABILITIES:
            outcome, words = cells.get(family, {}).get(capability, (NOT_RUN, ""))
            if words and words not in notes:
                notes.append(words)
            row.append(f"{outcome} [{notes.index(words) + 1}]" if words else outcome)
        lines.append(f"| {family} | {' | '.join(row)} |")
    architectures = [f"`{family.architecture}`" for family in FAMILIES.values()]
    described = [f"- **{name}**: {text}." for name, text in CAPABILITIES.items()]
    refusals = (
        ["What a refusal says:", "", *(f"{n}. `{words}`" for n, words in enumerate(notes, 1)), ""] if notes else []
    )
    return "\n".join(
        [
            "# Models",
            "",
            f"What was tried with a small model of each family, and held. `pytest {COMMAND}` writes",
            f"this page; a test checks that it is current. {today}: {versions}.",
            "",
            *lines,
            "",
            *refusals,
            f"Architectures of `config.json`: {', '.join(architectures)}.",
            "",
            *described,
            "",
        ]
    )
