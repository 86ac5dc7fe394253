"""StoredArray: what the readers of checkpoints give, be the file safetensors or PyTorch's.

An array's name, type and shape are known once its file's header is read; its numbers are read when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.errors import FileError

# Stored type -> the NumPy type of its bits, little-endian. NumPy has no bfloat16 and no 8-bit float.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
}
AGAIN = "Download the file again"


@dataclass(frozen=True)
class StoredArray:
    """An array in a shard. ``dtype`` is a key of DTYPES; nothing is read before :meth:`read`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    where: str  # what messages call it: file and name
    load: Callable[[], npt.NDArray[Any]] = field(repr=False)

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.n_elements * DTYPES[self.dtype].itemsize

    def read(self) -> npt.NDArray[Any]:
        """The array of ``shape``, little-endian as stored; a view of the mapped file where the format allows.

        BF16 comes as the uint16 of its bits, 8-bit floats as uint8. FileError if the shard is damaged there.
        """
        return self.load()

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32: exact for F32, F16, BF16. FileError for a type that holds no floats."""
        values = self.read()
        if self.dtype == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        if self.dtype not in ("F16", "F32", "F64"):
            raise FileError(self.where, f"type {self.dtype}", wanted="F32, F16, BF16 or F64")
        return values.astype(np.float32)


def stored(name: str, values: npt.NDArray[Any], dtype: str | None = None) -> StoredArray:
    """An array in memory as a StoredArray; ``dtype`` where NumPy has no such type (BF16, as uint16 bits)."""
    if dtype is None:
        kind = values.dtype.newbyteorder("<")
        dtype = next(key for key, known in DTYPES.items() if known == kind and key != "BOOL")
    return StoredArray(name, dtype, values.shape, name, lambda: values)
