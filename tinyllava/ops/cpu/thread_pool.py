"""A thread pool that shares out a task within a microsecond.

An operation of a small model takes 20 us, about what it costs to wake a sleeping thread. So between tasks the
workers spin in compiled code, without the GIL, and sleep only after a quarter of a second without work.

A task is a compiled function task(arguments, chunk, thread_id): ``arguments`` is the address of int64 numbers
(addresses and sizes), ``chunk`` says which part of the work to do, ``thread_id`` which thread does it. The chunks
are dealt out in contiguous queues, one for each thread: memory is read fastest by threads that each read on and on
(42 GB/s from a mapped file, where threads that take pieces of 64 KiB in turn get 32). A thread whose queue is
empty takes chunks from the others' queues. A chunk is computed in the same way whoever does it: results do not
depend on the number of threads.

Threads communicate through the shared state, an array of int64. Numbers that different threads write at the same
time stand on cache lines of their own (8 numbers):

    [ 0]  CHUNKS_DONE       of the current task
    [ 8]  SLEEPING          how many workers have not begun, or wait for the semaphore ``wake``
    [16]  STOP              1: the workers are to return
    [24]  TASK              address of the current task's compiled function
    [25]  TASK_ARGUMENTS    address of its arguments
    [32]  QUEUES            thread 0's queue: end << 32 | next chunk
    [40]                    thread 1's queue, and so on

A thread takes a chunk by adding 1 to a queue atomically. Then it may read TASK and TASK_ARGUMENTS: they, and what
they point at, do not change before all chunks of the task are done.

Tasks that are run again and again, in the same order and with the same arguments, are written into a TaskList once
(capture.py); the pool goes through the list in compiled code.
"""

from __future__ import annotations

import platform
import threading
import weakref
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from tinyllava.ops.cpu.compile import Task, kernel, task
from tinyllava.ops.cpu.simd import llvm

CHUNKS_DONE, SLEEPING, STOP, TASK, TASK_ARGUMENTS, QUEUES = 0, 8, 16, 24, 25, 32
CHUNK_BITS = 32  # of a queue: the next chunk; the bits above are the end
CHUNK_MASK = (1 << CHUNK_BITS) - 1
SPINS = 200_000  # pauses before a worker goes to sleep: about a quarter of a second on Zen 4


# ---- atomics


def _int64_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, llvm.I64.as_pointer())


@llvm.instruction("i:ii")
def add_atomically(builder: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address; returns what stood there before."""
    return builder.atomic_rmw("add", _int64_at(builder, address), value, "seq_cst")


@llvm.instruction("i:i")
def read_atomically(builder: Any, address: Any) -> Any:
    """The int64 at an address, with all that was written before it."""
    return builder.load_atomic(_int64_at(builder, address), "acquire", 8)


@llvm.instruction("-:ii")
def write_atomically(builder: Any, address: Any, value: Any) -> None:
    """Store an int64 after all that was written before it."""
    builder.store_atomic(value, _int64_at(builder, address), "seq_cst", 8)


@llvm.instruction("-:iiii")
def call_task(builder: Any, address: Any, arguments: Any, chunk: Any, thread_id: Any) -> None:
    """Call the task at an address."""
    kind = ir.FunctionType(ir.VoidType(), [llvm.I64] * 3).as_pointer()
    builder.call(builder.inttoptr(address, kind), [arguments, chunk, thread_id])


@llvm.instruction("-:")
def pause(builder: Any) -> None:
    """Tell the processor that this is a waiting loop."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64", "i686"):
        llvm.call(builder, "llvm.x86.sse2.pause", ir.VoidType())
    elif machine in ("aarch64", "arm64"):
        llvm.call(builder, "llvm.aarch64.hint", ir.VoidType(), llvm.i32(1))


# ---- what stands at an address


