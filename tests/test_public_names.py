"""The public names of jaxlm: which there are, and that importing them costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import jaxlm


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_these_are_the_public_names() -> None:
    """They are kept from release to release: a change here breaks other people's notebooks."""
    assert jaxlm.__all__ == ["RunConfig", "__version__", "load", "tokenizer", "train"]
    assert set(jaxlm.__all__) <= set(dir(jaxlm))
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        jaxlm.tarin  # noqa: B018  (an attribute that is not there)


def test_the_names_are_imported_without_jax() -> None:
    heavy = "print(sorted({'jax', 'flax', 'transformers', 'torch', 'pyarrow', 'rich'}.intersection(sys.modules)))"
    assert run(f"import jaxlm, sys; jaxlm.RunConfig, jaxlm.tokenizer, jaxlm.train; {heavy}") == "[]"


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import jaxlm.train",
        "import jaxlm.cli.train",
        "from jaxlm.train import main",
        "jaxlm.train; import jaxlm.train",
        "import jaxlm.config; jaxlm.RunConfig",
    ],
)
def test_train_is_a_function_whatever_was_imported_first(before: str) -> None:
    code = f"import jaxlm; {before}\nimport inspect; print(inspect.signature(jaxlm.train))"
    assert run(code) == "(config: 'RunConfig', *, verbose: 'bool' = False) -> 'Outcome'"
    assert run(f"import jaxlm; {before}\nfrom jaxlm import train; print(callable(train))") == "True"
