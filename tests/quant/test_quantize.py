"""Quantizers against gguf's bytes and ggml's errors, and what must hold for any weights."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from golden.quantize_samples import BLOCKS, SAMPLES
from tinyllava.quant import quantize_kernels as kernels
from tinyllava.quant.block_type import planes
from tinyllava.quant.blocks import TYPES, dequantize
from tinyllava.quant.quantize import QUANTIZERS, pack, quantize

GGML_ERRORS = json.loads((Path(__file__).parents[2] / "golden" / "quantize-errors.json").read_text())
PLAIN = ("F32", "F16", "BF16")
LEGACY = (*PLAIN, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")

# The largest error of a weight, as a part of the largest magnitude in its block. A code is half a step wide, and
# a whole one at the end that the even number of codes has too little; then scales are rounded, to 4 to 8 bits in
# the K-quants, and a search may give up an outlier for the sake of the others.
BOUND = {
    "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.005, "Q4_0": 0.13, "Q5_0": 0.065, "Q4_1": 0.07, "Q5_1": 0.035,
    "Q2_K": 0.6, "Q3_K": 0.3, "Q4_K": 0.15, "Q5_K": 0.08, "Q6_K": 0.045, "IQ4_NL": 0.16, "IQ4_XS": 0.18,
}  # fmt: skip


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def there_and_back(name: str, x: np.ndarray) -> np.ndarray:
    return dequantize(name, quantize(name, x), np.float64)


# ---- worked by hand


def test_q4_0_by_hand() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = -4, 1.3, 3.9  # d = -4 / -8 = 0.5: codes 0, 8 + 2.6 -> 11, 8 + 7.8 -> 16, which is cut to 15
    raw = quantize("Q4_0", x)[0]
    assert raw[:2].view(np.float16) == 0.5
    assert raw[2:5].tolist() == [0x80 | 0, 0x80 | 11, 0x80 | 15]  # weight 16 + j, a zero, is in the high nibble
    assert there_and_back("Q4_0", x)[0, :3].tolist() == [-4, 1.5, 3.5]


def test_bf16_rounds_ties_to_even() -> None:
    words = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF]], np.uint32)
    assert quantize("BF16", words.view(np.float32)).view(np.uint16).tolist() == [[0x3F80, 0x3F82, 0x3F81, 0x3F80]]


def test_a_line_is_found_exactly() -> None:
    """Weights that lie on a grid of Q4_K come back to float16's precision of the grid's two numbers."""
    q = np.arange(256).reshape(8, 32) % 16
    x = (np.float32(0.25) * q - np.float32(1.5)).reshape(1, 256).astype(np.float32)
    assert np.abs(there_and_back("Q4_K", x) - x).max() < 1.5e-3


@pytest.mark.parametrize("bits, group, word", [(4, 16, "u1"), (2, 32, "u1"), (1, 1, "<u4"), (2, 1, "<u2")])
def test_pack_is_the_inverse_of_planes(bits: int, group: int, word: str) -> None:
    numbers = np.random.default_rng(bits).integers(0, 1 << bits, (3, 256)).astype(np.uint8)
    assert np.array_equal(planes(pack(numbers, group, bits, word), group, bits), numbers)


# ---- against the outside


def theirs(name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(x, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(len(x), -1)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", LEGACY)
def test_legacy_bytes_are_ggufs(name: str, sample: str) -> None:
    x = SAMPLES[sample]()
    assert np.array_equal(quantize(name, x), theirs(name, x))


@settings(max_examples=25, deadline=None)
@given(x=hnp.arrays(np.float32, (2, 32), elements=st.floats(-1e4, 1e4, width=32)))
@pytest.mark.parametrize("name", LEGACY)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # gguf's, where a scale is subnormal
def test_legacy_bytes_are_ggufs_for_any_weights(name: str, x: np.ndarray) -> None:
    assert np.array_equal(quantize(name, x), theirs(name, x))


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_error_is_no_larger_than_ggmls(name: str, sample: str) -> None:
    x = SAMPLES[sample]()
    assert rms(there_and_back(name, x) - x) <= 1.01 * GGML_ERRORS[sample][name]


def test_every_quantizer_is_tested() -> None:
    assert set(QUANTIZERS) == {*LEGACY, *SEARCHED} == {*PLAIN, *BLOCKS}


# ---- for any weights


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", BOUND)
def test_the_error_has_a_bound(name: str, data: st.DataObject) -> None:
    size = max(TYPES[name].block_size, 32)
    scale = 10.0 ** data.draw(st.integers(-2, 3))
    elements = st.floats(-1, 1, width=32).map(lambda v: float(np.float32(v)))
    x = data.draw(hnp.arrays(np.float32, (1, size), elements=elements)) * np.float32(scale)
    error = np.abs(there_and_back(name, x) - x).max()
    assert error <= BOUND[name] * np.abs(x).max() + 1e-6


@pytest.mark.parametrize("name", QUANTIZERS)
def test_zeros_stay_zeros(name: str) -> None:
    assert not there_and_back(name, np.zeros((2, 256), np.float32)).any()


@pytest.mark.parametrize("constant", [1.0, -1.0, 0.02, -300.0])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_constants_stay_constant(name: str, constant: float) -> None:
    y = there_and_back(name, np.full((1, 512), constant, np.float32))
    assert np.ptp(y) <= 1e-3 * abs(constant)
    assert abs(y.mean() - constant) <= 0.01 * abs(constant)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-5, 1e4])
@pytest.mark.parametrize("name", BLOCKS)
def test_small_and_large_weights(name: str, scale: float) -> None:
    """Far below float16's smallest scale a block becomes zeros; nothing ever comes back larger than it was."""
    x = SAMPLES["bell"]()[:4] * np.float32(50 * scale)
    y = there_and_back(name, x)
    assert np.isfinite(y).all()
    assert np.abs(y).max() <= 1.3 * np.abs(x).max() + 6e-8 * 128


