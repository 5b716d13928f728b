"""Where files are: `~`, paths in a configuration, configurations that come with jaxlm, names of the Hugging Face hub,
the base of an adapter."""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from jaxlm.errors import UserError
from jaxlm.hub import HubName, Want, download, downloaded_name, is_address, pinned, plain_name, read_address
from jaxlm.remote import open_location, scheme_of

Config = TypeVar("Config")

# Types of configuration keys that hold a path. Read: `~` is expanded, and a relative one that a YAML file gives is
# looked for in the working directory, then in the folder of that file. Named: what ends in .json is such a path, all
# else is a name. Written: `~` is expanded.
READ, NAMED, WRITTEN = "a path that is read", "a name, or a .json file that is read", "a path that is written"
ReadPath = Annotated[str, READ]
NameOrPath = Annotated[str, NAMED]
WrittenPath = Annotated[str, WRITTEN]

PACKAGED = Path(__file__).parent / "configs"


def expand_user(path: str) -> str:
    """`path` with a leading `~` or `~name` as that home directory.

    Raises:
        UserError: there is no such user; nothing may be written to a folder that is called `~name`.
    """
    expanded = os.path.expanduser(path)  # noqa: PTH111  (pathlib would also drop a "./" in front and a "/" at the end)
    if expanded.startswith("~"):
        name = expanded.split("/")[0]
        raise UserError(f"{path}: there is no home directory {name}; a file of that name is ./{path}")
    return expanded


