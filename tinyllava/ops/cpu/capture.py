"""Capture and replay of a step that is taken again and again: its tasks are noted once and rerun in compiled code.

A token of a small model takes some 400 tasks, many of them shorter than the Python code that prepares them. So the
operations run their tasks through a TaskRunner and get their memory from it. While a step is captured, the runner
notes each task with its arguments, and sees to it that the memory at their addresses is used for nothing else
afterwards. What differs from one replay to the next must stand in memory too: the token's id, and how many tokens
the KV cache holds. An operation that does anything else says abandon_capture(); the step is then run as it is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.ops import Array
from tinyllava.ops.cpu.compile import Task
from tinyllava.ops.cpu.thread_pool import TaskCall, TaskList, ThreadPool
from tinyllava.ops.cpu.workspace import BufferPool, address, contiguous

Step = Callable[[Any], Array]


class MemoryPosition:
    """A position (ops/__init__.py) whose value stands at an address, where tasks read it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._value = np.zeros(1, np.int64)
        self.address = self._value.ctypes.data

    @property
    def value(self) -> int:
        """How many places are filled."""
        return int(self._value[0])

    @value.setter
    def value(self, value: int) -> None:
        self._value[0] = value


class CacheSlice(np.ndarray[Any, np.dtype[Any]]):
    """During capture: the filled part of a KV cache, whose length at replay is what ``position`` then says.

    NumPy makes views of it CacheSlices too, but without a position: how long those will be is not known.
    """

    position: MemoryPosition | None = None


class Capture:
    """What a step does, in order, and all memory whose addresses its tasks have."""

    def __init__(self, pool: ThreadPool, token: int) -> None:
        self.token_ids = np.array([token], np.int64)  # what the step is given
        self.thread = threading.get_ident()
        self.complete = True  # unless the step did what cannot be captured
        self.buffers = BufferPool(keep_bytes=math.inf, small_bytes=0)
        self._pool = pool
        self._tasks: list[list[TaskCall]] = []  # since the last of the actions
        self._actions: list[Callable[[], None]] = []
        self._kept: list[Any] = []
        self._reserved: dict[MemoryPosition, tuple[int, int, int]] = {}  # see reserve

    def add_tasks(self, calls: list[TaskCall]) -> None:
        """These tasks have been run together."""
        self._tasks.append(calls)

    def call(self, function: Callable[[], None]) -> None:
        """Call a Python function now, and at this point of each replay."""
        function()
        self._end_list()
        self._actions.append(function)

    def keep_alive(self, x: Any) -> None:
        """Hold x, since a task has its address. (Arrays of ``buffers`` are held, and used again, there.)"""
        if not (isinstance(x, np.ndarray) and self.buffers.owns(x)):
            self._kept.append(x)

    def reserve(self, position: MemoryPosition, n: int, limit: int) -> None:
        """The step uses the n places after a position, of ``limit`` that there are.

        Noted for each position: its value when the step began, how far beyond that the step goes, the limit.
        """
        first, reach, least = self._reserved.get(position, (position.value, 0, position.limit))
        self._reserved[position] = first, max(reach, position.value + n - first), min(least, limit)

    def end(self, result: Array) -> None:
        """The step is over. Its result must be the pool's, or a replay would not write it again."""
        self._end_list()
        self.complete = self.complete and self.buffers.owns(result)
        self._result = result

    def fits(self) -> bool:
        """Whether one more step stays within the positions' limits."""
        return all(position.value + reach <= limit for position, (_, reach, limit) in self._reserved.items())

    def replay(self, token: int) -> Array:
        """Take the step with another token."""
        self.token_ids[0] = token
        for action in self._actions:
            action()
        return self._result

    def _end_list(self) -> None:
        if self._tasks:
            self._actions.append(partial(self._pool.run_list, TaskList(self._tasks)))
            self._tasks = []


