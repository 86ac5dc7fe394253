"""Threads that share one operation's work, awake within a microsecond.

An operation of a small model takes 20 us, about what it costs to wake a sleeping thread; so between operations
the helpers spin in compiled code, without Python's lock, and sleep only when nothing has come for a while.

A task is a compiled function task(arguments, chunk, thread_id): ``arguments`` the address of int64 numbers,
``chunk`` which part of the work, ``thread_id`` which thread. Each thread has a run of chunks of its own, since
memory is read fastest by threads that each read on and on (42 GB/s from a mapped file, where threads that take
pieces of 64 KiB in turn get 32); who has finished takes from the others' runs. Each chunk is computed the same
way whoever does it: results do not depend on the number of threads.

All that threads say to each other stands in the ``board``, an array of int64:

    DONE        chunks finished                     TASK         address of the compiled function
    ASLEEP      helpers that wait for ``wake``     WHERE       address of its arguments
    STOP        helpers shall return               ARGUMENTS   room for them
    TICKETS     one for each thread: the end of its run << 32 | its next chunk; taking one is an atomic + 1

A thread that has taken an chunk may read TASK and WHERE: neither they nor what they point at can change before its
chunk is done.

Tasks that come again and again, always in the same order and with the same arguments, are written down once as a
TaskList. A replay goes through it in compiled code; each task finds its arguments where the script holds them.
"""

from __future__ import annotations

import platform
import struct
import threading
import weakref
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from tinyllava.ops.cpu.compile import Task, kernel, task
from tinyllava.ops.cpu.simd.llvm import I32, I64, call, instruction

DONE, ASLEEP, STOP, TASK, ARGUMENTS = 0, 8, 16, 24, 32  # in int64: each on its own cache line
WHERE = TASK + 1  # read and written together with it
MAX_ARGUMENTS = 24
TICKETS = ARGUMENTS + MAX_ARGUMENTS
CHUNK_BITS = 32
CHUNK_MASK = (1 << CHUNK_BITS) - 1
MAX_PARTS = (MAX_ARGUMENTS - 1) // 3  # of a task made of tasks
PACK = [struct.Struct(f"{n}q") for n in range(MAX_ARGUMENTS + 1)]
SPINS = 200_000  # pauses before a helper goes to sleep: about a quarter of a second on Zen 4


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
def call_task(builder: Any, address: Any, arguments: Any, chunk: Any, who: Any) -> None:
    """Call the task at an address."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * 3).as_pointer()
    builder.call(builder.inttoptr(address, kind), [arguments, chunk, who])


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
    """A task's arguments as an array."""
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
def ticket_of(board: int, thread_id: int) -> int:
    """Where a thread's ticket stands."""
    return board + 8 * (TICKETS + 8 * thread_id)


@kernel
def is_left(ticket: int) -> bool:
    """Whether a run has chunks that nobody has taken."""
    return ticket & CHUNK_MASK < ticket >> CHUNK_BITS


@kernel
def take_chunks(board: int, size: int, thread_id: int) -> bool:
    """Do chunks of the task on the board, first of one's own run, until none is left. Whether there were any."""
    found = False
    for i in range(size):
        ticket = ticket_of(board, (thread_id + i) % size)
        while is_left(read_atomically(ticket)):
            taken = add_atomically(ticket, 1)
            if is_left(taken):
                task, where = read_atomically(board + 8 * TASK), read_atomically(board + 8 * WHERE)
                call_task(task, where, taken & CHUNK_MASK, thread_id)
                add_atomically(board + 8 * DONE, 1)
                found = True
    return found


@kernel
def lead(board: int, size: int, task: int, n_chunks: int, where: int) -> int:
    """Put a task of n_chunks on the board, help with it, wait for the rest. Returns the number of sleepers."""
    if n_chunks == 1:  # nothing to share: nobody needs to hear of it
        call_task(task, where, 0, 0)
        return read_atomically(board + 8 * ASLEEP)
    write_atomically(board + 8 * TASK, task)
    write_atomically(board + 8 * WHERE, where)
    write_atomically(board + 8 * DONE, 0)
    for thread_id in range(size - 1, -1, -1):
        first, end = (n_chunks * thread_id + size - 1) // size, (n_chunks * (thread_id + 1) + size - 1) // size
        write_atomically(ticket_of(board, thread_id), end << CHUNK_BITS | first)
    take_chunks(board, size, 0)
    while read_atomically(board + 8 * DONE) < n_chunks:
        pause()
    return read_atomically(board + 8 * ASLEEP)


@kernel
def replay(board: int, size: int, table: int, n_tasks: int) -> int:
    """Lead the tasks of a table one after the other: address, chunks, address of the arguments for each."""
    sleepers = 0
    for i in range(n_tasks):
        entry = numbers_at(table + 24 * i)
        sleepers = lead(board, size, entry[0], entry[1], entry[2])
    return sleepers