@pytest.mark.parametrize("name", [*BLOCKS, "F16"])
def test_what_overflows_is_refused(name: str) -> None:
    for huge in (1e12, 1e20, 3e38):
        x = np.zeros((2, 256), np.float32)
        x[1, 7] = huge
        with pytest.raises(ValueError, match=f"are too large for {name}"):
            quantize(name, x)
        with pytest.raises(ValueError, match=f"are too large for {name}"):
            quantize(name, -x)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("value, said", [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_what_is_no_number_is_refused(name: str, value: float, said: str) -> None:
    x = np.zeros((2, 256), np.float32)
    x[1, 200] = value
    with pytest.raises(ValueError, match=said):
        quantize(name, x)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    x = SAMPLES["rows of all sizes"]()
    rows = [quantize(name, x[i : i + 1]) for i in range(len(x))]
    assert np.array_equal(quantize(name, x), np.concatenate(rows))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_rows_and_wrong_rows(name: str) -> None:
    assert quantize(name, np.zeros((0, 256), np.float32)).shape == (0, TYPES[name].row_bytes(256))
    if TYPES[name].block_size > 1:
        with pytest.raises(ValueError, match="no multiple"):
            quantize(name, np.zeros((1, 33), np.float32))


@pytest.mark.parametrize("name", SEARCHED)
def test_quantizing_twice_changes_little(name: str) -> None:
    """What lies on a grid already is found again, or nearly: the second error is a fraction of the first."""
    x = SAMPLES["bell"]()
    once = there_and_back(name, x).astype(np.float32)
    assert rms(there_and_back(name, once) - once) < 0.5 * rms(once - x)


def test_the_loops_say_the_same_uncompiled() -> None:
    """The kernels as Python: the order of sums differs, so the fits do in their last digits."""
    x = SAMPLES["bell"]()[0, :64].reshape(2, 32)
    scale, low = np.empty(2, np.float32), np.empty(2, np.float32)
    for g in range(2):
        w = np.empty(32, np.float32)
        lowest, highest = kernels.weigh.py_func(x[g], w)
        scale[g], low[g] = kernels.search_affine.py_func(x[g], w, lowest, highest, 15, -1.0, 21)
    compiled = np.empty((2, 2), np.float32)
    kernels.fit_affine(x, 15, -1.0, 21, compiled[0], compiled[1])
    assert np.allclose([scale, low], compiled, rtol=1e-4)
