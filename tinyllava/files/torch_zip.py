"""PyTorch's .bin and .pth files without PyTorch: a zip archive of a pickle and the tensors' bytes.

    NAME/data.pkl      a pickled dictionary; its tensors refer to storages by number
    NAME/data/0, ...   the storages' bytes, stored without compression
    NAME/byteorder     "little" or "big" (absent in older files: little)

A pickle is a program. Ours runs on an unpickler that can build dictionaries, lists and descriptions of tensors,
and nothing else: any other name that the pickle asks for is refused by that name, before anything is called.
Source: torch/serialization.py and torch/_utils.py, for the names and the order of the arguments.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from tinyllava.errors import FileError
from tinyllava.files.stored import AGAIN, DTYPES, StoredArray

MAX_PICKLE = 64 << 20  # bytes; that of a 70B model takes 0.1 MB
RESAVE = "where PyTorch is, with torch.save(torch.load(file, weights_only=True), file)"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which files before PyTorch 1.6 begin
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


@dataclass(frozen=True)
class Storage:
    """What a tensor's bytes are called in the archive, and their type."""

    key: str
    dtype: str


@dataclass(frozen=True)
class Description:
    """A tensor as the pickle describes it: a window on a storage. Numbers count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Archive:
    """The entries of the zip file, all of them stored as they are, over one mapping of the file."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error, EOFError) as error:
            raise FileError(path, f"a damaged zip archive: {error}", hint=AGAIN) from None
        pickles = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            found = f"a zip archive with {len(pickles)} entries named data.pkl"
            raise FileError(path, found, wanted="a file saved by torch.save")
        self.prefix = pickles[0].removesuffix("data.pkl")
        self.entries = {info.filename.removeprefix(self.prefix): info for info in infos}
        self._checked: set[str] = set()

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of an entry: a view of the mapping, checked against the archive's checksum the first time."""
        info = self.entries.get(name)
        if info is None:
            self.fail(f"no entry {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            self.fail(f"entry {name} is compressed or encrypted")
        # The local header repeats the name; only it says how long its own extra field is.
        fixed = self.mapping[info.header_offset : info.header_offset + 30]
        if len(fixed) < 30 or fixed[:4] != b"PK\x03\x04":
            self.fail(f"entry {name} has no header")
        name_bytes, extra_bytes = struct.unpack("<HH", fixed[26:30])
        start = info.header_offset + 30 + name_bytes + extra_bytes
        if start + info.file_size > len(self.mapping):
            self.fail(f"truncated in entry {name}")
        data = np.frombuffer(self.mapping, np.uint8, info.file_size, start)
        if name not in self._checked:
            if zlib.crc32(data.data) != info.CRC:
                self.fail(f"entry {name} does not match its checksum")
            self._checked.add(name)
        return data

    def fail(self, found: str) -> NoReturn:
        raise FileError(self.path, found, wanted="a whole file saved by torch.save", hint=AGAIN)


def open_torch_zip(path: str | Path) -> dict[str, StoredArray]:
    """The tensors of a file by name; a dictionary inside a dictionary adds its name and a dot.

    FileError for a file of another kind, a damaged one, and one whose pickle asks for more than tensors.
    """
    path = Path(path)
    archive = Archive(path, _map(path))
    if archive.entries["data.pkl"].file_size > MAX_PICKLE:
        archive.fail(f"a pickle of {archive.entries['data.pkl'].file_size} bytes")
    value = unpickle(archive.read("data.pkl").tobytes(), path)
    if "byteorder" in archive.entries and archive.read("byteorder").tobytes() != b"little":
        raise FileError(path, "big-endian tensors", wanted="little-endian ones", hint=f"Save it again {RESAVE}")
    arrays: dict[str, StoredArray] = {}
    for name, description in _flatten(value):
        where = f"{path}: {name}"
        dtype = description.storage.dtype
        arrays[name] = StoredArray(name, dtype, description.shape, where, _loader(archive, description, where))
    if not arrays:
        raise FileError(path, "no tensors in it", wanted="a checkpoint saved by torch.save")
    return arrays


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY))
            if head == LEGACY or head[:2] == b"\x80\x02":
                found = "a PyTorch file from before version 1.6"
                raise FileError(path, found, wanted="a zip archive", hint=f"Save it again {RESAVE}")
            if head[:2] != b"PK":
                raise FileError(path, "not a zip archive", wanted="a file saved by torch.save", hint=AGAIN)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FileError(path, error.strerror or "cannot be read") from None


