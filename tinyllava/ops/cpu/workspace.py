"""Workspace: a pool of buffers for results, which are used again once no array refers to them.

The operating system maps new memory page by page, and for arrays of megabytes that takes as long as computing what
goes into them: a sixth of the time of encoding a picture. So arrays are views of buffers that the pool keeps. A
buffer is free when the pool's list holds the only reference to it; Python's reference counts tell.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

SMALL_BYTES = 1 << 16  # smaller arrays are NumPy's own: the C library keeps small memory mapped
KEEP_BYTES = 1 << 27  # more than a picture or a prompt needs: what is free beyond it was an earlier stage's


def references(buffers: list[npt.NDArray[np.float32]]) -> list[int]:
    """The reference count of each buffer, which includes the list's reference and this function's own."""
    return [sys.getrefcount(buffer) for buffer in buffers]


FREE = references([np.empty(0, np.float32)])[0]  # the count of a free buffer, which depends on Python's version


class BufferPool:
    """Float32 arrays of any shape, uninitialised."""

    def __init__(self, keep_bytes: float = KEEP_BYTES, small_bytes: int = SMALL_BYTES) -> None:
        self._keep_bytes = keep_bytes
        self._small_bytes = small_bytes
        self._held: list[npt.NDArray[np.float32]] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> npt.NDArray[np.float32]:
        """An array in a free buffer of fitting size, or in a new one. Too many free buffers are released."""
        size = math.prod(shape)
        if 4 * size < self._small_bytes:
            return np.empty(shape, np.float32)
        with self._lock:
            counts = references(self._held)
            for buffer, count in zip(self._held, counts, strict=True):
                if size <= buffer.size <= 2 * size and count <= FREE:
                    return buffer[:size].reshape(shape)
            if 4 * size + sum(buffer.nbytes for buffer in self._held) > self._keep_bytes:
                held = zip(self._held, counts, strict=True)
                self._held = [buffer for buffer, count in held if count > FREE]
            self._held.append(np.empty(size, np.float32))
            return self._held[-1].reshape(shape)

    def owns(self, x: npt.NDArray[Any]) -> bool:
        """Whether x is a view of one of the pool's buffers."""
        return any(x.base is buffer for buffer in self._held)


def address(x: npt.NDArray[Any]) -> int:
    """Where an array's numbers begin. (``x.ctypes.data`` says the same in four times the time.)"""
    buffer: Any = x
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):  # read-only, empty or not contiguous
        return int(x.ctypes.data)


def contiguous(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """x as contiguous float32, itself if it is that."""
    return np.ascontiguousarray(x, dtype=np.float32)