class TaskRunner:
    """Runs tasks and provides memory for them, and notes both while a step is captured.

    Its scratch memory is shared, so one thread computes at a time. What other threads do during a capture is not
    captured.
    """

    def __init__(self, pool: ThreadPool) -> None:
        self.pool = pool
        self._buffers = BufferPool()
        self._scratch: dict[str, npt.NDArray[np.uint8]] = {}
        self._capture: Capture | None = None
        self._lock = threading.Lock()  # held during a capture

    @property
    def capturing(self) -> Capture | None:
        """The capture that is going on in this thread, if any."""
        capture = self._capture
        return capture if capture is not None and capture.thread == threading.get_ident() else None

    @contextmanager
    def capture(self, token: int) -> Iterator[Capture | None]:
        """Capture what this thread does meanwhile. None if another capture is going on."""
        if not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            self._capture = Capture(self.pool, token)
            yield self._capture
        finally:
            self._capture = None
            self._lock.release()

    def abandon_capture(self) -> None:
        """The step is about to do what cannot be captured."""
        if self.capturing is not None:
            self.capturing.complete = False

    # ---- work

    def run(self, task: Task, n_chunks: int, *arguments: int) -> None:
        """ThreadPool.run."""
        self.run_several([(task, n_chunks, arguments)])

    def run_several(self, calls: list[TaskCall]) -> None:
        """ThreadPool.run_several; an empty list is no work."""
        if calls:
            self.pool.run_several(calls)
            if self.capturing is not None:
                self.capturing.add_tasks(calls)

    # ---- memory

    def empty(self, *shape: int) -> Array:
        """A new float32 array, uninitialised."""
        capture = self.capturing
        return (self._buffers if capture is None else capture.buffers).empty(*shape)

    def scratch(self, name: str, size: int) -> int:
        """The address of at least ``size`` bytes of scratch memory, from the start of a cache line.

        The same name gives the same memory again, unless more is asked for.
        """
        memory = self._scratch.get(name)
        if memory is None or memory.size < size + 64:
            memory = self._scratch[name] = np.empty(size + 64, np.uint8)
        return -(-self.address(memory) // 64) * 64

    def keep_alive(self, x: Any) -> None:
        """A task gets the address of x: it must stay where it is for as long as the task may be rerun."""
        if self.capturing is not None:
            self.capturing.keep_alive(x)

    def address(self, x: Array) -> int:
        """The address of an array, for a task."""
        self.keep_alive(x)
        return address(x)

    def contiguous(self, x: Array) -> Array:
        """x as contiguous float32. If that takes a copy, capture is abandoned: a replay would not copy again."""
        y = contiguous(x)
        if self.capturing is not None and (isinstance(x, CacheSlice) or address(y) != address(x)):
            self.abandon_capture()
        return y

    def cache_slice(self, x: Array, position: MemoryPosition) -> Array:
        """x, a view of a cache up to a position."""
        if self.capturing is None:
            return x
        view = x.view(CacheSlice)
        view.position = position
        return view

    def kv_length(self, k: Array, v: Array) -> tuple[int, int, int]:
        """How many keys (and values) there are, as tasks are told: n, address of what is to be added to n, or 0.

        The third number is how many there may ever be.
        """
        positions = [x.position for x in (k, v) if isinstance(x, CacheSlice)]
        if not positions:
            return len(k), 0, len(k)
        position = positions[0]
        if position is None or positions != [position, position]:
            self.abandon_capture()
            return len(k), 0, len(k)
        return len(k) - position.value, position.address, position.limit


class CapturedStep:
    """``step``, faster: the first call runs it, the second captures it, all later ones replay that.

    Calls with anything but one token's id, and calls that find a cache full, run the step as it is.
    """

    def __init__(self, step: Step, runner: TaskRunner) -> None:
        self.step = step
        self.runner = runner
        self._called = False
        self._capture: Capture | None = None
        self._abandoned = False

    def __call__(self, given: Any) -> Array:
        token = one_token(given)
        if token is None or self._abandoned or self.runner.capturing is not None:  # the last: part of another step
            return self.step(given)
        if self._capture is not None:
            return self._capture.replay(token) if self._capture.fits() else self.step(given)
        if self._called:
            return self._capture_step(given, token)
        self._called = True
        return self.step(given)

    def _capture_step(self, given: Any, token: int) -> Array:
        with self.runner.capture(token) as capture:
            if capture is None:
                return self.step(given)
            result = self.step(capture.token_ids)
            capture.end(result)
        if capture.complete:
            self._capture = capture
        self._abandoned = not capture.complete
        return result


def one_token(given: Any) -> int | None:
    """The id in a list or array of one whole number; None for anything else."""
    values = np.asarray(given)
    return int(values[0]) if values.dtype.kind in "iu" and values.shape == (1,) else None
