"""Weights to blocks: the inverse of plain.py and codebook.py, format by format.

The older formats (a scale for 32 weights) follow from the extremes of a block; bytes equal those of gguf's
quantizers. The K- and IQ4-quants are found in three steps: a search gives each group of 16 or 32 weights the
scale it would like (quantize_kernels.py); those scales are quantized themselves, in units of one float16 for
the block; then the weights are rounded again, to the grid that the block really stores.

A quantizer takes x (n_blocks, size) float32 and gives (n_blocks,) records as declared beside its dequantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.quant.block_type import Blocks
from tinyllava.quant.blocks import TYPES
from tinyllava.quant.codebook import IQ4_VALUES

F32 = np.float32
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Multiples = npt.NDArray[np.int32]
Quantizer = Callable[[Floats], Blocks]

QUANTIZERS: dict[str, Quantizer] = {}
CHUNK = 1 << 16  # weights quantized at a time: the temporaries stay in cache
LARGEST = 1e15  # far beyond every block format, and sums of its squares still fit a float32


def quantize(type_name: str, weights: npt.NDArray[Any]) -> Bytes:
    """Blocks (n_rows, row_bytes) of weights (n_rows, n_cols), any float type, n_cols a multiple of the block.

    ValueError for weights that the format cannot hold: NaN, infinities, and numbers so large that a scale
    overflows its float16. KeyError if the format has no quantizer here.
    """
    kind = TYPES[type_name]
    n_rows, n_cols = weights.shape
    row_bytes = kind.row_bytes(n_cols)
    flat = np.ascontiguousarray(weights).reshape(-1, kind.block_size)  # (n_blocks, size)
    blocks = np.empty(len(flat), kind.dtype)
    step = max(1, CHUNK // kind.block_size)
    for start in range(0, len(flat), step):
        x = flat[start : start + step].astype(F32, copy=False)
        if not np.isfinite(x).all():
            raise ValueError("a weight is NaN" if np.isnan(x).any() else "a weight is infinite")
        peak = float(np.abs(x).max(initial=0))
        if kind.is_scalar or peak <= LARGEST:
            with np.errstate(over="ignore"):  # said below, in one line
                blocks[start : start + step] = QUANTIZERS[type_name](x)
            if _is_finite(type_name, blocks[start : start + step]):
                continue
        raise ValueError(f"weights up to {peak:.3g} are too large for {type_name}")
    return blocks.view(np.uint8).reshape(n_rows, row_bytes)


def _is_finite(type_name: str, blocks: Blocks) -> bool:
    """Whether no number and no scale overflowed."""
    if type_name == "BF16":
        return bool((blocks["x"] & np.uint16(0x7F80) != 0x7F80).all())
    names = {"x", "d", "m", "dmin"} & set(blocks.dtype.names or ())
    return all(bool(np.isfinite(blocks[name]).all()) for name in names)


def quantizer(type_name: str) -> Callable[[Quantizer], Quantizer]:
    """Register a function as the quantizer of a format."""

    def register(function: Quantizer) -> Quantizer:
        QUANTIZERS[type_name] = function
        return function

    return register


def records(type_name: str, **fields: npt.NDArray[Any]) -> Blocks:
    """Blocks with these fields, each (n_blocks,), (n_blocks, 1) for a number, or (n_blocks, count)."""
    blocks = np.zeros(len(next(iter(fields.values()))), TYPES[type_name].dtype)
    for name, values in fields.items():
        blocks[name] = values.reshape(blocks[name].shape)
    return blocks


def pack(numbers: npt.NDArray[Any], group: int, bits: int, word: str = "u1") -> npt.NDArray[Any]:
    """The inverse of block_type.planes: (n_blocks, n * count) small numbers into (n_blocks, n) words."""
    dtype = np.dtype(word)
    count = dtype.itemsize * 8 // bits
    planes = numbers.astype(dtype, copy=False).reshape(len(numbers), -1, count, group)
    words = planes[:, :, 0].copy()  # (n_blocks, n // group, group)
    for i in range(1, count):
        words |= planes[:, :, i] << dtype.type(i * bits)
    return words.reshape(len(numbers), -1)  # (n_blocks, n)


# ---- plain numbers


@quantizer("F32")
def f32(x: Floats) -> Blocks:
    """The number itself."""
    return records("F32", x=x)


@quantizer("F16")
def f16(x: Floats) -> Blocks:
    """The nearest float16, ties to even."""
    return records("F16", x=x.astype(np.float16))


@quantizer("BF16")
def bf16(x: Floats) -> Blocks:
    """The upper half of the float32, rounded to nearest, ties to even: odd ones are rounded up from a tie."""
    bits = x.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    return records("BF16", x=bits + np.uint32(0x7FFF) + odd >> np.uint32(16))


# ---- blocks of 32 with a scale from their extremes. The order of the operations decides the last bit.


def _codes(x: Floats, d: Floats, zero: float) -> Floats:
    """x / d + zero, as gguf computes it: by the reciprocal, which is 0 where d is.

    Where d is so small that its reciprocal overflows, its float16 is 0 and no code matters; gguf's is 0.
    """
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(d == 0, F32(0), F32(1) / d)
    usable = np.isfinite(inverse)
    codes: Floats = (x * np.where(usable, inverse, F32(0)) + F32(zero)) * usable
    return codes


def _scale_to_lowest(x: Floats, half: int) -> tuple[Floats, Bytes]:
    """d (n_blocks, 1) that maps the weight of largest magnitude to code 0, and all codes of d * (q - half)."""
    at = np.abs(x).argmax(axis=1, keepdims=True)  # (n_blocks, 1)
    d = np.take_along_axis(x, at, axis=1) / F32(-half)
    q = np.trunc(_codes(x, d, half + 0.5)).clip(0, 2 * half - 1)
    return d, q.astype(np.uint8)


def _scale_to_range(x: Floats, largest: int) -> tuple[Floats, Floats, Bytes]:
    """d and m (n_blocks, 1) that map the range of a block to 0..largest, and the codes of d * q + m."""
    m = x.min(axis=1, keepdims=True)  # (n_blocks, 1)
    d = (x.max(axis=1, keepdims=True) - m) / F32(largest)
    q = np.trunc(_codes(x - m, d, 0.5)).clip(0, largest)
    return d, m, q.astype(np.uint8)


@quantizer("Q4_0")
def q4_0(x: Floats) -> Blocks:
    """d * (q - 8)."""
    d, q = _scale_to_lowest(x, 8)
    return records("Q4_0", d=d, qs=pack(q, 16, 4))


@quantizer("Q4_1")
def q4_1(x: Floats) -> Blocks:
    """d * q + m."""
    d, m, q = _scale_to_range(x, 15)
    return records("Q4_1", d=d, m=m, qs=pack(q, 16, 4))


@quantizer("Q5_0")
def q5_0(x: Floats) -> Blocks:
    """d * (q - 16)."""
    d, q = _scale_to_lowest(x, 16)
    return records("Q5_0", d=d, qh=pack(q >> 4, 1, 1, "<u4"), qs=pack(q & 15, 16, 4))


@quantizer("Q5_1")
def q5_1(x: Floats) -> Blocks:
    """d * q + m."""
    d, m, q = _scale_to_range(x, 31)
    return records("Q5_1", d=d, m=m, qh=pack(q >> 4, 1, 1, "<u4"), qs=pack(q & 15, 16, 4))


@quantizer("Q8_0")
def q8_0(x: Floats) -> Blocks:
    """d * q, rounded to nearest, halves away from zero."""
    d = np.abs(x).max(axis=1, keepdims=True) / F32(127)  # (n_blocks, 1)
    y = _codes(x, d, 0)
    whole = np.trunc(y)
    return records("Q8_0", d=d, qs=whole + np.trunc(2 * (y - whole)))


# ---- K-quants and IQ4: searched scales, quantized in units of the block's


def _in_units(values: Floats, unit: Floats, lowest: int, highest: int) -> Multiples:
    """Whole multiples (n_blocks, n_groups) of each block's unit (n_blocks, 1), a float16 and maybe 0."""
    ratio = np.divide(values, unit, out=np.zeros_like(values), where=unit != 0)
    return np.rint(ratio).clip(lowest, highest).astype(np.int32)


