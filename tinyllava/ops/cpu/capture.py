"""A step that is taken again and again: its tasks, recorded once and replayed in compiled code.

A token of a small model takes some 400 tasks, many no longer than the Python that cuts them into chunks and
hands them over. So operations give their tasks to a TaskRunner, and get their memory from it. While a step is
recorded, it writes the tasks down with the addresses that they were given, of memory that nobody else gets
afterwards. What changes from one replay to the next must stand in memory, too: the token, and how many places
are filled. """

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
from tinyllava.ops.cpu.thread_pool import Part, TaskList, ThreadPool
from tinyllava.ops.cpu.weights import address, floats
from tinyllava.ops.cpu.workspace import Buffers

Step = Callable[[Any], Array]


class MemoryPosition:
    """A position whose count stands at an address, so that tasks can read it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = np.zeros(1, np.int64)
        self.address = self._count.ctypes.data

    @property
    def value(self) -> int:
        """How many places are filled."""
        return int(self._count[0])

    @value.setter
    def value(self, value: int) -> None:
        self._count[0] = value


class Window(np.ndarray[Any, np.dtype[Any]]):
    """While a step is recorded: all that is held up to a position. Its views are windows of no known position."""

    position: MemoryPosition | None = None


class Capture:
    """A step's tasks, and what else it does, in order; with all the memory whose addresses were written down."""

    def __init__(self, pool: ThreadPool, token: int) -> None:
        self.given = np.array([token], np.int64)  # what the step is given
        self.thread = threading.get_ident()
        self.complete = True  # unless the step did what cannot be recorded
        self.buffers = Buffers(keep_bytes=math.inf, small_bytes=0)
        self._pool = pool
        self._tasks: list[list[Part]] = []  # since the last act
        self._acts: list[Callable[[], None]] = []
        self._held: list[Any] = []
        self._places: dict[MemoryPosition, tuple[int, int, int]] = {}  # see use

    def run(self, parts: list[Part]) -> None:
        """These tasks have been run together."""
        self._tasks.append(parts)

    def call(self, function: Callable[[], None]) -> None:
        """Call a Python function now, and at this place of each replay."""
        function()
        self._end_script()
        self._acts.append(function)

    def hold(self, x: Any) -> None:
        """Keep what has an address that a task knows; arrays of ``buffers`` are kept, and used again, there."""
        if not (isinstance(x, np.ndarray) and self.buffers.owns(x)):
            self._held.append(x)

    def use(self, position: MemoryPosition, n: int, limit: int) -> None:
        """The step needs the n places after a position, of ``limit`` at most.

        For each position: where it stood when it was first used, how far beyond that the step goes, the limit.
        """
        first, reach, least = self._places.get(position, (position.value, 0, position.limit))
        self._places[position] = first, max(reach, position.value + n - first), min(least, limit)

    def end(self, result: Array) -> None:
        """The step is over. Only what its tasks have written will be written again."""
        self._end_script()
        self.complete = self.complete and self.buffers.owns(result)
        self._result = result

    def has_room(self) -> bool:
        """Whether the positions have room for one more step."""
        return all(position.value + reach <= limit for position, (_, reach, limit) in self._places.items())

    def replay(self, token: int) -> Array:
        """Take the step with another token."""
        self.given[0] = token
        for act in self._acts:
            act()
        return self._result

    def _end_script(self) -> None:
        if self._tasks:
            self._acts.append(partial(self._pool.replay, TaskList(self._tasks)))
            self._tasks = []


class TaskRunner:
    """Hands out a team's work and the memory for it, and writes both down while a step is recorded.

    Scratch is shared: one thread works at a time. What another does is kept out of the capturing, no more.
    """

    def __init__(self, pool: ThreadPool) -> None:
        self.pool = pool
        self._buffers = Buffers()
        self._scratch: dict[str, npt.NDArray[np.uint8]] = {}
        self._capture: Capture | None = None
        self._lock = threading.Lock()  # held while a step is recorded

    @property
    def capturing(self) -> Capture | None:
        """What this thread records, if it does."""
        capturing = self._capture
        return capturing if capturing is not None and capturing.thread == threading.get_ident() else None

    @contextmanager
    def record(self, token: int) -> Iterator[Capture | None]:
        """Record what this thread does meanwhile. None if another one records."""
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
        """What is about to be done cannot be recorded."""
        if self.capturing is not None:
            self.capturing.complete = False

    # ---- work

    def run(self, task: Task, n_chunks: int, *arguments: int) -> None:
        """ThreadPool.run."""
        self.run_several([(task, n_chunks, arguments)])

    def run_several(self, parts: list[Part]) -> None:
        """ThreadPool.run_several; no parts are no work."""
        if parts:
            self.pool.run_several(parts)
            if self.capturing is not None:
                self.capturing.run(parts)

    # ---- memory

    def empty(self, *shape: int) -> Array:
        """A new float32 array."""
        capturing = self.capturing
        return (self._buffers if capturing is None else capturing.buffers).empty(*shape)

    def room(self, name: str, size: int) -> int:
        """The address of at least ``size`` bytes, on a cache line's start. Used again under the same name."""
        held = self._scratch.get(name)
        if held is None or held.size < size + 64:
            held = self._scratch[name] = np.empty(size + 64, np.uint8)
        return -(-self.address(held) // 64) * 64

    def hold(self, x: Any) -> None:
        """x has an address that a task gets."""
        if self.capturing is not None:
            self.capturing.hold(x)

    def address(self, x: Array) -> int:
        """Where an array begins, for a task."""
        self.hold(x)
        return address(x)

    def floats(self, x: Array) -> Array:
        """x as float32, one number after the other. A copy would not be made again in a replay."""
        y = floats(x)
        if self.capturing is not None and (isinstance(x, Window) or address(y) != address(x)):
            self.abandon_capture()
        return y

    def window(self, x: Array, position: MemoryPosition) -> Array:
        """x, which is all that is held up to a position."""
        if self.capturing is None:
            return x
        window = x.view(Window)
        window.position = position
        return window

    def length(self, k: Array, v: Array) -> tuple[int, int, int]:
        """How many keys and values there are, as tasks are told: a number, and the address of another that is
        added to it, or 0. Third, how many there may ever be."""
        positions = [x.position for x in (k, v) if isinstance(x, Window)]
        if not positions:
            return len(k), 0, len(k)
        position = positions[0]
        if position is None or positions != [position, position]:
            self.abandon_capture()
            return len(k), 0, len(k)
        return len(k) - position.value, position.address, position.limit


class CapturedStep:
    """``step``: the first call takes it, the second records it, all later ones replay that.

    Other calls than those with one token's id, and calls that find a cache full, take the step as it is.
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
            return self._capture.replay(token) if self._capture.has_room() else self.step(given)
        if self._called:
            return self._capture_step(given, token)
        self._called = True
        return self.step(given)

    def _capture_step(self, given: Any, token: int) -> Array:
        with self.runner.record(token) as capturing:
            if capturing is None:
                return self.step(given)
            result = self.step(capturing.given)
            capturing.end(result)
        if capturing.complete:
            self._capture = capturing
        self._abandoned = not capturing.complete
        return result


def one_token(given: Any) -> int | None:
    """The id in a list or array of one whole number; None for anything else."""
    values = np.asarray(given)
    return int(values[0]) if values.dtype.kind in "iu" and values.shape == (1,) else None
