"""The thread pool: each chunk is run once, by any thread; one thread and many give the same results."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tinyllava.ops.cpu import thread_pool
from tinyllava.ops.cpu.compile import task
from tinyllava.ops.select import select


@task
def count(args: int, chunk: int, thread_id: int) -> None:
    """counts[chunk] += 1; workers[thread_id] += 1 (not atomic, but no other thread has this id)."""
    address, workers_address, n = thread_pool.arguments_at(args, 3)
    counts, workers = thread_pool.row_at(address, n), thread_pool.row_at(workers_address, 16)
    counts[chunk] += np.float32(1.0)
    workers[thread_id] += np.float32(1.0)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("n_chunks", [0, 1, 7, 1000])
def test_every_chunk_is_run_once(size: int, n_chunks: int) -> None:
    pool = thread_pool.ThreadPool(size)
    counts, workers = np.zeros(max(1, n_chunks), np.float32), np.zeros(16, np.float32)
    for _ in range(50):
        pool.run(count, n_chunks, counts.ctypes.data, workers.ctypes.data, len(counts))
    assert (counts[:n_chunks] == 50).all()
    assert workers.sum() == 50 * n_chunks and not workers[size:].any()


def test_workers_that_fell_asleep_are_woken() -> None:
    pool, counts, workers = thread_pool.ThreadPool(2), np.zeros(1 << 16, np.float32), np.zeros(16, np.float32)
    for _ in range(3):
        pool.run(count, len(counts), counts.ctypes.data, workers.ctypes.data, len(counts))
        time.sleep(0.1)
    assert (counts == 3).all()


@task
def shift(args: int, chunk: int, _thread_id: int) -> None:
    """y[chunk] = 2 x[chunk] + step, which shows whether it ran before or after another such task."""
    source, target, n, step = thread_pool.arguments_at(args, 4)
    x, y = thread_pool.row_at(source, n), thread_pool.row_at(target, n)
    y[chunk] = np.float32(2.0) * x[chunk] + np.float32(step)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_list_runs_its_tasks_in_order_each_time(size: int) -> None:
    pool, n = thread_pool.ThreadPool(size), 37
    x, y, z = (np.zeros(n, np.float32) for _ in range(3))
    at = [array.ctypes.data for array in (x, y, z)]
    steps: list[list[thread_pool.TaskCall]] = [
        [(shift, n, (at[0], at[1], n, 1))],  # y = 2 x + 1
        [(shift, n, (at[0], at[2], n, 5)), (shift, n, (at[1], at[1], n, 2))],  # z = 2 x + 5; y = 2 y + 2
        [(shift, 0, ())],
        [(shift, n, (at[1], at[0], n, 3))],  # x = 2 y + 3
    ]
    tasks, truth = thread_pool.TaskList(steps), np.arange(n, dtype=np.float32)
    x[:] = truth
    for i in range(3):
        if i == 2 and size > 1:
            time.sleep(0.5)  # time enough to fall asleep
        pool.run_several([(shift, n, (at[1], at[1], n, 0)), (shift, n, (at[1], at[2], n, 0))])  # in between
        pool.run_list(tasks)
        np.testing.assert_array_equal(z, 2 * truth + 5)
        truth = 8 * truth + 11
        np.testing.assert_array_equal(x, truth)
    pool.run_list(thread_pool.TaskList([]))


def test_the_answer_does_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((70, 4, 40)).astype(np.float32) for _ in range(3))
    answers = [select("numba", threads=n).attention(q, k, v, causal=True) for n in (1, 2, 3)]
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])
