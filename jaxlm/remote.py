"""Files of data wherever they lie: on this machine, or behind an address that fsspec reads (gs://, s3://, memory://).

One place opens an address, so that a source on a bucket is read by the same code as one on a disk: what `open_location`
returns has pathlib's methods either way (`upath.UPath`, of the package universal_pathlib, for addresses).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jaxlm.errors import UserError

if TYPE_CHECKING:
    from upath import UPath

# A file or folder of this machine, or one behind an address.
Location: TypeAlias = "Path | UPath"

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://")
# The packages that fsspec reads a scheme with, where they do not come with it.
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp requests"),
    **dict.fromkeys(("ssh", "sftp"), "paramiko"),
    "hdfs": "pyarrow",
    "oss": "ossfs",
    "smb": "smbprotocol",
}


def scheme_of(path: str | Path) -> str | None:
    """The scheme of an address (`s3` for s3://bucket/file), in small letters; None for a path of this machine."""
    match = _ADDRESS.match(str(path))
    return None if match is None else match["scheme"].lower()


def open_location(path: str, key: str) -> Location:
    """The file or folder that a path or an address means; nothing is read.

    Args:
        path: a path of this machine, file:///…, or an address. It may be a pattern, which `matches` resolves.
        key: the key of the configuration that names it, for messages.

    Raises:
        UserError: fsspec does not know the scheme, or the package that reads it is not installed.
    """
    scheme = scheme_of(path)
    if scheme is None:
        return Path(path)
    if scheme in ("file", "local"):
        # What datasets and others write; all that works on a path works on it.
        rest = path.partition("://")[2]
        return Path(urllib.parse.unquote(rest))
    from upath import UPath  # takes its time, and only addresses need it

    with _told(path, scheme, key):
        location = UPath(path)
        _ = location.fs
    return location


def matches(location: Location, key: str) -> list[Location]:
    """The files that a pattern (`*`, `?`, `[…]`, `**`) means, or the file itself, in the order of their names.

    Raises:
        UserError: the address cannot be reached.
    """
    if isinstance(location, Path):
        names = sorted(glob.glob(str(location), recursive=True))  # noqa: PTH207 (absolute patterns)
        return [path for path in map(Path, names) if path.is_file()]
    from upath import UPath

    filesystem = location.fs
    with reading(location, key):
        found = filesystem.glob(str(location), detail=True)
    names = sorted(name for name, info in found.items() if info["type"] == "file")
    return [UPath(filesystem.unstrip_protocol(name), **location.storage_options) for name in names]


def files_below(folder: Location, key: str) -> list[Location]:
    """The files of a folder and of those in it, without hidden ones, in the order of their names.

    Raises:
        UserError: the address cannot be reached.
    """
    if isinstance(folder, Path):
        return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    from upath import UPath

    filesystem = folder.fs
    with reading(folder, key):
        names = sorted(filesystem.find(str(folder)))
    paths = [UPath(filesystem.unstrip_protocol(name), **folder.storage_options) for name in names]
    return [path for path in paths if not path.name.startswith(".")]


class FileStatus(NamedTuple):
    """A file's size in bytes, and its time of change (ns) or the storage's own mark of its version."""

    size: int
    version: int


def file_status(file: Location, key: str) -> FileStatus:
    """A file's size and version.

    Raises:
        FileNotFoundError: a file of this machine is not there.
        UserError: the address cannot be reached.
    """
    if isinstance(file, Path):
        status = file.stat()
        return FileStatus(status.st_size, status.st_mtime_ns)
    with reading(file, key):
        # Made of what the storage says of the file: an ETag, a generation, a time.
        mark = hashlib.sha256(str(file.fs.ukey(file.path)).encode()).digest()
        return FileStatus(file.stat().st_size, int.from_bytes(mark[:7]))


@contextlib.contextmanager
def reading(location: Location, key: str) -> Iterator[None]:
    """A block that reads a location; what goes wrong on the way to an address is told with its name.

    Raises:
        UserError: the address cannot be reached, is refused, or the connection broke. What befalls a file of this
            machine is raised as it is.
    """
    if isinstance(location, Path):
        yield
        return
    scheme = location.protocol
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{key}: {location} does not exist") from None
    except PermissionError as error:
        raise UserError(
            f"{key}: {location} may not be read ({error}); log in with the tools of that storage (its credentials are "
            f"taken as {_package(scheme)} takes them)"
        ) from None
    except _errors_of(scheme) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{key}: {location} cannot be read: {why}; look after the network and your credentials and give the same "
            "command again, or copy the file here"
        ) from None


def _errors_of(scheme: str) -> tuple[type[Exception], ...]:
    """What a storage's package raises when it cannot be read; the packages are those in use."""
    if scheme in ("http", "https"):
        import aiohttp

        return (OSError, aiohttp.ClientError)
    if scheme in ("gs", "gcs"):
        import gcsfs.retry

        return (OSError, gcsfs.retry.HttpError)
    if scheme in ("s3", "s3a"):
        import botocore.exceptions

        return (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
    return (OSError,)


def _package(scheme: str) -> str:
    return PACKAGES.get(scheme, "fsspec").split()[0]


@contextlib.contextmanager
def _told(path: str, scheme: str, key: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        package = PACKAGES.get(scheme, f"the package that fsspec reads {scheme}:// with")
        extra = "pip install 'jaxlm[remote]', or " if scheme in ("s3", "gs", "gcs", "http", "https") else ""
        raise UserError(
            f"{key}: {path}: what reads {scheme}:// is not installed; {extra}pip install {package}"
        ) from None
    except ValueError:
        from fsspec import available_protocols

        known = [name for name in ("gs", "s3", "abfs", "https", "hdfs") if name in available_protocols()]
        raise UserError(
            f"{key}: {path}: nothing reads {scheme}://; known are a path, hf:// and "
            f"{', '.join(f'{name}://' for name in known)}"
        ) from None