@intrinsic
def _pointer(_context: Any, _address: Any) -> Any:
    """An address as a void pointer."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


def _arguments_at(_context: Any, _address: Any, count: Any) -> Any:
    """A task's arguments as a tuple: ``x, y, n = arguments_at(args, 3)`` names them. The count is a constant."""
    if not isinstance(count, types.IntegerLiteral):
        raise RequireLiteralValue("count")
    kind = types.UniTuple(types.int64, count.literal_value)

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        numbers = [llvm.load(builder, values[0], llvm.I64, 8 * i) for i in range(kind.count)]
        return context.make_tuple(builder, kind, numbers)

    return kind(types.int64, count), codegen


arguments_at: Any = intrinsic(_arguments_at)


@llvm.instruction("i:i")
def int64_at(builder: Any, address: Any) -> Any:
    """The int64 at an address."""
    return llvm.load(builder, address, llvm.I64)


@kernel
def floats_at(address: int, rows: int, columns: int) -> Any:
    """The contiguous float32 (rows, columns) at an address."""
    return carray(_pointer(address), (rows, columns), np.float32)


@kernel
def row_at(address: int, n: int) -> Any:
    """The n contiguous float32 at an address."""
    return carray(_pointer(address), (n,), np.float32)


# ---- what the threads do


@kernel
def queue_of(state: int, thread_id: int) -> int:
    """The address of a thread's queue."""
    return state + 8 * (QUEUES + 8 * thread_id)


@kernel
def has_chunks(queue: int) -> bool:
    """Whether a queue, given its value, holds a chunk that nobody has taken."""
    return queue & CHUNK_MASK < queue >> CHUNK_BITS


@kernel
def run_chunks(state: int, size: int, thread_id: int) -> bool:
    """Run chunks of the current task, one's own queue first, until none is left. Returns whether any were."""
    found = False
    for i in range(size):
        queue = queue_of(state, (thread_id + i) % size)
        while has_chunks(read_atomically(queue)):
            taken = add_atomically(queue, 1)
            if has_chunks(taken):  # not if another thread was faster
                address = read_atomically(state + 8 * TASK)
                arguments = read_atomically(state + 8 * TASK_ARGUMENTS)
                call_task(address, arguments, taken & CHUNK_MASK, thread_id)
                add_atomically(state + 8 * CHUNKS_DONE, 1)
                found = True
    return found


@kernel
def run_task(state: int, size: int, address: int, n_chunks: int, arguments: int) -> int:
    """Thread 0: start a task, take part in it, wait for the rest of it. Returns how many workers sleep."""
    if n_chunks == 1:  # there is nothing to share out
        call_task(address, arguments, 0, 0)
        return read_atomically(state + 8 * SLEEPING)
    write_atomically(state + 8 * TASK, address)
    write_atomically(state + 8 * TASK_ARGUMENTS, arguments)
    write_atomically(state + 8 * CHUNKS_DONE, 0)
    for thread_id in range(size - 1, -1, -1):
        first, end = (n_chunks * thread_id + size - 1) // size, (n_chunks * (thread_id + 1) + size - 1) // size
        write_atomically(queue_of(state, thread_id), end << CHUNK_BITS | first)
    run_chunks(state, size, 0)
    while read_atomically(state + 8 * CHUNKS_DONE) < n_chunks:
        pause()
    return read_atomically(state + 8 * SLEEPING)


@kernel
def run_table(state: int, size: int, table: int, n_tasks: int) -> int:
    """Run the tasks of a TaskList's table one after the other. Returns how many workers sleep."""
    sleeping = 0
    for i in range(n_tasks):
        address, n_chunks, arguments = arguments_at(table + 24 * i, 3)
        sleeping = run_task(state, size, address, n_chunks, arguments)
    return sleeping


@kernel
def work(state: int, size: int, thread_id: int) -> bool:
    """A worker is awake: it runs chunks until none has come for a while (then True) or until STOP (False)."""
    add_atomically(state + 8 * SLEEPING, -1)
    idle = 0
    while idle < SPINS:
        if run_chunks(state, size, thread_id):
            idle = 0
        elif read_atomically(state + 8 * STOP):
            return False
        else:
            pause()
            idle += 1
    add_atomically(state + 8 * SLEEPING, 1)
    return True