def _flatten(value: Any, prefix: str = "", depth: int = 0) -> list[tuple[str, Description]]:
    """The tensors in nested dictionaries, with their names joined by dots; everything else is passed over."""
    if not isinstance(value, dict) or depth > 4:
        return []
    found: list[tuple[str, Description]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        found += [(name, item)] if isinstance(item, Description) else _flatten(item, f"{name}.", depth + 1)
    return found


def _loader(archive: Archive, wanted: Description, where: str) -> Callable[[], npt.NDArray[Any]]:
    """Reads the window from its storage. FileError if it reaches beyond."""

    def load() -> npt.NDArray[Any]:
        kind = DTYPES[wanted.storage.dtype]
        data = archive.read(f"data/{wanted.storage.key}")
        n = len(data) // kind.itemsize
        values = data[: n * kind.itemsize].view(kind)
        last = wanted.offset + sum((d - 1) * s for d, s in zip(wanted.shape, wanted.stride, strict=True))
        if 0 not in wanted.shape and last >= n:
            raise FileError(where, f"reaches to element {last} of a storage of {n}", hint=AGAIN)
        if prod(wanted.shape) > n:  # a stride of 0 repeats elements, without bound
            raise FileError(where, f"shape {wanted.shape} on a storage of {n} elements", hint=AGAIN)
        strides = [s * kind.itemsize for s in wanted.stride]
        return np.lib.stride_tricks.as_strided(
            values[min(wanted.offset, n) :], wanted.shape, strides, writeable=False
        )

    return load


# ---- the pickle


def unpickle(data: bytes, path: Path) -> Any:
    """Run a pickle that may build dictionaries, lists and tensors' descriptions. FileError names anything else."""
    try:
        return _Unpickler(data, path).load()
    except FileError:
        raise
    except Exception as error:  # damaged bytes make the machine fail in every way that Python can
        raise FileError(path, f"a damaged pickle: {type(error).__name__}: {error}", hint=AGAIN) from None


# The unpickler written in Python: the one in C allocates as much memory as a damaged number tells it to.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # by opcode

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """The few names that tensors need, each bound to a function of our own."""
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        allowed = ALLOWED.get((module, name))
        if allowed is None:
            found = f"the pickle asks for {module}.{name}"
            hint = "Nothing was run. Do not trust this file"
            raise FileError(self.path, found, wanted="tensors and nothing else", hint=hint)
        return allowed

    def persistent_load(self, saved_id: Any) -> Storage:
        """("storage", type, key, device, length): how a pickle names the bytes of a tensor."""
        kind, dtype, key, *_ = saved_id
        if kind != "storage" or dtype not in STORAGES.values() or not isinstance(key, str):
            raise ValueError(f"a storage called {saved_id!r}")
        return Storage(key, dtype)


def _tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Description:
    """Stands in for torch._utils._rebuild_tensor_v2; what follows the stride concerns gradients."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or len(shape) != len(stride) or len(shape) > 32:
        raise ValueError(f"a tensor of shape {shape} and stride {stride}")
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers):
        raise ValueError(f"a tensor of shape {shape} and stride {stride} at {offset}")
    return Description(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: Description, *_: Any) -> Description:
    """Stands in for torch._utils._rebuild_parameter."""
    return data


def _load_build(self: Any) -> None:
    """BUILD sets attributes. A state dict has one, _metadata, which is of no use here; nothing else needs any."""
    self.stack.pop()
    if not isinstance(self.stack[-1], OrderedDict):
        raise ValueError(f"attributes for a {type(self.stack[-1]).__name__}")


_Unpickler.dispatch[pickle.BUILD[0]] = _load_build

ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
}
