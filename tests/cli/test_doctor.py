"""What `python -m jaxlm.doctor` finds, and what it says to do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.cli.doctor import (
    PACKAGES,
    Finding,
    check_clocks,
    check_disk,
    check_versions,
    main,
    missing_accelerator,
    together,
    wanted_libtpu,
)
from jaxlm.processes.distributed import Hosts

GOOD = {**dict.fromkeys(PACKAGES, "1.0"), "jax": "0.11.2", "jaxlib": "0.11.2"}


def test_this_machine_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dir", str(tmp_path), "--json"]) == 0
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert {"python", "jax, jaxlib", "disk", "memory", "devices", "computes", "attention, packed rows"} <= found.keys()
    assert "with 16 answers at a time 7: " in found["programs of serve"]["value"]
    assert "8 x cpu" in found["devices"]["value"] and "TFLOP/s" in found["computes"]["value"]
    assert not list(tmp_path.iterdir())
    assert main(["--dir", str(tmp_path)]) == 0
    assert "nothing to mend" in capsys.readouterr().out
    assert "runs, first result" in found["attention, packed rows"]["value"]
    assert main(["--dir", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("changes", "python", "what", "advice"),
    [
        ({"jaxlib": "0.11.0"}, (3, 12), "jax, jaxlib", "pip install jaxlib==0.11.2"),
        ({"flax": None}, (3, 12), "flax", "pip install flax"),
        ({"jax-cuda12-plugin": "0.10.2"}, (3, 12), "jax-cuda12-plugin", "pip install jax-cuda12-plugin==0.11.2"),
    ],
)
def test_versions_that_do_not_fit_come_with_advice(
    changes: dict[str, str | None], python: tuple[int, int], what: str, advice: str
) -> None:
    wrong = [finding for finding in check_versions(GOOD | changes, python) if finding.serious]
    assert [finding.what for finding in wrong] == [what] and advice in wrong[0].advice


def test_versions_that_go_together_need_no_advice() -> None:
    wanted = wanted_libtpu()
    assert wanted is not None and wanted.endswith(".")
    good = list(check_versions(GOOD | {"jax-cuda13-plugin": "0.11.2", "libtpu": wanted + "1"}, (3, 12)))
    assert not any(finding.advice for finding in good)
    old = list(check_versions(GOOD, (3, 11)))
    assert [finding.what for finding in old if finding.advice] == ["python"]
    assert not any(finding.serious for finding in old)


def test_an_accelerator_that_is_not_used_is_named() -> None:
    assert missing_accelerator("cpu", lambda path: path == "/dev/nvidia0", "1 x cpu").serious
    assert "jaxlm[tpu]" in missing_accelerator("cpu", lambda path: path == "/dev/accel0", "").advice
    assert not missing_accelerator("gpu", lambda path: True, "").advice
    assert not missing_accelerator("cpu", lambda path: False, "").advice


def test_a_directory_that_cannot_be_written_is_serious(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    found = check_disk(tmp_path)
    assert found.serious and "Permission denied" in found.advice


def test_libtpu_of_another_jax_is_named() -> None:
    (found,) = [one for one in check_versions(GOOD | {"libtpu": "0.0.1"}, (3, 12)) if one.what == "libtpu"]
    assert "pip install 'jax[tpu]==0.11.2'" in found.advice


def test_what_hosts_must_share_and_do_not_is_serious() -> None:
    same, old = Finding("jax, jaxlib", "0.11.2 and 0.11.2"), Finding("jax, jaxlib", "0.10.2 and 0.10.2")
    quick, quicker = Finding("disk", "200 GB free"), Finding("disk", "300 GB free")
    full = Finding("disk", "1 GB free", "make room")
    report = list(together([[same, quick], [same, quicker], [old, full]], ["a", "b", "c"]))
    assert report[0].serious and report[0].value == "0.11.2 and 0.11.2 on a, b; 0.10.2 and 0.10.2 on c"
    assert [(one.value, one.advice) for one in report[1:]] == [
        ("200 GB free on a; all well on 1 others", ""),
        ("1 GB free on c", "make room"),
    ]
    assert list(together([[same], [same]], ["a", "b"])) == [same]
    (libtpu,) = together([[Finding("libtpu", "0.0.42")], []], ["a", "b"])
    assert libtpu.serious and libtpu.value == "0.0.42 on a; none on b"


def test_clocks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts()
    assert check_clocks(hosts).value == "1"
    hosts.processes = 3
    now = time.time()
    for behind, advised in ((0.2, False), (40.0, True)):
        texts = [repr(now), repr(now - behind), repr(now - behind / 2)]
        monkeypatch.setattr(hosts, "exchange", lambda name, value, texts=texts: texts)
        found = check_clocks(hosts)
        assert found.value == f"3, clocks within {behind + 0.005:.2f} s"
        assert ("process 1 is behind process 0" in found.advice) == advised


def test_two_processes_make_one_report(tmp_path: Path) -> None:
    launcher = Path(__file__).parents[2] / "launch" / "local.py"
    command = [sys.executable, str(launcher), "--module", "jaxlm.doctor", "--", "--dir", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text = "\n".join(line.removeprefix("[0] ") for line in done.stdout.splitlines() if line.startswith("[0] "))
    found = {one["what"]: one for one in json.loads(text[text.index("{\n") :])["findings"]}
    assert found["hosts"]["value"].startswith("2, clocks within 0.0") and found["devices"]["value"] == "4 x cpu (cpu)"
    assert found["disk"]["value"].endswith("all well on 1 others") or found["disk"]["advice"]
