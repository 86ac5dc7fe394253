"""Activations rounded sixteen blocks at a time, beside one block at a time and beside what can be said by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tinyllava.ops.numba_records import (
    BLOCKS,
    QUANTIZE_ROOM,
    STEPS,
    X_SCALES,
    X_SIZE,
    X_SUMS,
    best_steps,
    blocks_of_bytes,
)
from tinyllava.ops.tile import BLOCK, TOKENS

RNG = np.random.default_rng(5)
OFFSET = 8


def steps_of(x: np.ndarray) -> np.ndarray:
    """The steps of blocks x (n, 32)."""
    room = np.zeros(QUANTIZE_ROOM // 4, np.float32)
    best_steps(x.ctypes.data, len(x), room.ctypes.data)
    return room[STEPS // 4 :][: len(x)]


def floats(values: list[list[float]] | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


@pytest.mark.parametrize("count", [1, 7, BLOCKS])
def test_the_step_is_the_best_of_four(count: int) -> None:
    x = floats(RNG.standard_normal((count, BLOCK)) * 10.0 ** RNG.integers(-9, 9, (count, 1)))
    ends = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1).astype(np.float64)  # (count, 1)
    candidates = ends / [-128, -127, -126, -125]  # (count, 4)
    whole = x[:, :, None] / candidates[:, None]  # (count, 32, 4)
    errors = (((whole - np.rint(whole)) * candidates[:, None]) ** 2).sum(axis=1)  # (count, 4)
    found = steps_of(x)
    chosen = np.abs(found[:, None] / candidates - 1).argmin(axis=1)
    np.testing.assert_allclose(found, np.take_along_axis(candidates, chosen[:, None], axis=1)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(errors[np.arange(count), chosen], errors.min(axis=1), rtol=1e-3)


def test_a_block_of_zeros_has_no_step_and_its_neighbours_keep_theirs() -> None:
    x = floats(RNG.standard_normal((3, BLOCK)))
    before = steps_of(x).copy()
    x[1] = 0
    np.testing.assert_array_equal(steps_of(x), [before[0], 0, before[2]])


@pytest.mark.parametrize("spoiler", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_block_only(spoiler: float) -> None:
    x = floats(RNG.standard_normal((3, BLOCK)))
    before = steps_of(x).copy()
    x[1, 20] = spoiler
    np.testing.assert_array_equal(steps_of(x), [before[0], np.nan, before[2]])


@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("count", [1, 5, BLOCKS])
def test_a_record_holds_bytes_scales_and_sums(layout: int, count: int) -> None:
    x, t, size = floats(RNG.standard_normal((count, BLOCK))), TOKENS - 1, X_SIZE[layout]
    records, room = np.zeros((count, size), np.uint8), np.zeros(QUANTIZE_ROOM, np.uint8)
    blocks_of_bytes(x.ctypes.data, count, records.ctypes.data, layout, OFFSET, t, room.ctypes.data)
    bytes_ = records[:, t * BLOCK : (t + 1) * BLOCK].view(np.int8)  # (count, 32)
    scales = records[:, X_SCALES[layout] : X_SUMS[layout]].view(np.float32)[:, t]  # (count,)
    np.testing.assert_array_equal(scales, steps_of(x))
    nearest = np.minimum(x / scales[:, None], 127)  # 8 bits have no 128
    assert (np.abs(bytes_ - nearest) <= 0.5001).all()
    halves = bytes_.reshape(count, 2, 16).sum(axis=2, dtype=np.float32)  # (count, 2)
    wanted = halves.sum(axis=1, keepdims=True) if layout < 2 else halves
    sums = records[:, X_SUMS[layout] :].view(np.float32 if layout % 2 else np.int32)
    sums = sums.reshape(count, 2, TOKENS)[:, : wanted.shape[1], t]
    np.testing.assert_array_equal(sums, wanted * scales[:, None] if layout % 2 else -OFFSET * wanted)
    others = np.delete(records[:, : X_SCALES[layout]].reshape(count, TOKENS, BLOCK), t, axis=1)
    assert (others == 0).all()
