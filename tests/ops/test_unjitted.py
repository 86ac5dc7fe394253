"""Row-wise kernels as the plain Python that they are written in, at toy size: coverage and debuggers can see them.

Vector instructions have stand-ins here: a vector of 16 floats is a NumPy array, and each stand-in is one line.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from tinyllava.ops.cpu import rowwise, thread_pool
from tinyllava.ops.select import select

RNG = np.random.default_rng(8)
TRUTH = select("numpy", dtype="float64")


def view(address: int, count: int, kind: Any = ctypes.c_float) -> np.ndarray:
    """``count`` numbers at an address."""
    return np.ctypeslib.as_array((kind * count).from_address(int(address)))


STAND_INS = {
    "float_of_bits": lambda bits: np.array(bits, np.int64).astype(np.int32).view(np.float32)[()],
    "float_at": lambda at: view(at, 1)[0],
    "load_floats": lambda at: view(at, 16).copy(),
    "no_floats": lambda: np.zeros(16, np.float32),
    "everywhere": lambda value: np.full(16, value, np.float32),
    "add": lambda a, b: a + b,
    "times": lambda a, b: a * b,
    "fused": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "fused_one": lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c)),
    "power_of_two": lambda n: np.float32(2.0) ** n,
    "total": lambda v: v.sum(),
    "larger": lambda a, b: np.where(a > b, a, b),
    "largest_lane": lambda v: v.max(),
    "put_half": lambda at, value: view(at, 1, ctypes.c_int16).__setitem__(0, np.float16(value).view(np.int16)),
    "put_halves": lambda at, v: view(at, 16, ctypes.c_int16).__setitem__(
        slice(None), v.astype(np.float16).view(np.int16)
    ),
}


@pytest.fixture(autouse=True)
def _unjitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel becomes its Python function, each instruction its stand-in."""
    for name, value in list(vars(rowwise).items()):
        if isinstance(value, Dispatcher):
            monkeypatch.setattr(rowwise, name, value.py_func)
        elif name in STAND_INS:
            monkeypatch.setattr(rowwise, name, STAND_INS[name])
    # For numbers_at and floats_at. Other kernels of thread_pool stay: threads of earlier tests may still run them.
    monkeypatch.setattr(thread_pool, "_pointer", lambda address: ctypes.c_void_p(int(address)))


def run(task: Any, n_chunks: int, *arguments: Any) -> None:
    """All chunks of a task: arrays as their addresses, floats as their bits."""
    numbers = np.zeros(thread_pool.MAX_ARGUMENTS, np.int64)
    for i, value in enumerate(arguments):
        if isinstance(value, np.ndarray):
            numbers[i] = value.ctypes.data
        else:
            numbers[i] = np.float32(value).view(np.int32) if isinstance(value, float) else value
    for chunk in range(n_chunks):
        task.python(numbers.ctypes.data, chunk, 0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("d", [5, 16, 37])
def test_norms(d: int) -> None:
    x, w, b, y = floats(3, d), floats(d), floats(d), floats(3, d)
    run(rowwise.rms_norm, 2, x, w, y, 3, d, 1e-5, 2)
    np.testing.assert_allclose(y, TRUTH.rms_norm(x, w, 1e-5), rtol=1e-5, atol=1e-6)
    run(rowwise.layer_norm, 2, x, w, b, y, 3, d, 1e-5, 2)
    np.testing.assert_allclose(y, TRUTH.layer_norm(x, w, b, 1e-5), rtol=1e-5, atol=1e-6)
    ratio = floats(3)
    run(rowwise.peaks, 2, x, ratio, 3, d, 2)
    np.testing.assert_allclose(ratio, (x**2).max(axis=1) / (x**2).mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("kind", rowwise.ACTIVATIONS)
def test_activations(kind: Any) -> None:
    x, y = np.array([-100, -87, -1, 0, 0.5, 30, np.nan], np.float32), floats(7)
    run(rowwise.ACTIVATIONS[kind], 3, x, y, 7, 3)
    np.testing.assert_allclose(y, TRUTH.activation(x.astype(np.float64), kind), rtol=1e-6, atol=1e-6)


def test_two_operands() -> None:
    x, other, y = floats(7), floats(7), floats(7)
    run(rowwise.sum_of_two, 3, x, y, 7, 3, other)
    np.testing.assert_array_equal(y, x + other)
    run(rowwise.swiglu, 3, x, y, 7, 3, other)
    np.testing.assert_allclose(y, TRUTH.swiglu(x, other), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["norm", "neox"])
def test_rope(kind: Any) -> None:
    x, cos, sin, y = floats(3, 2, 8), floats(3, 3), floats(3, 3), floats(3, 2, 8)
    run(rowwise.rope, 2, x, cos, sin, y, 3, 2, 8, 3, int(kind == "norm"), 2)
    np.testing.assert_allclose(y, TRUTH.rope(x, cos, sin, kind), rtol=1e-5, atol=1e-6)


def test_places() -> None:
    table, y, place = floats(9, 4), floats(2, 4), np.array([6], np.int64)
    run(rowwise.slice_at, 2, table, y, 4, place)
    np.testing.assert_array_equal(y, table[6:8])


@pytest.mark.parametrize("task, dtype", [(rowwise.keep_floats, np.float32), (rowwise.keep_halves, np.float16)])
def test_rows_are_kept_where_the_cache_has_their_place(task: Any, dtype: Any) -> None:
    n, n_head, d, limit, place = 3, 2, 18, 7, np.array([2], np.int64)
    k, v = floats(n, n_head, d), floats(n, n_head, d)
    k_cache, v_cache = np.zeros((2, n_head, limit, d), dtype)
    run(task, 4, k, v, k_cache, v_cache, n, n_head, d, limit, place, 2)
    for rows, cache in ((k, k_cache), (v, v_cache)):
        np.testing.assert_array_equal(cache[:, 2:5], rows.transpose(1, 0, 2).astype(dtype))
        assert not cache[:, :2].any() and not cache[:, 5:].any()