@task
def run_calls(args: int, chunk: int, thread_id: int) -> None:
    """Several tasks as one, whose chunks are those of the first, then those of the second, and so on.

    Arguments: how many tasks, then for each its first chunk, its address, the address of its arguments.
    """
    entry = args + 8 + 24 * (int64_at(args) - 1)
    while chunk < int64_at(entry):
        entry -= 24
    first, address, arguments = arguments_at(entry, 3)
    call_task(address, arguments, chunk - first, thread_id)


# ---- the pool, in Python

TaskCall = tuple[Task, int, tuple[int, ...]]  # a task, how many chunks, its arguments


def store(numbers: Iterable[int], arrays: list[Any]) -> int:
    """Put an array of int64 into ``arrays``. Returns its address, which is valid while the array is there."""
    arrays.append(array("q", numbers))
    return int(arrays[-1].buffer_info()[0])


def join(calls: list[TaskCall], arrays: list[Any]) -> TaskCall:
    """Several calls that do not wait for each other as one call, with their arguments stored."""
    if len(calls) == 1:
        return calls[0]
    total, table = 0, [len(calls)]
    for one, n_chunks, arguments in calls:
        table += total, one.address, store(arguments, arrays)
        total += n_chunks
    return run_calls, total, tuple(table)


class TaskList:
    """Tasks and their arguments, stored for ThreadPool.run_list: each step is what run_several would be given."""

    def __init__(self, steps: list[list[TaskCall]]) -> None:
        self.n_tasks = len(steps)
        self.arrays: list[Any] = []  # whose addresses the table has; the table is the last
        joined = [join(calls, self.arrays) for calls in steps]
        table = [(task.address, n, store(arguments, self.arrays)) for task, n, arguments in joined]
        self.address = store((number for entry in table for number in entry), self.arrays)


class ThreadPool:
    """``size`` threads, the caller's included. They end with the object."""

    def __init__(self, size: int) -> None:
        self.size = size
        memory = np.zeros(QUEUES + 8 * size + 8, np.int64)
        self.state = memory[-memory.ctypes.data // 8 % 8 :]  # from the start of a cache line
        self.state[SLEEPING] = size - 1
        self.address = self.state.ctypes.data
        self.wake = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._started = False

    def run(self, task: Task, n_chunks: int, *arguments: int) -> None:
        """Run all chunks of a task. Arguments are integers: addresses and sizes."""
        self.run_several([(task, n_chunks, arguments)])

    def run_several(self, calls: list[TaskCall]) -> None:
        """Run several tasks that do not wait for each other, as if they were one."""
        arrays: list[Any] = []
        task, n_chunks, arguments = join(calls, arrays)
        with self._lock:
            self._start()
            sleeping = run_task(self.address, self.size, task.address, n_chunks, store(arguments, arrays))
        self._wake(sleeping)

    def run_list(self, tasks: TaskList) -> None:
        """Run the tasks of a list, each when the one before it is done.

        Workers that sleep are woken before, since in between Python has no part in it; those that have fallen
        asleep meanwhile are woken after it.
        """
        with self._lock:
            self._start()
            self._wake(int(self.state[SLEEPING]))
            sleeping = run_table(self.address, self.size, tasks.address, tasks.n_tasks)
        self._wake(sleeping)

    def _wake(self, n: int) -> None:
        for _ in range(n):
            self.wake.release()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            for thread_id in range(1, self.size):
                what = self.state, self.size, thread_id, self.wake
                threading.Thread(target=_worker, args=what, daemon=True).start()
            weakref.finalize(self, _stop, self.state, self.size, self.wake)


def _worker(state: Any, size: int, thread_id: int, wake: threading.Semaphore) -> None:
    """What a worker's thread runs. It holds the state, whose memory must outlive the pool."""
    while work(state.ctypes.data, size, thread_id):
        wake.acquire()


def _stop(state: Any, size: int, wake: threading.Semaphore) -> None:
    state[STOP] = 1
    for _ in range(size):
        wake.release()
