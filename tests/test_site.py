"""The reference of the documentation site says what the code says."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from convert.commands.combine import normalise
from convert.commands.main import _parser as convert_parser
from jaxlm.cli.main import VERBS
from jaxlm.cli.main import main as jaxlm
from jaxlm.config.run import OptimizerConfig, RunConfig
from jaxlm.config.schema import all_keys, is_within_list
from jaxlm.evaluation.registry import MODULES, TEXTS

ROOT = Path(__file__).parent.parent
FIRST_PAGES = ["README.md", "docs/start.md", "docs/installing.md", "docs/troubleshooting.md", "docs/numerics.md"]


def module_of(name: str) -> ModuleType:
    """A script of docs/site, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return module_of("reference")


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    made: dict[str, str] = reference.pages()
    return made


def test_every_key_of_a_run_has_a_row_with_its_meaning(pages: dict[str, str]) -> None:
    text = pages["reference/configuration.md"]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE))
    # Keys of what stands in a list, as a source does, have no name on the command line.
    keys = {key.rpartition(".")[2] if is_within_list(key, RunConfig) else f"--{key}" for key in all_keys(RunConfig)}
    keys -= {
        f"--{key}" for key in all_keys(RunConfig) if any(other.startswith(f"{key}.") for other in all_keys(RunConfig))
    }
    assert len(keys) > 100
    missing = sorted(keys - set(rows))
    assert not missing
    for key in keys:
        kind, default, meaning = re.split(r"(?<!\\) \| ", rows[key])
        assert kind.startswith("`") and default.startswith("`") and len(meaning) > 5, key
    assert "| `--train.tasks` | `[task, ...]` | `[]` |" in text
    assert f"| `--optimizer.learning_rate` | `float` | `{OptimizerConfig().learning_rate}` |" in text


def test_every_command_has_a_page_with_all_that_its_help_says(reference: ModuleType, pages: dict[str, str]) -> None:
    def words(text: str) -> list[str]:
        return re.findall(r"[\w.-]{2,}", text.replace("\\", ""))

    assert {reference.command_path(name) for name in VERBS} < set(pages)
    for name in VERBS:
        shown = words(pages[reference.command_path(name)])
        if name in reference.TAKE_ALL_KEYS:
            shown += words(pages[reference.KEYS])
        assert not set(words(reference.help_of(name))) - set(shown), name


def test_verbs_and_tasks_are_all_there(reference: ModuleType, pages: dict[str, str]) -> None:
    assert (
        "## convert merge\n" in pages["reference/convert.md"]
        and "BASE ADAPTER [ADAPTER ...]" in pages["reference/convert.md"]
    )
    assert len(reference.verbs_of("convert")) > 20
    assert "## prepare inspect\n" in pages["reference/prepare.md"]
    assert re.findall(r"^## (\w+)$", pages["reference/tasks.md"], re.MULTILINE) == sorted({*MODULES, *TEXTS})
    assert "| `--options.few_shot` |" in pages["reference/tasks.md"]


def test_signs_of_a_meaning_are_not_markup(reference: ModuleType) -> None:
    text = "usage: x\n\n  --a_b: str|null = null\n      take <this> or `that_one`|*\n      and more.\n"
    assert (
        "| `--a_b` | `str\\|null` | `null` | take \\<this\\> or `that_one`\\|\\* and more. |"
        in reference.as_markdown(text)
    )
    assert (
        reference.as_markdown("usage: x [-h]\n\noptions:\n  -h, --help  show")
        == "```text\nusage: x [-h]\n\noptions:\n  -h, --help  show\n```"
    )


def commands_of(page: str) -> list[str]:
    """The command lines of ours on a page, in blocks and within sentences, but for shortened ones."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    spans = re.findall(r"(?<!`)`((?:jaxlm|convert) [^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line.strip().replace(".venv/bin/", "") for line in [*blocks, *spans]]
    return [
        line for line in lines if re.match(r"(jaxlm|convert) ", line) and not re.search(r"…|\bFILE\b|\.\.\. ?", line)
    ]


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*/*.md")) + FIRST_PAGES
)
def test_commands_of_the_pages_are_understood(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their configurations are found, and their flags and values are taken."""
    for line in commands_of(page):
        program, *words = shlex.split(line, comments=True)
        if program == "convert" and len(words) > 2:
            convert_parser("convert")[0].parse_args(normalise(words))
        elif words and words[0] in ("train", "plan", "generate", "evaluate", "serve") and len(words) > 1:
            with pytest.raises(SystemExit) as end:
                assert jaxlm([*words, "--print_config"]) == 0, (line, capsys.readouterr().err)
                raise SystemExit(0)
            assert not end.value.code, line
        elif program == "jaxlm":
            assert words[0] in VERBS or words[0] == "--help", line
