"""The pool of buffers: a buffer is used again only when no array refers to it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinyllava.ops.cpu.workspace import SMALL_BYTES, BufferPool

N = SMALL_BYTES // 4


def address(x: np.ndarray) -> int:
    return x.ctypes.data


def test_a_free_buffer_is_used_again_and_a_held_one_is_not() -> None:
    buffers = BufferPool()
    first = buffers.empty(2, N)
    where, view = address(first), first[1:, 3:]
    assert address(buffers.empty(2, N)) != where
    del first
    assert address(buffers.empty(2, N)) != where  # the view still holds it
    del view
    assert address(buffers.empty(2, N)) == where


def test_free_buffers_are_released_when_there_are_too_many() -> None:
    buffers = BufferPool(keep_bytes=16 * SMALL_BYTES)
    held = buffers.empty(N)
    buffers.empty(4 * N)
    buffers.empty(10 * N)
    assert [b.size for b in buffers._held] == [N, 4 * N, 10 * N]
    buffers.empty(3, N // 2)
    assert [b.size for b in buffers._held] == [N, 3 * N // 2]
    assert held.shape == (N,)


def test_small_arrays_are_kept_too_if_asked_for() -> None:
    buffers = BufferPool(small_bytes=0)
    first, other = buffers.empty(2, 3), np.empty((2, 3), np.float32)
    where = address(first)
    assert buffers.owns(first) and buffers.owns(first.reshape(6)[1:]) and not buffers.owns(other)
    assert address(buffers.empty(5)) != where
    del first
    assert address(buffers.empty(5)) == where


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=30))
def test_live_arrays_never_share_memory(steps: list[tuple[int, bool]]) -> None:
    buffers, live = BufferPool(), []
    for i, (size, keep) in enumerate(steps):
        x = buffers.empty(size, N // 2)
        assert x.shape == (size, N // 2) and x.dtype == np.float32
        x[:] = i
        if keep:
            live.append((i, x[size // 2 :]))
        elif live:
            live.pop(0)
        assert all((y == j).all() for j, y in live)