def at_home(path: str | Path) -> Path:
    """`path` with a leading `~` as the home directory; what names no user stays as it is, as `./~name` does."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (pathlib's own fails for a user that is not known)


def find_config(name: str) -> Path:
    """The file that `--config NAME` means: a file, or a configuration that comes with jaxlm.

    Args:
        name: a path; or a name below configs/, with or without that folder and the ending: alpaca/lora.

    Raises:
        UserError: neither; the message names near ones.
    """
    path = Path(expand_user(name))
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{name}: is a directory; name a YAML file in it")
    packaged = packaged_configs()
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    if wanted in packaged:
        return packaged[wanted]
    near = difflib.get_close_matches(wanted, packaged, 1)
    folders = dict.fromkeys(f"{known.split('/')[0]}/" for known in packaged if "/" in known)
    top = [known for known in packaged if "/" not in known]
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(top)}, and more in {', '.join(folders)}"
    raise UserError(f"{name}: no such file, and no configuration of that name comes with jaxlm; {hint}")


def packaged_configs() -> dict[str, Path]:
    """Configurations that come with jaxlm: name -> file."""
    files = sorted(PACKAGED.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {str(file.relative_to(PACKAGED).with_suffix("")): file for file in files}


def locate_paths(values: Any, root: type, folder: Path | None = None) -> Any:
    """Raw values of a configuration with its paths expanded and found.

    Args:
        values: as YAML has them, keys checked, types not.
        root: the dataclass that they are for.
        folder: where a relative path that is read is looked for when the working directory does not have it.

    Raises:
        UserError: see `expand_user`, with the key.
    """
    return _located(values, root, "", folder)


def _located(value: Any, hint: Any, key: str, folder: Path | None) -> Any:
    if isinstance(value, str):
        kind = next(_kinds(hint), None)
        if kind is not None and not value.strip():  # an unset variable of a shell; it would be the working directory
            raise UserError(f"{key}: the path is empty; give one, or leave the key out")
        if kind is None or is_address(value) or (kind == NAMED and not value.endswith(".json")):
            return value
        try:
            path = expand_user(value)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        return path if kind == WRITTEN or folder is None else _beside(path, folder)
    if isinstance(value, list):
        return [_located(inner, hint, key, folder) for inner in value]
    section = next((part for part in _parts(hint) if dataclasses.is_dataclass(part)), None)
    if isinstance(value, dict) and section is not None:
        hints = typing.get_type_hints(section, include_extras=True)
        prefix = f"{key}." if key else ""
        return {
            name: _located(inner, hints[name], f"{prefix}{name}", folder) if name in hints else inner
            for name, inner in value.items()
        }
    return value


def _beside(path: str, folder: Path) -> str:
    """`path`, or the same below `folder` when only that is there; patterns like *.json too."""

    def exists(candidate: Path) -> bool:
        pattern = any(sign in candidate.name for sign in "*?[")
        return candidate.exists() or (pattern and any(candidate.parent.glob(candidate.name)))

    candidate = folder / path
    return str(candidate) if not exists(Path(path)) and exists(candidate) else path


def _parts(hint: Any) -> Iterator[Any]:
    """The types in a union or a tuple, at any depth, `hint` itself among them."""
    yield hint
    if typing.get_origin(hint) is not Annotated:
        for inner in typing.get_args(hint):
            yield from _parts(inner)


def _kinds(hint: Any) -> Iterator[str]:
    for part in _parts(hint):
        if typing.get_origin(part) is Annotated:
            yield from (kind for kind in part.__metadata__ if kind in (READ, NAMED, WRITTEN))


def hub_name(path: str | Path, key: str = "model") -> HubName | None:
    """What a path means on the Hugging Face hub: an address (hf://…), or owner/name where no such folder is here.

    Raises:
        UserError: it is an address, and not one of a model or a data set.
    """
    if is_address(path):
        return read_address(str(path), key)
    return None if at_home(path).exists() else plain_name(path)


def on_disk(path: str | Path, want: Want = "model", key: str = "model") -> Path:
    """Where a model, adapter, tokenizer or data set lies on this machine; one of the hub is downloaded first.

    What is neither here nor a name of the hub is given back as it is: whoever opens it says what it expected.

    Args:
        path: a path, or a name of the hub. A folder of that name on this machine is taken before the hub's.
        want: which of the hub's files are needed, see `hub.download`.
        key: the key of the configuration that names it, for messages.

    Raises:
        UserError: see `hub.download`; a bucket's address, from which only data are read.
    """
    name = hub_name(path, key)
    if name is None:
        scheme = scheme_of(path)
        if scheme is not None and scheme not in ("file", "local"):
            raise UserError(
                f"{key}: {path}: only the records of data are read from {scheme}://; copy it here and give its path, "
                "or a name of the Hugging Face hub (hf://owner/name)"
            )
        return at_home(path) if scheme is None else Path(str(open_location(str(path), key)))
    if want != "data" and name.kind == "dataset":
        raise UserError(f"{key}: {path}: is a data set, expected a model (hf://owner/name)")
    if want == "data" and name.kind == "model":
        raise UserError(f"{key}: {path}: is a model; a data set is hf://datasets/owner/name")
    if is_address(path):
        return download(name, want, key)
    try:
        return download(name, want, key)
    except UserError as error:
        raise UserError(not_found(path, error)) from None


def not_found(path: str | Path, error: UserError) -> str:
    """What to say about owner/name, which is neither here nor on the hub: it may be a path with a mistake."""
    return f"{missing(path)}, and as a name on the Hugging Face hub: {error}"


def missing(path: str | Path) -> str:
    """What to say about a model, adapter or tokenizer that is not there."""
    return f"{path}: no such directory or file (relative paths are looked for in {Path.cwd()})"


def pin_names(config: Config, change: Callable[[str, str], str]) -> Config:
    """A configuration with `change(path, key)` in place of every path that is read.

    Args:
        config: a dataclass whose types say which values are paths.
        change: gets the path and its key, as `data.train[0].path`.
    """
    return typing.cast(Config, _changed(config, type(config), "", change))


def _changed(value: Any, hint: Any, key: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        return change(value, key) if READ in _kinds(hint) else value
    if isinstance(value, tuple):
        return tuple(_changed(inner, hint, f"{key}[{number}]", change) for number, inner in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value), include_extras=True)
        prefix = f"{key}." if key else ""
        changes = {
            field.name: _changed(getattr(value, field.name), hints[field.name], f"{prefix}{field.name}", change)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changes)
    return value


def record_base(base: str, directory: Path) -> dict[str, str]:
    """How an adapter in `directory` records its base: where it is, and where from there, should both move together.

    One of the hub is recorded by its name, with the commit.
    """
    if (name := hub_name(base) or downloaded_name(base)) is not None:
        return {"base": str(pinned(name, "base"))}
    where = Path(base).absolute()
    return {"base": str(where), "base_from_here": os.path.relpath(where, directory.absolute())}


def find_base(content: Mapping[str, Any], adapter: Path) -> Path | None:
    """The directory of the base that an adapter's model.json or adapter_config.json records; None: it is not here.

    Args:
        content: the file's `base` or `base_model_name_or_path`, and `base_from_here` where there is one.
        adapter: directory of the adapter. A recorded relative path, as older ones and PEFT's have it, was meant from
            the working directory of its time, so it is looked for from here and from every folder above the adapter.
    """
    base = content.get("base") or content.get("base_model_name_or_path")
    if not base:
        return None
    if is_address(base):
        return on_disk(base)
    candidates = [Path(base)]
    if content.get("base_from_here"):
        candidates.append(adapter / content["base_from_here"])
    if not Path(base).is_absolute():
        candidates += [parent / base for parent in adapter.absolute().parents]
    return next((candidate for candidate in candidates if candidate.exists()), None)