def _to_half(unit: Floats) -> Floats:
    """Rounded to float16, for the multiples of a unit must be taken of what is stored."""
    return unit.astype(np.float16).astype(F32)


Affine = tuple[Floats, Floats, Multiples, Multiples, Bytes]


def _affine(x: Floats, size: int, largest: int, units: int, first: float, n_grids: int) -> Affine:
    """d, dmin (n_blocks, 1), their multiples s, m (n_blocks, n_groups) of 0..units, and codes (n_blocks, 256).

    The weight is d * s * q - dmin * m. ``first`` and ``n_grids``: see fit_affine.
    """
    from tinyllava.quant import quantize_kernels as kernels

    groups = x.reshape(-1, size)  # (n_blocks * n_groups, size)
    scale, low = np.empty((2, len(x), 256 // size), F32)  # (n_blocks, n_groups) each
    kernels.fit_affine(groups, largest, first, n_grids, scale.reshape(-1), low.reshape(-1))
    d = _to_half(scale.max(axis=1, keepdims=True) / F32(units))  # (n_blocks, 1)
    dmin = _to_half(low.max(axis=1, keepdims=True) / F32(units))
    s, m = _in_units(scale, d, 0, units), _in_units(low, dmin, 0, units)
    codes = np.empty(groups.shape, np.uint8)
    d_, dmin_ = np.repeat(d.ravel(), s.shape[1]), np.repeat(dmin.ravel(), s.shape[1])  # one each group
    kernels.settle_affine(groups, largest, units, d_, dmin_, s.reshape(-1), m.reshape(-1), codes)
    return d, dmin, s, m, codes.reshape(len(x), -1)  # (n_blocks, 256)


def _symmetric(x: Floats, half: int, units: int, n_grids: int) -> tuple[Floats, Multiples, Bytes]:
    """d (n_blocks, 1), its multiples s (n_blocks, 16) of -units..units - 1, and codes of d * s * (q - half)."""
    from tinyllava.quant import quantize_kernels as kernels

    groups = x.reshape(-1, 16)  # (n_blocks * 16, 16)
    scale = np.empty(len(groups), F32)
    kernels.fit_symmetric(groups, half, n_grids, scale)
    d, s = _signed_units(scale.reshape(len(x), -1), units)
    codes = np.empty(groups.shape, np.uint8)
    kernels.settle_symmetric(groups, half, units, np.repeat(d.ravel(), 16), s.reshape(-1), codes)
    return d, s, codes.reshape(len(x), -1)  # (n_blocks, 256)


def _signed_units(scale: Floats, units: int) -> tuple[Floats, Multiples]:
    """d (n_blocks, 1) that makes the largest scale -units, and all scales as multiples of it."""
    at = np.abs(scale).argmax(axis=1, keepdims=True)  # (n_blocks, 1)
    d = _to_half(np.take_along_axis(scale, at, axis=1) / F32(-units))
    return d, _in_units(scale, d, -units, units - 1)


@quantizer("Q2_K")
def q2_k(x: Floats) -> Blocks:
    """d * s * q - dmin * m, q of 2 bits, s and m of 4, groups of 16."""
    d, dmin, s, m, q = _affine(x, 16, 3, 15, first=-0.5, n_grids=16)
    return records("Q2_K", d=d, dmin=dmin, scales=s | m << 4, qs=pack(q, 32, 2))


@quantizer("Q3_K")
def q3_k(x: Floats) -> Blocks:
    """d * (s - 32) * (q - 4), q of 3 bits, s of 6, groups of 16; layout as undone in plain.q3_k."""
    d, s, q = _symmetric(x, half=4, units=32, n_grids=9)
    s = s + 32
    scales = np.concatenate([pack(s & 15, 8, 4), pack(s >> 4, 4, 2)], axis=1)  # (n_blocks, 12)
    return records("Q3_K", d=d, scales=scales, hmask=pack(q >> 2, 32, 1), qs=pack(q & 3, 32, 2))


def _pack_k_scales(s: Multiples, m: Multiples) -> Multiples:
    """8 scales and 8 minima of 6 bits into (n_blocks, 12): the inverse of plain.k_scales."""
    first = s[:, :4] | s[:, 4:] >> 4 << 6  # (n_blocks, 4)
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    rest = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    return np.concatenate([first, second, rest], axis=1)


@quantizer("Q4_K")
def q4_k(x: Floats) -> Blocks:
    """d * s * q - dmin * m, q of 4 bits, s and m of 6, groups of 32."""
    d, dmin, s, m, q = _affine(x, 32, 15, 63, first=-1.0, n_grids=21)
    return records("Q4_K", d=d, dmin=dmin, scales=_pack_k_scales(s, m), qs=pack(q, 32, 4))


@quantizer("Q5_K")
def q5_k(x: Floats) -> Blocks:
    """Q4_K with q of 5 bits."""
    d, dmin, s, m, q = _affine(x, 32, 31, 63, first=-1.0, n_grids=21)
    high, low = pack(q >> 4, 32, 1), pack(q & 15, 32, 4)
    return records("Q5_K", d=d, dmin=dmin, scales=_pack_k_scales(s, m), qh=high, qs=low)


@quantizer("Q6_K")
def q6_k(x: Floats) -> Blocks:
    """d * s * (q - 32), q of 6 bits, s a signed byte, groups of 16."""
    d, s, q = _symmetric(x, half=32, units=128, n_grids=9)
    return records("Q6_K", d=d, scales=s, ql=pack(q & 15, 64, 4), qh=pack(q >> 4, 32, 2))


_VALUES = IQ4_VALUES.astype(F32)
_MIDDLES = (_VALUES[1:] + _VALUES[:-1]) / F32(2)  # (15,)
_IQ4_GRIDS = 7


def _iq4_scales(groups: Floats) -> Floats:
    """The scale (n_groups,) of scale * IQ4_VALUES[q] for each group of 32."""
    from tinyllava.quant import quantize_kernels as kernels

    scale = np.empty(len(groups), F32)
    kernels.fit_values(groups, _VALUES, _MIDDLES, _IQ4_GRIDS, scale)
    return scale


def _iq4_codes(groups: Floats, d: Floats, s: Multiples, units: int) -> Bytes:
    """Codes (n_groups, 32) of d * s * IQ4_VALUES[q], d and s (n_groups,); s is improved in place."""
    from tinyllava.quant import quantize_kernels as kernels

    codes = np.empty(groups.shape, np.uint8)
    kernels.settle_values(groups, _VALUES, _MIDDLES, units, d, s, codes)
    return codes


@quantizer("IQ4_NL")
def iq4_nl(x: Floats) -> Blocks:
    """d * IQ4_VALUES[q], blocks of 32."""
    d = _to_half(_iq4_scales(x))  # (n_blocks,)
    codes = _iq4_codes(x, d, np.ones(len(x), np.int32), units=0)
    return records("IQ4_NL", d=d, qs=pack(codes, 16, 4))


@quantizer("IQ4_XS")
def iq4_xs(x: Floats) -> Blocks:
    """d * (s - 32) * IQ4_VALUES[q], s of 6 bits, groups of 32."""
    groups = x.reshape(-1, 32)  # (n_blocks * 8, 32)
    d, s = _signed_units(_iq4_scales(groups).reshape(len(x), 8), 32)  # (n_blocks, 1), (n_blocks, 8)
    codes = _iq4_codes(groups, np.repeat(d.ravel(), 8), s.reshape(-1), units=32).reshape(len(x), 256)
    s = s + 32
    low, high = pack(s & 15, 1, 4), pack(s >> 4, 1, 2, "<u2")
    return records("IQ4_XS", d=d, scales_l=low, scales_h=high, qs=pack(codes, 16, 4))
