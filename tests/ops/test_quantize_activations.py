"""Activations quantized sixteen blocks at a time, beside one at a time and beside what can be said by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tinyllava.ops.cpu.microkernel import BLOCK, INT16, MINIMA_4, MINIMA_8, MINIMUM, NR, OFFSET, SIGNED
from tinyllava.ops.cpu.quantize_activations import (
    BLOCKS,
    COLUMNS,
    QUANTIZE_SCRATCH,
    SCALES_AT,
    X_SCALES,
    X_SIZE,
    X_SUMS,
    best_scales,
    pack_int8,
)

RNG = np.random.default_rng(5)
OFFSET_C = 8


def scales_of(x: np.ndarray, together: bool = False) -> np.ndarray:
    """The scales of blocks x (n, 32)."""
    scratch = np.zeros(QUANTIZE_SCRATCH // 4, np.float32)
    best_scales(x.ctypes.data, len(x), together, scratch.ctypes.data)
    return scratch[SCALES_AT // 4 :][: len(x)]


def floats(values: list[list[float]] | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


@pytest.mark.parametrize("count", [1, 7, BLOCKS])
def test_the_scale_is_the_best_of_four(count: int) -> None:
    x = floats(RNG.standard_normal((count, BLOCK)) * 10.0 ** RNG.integers(-9, 9, (count, 1)))
    ends = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1).astype(np.float64)  # (count, 1)
    candidates = ends / [-128, -127, -126, -125]  # (count, 4)
    whole = x[:, :, None] / candidates[:, None]  # (count, 32, 4)
    errors = (((whole - np.rint(whole)) * candidates[:, None]) ** 2).sum(axis=1)  # (count, 4)
    found = scales_of(x)
    chosen = np.abs(found[:, None] / candidates - 1).argmin(axis=1)
    np.testing.assert_allclose(found, np.take_along_axis(candidates, chosen[:, None], axis=1)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(errors[np.arange(count), chosen], errors.min(axis=1), rtol=1e-3)


def test_a_block_of_zeros_has_no_scale_and_its_neighbours_keep_theirs() -> None:
    x = floats(RNG.standard_normal((3, BLOCK)))
    before = scales_of(x).copy()
    x[1] = 0
    np.testing.assert_array_equal(scales_of(x), [before[0], 0, before[2]])


@pytest.mark.parametrize("spoiler", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_block_only(spoiler: float) -> None:
    x = floats(RNG.standard_normal((3, BLOCK)))
    before = scales_of(x).copy()
    x[1, 20] = spoiler
    np.testing.assert_array_equal(scales_of(x), [before[0], np.nan, before[2]])


def test_four_blocks_together_have_the_best_scale_for_all_of_them() -> None:
    x = floats(RNG.standard_normal((8, BLOCK)))
    found = scales_of(x, together=True)
    for i in (0, 4):
        four = x[i : i + 4].ravel()
        candidates = four[np.abs(four).argmax()] / np.array([-128.0, -127.0])
        whole = four / candidates[:, None]  # (2, 128)
        errors = ((whole - np.rint(whole)) ** 2).sum(axis=1) * candidates**2
        np.testing.assert_allclose(found[i : i + 4], candidates[errors.argmin()], rtol=1e-6)


@pytest.mark.parametrize("count", [4, 12, BLOCKS])
@pytest.mark.parametrize("layout", range(INT16))
def test_a_packed_block_holds_bytes_scales_and_sums(layout: int, count: int) -> None:
    x, t, size = floats(RNG.standard_normal((count, BLOCK))), NR - 1, X_SIZE[layout]
    each = COLUMNS[layout] // BLOCK
    packed, scratch = np.zeros((count // each, size), np.uint8), np.zeros(QUANTIZE_SCRATCH, np.uint8)
    pack_int8(x.ctypes.data, count, packed.ctypes.data, layout, OFFSET_C, t, scratch.ctypes.data)
    tokens = packed[:, : X_SCALES[layout]].reshape(-1, NR, each * BLOCK)
    assert (np.delete(tokens, t, axis=1) == 0).all()
    bytes_ = (tokens[:, t] ^ (128 if layout == SIGNED else 0)).view(np.int8).reshape(count, BLOCK)
    scales = packed[:, X_SCALES[layout] : X_SUMS[layout]].view(np.float32)[:, t].repeat(each)  # (count,)
    np.testing.assert_array_equal(scales, scales_of(x, each > 1))
    nearest = np.minimum(x / scales[:, None], 127)  # 8 bits have no 128
    assert (np.abs(bytes_ - nearest) <= 0.5001).all()
    sums = bytes_.sum(axis=1, dtype=np.float32)  # (count,)
    found = packed[:, X_SUMS[layout] :]
    if layout == OFFSET:
        np.testing.assert_array_equal(found.view(np.int32)[:, t], -OFFSET_C * sums)
    elif layout == MINIMUM:
        np.testing.assert_array_equal(found.view(np.float32)[:, t], sums * scales)
    elif layout == MINIMA_4:
        np.testing.assert_array_equal(found.view(np.int16).reshape(-1, NR, 4)[:, t].ravel(), sums)
    elif layout == MINIMA_8:
        halves = bytes_.reshape(2 * count, 16).sum(axis=1, dtype=np.int16)
        np.testing.assert_array_equal(found.view(np.int16).reshape(-1, NR, 8)[:, t].ravel(), halves)
