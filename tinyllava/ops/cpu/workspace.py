"""Memory for results, used again once nobody holds them.

The system hands out new memory page by page, and for arrays of megabytes that takes as long as computing what goes
into them: a sixth of the time of encoding a picture. So arrays are views of buffers that are kept; a buffer whose
only reference is the list's own is free.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

SMALL_BYTES = 1 << 16  # below this, memory comes from what Python holds anyway
KEEP_BYTES = 1 << 27  # more than one stage of work needs: beyond that, free ones are left from an earlier one


def references(buffers: list[npt.NDArray[np.float32]]) -> list[int]:
    """How many references there are to each, those of the list and of this function included."""
    return [sys.getrefcount(buffer) for buffer in buffers]


UNUSED = references([np.empty(0, np.float32)])[0]  # that of a buffer that nobody holds; it depends on the Python


class Buffers:
    """Float32 arrays of any shape, uninitialised."""

    def __init__(self, keep_bytes: float = KEEP_BYTES, small_bytes: int = SMALL_BYTES) -> None:
        self._keep_bytes = keep_bytes
        self._small_bytes = small_bytes
        self._held: list[npt.NDArray[np.float32]] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> npt.NDArray[np.float32]:
        """A new array. If no free buffer fits it and there are many, the free ones are let go."""
        size = math.prod(shape)
        if 4 * size < self._small_bytes:
            return np.empty(shape, np.float32)
        with self._lock:
            counts = references(self._held)
            for buffer, count in zip(self._held, counts, strict=True):
                if size <= buffer.size <= 2 * size and count <= UNUSED:
                    return buffer[:size].reshape(shape)
            if 4 * size + sum(buffer.nbytes for buffer in self._held) > self._keep_bytes:
                held = zip(self._held, counts, strict=True)
                self._held = [buffer for buffer, count in held if count > UNUSED]
            self._held.append(np.empty(size, np.float32))
            return self._held[-1].reshape(shape)

    def owns(self, x: npt.NDArray[Any]) -> bool:
        """Whether x is a view of a buffer that is kept here."""
        return any(x.base is buffer for buffer in self._held)
