"""Loops over block-quantized rows, compiled by Numba. Nothing but loops: buffers and threads are numba_ops's.

For each block format a function ``unpack_*(raw, y)`` turns one row of blocks (bytes) into float32; its reference
is the same format's dequantizer in quant/. ``unpack_row`` chooses among them by the format's index in FORMATS,
once a row, and two drivers call it:

    unpack_rows    rows lo..hi of a matrix -> float32, which prefill hands to sgemm piece by piece
    dot_rows       y[:, lo..hi] = x @ W[lo..hi]^T, one unpacked row at a time: each block is read once and no
                   float copy of the matrix is made, which is what decoding needs

Layouts are ggml-common.h's; the numbers in the loops are the offsets of the fields that blocks.py declares.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import njit

from tinyllava.ops.simd import half_to_float

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Sums may be reordered, or they could not use vector registers; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
kernel = njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy", boundscheck=False)


@kernel
def half_at(raw: Bytes, i: int) -> float:
    """The half-precision number stored at byte i, little-endian."""
    return half_to_float(np.uint16(raw[i] | (raw[i + 1] << 8)))


# ---- 16-bit floats


@kernel
def unpack_f16(raw: Bytes, y: Floats) -> None:
    bits = raw.view(np.uint16)
    for i in range(y.shape[0]):
        y[i] = half_to_float(bits[i])


@kernel
def unpack_bf16(raw: Bytes, y: Floats) -> None:
    """bfloat16 is the upper half of a float32."""
    bits = raw.view(np.uint16)
    words = y.view(np.uint32)
    for i in range(y.shape[0]):
        words[i] = np.uint32(bits[i]) << np.uint32(16)


# ---- blocks of 32 with one scale; low nibbles are elements 0..15, high nibbles 16..31


@kernel
def unpack_q4_0(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 32):
        at, to = 18 * b, 32 * b
        d = half_at(raw, at)
        for i in range(16):
            q = raw[at + 2 + i]
            y[to + i] = d * np.float32(np.int32(q & 15) - 8)
            y[to + 16 + i] = d * np.float32(np.int32(q >> 4) - 8)


@kernel
def unpack_q4_1(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 32):
        at, to = 20 * b, 32 * b
        d, m = half_at(raw, at), half_at(raw, at + 2)
        for i in range(16):
            q = raw[at + 4 + i]
            y[to + i] = d * np.float32(q & 15) + m
            y[to + 16 + i] = d * np.float32(q >> 4) + m


@kernel
def unpack_q5_0(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 32):
        at, to = 22 * b, 32 * b
        d = half_at(raw, at)
        for i in range(16):  # the fifth bits of elements i and 16 + i are bits i and 16 + i of a 32-bit word
            q = raw[at + 6 + i]
            low = (raw[at + 2 + i // 8] >> (i % 8)) & 1
            high = (raw[at + 4 + i // 8] >> (i % 8)) & 1
            y[to + i] = d * np.float32(np.int32((q & 15) | (low << 4)) - 16)
            y[to + 16 + i] = d * np.float32(np.int32((q >> 4) | (high << 4)) - 16)


@kernel
def unpack_q5_1(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 32):
        at, to = 24 * b, 32 * b
        d, m = half_at(raw, at), half_at(raw, at + 2)
        for i in range(16):
            q = raw[at + 8 + i]
            low = (raw[at + 4 + i // 8] >> (i % 8)) & 1
            high = (raw[at + 6 + i // 8] >> (i % 8)) & 1
            y[to + i] = d * np.float32((q & 15) | (low << 4)) + m
            y[to + 16 + i] = d * np.float32((q >> 4) | (high << 4)) + m


@kernel
def unpack_q8_0(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 32):
        at, to = 34 * b, 32 * b
        d = half_at(raw, at)
        for i in range(32):
            y[to + i] = d * np.float32(np.int8(raw[at + 2 + i]))


# ---- super-blocks of 256 with quantized scales (the K formats)


@kernel
def unpack_q2_k(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 256):
        at, to = 84 * b, 256 * b
        d, dmin = half_at(raw, at + 80), half_at(raw, at + 82)
        for group in range(16):  # of 16: half, then bit pair, then which 16 of 32 bytes
            half, pair, part = group // 8, (group % 8) // 2, group % 2
            scale = raw[at + group]
            step, low = d * np.float32(scale & 15), dmin * np.float32(scale >> 4)
            start = at + 16 + 32 * half + 16 * part
            for i in range(16):
                y[to + 16 * group + i] = step * np.float32((raw[start + i] >> (2 * pair)) & 3) - low


@kernel
def unpack_q3_k(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 256):
        at, to = 110 * b, 256 * b
        d = half_at(raw, at + 108)
        for group in range(16):
            half, pair, part = group // 8, (group % 8) // 2, group % 2
            low = (raw[at + 96 + group % 8] >> (4 * (group // 8))) & 15  # 6-bit scales: four low bits here,
            high = (raw[at + 104 + group % 4] >> (2 * (group // 4))) & 3  # two high bits there
            step = d * np.float32(np.int32(low | (high << 4)) - 32)
            start = at + 32 + 32 * half + 16 * part
            for i in range(16):  # the third bit is stored inverted: clear means subtract 4
                third = (raw[at + 16 * part + i] >> (4 * half + pair)) & 1
                q = np.int32((raw[start + i] >> (2 * pair)) & 3) + 4 * np.int32(third) - 4
                y[to + 16 * group + i] = step * np.float32(q)


@kernel
def scale_and_min(raw: Bytes, at: int, j: int) -> tuple[int, int]:
    """Scale and minimum number j of Q4_K and Q5_K: eight pairs of 6 bits, packed in 12 bytes at ``at``."""
    if j < 4:
        return raw[at + j] & 63, raw[at + 4 + j] & 63
    low = raw[at + 4 + j]
    return (low & 15) | ((raw[at + j - 4] >> 6) << 4), (low >> 4) | ((raw[at + j] >> 6) << 4)


@kernel
def unpack_q4_k(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 256):
        at, to = 144 * b, 256 * b
        d, dmin = half_at(raw, at), half_at(raw, at + 2)
        for j in range(8):  # groups of 32: the low or the high nibbles of 32 bytes
            scale, minimum = scale_and_min(raw, at + 4, j)
            step, low = d * np.float32(scale), dmin * np.float32(minimum)
            start, shift = at + 16 + 32 * (j // 2), 4 * (j % 2)
            for i in range(32):
                y[to + 32 * j + i] = step * np.float32((raw[start + i] >> shift) & 15) - low


@kernel
def unpack_q5_k(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 256):
        at, to = 176 * b, 256 * b
        d, dmin = half_at(raw, at), half_at(raw, at + 2)
        for j in range(8):
            scale, minimum = scale_and_min(raw, at + 4, j)
            step, low = d * np.float32(scale), dmin * np.float32(minimum)
            start, shift = at + 48 + 32 * (j // 2), 4 * (j % 2)
            for i in range(32):
                q = ((raw[start + i] >> shift) & 15) | (((raw[at + 16 + i] >> j) & 1) << 4)
                y[to + 32 * j + i] = step * np.float32(q) - low


@kernel
def unpack_q6_k(raw: Bytes, y: Floats) -> None:
    for b in range(y.shape[0] // 256):
        at, to = 210 * b, 256 * b
        d = half_at(raw, at + 208)
        for group in range(16):  # of 16: half, then quarter of 32, then which 16 of them
            half, quarter, part = group // 8, (group % 8) // 2, group % 2
            step = d * np.float32(np.int8(raw[at + 192 + group]))
            low_at = at + 64 * half + 32 * (quarter % 2) + 16 * part
            high_at = at + 128 + 32 * half + 16 * part
            for i in range(16):
                low = (raw[low_at + i] >> (4 * (quarter // 2))) & 15
                high = (raw[high_at + i] >> (2 * quarter)) & 3
                y[to + 16 * group + i] = step * np.float32(np.int32(low | (high << 4)) - 32)


# ---- the drivers

FORMATS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@kernel
def unpack_row(kind: int, raw: Bytes, y: Floats) -> None:
    """One row of blocks of the format FORMATS[kind] -> float32."""
    if kind == 0:
        unpack_f16(raw, y)
    elif kind == 1:
        unpack_bf16(raw, y)
    elif kind == 2:
        unpack_q4_0(raw, y)
    elif kind == 3:
        unpack_q4_1(raw, y)
    elif kind == 4:
        unpack_q5_0(raw, y)
    elif kind == 5:
        unpack_q5_1(raw, y)
    elif kind == 6:
        unpack_q8_0(raw, y)
    elif kind == 7:
        unpack_q2_k(raw, y)
    elif kind == 8:
        unpack_q3_k(raw, y)
    elif kind == 9:
        unpack_q4_k(raw, y)
    elif kind == 10:
        unpack_q5_k(raw, y)
    else:
        unpack_q6_k(raw, y)


@kernel
def unpack_rows(kind: int, raw: Bytes, y: Floats, first: int, lo: int, hi: int) -> None:
    """Rows first + lo .. first + hi of raw (rows, bytes) -> rows lo..hi of y (rows, d)."""
    for r in range(lo, hi):
        unpack_row(kind, raw[first + r], y[r])


@kernel
def dot_rows(kind: int, raw: Bytes, x: Floats, y: Floats, lo: int, hi: int) -> None:
    """y[:, lo..hi] = x @ W[lo..hi]^T: x (n, d), raw the blocks of W (d_out, d), y (n, d_out)."""
    row = np.empty(x.shape[1], np.float32)
    for r in range(lo, hi):
        unpack_row(kind, raw[r], row)
        for t in range(x.shape[0]):
            total = np.float32(0.0)
            for i in range(row.shape[0]):
                total += x[t, i] * row[i]
            y[t, r] = total


# ---- element by element


@kernel
def gelu_erf(x: Floats, y: Floats, lo: int, hi: int) -> None:
    """y = x Phi(x) on elements lo..hi of flat arrays."""
    for i in range(lo, hi):
        y[i] = np.float32(0.5) * x[i] * (np.float32(1.0) + math.erf(x[i] * np.float32(math.sqrt(0.5))))
