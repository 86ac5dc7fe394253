"""The integer product beside kernels, beside what can be worked out by hand, and beside the product in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava.ops import Ops
from tinyllava.ops.cpu.unpack import FORMATS
from tinyllava.ops.quantized import int16_activations, integer_product, quantize, unpack
from tinyllava.ops.select import select
from tinyllava.quant.blocks import TYPES, dequantize

# Relative 2-norm of the difference.
CLOSE = 1e-6  # sums of at most 8448 products in float32, in any order
# Q6_K's kernel for prompts adds 128 to activations and takes 128 * sum(w) of 128 columns back, in float32. Where
# one column makes up nearly all of a result, as an outlier's does, that sum is some 10 times as large.
CLOSE_BESIDE_128 = 2e-6
QUANTIZED = [kind for kind in FORMATS if not TYPES[kind].is_scalar]
SUPER_BLOCKS = [kind for kind in QUANTIZED if TYPES[kind].block_size == 256]
WIDTHS = {32: (32, 96, 512, 1056), 256: (256, 512, 768, 8448), 1: (32, 70, 512, 1056)}  # by weights of a block
D_OUT = 37
# Ranges of the float16 fields of random blocks: weights are about 0.1, as often negative as positive.
FIELDS = {"d": (0.005, 0.02), "m": (-0.2, -0.05), "dmin": (0.01, 0.04)}


@pytest.fixture(scope="module")
def ops() -> Ops:
    return select("numba", threads=2)


def tensor_of(kind: str, raw: np.ndarray) -> Any:
    """Stands in for files.gguf.Tensor: the blocks raw (d_out, row bytes)."""
    floats = dequantize(kind, raw)
    return SimpleNamespace(
        name=kind, type=kind, shape=floats.shape, n_elements=floats.size, raw=raw,
        dequantize=lambda dtype=np.float32: floats.astype(dtype),
    )  # fmt: skip


def random_tensor(kind: str, d_in: int, seed: int) -> Any:
    """Weights (D_OUT, d_in): random bytes, with scales of a usual size."""
    rng, block = np.random.default_rng(seed), TYPES[kind]
    if block.is_scalar:
        floats = rng.standard_normal((D_OUT, d_in)).astype(np.float32)
        stored = {"F32": floats, "F16": floats.astype("<f2"), "BF16": (floats.view(np.uint32) >> 16).astype("<u2")}
        return tensor_of(kind, stored[kind].view(np.uint8))
    blocks = rng.integers(0, 256, D_OUT * block.row_bytes(d_in), np.uint8).view(block.dtype)
    for name, (low, high) in FIELDS.items():
        if name in blocks.dtype.names:
            blocks[name] = rng.uniform(low, high, len(blocks))
    return tensor_of(kind, blocks.view(np.uint8).reshape(D_OUT, -1))


def tokens(n: int, d: int, seed: int, outliers: int = 0) -> np.ndarray:
    """n tokens, the first of which have two outliers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)).astype(np.float32)
    x[:outliers, [d // 3, d - 1]] = 900.0, -3000.0
    return x


def limit(kind: str, n: int, outliers: int) -> float:
    return CLOSE_BESIDE_128 if kind == "Q6_K" and n > 2 and outliers else CLOSE


def assert_close(found: np.ndarray, wanted: np.ndarray, limit: float) -> None:
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= limit * np.linalg.norm(wanted)


# ---- beside the kernels


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_kernels_differ_by_the_rounding_of_sums_only(kind: str, n: int, with_bias: bool, ops: Ops) -> None:
    for d_in in WIDTHS[TYPES[kind].block_size]:
        weight = random_tensor(kind, d_in, seed=d_in)
        bias = np.random.default_rng(n).standard_normal(D_OUT).astype(np.float32) if with_bias else None
        for outliers in {0, min(n, 2), n}:  # none; in few tokens, where they are multiplied separately; in all
            x = tokens(n, d_in, n, outliers)
            found, wanted = ops.linear(x, ops.matrix(weight), bias), integer_product(x, weight, bias)
            assert_close(found, wanted, limit(kind, n, outliers))


def identity(kind: str) -> Any:
    """The unit matrix (256, 256) in Q8_0, Q4_K or F16: times it, an activation is what it was rounded to."""
    one = np.eye(256)
    if kind == "F16":
        return tensor_of(kind, one.astype("<f2").view(np.uint8))
    blocks = np.zeros(256 * 256 // TYPES[kind].block_size, TYPES[kind].dtype)
    blocks["d"] = 1
    if kind == "Q8_0":
        blocks["qs"] = one.reshape(-1, 32)
    else:
        blocks["scales"] = [1] * 4 + [0] * 4 + [1] * 4  # eight scales of 1, eight minima of 0
        nibbles = one.reshape(256, 4, 2, 32).astype(np.uint8)
        blocks["qs"] = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(256, 128)
    return tensor_of(kind, blocks.view(np.uint8).reshape(256, -1))


@pytest.mark.parametrize("kind, n, size", [("Q8_0", 300, 32), ("Q4_K", 2, 32), ("Q4_K", 300, 128)])
def test_kernels_round_activations_to_the_same_integers(kind: str, n: int, size: int, ops: Ops) -> None:
    weight = identity(kind)
    for seed in range(30 if n == 2 else 1):
        x = tokens(n, 256, seed) * np.float32(10.0) ** np.arange(-15, 15, 30 / n).astype(np.float32)[:, None]
        x[::2, :256:32], x[::2, 1:256:32] = 2.0**60, -(2.0**60)  # as large: then the scale is positive
        p, s, _ = quantize(x, size)
        np.testing.assert_array_equal(ops.linear(x, ops.matrix(weight)), (p * s[..., None]).reshape(n, 256))


def test_kernels_round_activations_to_the_same_int16(ops: Ops) -> None:
    x, weight = tokens(300, 256, 7), identity("F16")
    p, s, _ = int16_activations(x)
    found = ops.linear(x, ops.matrix(weight)).reshape(p.shape) / s[..., None]
    np.testing.assert_allclose(found, p, rtol=1e-6)  # so rounded, they are equal: 11585 is the largest
    assert np.abs(p).max() == 11585


@pytest.mark.parametrize("spoiler", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_not_finite_spoils_its_own_token_only(kind: str, n: int, spoiler: float, ops: Ops) -> None:
    x, weight, spoilt = tokens(n, 512, n, min(n, 2)), random_tensor(kind, 512, 5), n // 2
    before = integer_product(x, weight)
    x[spoilt, 100] = spoiler
    for y in (integer_product(x, weight), ops.linear(x, ops.matrix(weight))):
        assert (~np.isfinite(y[spoilt])).all()
        if kind in QUANTIZED:  # floats may stay infinite
            assert np.isnan(y[spoilt]).all()
        assert_close(np.delete(y, spoilt, axis=0), np.delete(before, spoilt, axis=0), limit(kind, n, 2))


# ---- by hand


def test_a_block_by_hand() -> None:
    """Of -64, 32 and 0.4, -64 becomes -128: with a scale of 1/2, 32 is 64 exactly. 0.4 becomes 1."""
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = -64, 32, 0.4
    p, s, _ = quantize(x, 32)
    assert s.item() == 0.5
    assert p[0, 0, :4].tolist() == [-128, 64, 1, 0]

    q8_0 = np.zeros(1, TYPES["Q8_0"].dtype)
    q8_0["d"], q8_0["qs"][0, :3] = 0.25, [3, -5, 100]
    weight = tensor_of("Q8_0", q8_0.view(np.uint8).reshape(1, -1))
    # In floats: 0.25 * (-64 * 3 + 32 * -5 + 0.4 * 100) = -78.
    assert integer_product(x, weight).item() == 0.5 * 0.25 * (-128 * 3 + 64 * -5 + 1 * 100) == -75.5

    q4_1 = np.zeros(1, TYPES["Q4_1"].dtype)
    q4_1["d"], q4_1["m"], q4_1["qs"][0, :3] = 0.25, -2, [15, 0, 8]
    weight = tensor_of("Q4_1", q4_1.view(np.uint8).reshape(1, -1))
    bias = np.array([1000.0])
    assert integer_product(x, weight, bias).item() == 0.5 * (0.25 * (-128 * 15 + 8) - 2 * (-128 + 64 + 1)) + 1000


def test_an_outlier_leaves_the_digits_of_its_neighbours_alone() -> None:
    x = np.ones((3, 512), np.float32)
    weight = random_tensor("Q8_0", 512, 1)
    usual = integer_product(x, weight)
    x[1, 40] = 128 * 1000
    wanted = usual[1] + (x[1, 40] - 1) * weight.dequantize(np.float64)[:, 40]
    np.testing.assert_allclose(integer_product(x, weight)[1], wanted, rtol=1e-4)
    x[:, 40] = 128 * 1000  # in every token: not separated, and 1 becomes 0 beside 128000
    neighbours = weight.dequantize(np.float64)[:, 32:64].sum(axis=1) - weight.dequantize(np.float64)[:, 40]
    wanted -= neighbours
    np.testing.assert_allclose(integer_product(x, weight)[1], wanted, rtol=1e-4)


# ---- properties


@pytest.mark.parametrize("kind", QUANTIZED)
def test_unpacked_weights_are_the_dequantized(kind: str) -> None:
    weight = random_tensor(kind, 512, 3)
    q, d, m = unpack(weight)
    assert q.dtype.itemsize * 8 >= 8 and np.abs(q.astype(int)).max() <= 128
    w = q * d[..., None] + (0 if m is None else m[..., None])  # float32, in the formulas' order
    np.testing.assert_array_equal(w.reshape(weight.shape).astype(np.float32), weight.dequantize())


def varied_tokens(n: int, seed: int, numbers: list[tuple[int, int, float]]) -> np.ndarray:
    """n tokens (n, 256), each block of 32 of another magnitude, and some numbers at given places."""
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((n, 8, 32)) * 2.0 ** rng.integers(-40, 40, (n, 8, 1))
    x = blocks.reshape(n, 256).astype(np.float32)
    for row, column, value in numbers:
        x[row % n, column] = value
    return x


NUMBERS = st.one_of(st.just(0.0), st.floats(2.0**-50, 2.0**50), st.floats(-(2.0**50), -(2.0**-50)))
PLACES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 255), NUMBERS), max_size=6)
TOKENS = st.builds(varied_tokens, st.integers(1, 5), st.integers(0, 1000), PLACES)


@given(TOKENS, st.sampled_from([32, 128]))
def test_no_number_is_rounded_by_more_than_half_a_scale(x: np.ndarray, size: int) -> None:
    p, scales, _ = quantize(x, size)
    s = scales.astype(np.float64)[..., None]  # (n, g, 1)
    blocks = x.reshape(p.shape)  # (n, g, size)
    assert (np.abs(blocks - s * p) <= np.where(p == 127, 1.0001, 0.5001) * np.abs(s)).all()  # 128 is cut to 127
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    assert ((np.abs(s) >= largest / 128.0001) & (np.abs(s) <= largest / 124.9999)).all()


@given(TOKENS, st.sampled_from(QUANTIZED), st.randoms(use_true_random=False))
def test_tokens_in_another_order_have_the_same_results(x: np.ndarray, kind: str, random: Any) -> None:
    order = random.sample(range(len(x)), len(x))
    weight = random_tensor(kind, 256, 11)
    np.testing.assert_allclose(integer_product(x[order], weight), integer_product(x, weight)[order], rtol=1e-9)


@given(TOKENS, st.sampled_from(QUANTIZED))
def test_the_error_is_bounded(x: np.ndarray, kind: str) -> None:
    """A number is off by its block's scale at most, largest / 125; a minimum by its unit / 2, largest / 65534."""
    weight = random_tensor(kind, 256, 12)
    w, wide = weight.dequantize(np.float64), x.astype(np.float64)
    error = np.abs(integer_product(x, weight) - wide @ w.T)
    size = 128 if kind in SUPER_BLOCKS and len(x) > 2 else 32
    scales = np.abs(wide).reshape(len(x), -1, size).max(axis=2) / 124.9  # (n, blocks)
    sums = np.abs(w).reshape(D_OUT, -1, size).sum(axis=2)  # (d_out, blocks)
    minima = unpack(weight).minima
    off = 0.0 if minima is None or size == 32 else np.abs(minima).max() / 65000
    bound = scales @ sums.T + off * 1.1 * np.abs(wide).sum(axis=1, keepdims=True)
    assert (error <= bound * 1.001).all()
