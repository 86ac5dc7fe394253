"""Products wider than a slice of columns, and the softmax of rows that do not fill whole vectors."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from tests.ops.test_parity import close, kind_of_linear, tensor
from tinyllava.ops.cpu.gemm import TOKEN_PANELS
from tinyllava.ops.cpu.microkernel import NR
from tinyllava.ops.cpu.ops import NumbaOps
from tinyllava.ops.cpu.pack_weights import PACK_COLUMNS
from tinyllava.ops.cpu.quantize_activations import KC
from tinyllava.ops.cpu.softmax import softmax
from tinyllava.ops.cpu.unpack import FORMATS
from tinyllava.ops.select import select
from tinyllava.quant.blocks import TYPES

RNG = np.random.default_rng(0)
WIDE = [
    *(("F16", PACK_COLUMNS + 76), ("Q8_0", PACK_COLUMNS + KC + 32)),
    *(("Q4_K", PACK_COLUMNS + 512), ("Q6_K", PACK_COLUMNS + 256), ("Q2_K", PACK_COLUMNS + 256)),
]
TRUTH, NUMBA = select("numpy", dtype="float64"), select("numba", threads=2)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "d_in"),
    [("F16", KC + 76), ("BF16", 3 * KC), ("Q4_0", KC + 32), ("Q8_0", 2 * KC + 96), ("Q4_K", 5 * 256)],
)
def test_a_product_of_several_slices(kind: str, d_in: int, with_bias: bool) -> None:
    weight, x = tensor(kind, 37, d_in), RNG.standard_normal((11, d_in)).astype(np.float32)
    bias = RNG.standard_normal(37).astype(np.float32) if with_bias else None
    truth = TRUTH.linear(x.astype(np.float64), TRUTH.matrix(weight), bias)
    close(kind_of_linear(kind, NUMBA, 11), NUMBA.linear(x, NUMBA.matrix(weight), bias), truth)


@pytest.mark.parametrize(("kind", "d_in"), WIDE)
@pytest.mark.parametrize("d_out", [5, 48])
def test_a_product_too_wide_to_be_taken_apart_at_once(kind: str, d_in: int, d_out: int) -> None:
    n = TOKEN_PANELS * NR + 5  # more tokens than one slice after the other meets at once, too
    weight, x = tensor(kind, d_out, d_in), RNG.standard_normal((n, d_in)).astype(np.float32)
    bias = RNG.standard_normal(d_out).astype(np.float32)
    truth = TRUTH.linear(x.astype(np.float64), TRUTH.matrix(weight), bias)
    close(kind_of_linear(kind, NUMBA, n), NUMBA.linear(x, NUMBA.matrix(weight), bias), truth)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_product_does_not_depend_on_what_memory_held(kind: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(37, d_in) for d_in in (96, 320, 1056) if d_in % TYPES[kind].block_size == 0] or [(37, 768)]
    for d_out, d_in in shapes:
        weight, x = tensor(kind, d_out, d_in), RNG.standard_normal((n, d_in)).astype(np.float32)
        clean, poisoned = NumbaOps(2), NumbaOps(2)
        scratch, empty = poisoned.runner.scratch, poisoned.runner.empty

        def poisoned_scratch(name: str, size: int, scratch: Any = scratch) -> int:
            at: int = scratch(name, size)
            ctypes.memset(at, 0xFF, size)  # every float in it is NaN
            return at

        def poisoned_empty(*shape: int, empty: Any = empty) -> np.ndarray:
            y: np.ndarray = empty(*shape)
            y.fill(np.nan)
            return y

        monkeypatch.setattr(poisoned.runner, "scratch", poisoned_scratch)
        monkeypatch.setattr(poisoned.runner, "empty", poisoned_empty)
        truth = clean.linear(x, clean.matrix(weight))
        np.testing.assert_array_equal(poisoned.linear(x, poisoned.matrix(weight)), truth)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_softmax_of_a_padded_row(n: int) -> None:
    row = np.full(48, 7.0, np.float32)
    row[:n] = x = RNG.standard_normal(n).astype(np.float32) * 10
    padded = -(-n // 16) * 16
    softmax(row.ctypes.data, n, padded)
    truth = np.exp((x - x.max()).astype(np.float64))  # the difference itself is rounded to float32
    np.testing.assert_allclose(row[:n], truth / truth.sum(), rtol=1e-6)
    assert (row[n:padded] == 0).all() and (row[padded:] == 7).all()


def test_far_below_the_largest_is_zero_and_a_nan_spoils_the_row() -> None:
    row = np.zeros(16, np.float32)
    row[3], row[5] = -100.0, -np.inf
    softmax(row.ctypes.data, 16, 16)
    assert row[3] == row[5] == 0.0 and row[0] == np.float32(1 / 14)
    row[2] = np.nan
    softmax(row.ctypes.data, 16, 16)
    assert np.isnan(row).all()
