"""Running the commands as a user would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.convert.tiny import make_hf_model


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Block sizes at which even tiny tensors take several."""
    sizes = {
        "jaxlm.weights.tensors.BLOCK_BYTES": 256,
        "jaxlm.weights.tensors.STRIP_ROWS": 5,
        "jaxlm.weights.transpose.STRIP_ROWS": 5,
        "jaxlm.weights.leaves.BLOCK_ELEMENTS": 250,
        "convert.transforms.merge.BLOCK_BYTES": 300,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(name, size)
        yield


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """A saved float32 LLaMA."""
    make_hf_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `convert …`, which must succeed; returns what it printed."""
    from convert.commands.main import main

    def go(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return go


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs `convert …`, which must fail with status 2 and leave nothing new behind; returns the message."""
    from convert.commands.main import main

    def go(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == 2, (status, printed)
        assert sorted(tmp_path.rglob("*")) == before
        message = printed.err.strip().splitlines()[-1]
        assert message.startswith(f"convert {arguments[0]}: ")
        return message

    return go
