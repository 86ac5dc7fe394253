"""Attention of many tokens on tensor cores, cuda/attention.cu, against the reference in float64.

The kernel is launched as it is, in every width it can be compiled for; test_kernels.py goes through the backend.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest

from tinyllava.errors import UsageError
from tinyllava.ops.select import select

pytestmark = pytest.mark.gpu
RNG = np.random.default_rng(11)
TRUTH = select("numpy", dtype="float64")

# Relative 2-norm. Queries, probabilities and answers are rounded to half precision, by 2^-11 of themselves at most
# and about a third of that as a rule: 4e-4 altogether, as an emulation of the kernel shows, too.
TOLERANCE = 8e-4
WIDTHS = (16, 48, 64, 80, 96, 128, 160, 256)


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    try:
        select("cupy")
    except UsageError as error:
        pytest.skip(str(error))


@cache
def kernel_of(width: int, row_tiles: int) -> tuple[Any, str]:
    """The kernel for heads of ``width`` features, 64 * ``row_tiles`` queries a block, and its name."""
    from tinyllava.ops.gpu.constants import source
    from tinyllava.ops.gpu.kernels import Kernels

    name = f"attention_of_{width}_{row_tiles}"
    code = source("common.cu", "attention.cu") + f"FLASH_ATTENTION({name}, {width}, {row_tiles})"
    return Kernels(code), name


def attend(q: Any, k: Any, v: Any, *, causal: bool, row_tiles: int) -> np.ndarray:
    """q (n, h, k) floats; k, v (m, g, k) float16 in any layout whose features are contiguous, all CuPy's."""
    import cupy

    (n, n_head, width), (m, n_head_kv, _) = q.shape, k.shape
    kernels, name = kernel_of(width, row_tiles)
    y = cupy.full(q.shape, np.nan, cupy.float16)
    strides = [stride // x.itemsize for x in (k, v) for stride in x.strides[:2]]
    kernels.launch(
        name, (n_head, -(-n // (64 * row_tiles))), 128,
        q, k, v, y, n, n_head, n_head_kv, m, *strides, causal, 1 / math.sqrt(width),
        shared=(128 + 64 * row_tiles) * (2 * width + 16),
    )  # fmt: skip
    return cupy.asnumpy(y).astype(np.float64)


def cached(values: np.ndarray, n_ctx: int) -> Any:
    """(m, g, k) as the cache holds them: float16 (g, n_ctx, k), NaN beyond m."""
    import cupy

    m, n_head_kv, width = values.shape
    cache = cupy.full((n_head_kv, n_ctx, width), np.nan, cupy.float16)
    cache[:, :m] = cupy.asarray(values.transpose(1, 0, 2))
    return cache[:, :m].transpose(1, 0, 2)


def error(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def random_float16(*shape: int) -> np.ndarray:
    """Random numbers that half precision holds."""
    return RNG.standard_normal(shape).astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n, m", [(1, 1), (2, 65), (64, 64), (65, 200), (127, 127), (129, 500), (300, 300)])
@pytest.mark.parametrize("width, row_tiles", [(w, t) for w in WIDTHS for t in (1, 2) if w * t <= 256])
def test_every_width_and_every_edge(width: int, row_tiles: int, n: int, m: int, causal: bool) -> None:
    import cupy

    q, k, v = RNG.standard_normal((n, 6, width)), random_float16(m, 2, width), random_float16(m, 2, width)
    truth = TRUTH.attention(q, k, v, causal=causal)
    for keys, values in (  # in the cache; contiguous, as the image encoder has them
        (cached(k, m + 3), cached(v, m + 9)),
        tuple(cupy.asarray(x, cupy.float16) for x in (k, v)),
    ):
        found = attend(cupy.asarray(q, cupy.float32), keys, values, causal=causal, row_tiles=row_tiles)
        assert error(found, truth) < TOLERANCE


@pytest.mark.parametrize("width, row_tiles", [(64, 2), (128, 2), (128, 1)])
def test_a_long_prompt(width: int, row_tiles: int) -> None:
    import cupy

    n, n_head, n_head_kv = 2928, 8, 4
    q = RNG.standard_normal((n, n_head, width))
    k, v = (random_float16(n, n_head_kv, width) for _ in range(2))
    arrays = cupy.asarray(q, cupy.float32), cached(k, 4096), cached(v, 4096)
    found = attend(*arrays, causal=True, row_tiles=row_tiles)
    truth = TRUTH.attention(q, k, v, causal=True)
    assert error(found, truth) < TOLERANCE
    assert error(found[-64:], truth[-64:]) < 2 * TOLERANCE  # means of thousands: small, and no worse


def test_scores_that_grow_by_hundreds_stay_numbers() -> None:
    """The last key is what each query looks for, and those before it are its opposite: the last value is it."""
    import cupy

    m, width = 200, 64
    q = np.full((128, 1, width), 8.0)
    k = np.full((m, 1, width), -8.0)
    k[-1] = 8.0  # scores of -512 and 512
    v = random_float16(m, 1, width)
    arrays = cupy.asarray(q, cupy.float32), cached(k, m), cached(v, m)
    for row_tiles in (1, 2):
        found = attend(*arrays, causal=False, row_tiles=row_tiles)
        np.testing.assert_array_equal(found, np.broadcast_to(v[-1], found.shape))
