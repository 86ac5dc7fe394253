"""Weight matrices on the device, in the bytes that their file has for them.

Formats whose blocks are a multiple of 16 bytes lie as in the file. Of the others each field lies apart, so that a
thread can load 16 bytes of it at once; cuda/blocks.cu shows both. What has no kernel becomes half precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from tinyllava.ops.gpu.device import FORMATS
from tinyllava.quant.blocks import TYPES

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor

# The fields that lie apart, where they do, in cuda/blocks.cu's order.
APART = {"Q4_0": ("qs", "d"), "Q8_0": ("qs", "d"), "Q6_K": ("ql", "qh", "scales", "d")}
PIECE_BYTES = 1 << 25  # of a matrix, rearranged at a time
MOST_HALF = 65504.0


class DeviceMatrix:
    """A weight matrix (d_out, d_in) in device memory: ``data`` (nbytes,) in the blocks of ``kind``."""

    def __init__(self, kind: str, shape: tuple[int, ...], data: Any) -> None:
        self.kind = kind
        self.shape = shape
        self.data = data
        self.type = TYPES[kind]
        self.format = self.type.id
        self.n_blocks = np.uint64(shape[0] * shape[1] // self.type.block_size)

    @property
    def is_float(self) -> bool:
        return self.type.is_scalar

    @property
    def rows_are_aligned(self) -> bool:
        """Whether each row starts at a multiple of 16 bytes, as the kernel for one token reads it."""
        return not self.is_float or self.shape[1] % 8 == 0


def upload(tensor: Tensor) -> DeviceMatrix:
    """A matrix of a file, moved to the device."""
    kind = tensor.type if tensor.type in FORMATS else "F16"
    shape = int(tensor.shape[0]), int(tensor.shape[1])
    block = TYPES[kind]
    row_bytes = block.row_bytes(shape[1])
    data = cupy.empty(shape[0] * row_bytes, cupy.uint8)
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        raw = tensor.raw[start:stop] if tensor.type == kind else _halves(tensor, start, stop)
        piece = cupy.asarray(np.ascontiguousarray(raw)).reshape(-1, block.nbytes)  # (blocks, bytes)
        _place(piece, data, start * row_bytes // block.nbytes, kind)
    return DeviceMatrix(kind, shape, data)


def _halves(tensor: Tensor, start: int, stop: int) -> Any:
    rows = np.clip(tensor.rows(np.arange(start, stop)), -MOST_HALF, MOST_HALF)
    return rows.astype(np.float16).view(np.uint8)


def _place(piece: Any, data: Any, first: int, kind: str) -> None:
    """Write blocks (n, nbytes) where they belong in a matrix's data, from block ``first`` on."""
    block = TYPES[kind]
    n, n_blocks = len(piece), data.size // block.nbytes
    if kind not in APART:
        data[first * block.nbytes : (first + n) * block.nbytes] = piece.ravel()
        return
    plane = 0  # where the field's plane starts
    for name in APART[kind]:
        size = block.dtype[name].itemsize
        column = block.offset(name)
        place = data[plane + first * size : plane + (first + n) * size]
        place.reshape(n, size)[:] = piece[:, column : column + size]
        plane += n_blocks * size
