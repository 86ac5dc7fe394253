"""A step that is taken again and again, recorded once as a CUDA graph and replayed.

A token of a 7B model takes some 500 launches, and each costs the host about as long as the device needs for it. A
graph is launched as one. What changes from one replay to the next must then be read from device memory: the token,
and how many places of the cache are filled; or the pixels of a picture's tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

if TYPE_CHECKING:
    from tinyllava.ops import Array
    from tinyllava.ops.gpu.ops import CupyOps

Step = Callable[[Any], "Array"]


class DevicePosition:
    """A position that the host counts in ``value`` and the device in ``device``, an int32 array (1,)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.value = 0
        self.device = cupy.zeros(1, cupy.int32)


class Window:
    """While a step is recorded: an array of which the position, known only at replay, says what counts."""

    def __init__(self, array: Any, position: DevicePosition) -> None:
        self.array = array
        self.position = position


class CapturedStep:
    """``step``: the first call runs it, the second records it, all later ones replay that."""

    def __init__(self, step: Step, ops: CupyOps) -> None:
        self.step = step
        self.ops = ops
        self.stream = cupy.cuda.Stream()  # it waits for the default stream, and the default stream for it
        self.pool = cupy.cuda.MemoryPool()  # the recorded arrays' own: nobody else may get their memory
        self.moves: list[tuple[DevicePosition, int]] = []  # what a step does to positions
        self.given: Any = None  # what the recorded step is given, on the device
        self.graph: Any = None
        self.result: Any = None

    def __call__(self, given: Any) -> Array:
        values = np.asarray(given)
        values = values.astype(np.int32 if values.dtype.kind == "i" else np.float32, copy=False)
        if not self._replays(values):
            self.given = self.given if self.graph else cupy.empty(values.shape, values.dtype)
            return self.step(given)
        self.given.set(np.ascontiguousarray(values))
        if self.graph is None:
            self._capture()
        else:
            for position, n in self.moves:
                position.value += n
        self.graph.launch(self.stream)
        result: Array = self.result
        return result

    def _replays(self, values: Any) -> bool:
        """Whether this is not the first call, nor one of another size, nor one that finds a cache full."""
        if self.given is None or values.shape != self.given.shape or values.dtype != self.given.dtype:
            return False
        return all(position.value + n <= position.limit for position, n in self.moves)

    def _capture(self) -> None:
        self.moves = []
        with self.stream, cupy.cuda.using_allocator(self.pool.malloc):
            self.stream.begin_capture()
            self.ops.capturing = self.moves
            # One token's kernels are so short that their starts count; long ones only get in each other's way.
            self.ops.kernels.overlap = self.given.size == 1
            try:
                self.result = self.step(self.given)
            finally:
                self.ops.capturing = None
                self.ops.kernels.overlap = False
                graph = self.stream.end_capture()
        self.graph = graph  # not if the step has failed
