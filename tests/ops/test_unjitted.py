"""Kernels run as plain Python at toy size, so that coverage and a debugger see them; compared with the reference.

What holds vectors in registers only runs compiled, in test_parity.py: outlier_ratio, rows of float16, softmax and
attention; and the sums of norms, in whose place NumPy's are used here.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from typing import Any

import numpy as np
import pytest

from tests.ops.unjitted import unjitted
from tinyllava.ops import Activation, RopeKind
from tinyllava.ops.cpu import rowwise, thread_pool
from tinyllava.ops.cpu.compile import Task
from tinyllava.ops.cpu.ops import NumbaOps
from tinyllava.ops.cpu.thread_pool import TaskCall
from tinyllava.ops.select import select

RNG = np.random.default_rng(2)
TRUTH = select("numpy", dtype="float64")


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def row_of(address: int, d: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * d).from_address(address))


SUMS = {
    "sum_of_row": lambda row, d: row_of(row, d).sum(),
    "sum_of_squares": lambda row, d, mean: np.square(row_of(row, d) - mean).sum(),
}


class PlainPool:
    """A thread pool without threads, whose tasks are plain Python."""

    def run_several(self, calls: list[TaskCall]) -> None:
        for task, n_chunks, arguments in calls:
            numbers, function = array("q", arguments), unjitted(task, **SUMS)
            for chunk in reversed(range(n_chunks)):  # in any order
                function(numbers.buffer_info()[0], chunk, 0)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> NumbaOps:
    for module in ("ops", "matmul"):  # so that there are several chunks
        monkeypatch.setattr(f"tinyllava.ops.cpu.{module}.CHUNK_NUMBERS", 16)
    backend: Any = NumbaOps(1)
    backend.runner.pool = PlainPool()
    return backend


def close(found: Any, truth: Any) -> None:
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)


def test_norms(ops: NumbaOps) -> None:
    x, w, b = floats(3, 5), floats(5), floats(5)
    close(ops.rms_norm(x, w, 1e-5), TRUTH.rms_norm(x, w, 1e-5))
    close(ops.layer_norm(x, w, b, 1e-5), TRUTH.layer_norm(x, w, b, 1e-5))


@pytest.mark.parametrize("kind", ["gelu_erf", "gelu_tanh", "gelu_quick", "silu"])
def test_activations(kind: Activation, ops: NumbaOps) -> None:
    x = np.array([[-100.0, -3.0, -0.5, 0.0, 1.0, 20.0]], np.float32)
    close(ops.activation(x, kind), TRUTH.activation(x.astype(np.float64), kind))


def test_sums_and_swiglu(ops: NumbaOps) -> None:
    x, y = floats(2, 7), floats(2, 7)
    np.testing.assert_array_equal(ops.add(x, y), x + y)
    close(ops.swiglu(x, y), TRUTH.swiglu(x, y))


@pytest.mark.parametrize("kind", ["norm", "neox"])
@pytest.mark.parametrize("n_pairs", [3, 2])  # of heads with 6 features: all of them, and 4
def test_rope(kind: RopeKind, n_pairs: int, ops: NumbaOps) -> None:
    x, cos, sin = floats(4, 2, 6), floats(4, n_pairs), floats(4, n_pairs)
    close(ops.rope(x, cos, sin, kind), TRUTH.rope(x, cos, sin, kind))


def test_append_kv_in_float32(ops: NumbaOps) -> None:
    held, rows = tuple(floats(2, 9, 3) for _ in range(2)), tuple(floats(4, 2, 3) for _ in range(2))
    position = ops.position(9)
    position.value = 5
    truth = TRUTH.append_kv(tuple(x.copy() for x in held), rows, position)
    for found, wanted in zip(ops.append_kv(held, rows, position), truth, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_slice_at() -> None:
    table, y, position = floats(6, 3), floats(2, 3), np.array([4])
    for chunk in range(2):
        arguments = array("q", (table.ctypes.data, y.ctypes.data, 3, position.ctypes.data))
        unjitted(rowwise.slice_at)(arguments.buffer_info()[0], chunk, 0)
    np.testing.assert_array_equal(y, table[4:])


# ---- the thread pool's bookkeeping, with atomics that are a lock


class Shared:
    """The shared state of a pool of some threads, and the intrinsics on it."""

    def __init__(self, size: int) -> None:
        self.state = thread_pool.ThreadPool(size).state
        self.address, self.size = self.state.ctypes.data, size
        self.lock = threading.Lock()
        self.done: list[tuple[int, int]] = []  # arguments, chunk
        self.stand_ins = {
            "add_atomically": self.add,
            "read_atomically": lambda address: self.at(address).value,
            "write_atomically": self.write,
            "call_task": lambda _address, arguments, chunk, _: self.done.append((arguments, chunk)),
            "pause": lambda: None,
        }

    def at(self, address: int) -> Any:
        return ctypes.c_int64.from_address(address)

    def add(self, address: int, value: int) -> int:
        with self.lock:
            before = int(self.at(address).value)
            self.at(address).value += value
        return before

    def write(self, address: int, value: int) -> None:
        self.at(address).value = value

    def call(self, function: Any, *arguments: int) -> Any:
        return unjitted(function, **self.stand_ins)(self.address, self.size, *arguments)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("n_chunks", [0, 1, 2, 3, 10])
def test_one_thread_takes_all_chunks_of_all_queues(size: int, n_chunks: int) -> None:
    shared = Shared(size)
    shared.state[thread_pool.SLEEPING] = 2
    assert shared.call(thread_pool.run_task, 1234, n_chunks, 99) == 2
    assert sorted(shared.done) == [(99, chunk) for chunk in range(n_chunks)]
    shared.done.clear()
    assert not shared.call(thread_pool.run_chunks, size - 1) and not shared.done


def test_a_worker_leaves_when_told_and_sleeps_without_work() -> None:
    shared = Shared(2)
    work = unjitted(thread_pool.work, **shared.stand_ins)
    work.__globals__["SPINS"] = 3
    assert work(shared.address, 2, 1) and shared.state[thread_pool.SLEEPING] == 1
    shared.state[thread_pool.STOP] = 1
    assert not work(shared.address, 2, 1) and shared.state[thread_pool.SLEEPING] == 0


def test_a_list_of_joined_tasks_calls_each_with_its_own_chunks() -> None:
    class Named(Task):
        address = 7  # type: ignore[assignment]

    one, shared = Named(lambda *_: None), Shared(1)
    tasks = thread_pool.TaskList([[(one, 2, (11,)), (one, 0, (12,)), (one, 3, (13,))], [(one, 1, (14,))]])
    run_calls = unjitted(thread_pool.run_calls, **shared.stand_ins)
    address, n_chunks, arguments = (int(n) for n in tasks.arrays[-1][:3])
    assert address == thread_pool.run_calls.address and n_chunks == 5 and tasks.n_tasks == 2
    for chunk in range(n_chunks):
        run_calls(arguments, chunk, 0)
    found = [(shared.at(where).value, chunk) for where, chunk in shared.done]
    assert found == [(11, 0), (11, 1), (13, 0), (13, 1), (13, 2)]
    shared.done.clear()
    assert shared.call(thread_pool.run_table, tasks.address, tasks.n_tasks) == 0
    assert len(shared.done) == 6 and shared.at(shared.done[-1][0]).value == 14
