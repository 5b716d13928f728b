"""`jaxlm evaluate --task NAME --help`: the options of a task."""

from __future__ import annotations

import dataclasses

import pytest

from jaxlm.cli.evaluate import main
from jaxlm.cli.harness import HarnessOptions
from jaxlm.evaluation.registry import MODULES, get_task


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_tasks_options_are_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its type, its default and a meaning."""
    assert main(["--task", name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"--task {name}"
    for field in dataclasses.fields(get_task(name).options):
        place = next(at for at, line in enumerate(lines) if line.startswith(f"  --options.{field.name}: "))
        assert " = " in lines[place] and lines[place + 1].startswith("      "), field.name
        assert lines[place + 1].strip()


@pytest.mark.parametrize("words", [["--task=qa,numbers", "-h"], ["--options.help", "--task", "qa,numbers"]])
def test_options_of_several_tasks(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words, "jaxlm evaluate") == 0
    text = capsys.readouterr().out
    assert text.index("--task qa\n") < text.index("--task numbers\n") < text.index("--options.tolerance: float = 0.05")
    assert '  --options.question: str = "Question: "\n' in text
    assert text.endswith("`jaxlm evaluate --help` lists all other keys.\n")


def test_options_of_the_harness(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--harness", "arc_easy", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  --options.{field.name}: " in text for field in dataclasses.fields(HarnessOptions))


def test_help_without_a_task_that_has_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--task", "--help"], ["--task", "perplexity", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words, "jaxlm evaluate")
        assert capsys.readouterr().out.startswith("usage: jaxlm evaluate ")


def test_help_of_a_task_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "zbnch", "--help"]) == 2
    assert "did you mean 'zbench'" in capsys.readouterr().err


@pytest.mark.parametrize(("columns", "widest"), [("60", 60), ("500", 100)])
def test_help_is_as_wide_as_the_terminal(
    columns: str, widest: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lengths = [len(line) for line in capsys.readouterr().out.splitlines() if line.startswith(" " * 6)]
    assert widest - 12 < max(lengths) <= widest
