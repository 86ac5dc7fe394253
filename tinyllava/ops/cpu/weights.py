"""Weight matrices as the Numba backend holds them: where they stand in the mapped file, and who multiplies."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Array
from tinyllava.ops.cpu import gemv as dots
from tinyllava.ops.cpu.compile import Task
from tinyllava.ops.cpu.microkernel import BLOCK, MINIMA_4, MINIMA_8, MINIMUM, OFFSET, SIGNED, WORDS
from tinyllava.ops.cpu.unpack import FORMATS, Format

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor


def address(x: Array) -> int:
    """Where an array's numbers begin. (``x.ctypes.data`` says the same in four times the time.)"""
    buffer: Any = x
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):  # read-only, empty or with gaps
        return int(x.ctypes.data)


def floats(x: Array) -> Array:
    """x as float32, one number after the other."""
    return np.ascontiguousarray(x, dtype=np.float32)


class BlockMatrix:
    """A weight matrix (d_out, d_in) left in its file: ``raw`` (d_out, row bytes) is a view of the mapping."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.raw: npt.NDArray[np.uint8] = np.ascontiguousarray(tensor.raw)
        self.shape = tuple(tensor.shape)
        self.address, self.row_bytes = self.raw.ctypes.data, self.raw.shape[1]
        self.format = FORMATS[tensor.type]
        self.layout = layout_of(self.format)
        self.task, form = self._dot(tensor.type, self.shape[1])
        self.token = form, self.format.offset  # how it wants one token

    def _dot(self, kind: str, d_in: int) -> tuple[Task, int]:
        """The task for one token, and the form in which it wants it."""
        if kind in ("F16", "BF16"):
            return (dots.dot_f16 if kind == "F16" else dots.dot_bf16), dots.FLOATS
        if d_in % (2 * BLOCK):  # an odd number of blocks
            return dots.dot_levels, dots.SIXTEENS
        return dots.TASKS[kind]


def layout_of(form: Format) -> int:
    """Which layout of tile.py a format's tiles have."""
    if not form.has_super_blocks:
        return {"offset": OFFSET, "minimum": MINIMUM, "": WORDS}[form.sums]
    if form.sums == "offset":
        return SIGNED
    return MINIMA_4 if form.groups == 1 else MINIMA_8


class FloatMatrix:
    """A float32 matrix (d_out, d_in), a view of the mapping."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.floats = np.ascontiguousarray(np.asarray(tensor.raw)).view("<f4").reshape(tensor.shape)
        self.shape = tuple(tensor.shape)
        self.address, self.row_bytes = self.floats.ctypes.data, 4 * self.shape[1]
        self.task, self.token = dots.dot_f32, (dots.FLOATS, 0)
