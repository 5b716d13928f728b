"""What `python -m jaxlm.doctor` finds, and what it says to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlm.doctor import PACKAGES, check_disk, check_versions, main, missing_accelerator

GOOD = {**dict.fromkeys(PACKAGES, "1.0"), "jax": "0.11.2", "jaxlib": "0.11.2"}


def test_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dir", str(tmp_path), "--json"]) == 0
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"python", "jax, jaxlib", "disk", "memory", "devices", "computes", "attention, packed rows"} <= found.keys()
    assert "8 x cpu" in found["devices"]["value"] and "TFLOP/s" in found["computes"]["value"]
    assert not list(tmp_path.iterdir())
    assert main(["--dir", str(tmp_path)]) == 0
    assert "nothing to mend" in capsys.readouterr().out
    assert main(["--dir", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("changes", "python", "what", "advice"),
    [
        ({"jaxlib": "0.11.0"}, (3, 12), "jax, jaxlib", "pip install jaxlib==0.11.2"),
        ({"flax": None}, (3, 12), "flax", "pip install flax"),
        ({"jax-cuda12-plugin": "0.10.2"}, (3, 12), "jax-cuda12-plugin", "pip install jax-cuda12-plugin==0.11.2"),
    ],
)
def test_versions(changes: dict[str, str | None], python: tuple[int, int], what: str, advice: str) -> None:
    wrong = [finding for finding in check_versions(GOOD | changes, python) if finding.serious]
    assert [finding.what for finding in wrong] == [what] and advice in wrong[0].advice


def test_versions_that_go_together() -> None:
    good = list(check_versions(GOOD | {"jax-cuda13-plugin": "0.11.2", "libtpu": "0.0.42"}, (3, 12)))
    assert not any(finding.advice for finding in good)
    old = list(check_versions(GOOD, (3, 11)))
    assert [finding.what for finding in old if finding.advice] == ["python"]
    assert not any(finding.serious for finding in old)


def test_an_accelerator_that_is_not_used() -> None:
    assert missing_accelerator("cpu", lambda path: path == "/dev/nvidia0", "1 x cpu").serious
    assert "jaxlm[tpu]" in missing_accelerator("cpu", lambda path: path == "/dev/accel0", "").advice
    assert not missing_accelerator("gpu", lambda path: True, "").advice
    assert not missing_accelerator("cpu", lambda path: False, "").advice


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    found = check_disk(tmp_path)
    assert found.serious and "Permission denied" in found.advice
