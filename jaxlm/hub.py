"""Models, tokenizers and data sets of the Hugging Face hub, as folders of this machine.

A name is hf://owner/name, with @revision and a path inside where they matter, and hf://datasets/owner/name. What is
taken is one commit, in the hub library's own cache: it goes on after a connection that broke, is shared with other
programs, and needs no network for a commit that is there as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from jaxlm.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
PAGES = ("https://huggingface.co/", "https://hf.co/")  # what a browser's address line has
# A name without the scheme: owner/name.
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# What is taken of a repository: a model, the small files of one (tokenizer and shape), or data.
Want = Literal["model", "small", "data"]

# Weights, the first kind that is there; each with what an index of several files is called.
_WEIGHTS = (
    (r"model\.safetensors", r"model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors"),
    (r"pytorch_model\.bin", r"pytorch_model\.bin\.index\.json|pytorch_model-\d+-of-\d+\.bin"),
    (r"consolidated\.\d+\.pth",),
    (r".*\.ckpt",),
    (r".*\.safetensors",),  # MindSpore's, and shards by other names
)
_ADAPTERS = ((r"adapter_model\.safetensors",), (r"adapter_model\.bin",))
_SMALL = ("*.json", "*.model", "*.model.v*", "*.txt", "*.jinja", "*.tiktoken", "*.yaml", "*.npy")
_OWN = "jaxlm/model.json"  # what a directory of jaxlm has; all of it is needed
_BESIDE = ("jaxlm_experts",)  # folders in a Hugging Face directory that jaxlm writes and reads
_NO_DATA = ("README.md", "dataset_infos.json", "*.py", ".*")  # what a repository of data holds about itself
# What this process has found out: names always mean the same for it.
_COMMITS: dict[HubName, HubName] = {}  # name -> the same with its commit
_DOWNLOADED: dict[tuple[HubName, Want], tuple[Path, list[str]]] = {}  # what was fetched -> folder and files
_FOLDERS: dict[Path, HubName] = {}  # path -> its name, for records of what a result was made from
_SPLITS = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test|eval)(?=[/_.-])")


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository of the hub, or a part of one.

    Args:
        kind: model or dataset.
        repo: owner/name.
        revision: branch, tag or commit; None: the main branch.
        inside: a file, folder or pattern in it; empty: all of it.
    """

    kind: str
    repo: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        inside = f"/{self.inside}" if self.inside else ""
        return f"{SCHEME}{'datasets/' if self.kind == 'dataset' else ''}{self.repo}{revision}{inside}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def download_command(self) -> str:
        """The command that fetches it by hand, to be run where the hub can be reached."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repo}{kind}{revision} --local-dir {self.repo.partition('/')[2]}"


def is_address(path: str | Path) -> bool:
    """Whether a path is an address of the hub, hf://… or that of its web page."""
    return str(path).startswith((SCHEME, *PAGES))


def read_address(path: str, key: str) -> HubName:
    """The repository that an address names.

    Raises:
        UserError: it is not one of a model or a data set.
    """
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    expected = f"{key}: {path}: expected hf://owner/name, hf://owner/name@revision or hf://datasets/owner/name/file"
    try:
        uri = parse_hf_uri(path)
    except HfUriError:
        raise UserError(expected) from None
    if uri.type not in ("model", "dataset"):
        raise UserError(f"{expected}; a {uri.type} is neither a model nor data")
    return HubName(uri.type, uri.id, uri.revision, uri.path_in_repo)


def plain_name(path: str | Path) -> HubName | None:
    """What owner/name, without a scheme, means when nothing of that name is on this machine."""
    text = str(path)
    if _PLAIN.fullmatch(text) is None or Path(text.partition("/")[0]).exists():
        return None
    return HubName("model", text)


