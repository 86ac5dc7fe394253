"""Weight matrices on the device, in their file's blocks (constants.py says in which layout).

What has no kernel is converted to float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from tinyllava.ops.gpu.constants import FORMATS, field_places, is_split
from tinyllava.quant.blocks import TYPES, BlockType

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor

UPLOAD_BYTES = 1 << 25  # of a matrix at a time: what is copied to the device and rearranged there
MAX_FLOAT16 = 65504.0


class DeviceMatrix:
    """A weight matrix (d_out, d_in) in device memory: ``data`` (nbytes,) in blocks of ``type``."""

    def __init__(self, type: BlockType, shape: tuple[int, ...], data: Any) -> None:
        self.type = type
        self.shape = shape
        self.data = data
        self.n_blocks = np.uint64(shape[0] * shape[1] // type.block_size)

    @property
    def rows_are_aligned(self) -> bool:
        """Whether each row starts at a multiple of 16 bytes, as matvec.cu reads it."""
        return not self.type.is_scalar or self.shape[1] % 8 == 0


def upload(tensor: Tensor) -> DeviceMatrix:
    """A matrix of a file, copied to the device."""
    kind = TYPES[tensor.type if tensor.type in FORMATS else "F16"]
    shape = int(tensor.shape[0]), int(tensor.shape[1])
    row_bytes = kind.row_bytes(shape[1])
    data = cupy.empty(shape[0] * row_bytes, cupy.uint8)
    step = max(1, UPLOAD_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        raw = tensor.raw[start:stop] if tensor.type == kind.name else _as_float16(tensor, start, stop)
        blocks = cupy.asarray(np.ascontiguousarray(raw)).reshape(-1, kind.nbytes)
        _store(blocks, data, start * row_bytes // kind.nbytes, kind)
    return DeviceMatrix(kind, shape, data)


def _as_float16(tensor: Tensor, start: int, stop: int) -> Any:
    rows = np.clip(tensor.rows(np.arange(start, stop)), -MAX_FLOAT16, MAX_FLOAT16)
    return rows.astype(np.float16).view(np.uint8)


def _store(blocks: Any, data: Any, first: int, kind: BlockType) -> None:
    """Write blocks (n, nbytes) into a matrix's data as its blocks first .. first + n."""
    n, n_blocks = len(blocks), data.size // kind.nbytes
    if not is_split(kind):
        data[first * kind.nbytes : (first + n) * kind.nbytes] = blocks.ravel()
        return
    for name, (plane, _, size) in field_places(kind).items():
        column, start = kind.offset(name), n_blocks * plane + first * size
        data[start : start + n * size].reshape(n, size)[:] = blocks[:, column : column + size]
