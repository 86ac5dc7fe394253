"""A function that is called once for each token or picture tile, captured as a CUDA graph and launched as one.

A token of a 7B model takes some 500 kernel launches, and each costs the host about as long as the device needs for
the kernel; a graph is a single launch. Its kernels get the same pointers and numbers each time, so what changes is
read from device memory: the token or the pixels (``input``), and positions (position.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import cupy
import numpy as np

from tinyllava.ops import Array
from tinyllava.ops.gpu.kernels import Kernels
from tinyllava.ops.gpu.position import DevicePosition

Step = Callable[[Any], Array]


class Capturing(Protocol):
    """What a backend has that captures its steps: the advances of positions while it does, else None."""

    kernels: Kernels
    capturing: list[tuple[DevicePosition, int]] | None


class CapturedStep:
    """``step``: the first call runs it, the second captures it, and all later ones launch the graph.

    A call that the graph does not fit (another shape, or a full cache) runs ``step`` itself.
    """

    def __init__(self, step: Step, ops: Capturing) -> None:
        self.step = step
        self.ops = ops
        self.stream = cupy.cuda.Stream()  # it waits for the default stream, and the default stream for it
        self.pool = cupy.cuda.MemoryPool()  # the graph's own: its arrays keep their memory between launches
        self.advances: list[tuple[DevicePosition, int]] = []  # of each call
        self.input: Any = None  # the step's argument on the device
        self.graph: Any = None
        self.result: Any = None

    def __call__(self, argument: Any) -> Array:
        values = np.asarray(argument)
        values = values.astype(np.int32 if values.dtype.kind == "i" else np.float32, copy=False)
        if not self._fits(values):
            self.input = self.input if self.graph else cupy.empty(values.shape, values.dtype)
            return self.step(argument)
        self.input.set(np.ascontiguousarray(values))
        if self.graph is None:
            self._capture()
        else:
            for position, n in self.advances:
                position.value += n
        self.graph.launch(self.stream)
        result: Array = self.result
        return result

    def _fits(self, values: Any) -> bool:
        """Whether this is not the first call, nor one with another shape, nor one that finds a cache full."""
        if self.input is None or values.shape != self.input.shape or values.dtype != self.input.dtype:
            return False
        return all(position.value + n <= position.limit for position, n in self.advances)

    def _capture(self) -> None:
        self.advances = []
        with self.stream, cupy.cuda.using_allocator(self.pool.malloc):
            self.stream.begin_capture()
            self.ops.capturing = self.advances
            # One token's kernels are so short that launch latency counts; longer ones gain nothing from overlap.
            self.ops.kernels.overlap = self.input.size == 1
            try:
                self.result = self.step(self.input)
            finally:
                self.ops.capturing = None
                self.ops.kernels.overlap = False
                graph = self.stream.end_capture()
        self.graph = graph  # stays None if the step has raised an error
