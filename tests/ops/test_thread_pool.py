"""The threads: every chunk once, by whoever comes; the same answer from one thread and from many."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tinyllava.ops.cpu import thread_pool
from tinyllava.ops.cpu.compile import task
from tinyllava.ops.select import select


@task
def count(args: int, chunk: int, thread_id: int) -> None:
    """counts[chunk] += 1; workers[thread_id] += 1 (not atomic, but nobody else is ``thread_id``)."""
    a = thread_pool.numbers_at(args)
    counts, workers = thread_pool.floats_at(a[0], 1, a[2])[0], thread_pool.floats_at(a[1], 1, 16)[0]
    counts[chunk] += np.float32(1.0)
    workers[thread_id] += np.float32(1.0)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("n_chunks", [0, 1, 7, 1000])
def test_every_item_is_done_once(size: int, n_chunks: int) -> None:
    members = thread_pool.ThreadPool(size)
    counts, workers = np.zeros(max(1, n_chunks), np.float32), np.zeros(16, np.float32)
    for _ in range(50):
        members.run(count, n_chunks, counts.ctypes.data, workers.ctypes.data, len(counts))
    assert (counts[:n_chunks] == 50).all()
    assert workers.sum() == 50 * n_chunks and not workers[size:].any()


def test_helpers_that_fell_asleep_come_back() -> None:
    members, counts, workers = thread_pool.ThreadPool(2), np.zeros(1 << 16, np.float32), np.zeros(16, np.float32)
    for _ in range(3):
        members.run(count, len(counts), counts.ctypes.data, workers.ctypes.data, len(counts))
        time.sleep(0.1)
    assert (counts == 3).all()


@task
def shift(args: int, chunk: int, _thread_id: int) -> None:
    """y[chunk] = 2 x[chunk] + step: whether it ran before or after another such task shows."""
    a = thread_pool.numbers_at(args)
    x, y = thread_pool.floats_at(a[0], 1, a[2])[0], thread_pool.floats_at(a[1], 1, a[2])[0]
    y[chunk] = np.float32(2.0) * x[chunk] + np.float32(a[3])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_script_is_its_jobs_in_order_each_time(size: int) -> None:
    members, n = thread_pool.ThreadPool(size), 37
    x, y, z = (np.zeros(n, np.float32) for _ in range(3))
    at = [array.ctypes.data for array in (x, y, z)]
    steps: list[list[thread_pool.TaskCall]] = [
        [(shift, n, (at[0], at[1], n, 1))],  # y = 2 x + 1
        [(shift, n, (at[0], at[2], n, 5)), (shift, n, (at[1], at[1], n, 2))],  # z = 2 x + 5; y = 2 y + 2
        [(shift, 0, ())],
        [(shift, n, (at[1], at[0], n, 3))],  # x = 2 y + 3
    ]
    script, truth = thread_pool.TaskList(steps), np.arange(n, dtype=np.float32)
    x[:] = truth
    for i in range(3):
        if i == 2 and size > 1:
            time.sleep(0.5)  # time enough to fall asleep
        others: list[thread_pool.TaskCall] = [(shift, n, (at[1], at[1], n, 0)), (shift, n, (at[1], at[2], n, 0))]
        members.run_several(others)  # in the rooms that the script's tasks must not use
        members.run_list(script)
        np.testing.assert_array_equal(z, 2 * truth + 5)
        truth = 8 * truth + 11
        np.testing.assert_array_equal(x, truth)
    members.run_list(thread_pool.TaskList([]))


def test_the_answer_does_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((70, 4, 40)).astype(np.float32) for _ in range(3))
    answers = [select("numba", threads=n).attention(q, k, v, causal=True) for n in (1, 2, 3)]
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])
