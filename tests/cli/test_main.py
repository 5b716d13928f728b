"""`jaxlm VERB`: every command under one name, and by its own as before."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import ClassVar

import pytest

from convert.commands.main import main as convert
from jaxlm.cli.main import VERBS, main
from jaxlm.errors import UserError, exit_status, write_line


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: jaxlm VERB")
    assert all(f"  {name} " in text for name in VERBS)


def test_an_unknown_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: 'trian' is not a command of jaxlm; did you mean 'train'?\n"
    assert main(["fly"]) == 2
    assert "there are train, generate" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        convert(["merg"])
    assert "'merg' is not a verb; did you mean 'merge'?" in capsys.readouterr().err


def test_the_version_is_that_of_the_package() -> None:
    assert run("-m", "jaxlm", "--version").stdout == "jaxlm 0.1.0\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_the_program_as_it_was_called(verb: str) -> None:
    own = ("-m", "convert") if verb == "convert" else ("-m", f"jaxlm.{verb.replace('-', '_')}")
    ways = {("-m", "jaxlm", verb): f"python -m jaxlm {verb}", own: f"python {' '.join(own)}"}
    for words, prog in ways.items():
        assert run(*words, "--help").stdout.startswith(f"usage: {prog} ")


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_answered_without_jax(verb: str) -> None:
    """And without anything else that takes a second to import."""
    code = (
        "import json, sys\nfrom jaxlm.cli.main import main\n"
        f"try:\n    main([*{[verb] if verb else []}, '--help'])\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    modules = json.loads(run("-c", code).stdout.splitlines()[-1])
    assert not {"jax", "flax", "transformers", "torch", "matplotlib", "pyarrow", "rich.console"}.intersection(modules)


def test_the_exit_status_reaches_the_shell() -> None:
    assert run("-m", "jaxlm", "train", "--nope").returncode == 2
    assert run("-m", "jaxlm.train", "--nope").returncode == 2
    assert run("-m", "jaxlm.generate", "--nope").returncode == 2


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("a.b: 3 is odd"), 2, "error: a.b: 3 is odd\n"),
        (OSError(28, "No space left on device", "out/x"), 2, "error: out/x: No space left on device; free some space"),
        (OSError("what"), 2, "error: input or output: what\n"),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: input or output: Broken pipe\n"),  # of a socket
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_can_be_mended_is_said_in_a_line(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise error

    assert exit_status(command) == status
    assert capsys.readouterr().err.startswith(message)


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    def command() -> int:
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        exit_status(command)


def test_a_line_is_written_at_once() -> None:
    """With its end: processes that share a terminal write lines, not parts of them."""

    class Stream(io.StringIO):
        parts: ClassVar[list[str]] = []

        def write(self, text: str) -> int:
            self.parts.append(text)
            return super().write(text)

    write_line("error: a file", stream := Stream())
    assert stream.parts == ["error: a file\n"]
