"""Writes PyTorch's zip format without PyTorch: what torch.save writes for a dictionary of tensors."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STORAGE_NAMES = {
    "<f4": "FloatStorage",
    "<f2": "HalfStorage",
    "<f8": "DoubleStorage",
    "<i8": "LongStorage",
    "|u1": "ByteStorage",
}


@dataclass
class TensorRef:
    """A tensor in the pickle: which storage, and the window on it, in elements."""

    key: str
    storage: str  # HalfStorage, ...
    n_elements: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0


@dataclass
class Global:
    """A name that the pickle asks for."""

    module: str
    name: str


class Pickler(pickle._Pickler):
    """Protocol 2, with torch's names written as text, so that they need not exist."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, TensorRef):
            self.save(Global("torch._utils", "_rebuild_tensor_v2"))
            self.write(pickle.MARK)
            self.save(("storage", Global("torch", obj.storage), obj.key, "cpu", obj.n_elements))
            self.write(pickle.BINPERSID)
            for argument in (obj.offset, obj.shape, obj.stride, False, {}):
                self.save(argument)
            self.write(pickle.TUPLE + pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def dumps(value: Any) -> bytes:
    """The pickle of a structure of dictionaries, TensorRefs and Globals."""
    out = io.BytesIO()
    Pickler(out, 2).dump(value)
    return out.getvalue()


def write_zip(
    path: Path, pickled: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """The archive of a pickle and its storages."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def save(path: Path, tensors: dict[str, np.ndarray], bf16: tuple[str, ...] = ()) -> None:
    """What torch.save(tensors, path) writes. Arrays named in ``bf16`` are uint16 bits of bfloat16."""
    refs, storages = {}, {}
    for i, (name, values) in enumerate(tensors.items()):
        storage = "BFloat16Storage" if name in bf16 else STORAGE_NAMES[values.dtype.str]
        stride = tuple(s // values.itemsize for s in np.empty(values.shape, values.dtype).strides)
        refs[name] = TensorRef(str(i), storage, values.size, values.shape, stride)
        storages[str(i)] = values.tobytes()
    write_zip(path, dumps(refs), storages)