def pinned(name: HubName, key: str) -> HubName:
    """The same with its commit as the revision; for one process always the same.

    Raises:
        UserError: there is no such repository or revision, it may not be read, or the hub cannot be reached and the
            cache does not know the revision.
    """
    if name.is_pinned:
        return name
    if name not in _COMMITS:
        with _told(name, key):
            resolved = _api().resolve_revision(name.repo, repo_type=name.kind, revision=name.revision).resolved
        _COMMITS[name] = dataclasses.replace(name, revision=resolved)
    return _COMMITS[name]


def push_name(text: str, key: str) -> HubName:
    """The repository of a model that something is to be pushed to: owner/name, with or without hf:// in front.

    Raises:
        UserError: it is not such a name, or has a revision or a path.
    """
    name = read_address(text, key) if is_address(text) else HubName("model", text)
    if _PLAIN.fullmatch(name.repo) is None or name != HubName("model", name.repo):
        raise UserError(f"{key}: {text}: expected owner/name, a model's repository")
    return name


def upload(
    name: HubName, directory: Path, files: Iterable[str], private: bool, branch: str | None, message: str
) -> str:
    """Sends files to a repository as one commit; the repository, and a branch, are made if they are not there.

    What the hub has already is not sent again.

    Args:
        files: relative to the directory.
        private: of a repository that is made.
        branch: None: the main one.

    Returns:
        The commit's address.

    Raises:
        UserError: the hub cannot be reached or refuses: nobody is logged in, or may not write there.
    """
    from huggingface_hub import constants, errors, get_token

    log_in = "hf auth login, or set HF_TOKEN (a token with write access)"
    if get_token() is None:
        raise UserError(f"{name}: nobody is logged in here; do that with {log_in}")
    # Names are taken literally; the library takes patterns.
    patterns = [glob.escape(file) for file in files]
    try:
        with _one_client():
            api = _api()
            api.create_repo(name.repo, private=private, exist_ok=True)
            if branch is not None:
                api.create_branch(name.repo, branch=branch, exist_ok=True)
            commit = api.upload_folder(
                repo_id=name.repo,
                folder_path=directory,
                allow_patterns=patterns,
                revision=branch,
                commit_message=message,
            )
    except _unreachable() as error:
        off = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE forbids the network" if off else f"the hub cannot be reached ({_brief(error)})"
        raise UserError(f"{name}: {why}; the same command again sends what is missing") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise UserError(
                f"{name}: the hub refuses (status {status}): whoever is logged in may not write there, or there is no "
                f"such owner; compare the name, or log in with {log_in}"
            ) from None
        raise UserError(f"{name}: the hub refuses with status {status} ({_brief(error)}); try again later") from None
    return str(commit.commit_url)


def download(name: HubName, want: Want, key: str) -> Path:
    """The folder, file or pattern of this machine that holds what a name means; fetched if the cache lacks some of it.

    Args:
        name: the repository.
        want: which of its files are needed; of weights that are there in several formats one is taken.
        key: the key of the configuration that names it, for messages.

    Raises:
        UserError: as `pinned`; nothing in it is of use; the download broke off; several splits of data, none of which
            was named.
    """
    name = pinned(name, key)
    folder, _ = _downloaded(name, want, key)
    path = folder / name.inside if name.inside else folder
    _FOLDERS[path] = name
    return path


def download_data(name: HubName, key: str) -> list[Path]:
    """The files of data that a name means, in the order of their names; as `download`.

    The folder of a commit may hold more, which another program has fetched.
    """
    folder, names = _downloaded(pinned(name, key), "data", key)
    return [folder / file for file in names]


def _downloaded(name: HubName, want: Want, key: str) -> tuple[Path, list[str]]:
    """The folder of a commit, and which of its files were wanted; for one process once."""
    if (name, want) not in _DOWNLOADED:
        _DOWNLOADED[name, want] = _fetched(name, want, key)
    return _DOWNLOADED[name, want]


