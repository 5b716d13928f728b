"""`jaxlm push`: what would be sent, what is sent, and what the messages say; the hub's library is stubbed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from jaxlm.cli.main import main

MODEL = {"config.json": "{}", "model.safetensors": "abc", "README.md": "# A model", "tokenizer.json": "{ }"}


class Api:
    """What the hub's library is asked."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._failure = failure

    def __getattr__(self, name: str) -> Any:
        def ask(repo: str | None = None, **options: Any) -> Any:
            self.asked.append((name, {"repo_id": repo} | options if repo else options))
            if name == "upload_folder" and self._failure is not None:
                raise self._failure
            return SimpleNamespace(commit_url="https://huggingface.co/me/mine/commit/1")

        return ask


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / ".cache").mkdir(parents=True)
    (directory / ".cache" / "lock").write_text("x")
    for name, text in MODEL.items():
        (directory / name).write_text(text)
    return directory


def stubbed(monkeypatch: pytest.MonkeyPatch, api: Api, token: str | None = "t") -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Api()
    stubbed(monkeypatch, api, token=None)
    assert main(["push", str(model), "me/mine", "--dry-run", "--private"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("a Hugging Face model, 4 files, 17 B -> me/mine, private\n")
    assert "  model.safetensors        3 B\n" in printed
    assert ".cache" not in printed and "nothing was sent" in printed and "note:" not in printed
    assert api.asked == []
    assert main(["push", str(model), "me/mine", "--dry-run", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "what": "a Hugging Face model",
        "repo": "me/mine",
        "revision": None,
        "private": True,
        "files": {name: len(text) for name, text in MODEL.items()},
        "bytes": 17,
        "has_card": True,
        "url": None,
    }
    assert api.asked == []
    stubbed(monkeypatch, api)
    assert main(["push", str(model), "me/mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == "https://huggingface.co/me/mine/commit/1"


def test_files_are_sent_as_one_commit(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Api()
    stubbed(monkeypatch, api)
    (model / "README.md").unlink()
    (model / "odd[1].txt").write_text("y")
    words = ["push", str(model), "hf://me/mine", "--private", "--revision", "v1", "--message", "first"]
    assert main(words) == 0
    (made, made_with), (branch, branch_with), (sent, sent_with) = api.asked
    assert (made, made_with) == ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True})
    assert (branch, branch_with["branch"]) == ("create_branch", "v1")
    assert sent == "upload_folder"
    assert sent_with == {
        "repo_id": "me/mine",
        "folder_path": model,
        "allow_patterns": ["config.json", "model.safetensors", "odd[[]1].txt", "tokenizer.json"],
        "revision": "v1",
        "commit_message": "first",
    }
    printed = capsys.readouterr().out
    assert "pushed: https://huggingface.co/me/mine/commit/1" in printed and "note: there is no README.md" in printed


def refused(status: int) -> HfHubHTTPError:
    request = httpx2.Request("POST", "https://huggingface.co/api")
    return HfHubHTTPError("refused", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("failure", "token", "message"),
    [
        (None, None, "hf://me/mine: nobody is logged in here; do that with hf auth login"),
        (refused(403), "t", "may not write there, or there is no such owner"),
        (refused(500), "t", "refuses with status 500"),
        (httpx2.ConnectError("no route"), "t", "cannot be reached (no route); the same command again sends what is"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(
    failure: Exception | None,
    token: str | None,
    message: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stubbed(monkeypatch, Api(failure), token)
    assert main(["push", str(model), "me/mine"]) == 2
    assert message in capsys.readouterr().err


def test_what_is_not_to_be_pushed_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stubbed(monkeypatch, Api())

    def message(*words: object) -> str:
        assert main(["push", *map(str, words), "--dry-run"]) == 2
        return capsys.readouterr().err

    assert "expected owner/name" in message(model, "mine")
    assert "expected owner/name" in message(model, "hf://datasets/me/mine")
    assert "expected owner/name" in message(model, "hf://me/mine@main")
    assert "no such directory" in message(tmp_path / "no", "me/mine")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "is a run, with its checkpoints and logs; push what others can use" in message(tmp_path / "run", "me/mine")
    (tmp_path / "empty").mkdir()
    assert "holds no model or adapter (no files)" in message(tmp_path / "empty", "me/mine")


def test_a_file_that_was_cut_short_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxlm.weights.manifest import Hasher

    stubbed(monkeypatch, Api())
    with Hasher(model) as hasher:
        hasher.finish()
    (model / "README.md").write_text("# Another card")
    assert main(["push", str(model), "me/mine", "--dry-run"]) == 0
    capsys.readouterr()
    (model / "model.safetensors").write_text("ab")
    assert main(["push", str(model), "me/mine", "--dry-run"]) == 2
    assert "model.safetensors has 2 bytes, and manifest.json says 3" in capsys.readouterr().err
