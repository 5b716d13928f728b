"""A small server that speaks the Hugging Face hub's protocol: what a repository holds, and its files by ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


class Hub:
    """The repositories of a server, and what it is to do wrong.

    Attributes:
        url: where it listens.
        requests: what was asked, in order.
        broken: file name -> bytes after which its next answer breaks off; once.
        refusals: repository -> (status, error code) for all that is asked of it.
        other_commit: what files say their commit is, in place of the true one.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.broken: dict[str, int] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.other_commit: str | None = None
        self._commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self._branches: dict[tuple[str, str], str] = {}

    def push(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit with these files, to which the branch then points; returns its hash."""
        commit = hashlib.sha1(json.dumps([repo, {n: c.hex() for n, c in files.items()}]).encode()).hexdigest()
        self._commits[repo, commit] = files
        self._branches[repo, branch] = commit
        return commit

    def push_folder(self, repo: str, folder: Path, more: dict[str, bytes] | None = None) -> str:
        """`push` with the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.push(repo, files | (more or {}))

    def downloaded(self) -> list[str]:
        """The names of the files whose content was sent."""
        got = [re.search(r"/resolve/[^/]+/(.*)", request.path) for request in self.requests if request.method == "GET"]
        return sorted({match.group(1) for match in got if match})

    def commit(self, repo: str, revision: str) -> str | None:
        if (repo, revision) in self._commits:
            return revision
        return self._branches.get((repo, revision))

    def files(self, repo: str, commit: str) -> dict[str, bytes]:
        return self._commits[repo, commit]

    def has(self, repo: str) -> bool:
        return any(name == repo for name, _ in self._commits)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            kind, repo, what, revision = match.groups()
            if (commit := self._commit(kind, repo, revision or "main")) is not None:
                files = self.hub.files(self._name(kind, repo), commit)
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in files.items()
                ]
                info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                self._send(json.dumps(tree if what == "tree" else info).encode())
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, repo, revision, name = match[1] or "models", match[2], match[3], match[4]
            if (commit := self._commit(kind.rstrip("/"), repo, revision)) is not None:
                self._file(self.hub.files(self._name(kind.rstrip("/"), repo), commit), name, commit)
        else:
            self._refuse(404, "EntryNotFound")

    def _name(self, kind: str, repo: str) -> str:
        return f"datasets/{repo}" if kind == "datasets" else repo

    def _commit(self, kind: str, repo: str, revision: str) -> str | None:
        name = self._name(kind, repo)
        if name in self.hub.refusals:
            self._refuse(*self.hub.refusals[name])
        elif not self.hub.has(name):
            self._refuse(
                401, "RepoNotFound"
            )  # as the hub does: it does not tell what is private from what is not there
        elif (commit := self.hub.commit(name, revision)) is None:
            self._refuse(404, "RevisionNotFound")
        else:
            return commit
        return None

    def _file(self, files: dict[str, bytes], name: str, commit: str) -> None:
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        content, begin, status = files[name], 0, 200
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": self.hub.other_commit or commit}
        headers["Accept-Ranges"] = "bytes"
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        stop = None if self.command == "HEAD" else self.hub.broken.pop(name, None)
        return self._send(content[begin:], status, headers, stop)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", status, {"X-Error-Code": code, "X-Error-Message": "refused by the test's server"})

    def _send(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, stop: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop])
        if stop is not None:
            self.close_connection = True


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server, to which the hub library of this process turns, with a cache of its own."""
    from huggingface_hub import _tree_cache, constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    forget()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        forget()


def forget() -> None:
    """What a new process does not know."""
    import jaxlm.hub

    jaxlm.hub._COMMITS.clear()
    jaxlm.hub._DOWNLOADED.clear()
    jaxlm.hub._FOLDERS.clear()