def _fetched(name: HubName, want: Want, key: str) -> tuple[Path, list[str]]:
    from huggingface_hub import snapshot_download

    revision = name.revision
    with _told(name, key):
        names = _listing(name)
        chosen = data_files(name, names, key) if want == "data" else model_files(names, name.inside, want)
        if not chosen:
            what = "data" if want == "data" else "tokenizer or configuration" if want == "small" else "model"
            raise UserError(f"{key}: {name} holds no file of a {what}; it has {', '.join(sorted(names)[:8]) or 'none'}")
        patterns = [glob.escape(file) for file in chosen]
        folder = Path(snapshot_download(name.repo, repo_type=name.kind, revision=revision, allow_patterns=patterns))
        missing = [file for file in chosen if not (folder / file).is_file()]
    if missing:
        # A server (or a proxy in front of it) that answers with another commit puts its files elsewhere.
        raise UserError(
            f"{key}: {name}: the hub sent {missing[0]} of another commit, or not at all; remove {folder} and try "
            f"again, or fetch it by hand: {name.download_command}"
        )
    return folder, sorted(chosen)


def downloaded_name(path: str | Path) -> HubName | None:
    """The name of the hub, with its commit, that this process has taken a path from; None for any other path."""
    return _FOLDERS.get(Path(path))


