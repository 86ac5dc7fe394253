"""Attention on the CPU beyond parity: one query with shared keys in float16; several blocks of queries."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.test_parity import close
from tinyllava.ops.select import select

RNG = np.random.default_rng(7)
TRUTH = select("numpy", dtype="float64")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n_head, n_head_kv", [(8, 8), (12, 6), (8, 1)])
@pytest.mark.parametrize("d, m", [(64, 1), (64, 50), (96, 16), (20, 33), (8, 200)])
def test_one_query(d: int, m: int, n_head: int, n_head_kv: int, dtype: type, threads: int) -> None:
    q = RNG.standard_normal((1, n_head, d)).astype(np.float32) * 3
    limit = m + 7  # places of the cache that are not filled hold NaN: they must not be read
    held = [np.full((n_head_kv, limit, d), np.nan, dtype) for _ in range(2)]
    for memory in held:
        memory[:, :m] = RNG.standard_normal((n_head_kv, m, d))
    k, v = (memory[:, :m].transpose(1, 0, 2) for memory in held)
    truth = TRUTH.attention(*(x.astype(np.float64) for x in (q, k, v)), causal=True)
    close("attention", select("numba", threads=threads).attention(q, k, v, causal=True), truth)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n, m, d", [(150, 150, 64), (97, 230, 80), (300, 300, 16), (13, 700, 96)])
def test_blocks_of_queries(n: int, m: int, d: int, causal: bool) -> None:
    """Blocks of keys that all queries see, that some see, and that none sees."""
    q = RNG.standard_normal((n, 4, d)).astype(np.float32) * 3
    k, v = (RNG.standard_normal((m, 2, d)).astype(np.float16) for _ in range(2))
    truth = TRUTH.attention(*(x.astype(np.float64) for x in (q, k, v)), causal=causal)
    close("attention", select("numba", threads=2).attention(q, k, v, causal=causal), truth)
