"""Threads that share one operation's work, awake within a microsecond.

An operation of a small model takes 20 us, about what it costs to wake a sleeping thread; so between operations
the helpers spin in compiled code, without Python's lock, and sleep only when nothing has come for a while.

A job is a compiled function job(arguments, item, who): ``arguments`` the address of int64 numbers, ``item`` which
part of the work, ``who`` which thread. Threads take items one by one, so a slow thread takes fewer. Each item is
computed the same way whoever does it: results do not depend on the number of threads.

All that threads say to each other stands in the ``board``, an array of int64:

    TICKET      generation << 40 | items of this job << 20 | items taken; taking one is an atomic + 1
    DONE        items finished                     JOB         address of the compiled function
    ASLEEP      helpers that wait for ``wake``     ARGUMENTS   the job's numbers
    STOP        helpers shall return

A thread that has taken an item may read JOB and ARGUMENTS: they cannot change before its item is done.
"""

from __future__ import annotations

import platform
import threading
import weakref
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from tinyllava.ops.compiled import Job, kernel
from tinyllava.ops.simd import I32, I64, call, instruction

TICKET, DONE, ASLEEP, STOP, JOB, ARGUMENTS = 0, 8, 16, 24, 32, 40  # in int64: each on its own cache line
MAX_ARGUMENTS = 24
MAX_ITEMS = 1 << 20
SPINS = 200_000  # pauses before a helper goes to sleep: some milliseconds


# ---- atomics


def _number_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


@instruction("i:ii")
def add_atomically(builder: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address; returns what stood there before."""
    return builder.atomic_rmw("add", _number_at(builder, address), value, "seq_cst")


@instruction("i:i")
def read_atomically(builder: Any, address: Any) -> Any:
    """The int64 at an address, with all that was written before it."""
    return builder.load_atomic(_number_at(builder, address), "acquire", 8)


@instruction("-:ii")
def write_atomically(builder: Any, address: Any, value: Any) -> None:
    """Store an int64 after all that was written before it."""
    builder.store_atomic(value, _number_at(builder, address), "seq_cst", 8)


@instruction("-:iiii")
def call_job(builder: Any, address: Any, arguments: Any, item: Any, who: Any) -> None:
    """Call the job at an address."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * 3).as_pointer()
    builder.call(builder.inttoptr(address, kind), [arguments, item, who])


@instruction("-:")
def pause(builder: Any) -> None:
    """Tell the processor that this is a waiting loop."""
    if _family() == "x86":
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
    elif _family() == "arm":
        call(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(I32, 1))


def _family() -> str:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64", "i686"):
        return "x86"
    return "arm" if machine in ("aarch64", "arm64") else ""


# ---- addresses as arrays


@intrinsic
def _pointer(_context: Any, _address: Any) -> Any:
    """An address as a pointer to nothing in particular."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@kernel
def numbers_at(address: int) -> Any:
    """A job's arguments as an array."""
    return carray(_pointer(address), (MAX_ARGUMENTS,), np.int64)


@kernel
def bytes_at(address: int, rows: int, columns: int) -> Any:
    """(rows, columns) bytes in a row."""
    return carray(_pointer(address), (rows, columns), np.uint8)


@kernel
def floats_at(address: int, rows: int, columns: int) -> Any:
    """(rows, columns) float32 in a row."""
    return carray(_pointer(address), (rows, columns), np.float32)


# ---- the two sides


@kernel
def take_items(board: int, who: int) -> None:
    """Do items of the job on the board until none is left."""
    while True:
        ticket = add_atomically(board + 8 * TICKET, 1)
        if ticket & (MAX_ITEMS - 1) >= (ticket >> 20) & (MAX_ITEMS - 1):
            return
        address = read_atomically(board + 8 * JOB)
        call_job(address, board + 8 * ARGUMENTS, ticket & (MAX_ITEMS - 1), who)
        add_atomically(board + 8 * DONE, 1)


@kernel
def lead(board: int, job: int, n_items: int) -> int:
    """Put a job of n_items on the board, help with it, wait for the rest. Returns the number of sleepers."""
    write_atomically(board + 8 * JOB, job)
    write_atomically(board + 8 * DONE, 0)
    generation = (read_atomically(board + 8 * TICKET) >> 40) + 1
    write_atomically(board + 8 * TICKET, ((generation & 0xFFFFF) << 40) | (n_items << 20))
    take_items(board, 0)
    while read_atomically(board + 8 * DONE) < n_items:
        pause()
    return read_atomically(board + 8 * ASLEEP)


@kernel
def help_out(board: int, who: int) -> bool:
    """Help with whatever is on the board, until nothing has come for a while (True) or STOP (False)."""
    idle = 0
    while idle < SPINS:
        ticket = read_atomically(board + 8 * TICKET)
        if ticket & (MAX_ITEMS - 1) < (ticket >> 20) & (MAX_ITEMS - 1):
            take_items(board, who)
            idle = 0
        elif read_atomically(board + 8 * STOP):
            return False
        else:
            pause()
            idle += 1
    add_atomically(board + 8 * ASLEEP, 1)
    return True


@kernel
def get_up(board: int) -> None:
    """A helper no longer sleeps."""
    add_atomically(board + 8 * ASLEEP, -1)


class Team:
    """``size`` threads, the caller's included. They end with the object."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.board = np.zeros(ARGUMENTS + MAX_ARGUMENTS + 8, np.int64)
        self.base = -(-self.board.ctypes.data // 64) * 64  # a cache line's start
        start = (self.base - self.board.ctypes.data) // 8 + ARGUMENTS
        self.arguments = self.board[start : start + MAX_ARGUMENTS]
        self.wake = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._started = False

    def run(self, job: Job, n_items: int, *arguments: int) -> None:
        """Call job for each item; returns when all are done. Arguments are whole numbers: addresses and sizes."""
        with self._lock:
            if not self._started:
                self._start()
            self.arguments[: len(arguments)] = arguments
            sleepers = lead(self.base, job.address, n_items)
        for _ in range(sleepers):
            self.wake.release()

    def _start(self) -> None:
        self._started = True
        for who in range(1, self.size):
            threading.Thread(target=_helper, args=(self.board, self.base, who, self.wake), daemon=True).start()
        weakref.finalize(self, _stop, self.board, self.base, self.size, self.wake)


def _helper(board: Any, base: int, who: int, wake: threading.Semaphore) -> None:
    """A helper's life. It holds the board, so that its memory outlives the team."""
    while help_out(base, who):
        wake.acquire()
        get_up(base)
    del board


def _stop(board: Any, base: int, size: int, wake: threading.Semaphore) -> None:
    board[(base - board.ctypes.data) // 8 + STOP] = 1
    for _ in range(size):
        wake.release()