def _listing(name: HubName) -> list[str]:
    """The names of all files of a commit; from the cache where it has them, since a commit never changes."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with contextlib.suppress(CachedRepoTreeNotFoundError):
        cached = get_cached_repo_tree(name.repo, repo_type=name.kind, revision=name.revision)
        return [file.path for file in cached]
    try:
        tree = _api().list_repo_tree(name.repo, recursive=True, revision=name.revision, repo_type=name.kind)
        return [entry.path for entry in tree if hasattr(entry, "size")]  # folders have none
    except _unreachable() as error:
        # A snapshot that older programs have put into the cache comes without a list of its files.
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name.repo, repo_type=name.kind, revision=name.revision, local_files_only=True))
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        if not names:
            raise error from None
        logging.getLogger(__name__).warning(
            "%s: the hub cannot be reached; the cache has %d files of it, which are taken to be all", name, len(names)
        )
        return names


def model_files(names: Iterable[str], inside: str, want: Want) -> list[str]:
    """The files of a repository that a model, or its small files, consist of.

    Weights are taken in one format: safetensors before torch's, as they are read.

    Args:
        names: all files, folders divided by slashes.
        inside: the folder that the model is in, or a file; empty: the root.
        want: "model", or "small" for tokenizer and shape.
    """
    names = list(names)
    if inside in names:  # a file: a tokenizer, with what lies beside it
        folder = str(PurePosixPath(inside).parent)
        return sorted({inside, *model_files(names, "" if folder == "." else folder, "small")})
    prefix = f"{inside.rstrip('/')}/" if inside else ""
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if any(name == _OWN or name.endswith(f"/{_OWN}") for name in below):
        chosen: Collection[str] = [name for name in below if not name.startswith(".") and not name.endswith(".md")]
    else:
        root = [name for name in below if "/" not in name]
        beside = [name for name in below if name.partition("/")[0] in _BESIDE]
        small = [name for name in root if any(fnmatchcase(name, pattern) for pattern in _SMALL)]
        small = [name for name in small if not name.endswith(".index.json")]
        weights = [*_first(root, _ADAPTERS), *_first(root, _WEIGHTS)] if want == "model" else []
        if "adapter_config.json" in root and weights and not _first(root, _WEIGHTS[:4]):
            weights = _first(root, _ADAPTERS)
        chosen = {*small, *beside, *weights}
    return sorted(prefix + name for name in chosen)


def _first(names: Iterable[str], kinds: Iterable[tuple[str, ...]]) -> list[str]:
    """The files of the first kind that is there."""
    for kind in kinds:
        for pattern in kind:
            if files := [name for name in names if re.fullmatch(pattern, name)]:
                return files
    return []


def data_files(name: HubName, names: Iterable[str], key: str) -> list[str]:
    """The files of a repository of data that a name means: one, those of a folder, those of a pattern, or all.

    Raises:
        UserError: it names none of them, or all of several splits, which are seldom meant together.
    """
    inside = name.inside.rstrip("/")
    files = [file for file in names if not any(fnmatchcase(PurePosixPath(file).name, no) for no in _NO_DATA)]
    if not inside:
        chosen = files
        splits = sorted({match.group(1) for file in files if (match := _SPLITS.search(f"/{file}"))})
        if len(splits) > 1:
            example = next(file for file in files if _SPLITS.search(f"/{file}"))
            raise UserError(
                f"{key}: {name} holds several splits ({', '.join(splits)}); name the files of one, or a pattern, e.g. "
                f"{name}/{example}"
            )
    elif any(sign in inside for sign in "*?["):
        from fsspec.utils import glob_translate  # Python's own from 3.13 on

        pattern = re.compile(glob_translate(inside))
        chosen = [file for file in files if pattern.match(file)]
    else:
        chosen = [file for file in files if file == inside or file.startswith(f"{inside}/")]
    if inside and not chosen:
        shown = ", ".join(sorted(files)[:8])
        raise UserError(f"{key}: {name}: the repository has no such file; it has {shown or 'none'}")
    return chosen


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="jaxlm")


def _unreachable() -> tuple[type[Exception], ...]:
    import httpx2  # what the hub library connects with; it comes with it
    from huggingface_hub import errors

    return (
        httpx2.TransportError,
        errors.OfflineModeIsEnabled,
        errors.RevisionResolutionError,
        errors.LocalEntryNotFoundError,
    )


@contextlib.contextmanager
def _one_client() -> Iterator[None]:
    """A block in which threads of the hub library share its client, which the first that cannot connect closes.

    Raises:
        httpx2.ConnectError: in place of the RuntimeError of another that was about to use it.
    """
    import httpx2

    try:
        yield
    except RuntimeError as error:
        if "client has been closed" not in str(error):
            raise
        raise httpx2.ConnectError("no connection") from error


@contextlib.contextmanager
def _told(name: HubName, key: str) -> Iterator[None]:
    """A block that asks the hub; what it answers is told in words that say what to do.

    Raises:
        UserError: in place of the hub library's errors.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if name.kind == 'dataset' else ''}{name.repo}"
    by_hand = f"where the network reaches it, run {name.download_command}, bring the folder here and give its path"
    try:
        with _one_client():
            yield
    except errors.GatedRepoError:
        raise UserError(
            f"{key}: {name} has a licence to accept first: do that at {page}, then log in here with hf auth login (or "
            "set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{key}: {name}: the repository has no branch, tag or commit {name.revision}; see {page}/tree/main"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{key}: {name}: the hub has no such repository, or it is private and you are not logged in; compare the "
            f"name with {page}, or log in with hf auth login (or set HF_TOKEN)"
        ) from None
    except _unreachable() as error:
        off = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE forbids the network" if off else f"the hub cannot be reached ({_brief(error)})"
        again = "" if off else "the same command again goes on where it was; or "
        raise UserError(
            f"{key}: {name} is not in the cache as a whole ({constants.HF_HUB_CACHE}), and {why}; {again}{by_hand}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in again with hf auth login (or correct HF_TOKEN)" if status in (401, 403) else "try again later"
        raise UserError(f"{key}: {name}: the hub refuses with status {status}; {advice}, or {by_hand}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(
                f"{key}: {name} cannot be kept in {constants.HF_HUB_CACHE} ({os.strerror(error.errno)}); set "
                "HF_HUB_CACHE to a folder with room"
            ) from None
        raise UserError(
            f"{key}: {name}: the download broke off ({_brief(error)}); the same command again goes on with it"
        ) from None


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
