"""Reading `torch.save` files (.bin) without torch and without unpickling.

Such a file is a zip: `data.pkl` describes the tensors, `data/0`, `data/1`, … are the raw storages, stored uncompressed.
The description is a program for the pickle machine. It is not run: its opcodes are listed with `pickletools` and
followed by the few rules that a state dict needs. Any other opcode, class or function is refused, so nothing that a
file asks for is ever imported or called.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.tensors import StoredTensor

STORAGES: dict[str, np.dtype[Any]] = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": BFLOAT16,
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
ORDERED_DICT = "collections OrderedDict"
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
GLOBALS = {ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER, *STORAGES}
# data.pkl takes about 250 bytes a tensor.
MAX_PICKLE_BYTES = 8 << 20
MAX_DIMS = 64

AGAIN = "copy or download the file again"
RESAVE = (
    "re-save it with a recent PyTorch, e.g. "
    "torch.save(torch.load('{name}', weights_only=True), '{name}'), or as safetensors"
)


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype[Any]
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """Not a state dict's program; the reason is the message."""


_MARK = object()


def read_torch_zip(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict written by `torch.save`, located but not read.

    Raises:
        UserError: for the format before PyTorch 1.6, a damaged file, or one that holds anything but tensors by name.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as handle:
        zipped = handle.read(4) == b"PK\x03\x04"
    if not zipped:
        raise UserError(
            f"{path}: not a PyTorch zip file: either cut short or in the format of PyTorch before 1.6; "
            + RESAVE.format(name=path.name)
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise zipfile.BadZipFile("a name occurs twice")
            pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise UserError(f"{path}: a zip file, but not one written by torch.save (no data.pkl)")
            root = pickles[0].removesuffix("data.pkl")
            program = _small_member(path, archive, members[pickles[0]])
            order = members.get(f"{root}byteorder")
            byte_order = _small_member(path, archive, order) if order is not None else b"little"
    # What the zipfile module raises for damaged files is not one family.
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
        struct.error,
    ) as error:
        raise UserError(f"{path}: damaged zip file ({error}); copy or download it again") from None
    if byte_order.strip() != b"little":
        raise UserError(f"{path}: written on a big-endian machine; " + RESAVE.format(name=path.name))
    try:
        state = _run(program)
    except _Refused as error:
        raise UserError(
            f"{path}: refused: {error}; only tensors by name are read. " + RESAVE.format(name=path.name)
        ) from None
    except (ValueError, IndexError, KeyError, struct.error, OverflowError) as error:
        raise UserError(f"{path}: data.pkl is damaged ({error}); {AGAIN}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(state).__name__.strip('_')}, not tensors by name")
    offsets: dict[str, int] = {}
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            kind = type(value).__name__.strip("_")
            raise UserError(f"{path}: entry {name!r} is {kind}, not a tensor; save the model's state dict alone")
        tensors[name] = _locate(path, name, value, members, root, offsets)
    for member in members:
        # A tensor that was pointed at another's storage would leave its own behind.
        if member.startswith(f"{root}data/") and member not in offsets and not member.endswith("/"):
            raise UserError(f"{path}: {member.removeprefix(root)} belongs to no tensor; the file is damaged: {AGAIN}")
    return tensors


def _small_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member that is read whole; its CRC is checked by the zipfile module."""
    name = info.filename.split("/", 1)[-1]
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UserError(f"{path}: {name} is compressed or encrypted; " + RESAVE.format(name=path.name))
    if info.file_size > min(MAX_PICKLE_BYTES, path.stat().st_size):
        raise UserError(f"{path}: {name} has {info.file_size} bytes; not a state dict")
    return archive.read(info)


def _locate(
    path: Path,
    name: str,
    tensor: _Tensor,
    members: dict[str, zipfile.ZipInfo],
    root: str,
    offsets: dict[str, int],
) -> StoredTensor:
    storage = tensor.storage
    info = members.get(f"{root}data/{storage.key}")
    if info is None:
        raise UserError(f"{path}: tensor {name!r} lies in data/{storage.key}, which is not in the file")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise UserError(f"{path}: data/{storage.key} is compressed or encrypted; " + RESAVE.format(name=path.name))
    itemsize = storage.dtype.itemsize
    if len(tensor.shape) != len(tensor.strides) or min((*tensor.shape, *tensor.strides, tensor.offset), default=0) < 0:
        raise UserError(f"{path}: tensor {name!r} has shape {tensor.shape} with strides {tensor.strides}")
    empty = 0 in tensor.shape
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if not empty and (last + 1) * itemsize > info.file_size:
        raise UserError(
            f"{path}: tensor {name!r} reaches byte {(last + 1) * itemsize} of data/{storage.key}, "
            f"which has {info.file_size}"
        )
    if info.filename not in offsets:
        offsets[info.filename] = _data_offset(path, info)
    start = offsets[info.filename] + tensor.offset * itemsize
    contiguous = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    in_order = all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(tensor.shape, tensor.strides, contiguous, strict=True)
    )
    strides = None if in_order or empty else tensor.strides
    return StoredTensor(name, path, start, tensor.shape, storage.dtype, strides)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    # The lengths in the local header may differ from those in the central directory (torch pads the extra field).
    size = path.stat().st_size
    damaged = UserError(f"{path}: damaged zip header of {info.filename}; {AGAIN}")
    with path.open("rb") as handle:
        handle.seek(info.header_offset)
        header = handle.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise damaged
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        name, extra = handle.read(name_length), handle.read(extra_length)
    # A wrong length here would shift the tensor by some bytes, so everything must fit.
    while len(extra) >= 4 and len(extra) >= 4 + int.from_bytes(extra[2:4], "little"):
        extra = extra[4 + int.from_bytes(extra[2:4], "little") :]
    if name != info.filename.encode() or extra:
        raise damaged
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > size:
        raise UserError(f"{path}: cut short inside {info.filename}; {AGAIN}")
    return int(start)


def _run(program: bytes) -> Any:
    """Follows the opcodes of a state dict and returns what they describe."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def pop_mark() -> list[Any]:
        items: list[Any] = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            break
        if name == "MARK":
            stack.append(_MARK)
        elif name in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            stack.append(argument)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "TUPLE":
            stack.append(tuple(pop_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items, stack[-count:] = tuple(stack[-count:]), []
            stack.append(items)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = pop_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            if not isinstance(stack[-1], dict):
                raise _Refused("it sets items of something that is not a dict")
            stack[-1].update(_items(zip(pairs[::2], pairs[1::2], strict=True)))
        elif name in ("APPEND", "APPENDS"):
            values = pop_mark() if name == "APPENDS" else [stack.pop()]
            if not isinstance(stack[-1], list):
                raise _Refused("it appends to something that is not a list")
            stack[-1].extend(values)
        elif name == "GLOBAL":
            stack.append(_known_global(str(argument)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(attribute, str) or not isinstance(module, str):
                raise _Refused("it names a class by something that is not text")
            stack.append(_known_global(f"{module} {attribute}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(function, arguments))
        elif name == "BUILD":
            # A state dict carries a `_metadata` attribute (module versions); it says nothing about the tensors.
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise _Refused("it sets attributes of an object")
        else:
            raise _Refused(f"it uses the pickle operation {name}")
    if len(stack) != 1:
        raise _Refused("it does not end in one object")
    return stack[0]


# Nothing that a program has put together is printed or hashed before its type is known: a tuple of the same tuple
# twice, forty times over, is small in memory but takes forever to go through.


def _items(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    for key, value in pairs:
        if not isinstance(key, str):
            raise _Refused(f"it names an entry by {type(key).__name__.strip('_')}, not by text")
        yield key, value


def _known_global(name: str) -> _Global:
    if name not in GLOBALS:
        raise _Refused(f"it asks for {name[:200].replace(' ', '.')}")
    return _Global(name)


def _storage(value: Any) -> _Storage:
    if not isinstance(value, tuple) or len(value) != 5:
        raise _Refused("it describes a storage in an unknown way")
    kind, storage, key, _, numel = value
    if not isinstance(kind, str) or kind != "storage" or not isinstance(storage, _Global):
        raise _Refused("it holds an object that is not a storage")
    if storage.name not in STORAGES:
        raise _Refused(f"it holds an object of the class {storage.name.replace(' ', '.')}")
    if not isinstance(key, str) or not key.isdigit() or type(numel) is not int:
        raise _Refused("it names a storage by something that is not a number")
    return _Storage(STORAGES[storage.name], key, numel)


def _reduce(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise _Refused("it calls something that is not a known function")
    if function.name == ORDERED_DICT:
        if len(arguments) > 1 or (arguments and not isinstance(arguments[0], (list, tuple))):
            raise _Refused("it builds an OrderedDict in an unknown way")
        return dict(_items((key, value) for key, value in arguments[0])) if arguments else {}
    if function.name == REBUILD_TENSOR:
        storage, offset, shape, strides = arguments[:4]
        good = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
        if not good or max(len(shape), len(strides)) > MAX_DIMS:
            raise _Refused("it describes a tensor in an unknown way")
        if any(type(number) is not int for number in (offset, *shape, *strides)):
            raise _Refused("it describes a tensor by something that is not a number")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))
    if function.name == REBUILD_PARAMETER:
        if not arguments or not isinstance(arguments[0], _Tensor):
            raise _Refused("it describes a parameter in an unknown way")
        return arguments[0]
    raise _Refused(f"it calls {function.name.replace(' ', '.')}")