@kernel
def help_out(board: int, size: int, thread_id: int) -> bool:
    """Help with whatever is on the board, until nothing has come for a while (True) or STOP (False)."""
    idle = 0
    while idle < SPINS:
        if take_chunks(board, size, thread_id):
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


@task
def several(args: int, chunk: int, thread_id: int) -> None:
    """Tasks one after the other: how many, then for each its first chunk, its address, its arguments' address."""
    a = numbers_at(args)
    at = 3 * a[0] - 2
    while chunk < a[at]:
        at -= 3
    call_task(a[at + 1], a[at + 2], chunk - a[at], thread_id)


Part = tuple[Task, int, tuple[int, ...]]  # a task, how many chunks, its arguments
Room = tuple[Any, int]  # for one task's arguments: an array of int64, and its address


def rooms(n: int) -> list[Room]:
    """Room for the arguments of n tasks."""
    parts: Any = np.zeros((n, MAX_ARGUMENTS), np.int64)
    return [(row, row.ctypes.data) for row in parts]


def write(arguments: tuple[int, ...], room: Room) -> int:
    """Put a task's arguments into a room. Returns where they stand."""
    numbers, address = room
    PACK[len(arguments)].pack_into(numbers, 0, *arguments)
    return address


def join(parts: list[Part], rooms: list[Room]) -> Part:
    """Several tasks that do not wait for each other, at most MAX_PARTS, as one. Each needs one of the rooms."""
    assert len(parts) <= MAX_PARTS
    if len(parts) == 1:
        return parts[0]
    total, table = 0, [len(parts)]
    for (one, n_chunks, arguments), room in zip(parts, rooms, strict=False):
        table += total, one.address, write(arguments, room)
        total += n_chunks
    return several, total, tuple(table)


class TaskList:
    """Tasks in a row with their arguments, written down for :meth:`ThreadPool.replay`.

    Each entry of ``steps`` is what :meth:`ThreadPool.run_several` would be given.
    """

    def __init__(self, steps: list[list[Part]]) -> None:
        self.rooms = [rooms(len(parts) + 1) for parts in steps]  # held, as the table has their addresses
        entries = []
        for parts, (own, *others) in zip(steps, self.rooms, strict=True):
            task, n_chunks, arguments = join(parts, others)
            entries.append((task.address, n_chunks, write(arguments, own)))
        self.table = np.array(entries, np.int64).reshape(-1, 3)
        self.address = self.table.ctypes.data


class ThreadPool:
    """``size`` threads, the caller's included. They end with the object."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.board = np.zeros(TICKETS + 8 * size + 8, np.int64)
        self.base = -(-self.board.ctypes.data // 64) * 64  # a cache line's start
        start = (self.base - self.board.ctypes.data) // 8
        self._asleep = self.board[start + ASLEEP : start + ASLEEP + 1]
        self._room: Room = self.board[start + ARGUMENTS : start + TICKETS], self.base + 8 * ARGUMENTS
        self._rooms = rooms(MAX_PARTS)
        self.wake = threading.Semaphore(0)
        self._lock = threading.RLock()
        self._started = False

    def run(self, task: Task, n_chunks: int, *arguments: int) -> None:
        """Call task for each chunk; returns when all are done. Arguments are integers: addresses and sizes."""
        with self._lock:
            self._start()
            sleepers = lead(self.base, self.size, task.address, n_chunks, write(arguments, self._room))
        self._wake(sleepers)

    def run_several(self, parts: list[Part]) -> None:
        """Call several tasks that do not wait for each other, at most MAX_PARTS, as one task."""
        with self._lock:
            task, n_chunks, arguments = join(parts, self._rooms)
            self.run(task, n_chunks, *arguments)

    def replay(self, script: TaskList) -> None:
        """Run the script's tasks, each when the one before it is done.

        Sleepers are called before, as there is no other occasion until all is done, and those that fell asleep
        meanwhile after it.
        """
        with self._lock:
            self._start()
            self._wake(int(self._asleep[0]))
            sleepers = replay(self.base, self.size, script.address, len(script.table))
        self._wake(sleepers)

    def _wake(self, n: int) -> None:
        for _ in range(n):
            self.wake.release()

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        for thread_id in range(1, self.size):
            what = self.board, self.base, self.size, thread_id, self.wake
            threading.Thread(target=_helper, args=what, daemon=True).start()
        weakref.finalize(self, _stop, self.board, self.base, self.size, self.wake)


def _helper(board: Any, base: int, size: int, thread_id: int, wake: threading.Semaphore) -> None:
    """A helper's life. It holds the board, so that its memory outlives the thread_pool."""
    while help_out(base, size, thread_id):
        wake.acquire()
        get_up(base)
    del board


def _stop(board: Any, base: int, size: int, wake: threading.Semaphore) -> None:
    board[(base - board.ctypes.data) // 8 + STOP] = 1
    for _ in range(size):
        wake.release()


