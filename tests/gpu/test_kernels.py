"""The CUDA kernels at sizes that fill a device, and captured graphs, against the reference in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gpu.models import RandomTensor, random_file
from tests.true_shapes import Shape
from tinyllava.errors import ContextError, UsageError
from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.language.llama import embed, forward, load_llama, unembed
from tinyllava.ops import Ops
from tinyllava.ops.gpu.constants import FORMATS
from tinyllava.ops.select import select
from tinyllava.quant.blocks import TYPES

pytestmark = pytest.mark.gpu
RNG = np.random.default_rng(7)
TRUTH = select("numpy", dtype="float64")
QUANTIZED = [name for name in FORMATS if not TYPES[name].is_scalar]


@pytest.fixture(scope="module")
def ops() -> Ops:
    try:
        return select("cupy")
    except UsageError as error:
        pytest.skip(str(error))


def error(found: np.ndarray, truth: np.ndarray) -> float:
    assert found.shape == truth.shape
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("d_out, d_in", [(4096, 4096), (1000, 11008), (61, 20480), (16, 256), (7, 768)])
@pytest.mark.parametrize("kind", FORMATS)
def test_one_token(kind: str, d_out: int, d_in: int, ops: Ops) -> None:
    weight = RandomTensor("w", kind, (d_out, d_in))
    x = RNG.standard_normal((1, d_in)).astype(np.float32)
    x[0, ::97] *= 100  # outliers, as language models have them
    truth = x.astype(np.float64) @ weight.dequantize(np.float64).T
    found = ops.numpy(ops.linear(ops.array(x), ops.matrix(weight)))
    # Floats: float32 sums of d_in products. Integers: x within 2^-16 of the largest of 16, an outlier at times.
    assert error(found, truth) < (2e-6 if kind in ("F32", "F16") else 1e-4)


@pytest.mark.parametrize("d_in", [32, 96, 704])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_one_token_in_an_odd_number_of_blocks(kind: str, d_in: int, ops: Ops) -> None:
    weight, x = RandomTensor("w", kind, (50, d_in)), RNG.standard_normal((1, d_in)).astype(np.float32)
    truth = x.astype(np.float64) @ weight.dequantize(np.float64).T
    assert error(ops.numpy(ops.linear(ops.array(x), ops.matrix(weight))), truth) < 1e-4


@pytest.mark.parametrize("d_in", [588, 36])
@pytest.mark.parametrize("n", [1, 5])
def test_rows_that_are_no_multiple_of_16_bytes(n: int, d_in: int, ops: Ops) -> None:
    weight, x = RandomTensor("w", "F16", (24, d_in)), RNG.standard_normal((n, d_in))
    truth = x @ weight.dequantize(np.float64).T
    assert error(ops.numpy(ops.linear(ops.array(x), ops.matrix(weight))), truth) < 6e-4  # x in half precision


@pytest.mark.parametrize("kind", QUANTIZED)
def test_weights_dequantized_some_rows_at_a_time(kind: str, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllava.ops.gpu.ops.DEQUANTIZED_BYTES", 2 * 512 * 128)  # 128 rows at once
    weight, x = RandomTensor("w", kind, (301, 512)), RNG.standard_normal((9, 512))
    truth = x @ weight.dequantize(np.float64).T
    assert error(ops.numpy(ops.linear(ops.array(x), ops.matrix(weight))), truth) < 6e-4


@pytest.mark.parametrize("shape", [(7, 32), (3, 96), (37, 256), (500, 4096)])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_dequantized_weights_are_the_weights(kind: str, shape: tuple[int, int], ops: Any) -> None:
    if shape[1] % TYPES[kind].block_size:
        return
    import cupy

    weight = RandomTensor("w", kind, shape)
    found = cupy.asnumpy(ops._dequantize(ops.matrix(weight), 1, shape[0]))
    np.testing.assert_array_equal(found, weight.dequantize()[1:].astype(np.float16))


def cached(values: np.ndarray, n_ctx: int, half: bool) -> tuple[Any, np.ndarray]:
    """Keys (m, g, k) as a cache of n_ctx positions holds them, and what it holds in float64."""
    import cupy

    m, n_head_kv, width = values.shape
    cache = cupy.zeros((n_head_kv, n_ctx, width), cupy.float16 if half else cupy.float32)
    cache[:, :m] = cupy.asarray(values.transpose(1, 0, 2))
    view = cache[:, :m].transpose(1, 0, 2)
    return view, cupy.asnumpy(view).astype(np.float64)


SIZES = [(1, 1), (1, 63), (1, 64), (1, 65), (1, 700), (2, 70), (100, 100), (130, 700), (577, 577)]


@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("width", [48, 64, 128])
@pytest.mark.parametrize("half", [True, False])
def test_attention(n: int, m: int, width: int, half: bool, ops: Ops) -> None:
    ops.matrix(RandomTensor("w", "F16", (8, 8)))  # as if there were a model in half precision
    q = RNG.standard_normal((n, 8, width)).astype(np.float32) * 2
    k, v = (RNG.standard_normal((m, 2, width)).astype(np.float32) for _ in range(2))
    (k_cached, k_true), (v_cached, v_true) = (cached(x, m + 5, half) for x in (k, v))
    for causal in (True, False):
        truth = TRUTH.attention(q.astype(np.float64), k_true, v_true, causal=causal)
        found = ops.numpy(ops.attention(ops.array(q), k_cached, v_cached, causal=causal))
        # On tensor cores q, k, v and the weights are rounded to half precision.
        assert error(found, truth) < (1.5e-3 if n > 1 and width != 48 else 3e-6)


SMALL = Shape(256, 3, 4, 2, 512, 300)


@pytest.mark.parametrize("ftype", ["F32", "F16", "Q4_K_M", "Q8_0"])
def test_a_captured_step_is_the_step(ftype: str, ops: Ops) -> None:
    file: Any = random_file(SMALL, ftype, own=True)
    config = read_config(file)
    ids = [int(i) for i in RNG.integers(0, 300, 90)]
    fresh = type(ops)()  # that has seen no other weights
    llama = load_llama(file, config, fresh)

    def logits(captured: bool) -> np.ndarray:
        cache = KVCache(config, len(ids), fresh)
        hidden = forward(embed(ids[:50], llama, fresh), llama, cache, fresh)

        def read(ids: list[int]) -> Any:
            return unembed(forward(embed(ids, llama, fresh), llama, cache, fresh), llama, fresh)

        step = fresh.capture(read) if captured else read
        rows = [fresh.numpy(unembed(hidden[-1:], llama, fresh))]
        rows += [fresh.numpy(step([i])).copy() for i in ids[50:]]
        assert cache.length == len(ids)
        return np.concatenate(rows)

    once, again = logits(False), logits(True)
    np.testing.assert_array_equal(once, again)
    truth = load_llama(file, config, TRUTH)
    hidden = forward(embed(ids, truth, TRUTH), truth, KVCache(config, len(ids), TRUTH), TRUTH)
    found = error(once.astype(np.float64), unembed(hidden, truth, TRUTH)[49:])
    print(ftype, found)
    assert found < (2e-5 if ftype == "F32" else 2e-3)  # half precision where many tokens are multiplied


@pytest.mark.parametrize("n_free", [1, 2, 3])
def test_a_full_cache_refuses_a_step_and_then_goes_on(n_free: int, ops: Ops) -> None:
    """Whether the step runs, is captured or is replayed when the cache is full."""
    file: Any = random_file(SMALL, "Q4_K_M")
    config = read_config(file)
    llama, cache = load_llama(file, config, ops), KVCache(config, 4 + n_free, ops)
    forward(embed([1, 2, 3, 4], llama, ops), llama, cache, ops)

    def read(ids: list[int]) -> Any:
        return unembed(forward(embed(ids, llama, ops), llama, cache, ops), llama, ops)

    step = ops.capture(read)
    for token in range(n_free):
        step([token])
    with pytest.raises(ContextError, match=f"{5 + n_free} tokens; wanted at most {4 + n_free}"):
        step([7])
    cache.truncate(4)
    again = ops.numpy(step([7])).copy()
    cache.truncate(4)
    np.testing.assert_array_equal(again, ops.numpy(read([7])))
