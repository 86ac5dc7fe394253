"""A position in the sequence that both the host and the device know, and slices that start at it.

A CUDA graph is captured once and launched for every token, so a number that the host passes to a kernel stays what
it was during capture. What changes from token to token must be read from device memory instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import cupy

if TYPE_CHECKING:
    from tinyllava.ops import Array


class DevicePosition:
    """A position up to ``limit``: ``value`` on the host, ``device`` an int32 array (1,) with the same number."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.value = 0
        self.device = cupy.zeros(1, cupy.int32)


class DeferredSlice:
    """Stands for rows of an array during capture, when their position is not known yet.

    ``array`` is a whole RoPE table, and the rows from ``position`` on are meant; or a whole KV cache, and all rows
    before ``position`` and those just appended are meant. The kernels read ``position.device`` at each launch.
    """

    def __init__(self, array: Any, position: DevicePosition) -> None:
        self.array = array
        self.position = position


def defer(array: Any, position: DevicePosition) -> Array:
    """A DeferredSlice as an operation's result. Only rope and attention take it; the cast is for mypy."""
    return cast("Array", DeferredSlice(array, position))
