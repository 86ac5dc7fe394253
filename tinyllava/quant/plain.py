"""Formats whose weights are numbers times a scale: scalars, Q4_0 to Q8_0, K-quants, ternary, 4-bit floats.

A weight is ``d * q`` or ``d * q + m``: ``q`` a small integer, ``d`` and ``m`` shared by the weights of a
block. The K-quants share twice: a block of 256 weights has float16 scales, and its 8 or 16 sub-blocks have
scales of 4 to 8 bits in units of those.

The layouts are those of the structs in ggml-common.h, the formulas those of ``dequantize_row_*`` in
ggml-quants.c. The order of the float32 operations is part of a formula: another order rounds differently, and
these are equal to gguf's bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tinyllava.quant.block_type import Blocks, Weights, block, declare, planes, scale

F32 = np.float32


def _stored(b: Blocks) -> Weights:
    """w = x: the number that is stored, in its own type."""
    return b["x"][:, None]  # (n_blocks, 1)


declare("F32", id=0, size=1, nbytes=4, fields=[("x", "<f4")], formula=_stored)
declare("F16", id=1, size=1, nbytes=2, fields=[("x", "<f2")], formula=_stored)
declare("F64", id=28, size=1, nbytes=8, fields=[("x", "<f8")], formula=_stored)
declare("I8", id=24, size=1, nbytes=1, fields=[("x", "i1")], formula=_stored)
declare("I16", id=25, size=1, nbytes=2, fields=[("x", "<i2")], formula=_stored)
declare("I32", id=26, size=1, nbytes=4, fields=[("x", "<i4")], formula=_stored)
declare("I64", id=27, size=1, nbytes=8, fields=[("x", "<i8")], formula=_stored)


@block("BF16", id=30, size=1, nbytes=2, fields=[("x", "<u2")])
def bf16(b: Blocks) -> Weights:
    """The upper half of a float32: the same 8 exponent bits, 7 of the 23 fraction bits."""
    return (b["x"].astype(np.uint32) << np.uint32(16)).view(F32)[:, None]  # (n_blocks, 1)


# ---- blocks of 32, one scale each -------------------------------------------------------------------------


@block("Q4_0", id=2, size=32, nbytes=18, fields=[("d", "<f2"), ("qs", "u1", 16)])
def q4_0(b: Blocks) -> Weights:
    """w = d * (q - 8), q of 4 bits: byte j holds weight j (low nibble) and weight j + 16 (high nibble)."""
    q = planes(b["qs"], 16, 4).astype(np.int8) - np.int8(8)  # (n_blocks, 32)
    return scale(b["d"]) * q


@block("Q4_1", id=3, size=32, nbytes=20, fields=[("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
def q4_1(b: Blocks) -> Weights:
    """w = d * q + m, nibbles as in Q4_0."""
    w: Weights = scale(b["d"]) * planes(b["qs"], 16, 4) + scale(b["m"])
    return w


def _q5(b: Blocks) -> npt.NDArray[np.uint8]:
    """5-bit numbers (n_blocks, 32): nibbles as in Q4_0, and on top of number j bit j of the word ``qh``."""
    high = planes(b["qh"][:, None], 1, 1).astype(np.uint8)  # (n_blocks, 32)
    q: npt.NDArray[np.uint8] = planes(b["qs"], 16, 4) | high << np.uint8(4)
    return q


@block("Q5_0", id=6, size=32, nbytes=22, fields=[("d", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)])
def q5_0(b: Blocks) -> Weights:
    """w = d * (q - 16), q of 5 bits."""
    return scale(b["d"]) * (_q5(b).astype(np.int8) - np.int8(16))


@block("Q5_1", id=7, size=32, nbytes=24, fields=[("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)])
def q5_1(b: Blocks) -> Weights:
    """w = d * q + m, q of 5 bits."""
    return scale(b["d"]) * _q5(b) + scale(b["m"])


@block("Q8_0", id=8, size=32, nbytes=34, fields=[("d", "<f2"), ("qs", "i1", 32)])
def q8_0(b: Blocks) -> Weights:
    """w = q * d, q a signed byte."""
    return b["qs"] * scale(b["d"])


# ggml's own intermediate formats for activations: sized, never stored in a model, so without a formula here.
# (gguf's size table has 40 bytes for Q8_1, from when d and s were float32; ggml-common.h has 36.)
declare("Q8_1", id=9, size=32, nbytes=36, fields=[("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)])
declare("Q8_K", id=15, size=256, nbytes=292, fields=[("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])


# ---- K-quants: blocks of 256, sub-blocks with scales of their own -----------------------------------------


@block(
    "Q2_K", id=10, size=256, nbytes=84,
    fields=[("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")],
)  # fmt: skip
def q2_k(b: Blocks) -> Weights:
    """w = (d * s) * q - dmin * m: q of 2 bits; 16 sub-blocks, s and m nibbles (low, high) of ``scales``."""
    s, m = b["scales"] & np.uint8(0x0F), b["scales"] >> np.uint8(4)  # (n_blocks, 16) each
    q = planes(b["qs"], 32, 2).reshape(-1, 16, 16)  # (n_blocks, sub-block, weight)
    d, dmin = (scale(b["d"]) * s)[..., None], (scale(b["dmin"]) * m)[..., None]  # (n_blocks, 16, 1) each
    w: Weights = d * q - dmin  # (n_blocks, 16, 16)
    return w.reshape(-1, 256)


@block(
    "Q3_K", id=11, size=256, nbytes=110,
    fields=[("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")],
)  # fmt: skip
def q3_k(b: Blocks) -> Weights:
    """w = (d * (s - 32)) * (q - 4): q of 3 bits, its highest in ``hmask``; 16 sub-blocks with s of 6 bits.

    The scales' lower 4 bits are the 16 nibbles of bytes 0..7, their upper 2 bits the planes of bytes 8..11.
    """
    low = planes(b["scales"][:, :8], 8, 4)  # (n_blocks, 16)
    high = planes(b["scales"][:, 8:], 4, 2)  # (n_blocks, 16)
    s = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    q = planes(b["qs"], 32, 2) | planes(b["hmask"], 32, 1) << np.uint8(2)  # (n_blocks, 256)
    q_signed = (q.astype(np.int8) - np.int8(4)).reshape(-1, 16, 16)  # (n_blocks, sub-block, weight)
    w: Weights = (scale(b["d"]) * s)[..., None] * q_signed  # (n_blocks, 16, 16)
    return w.reshape(-1, 256)


def k_scales(packed: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The 8 scales and 8 minima, of 6 bits each, from the 12 bytes of Q4_K and Q5_K: two (n_blocks, 8).

    Bytes 0..3 hold scales 0..3 in their lower 6 bits, bytes 4..7 minima 0..3. Scales and minima 4..7 have
    their lower 4 bits in bytes 8..11 (low nibble scale, high nibble minimum) and their upper 2 bits in the
    two bits that bytes 0..7 left free (``get_scale_min_k4`` in ggml-quants.c).
    """
    a, c, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]  # (n_blocks, 4) each
    s = np.concatenate([a & 0x3F, rest & 0x0F | (a >> 2) & 0x30], axis=1)  # (n_blocks, 8)
    m = np.concatenate([c & 0x3F, rest >> 4 | (c >> 2) & 0x30], axis=1)  # (n_blocks, 8)
    return s, m


def _scale_and_min(b: Blocks, q: npt.NDArray[np.uint8]) -> Weights:
    """w = (d * s) * q - dmin * m over 8 sub-blocks of 32: what Q4_K and Q5_K share."""
    s, m = k_scales(b["scales"])
    q = q.reshape(-1, 8, 32)  # (n_blocks, sub-block, weight)
    d, dmin = (scale(b["d"]) * s)[..., None], (scale(b["dmin"]) * m)[..., None]  # (n_blocks, 8, 1) each
    w: Weights = d * q - dmin  # (n_blocks, 8, 32)
    return w.reshape(-1, 256)


@block(
    "Q4_K", id=12, size=256, nbytes=144,
    fields=[("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)],
)  # fmt: skip
def q4_k(b: Blocks) -> Weights:
    """w = (d * s) * q - dmin * m, q of 4 bits: 32 bytes hold two sub-blocks, low nibbles, then high ones."""
    return _scale_and_min(b, planes(b["qs"], 32, 4))


@block(
    "Q5_K", id=13, size=256, nbytes=176,
    fields=[("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)],
)  # fmt: skip
def q5_k(b: Blocks) -> Weights:
    """Q4_K with a fifth bit: bit i of byte j of ``qh`` belongs to weight j of sub-block i."""
    return _scale_and_min(b, planes(b["qs"], 32, 4) | planes(b["qh"], 32, 1) << np.uint8(4))


@block(
    "Q6_K", id=14, size=256, nbytes=210,
    fields=[("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")],
)  # fmt: skip
def q6_k(b: Blocks) -> Weights:
    """w = (d * s) * (q - 32): q of 6 bits, the lower 4 in ``ql``, the upper 2 in ``qh``; s a signed byte."""
    q = planes(b["ql"], 64, 4) | planes(b["qh"], 32, 2) << np.uint8(4)  # (n_blocks, 256)
    q_signed = (q.astype(np.int8) - np.int8(32)).reshape(-1, 16, 16)  # (n_blocks, sub-block, weight)
    w: Weights = (scale(b["d"]) * b["scales"])[..., None] * q_signed  # (n_blocks, 16, 16)
    return w.reshape(-1, 256)


# ---- one, two and ternary bits ----------------------------------------------------------------------------


@block("Q1_0", id=41, size=128, nbytes=18, fields=[("d", "<f2"), ("qs", "u1", 16)])
def q1_0(b: Blocks) -> Weights:
    """w = d where the bit is set, else -d; weight j is bit j % 8 of byte j // 8."""
    d = scale(b["d"])
    return np.where(planes(b["qs"], 1, 1) == 1, d, -d)


@block("Q2_0", id=42, size=64, nbytes=18, fields=[("d", "<f2"), ("qs", "u1", 16)])
def q2_0(b: Blocks) -> Weights:
    """w = (q - 1) * d, q of 2 bits: -1, 0, 1 or 2 times d; four neighbours in a byte, lowest bits first."""
    return (planes(b["qs"], 1, 2).astype(np.int8) - np.int8(1)) * scale(b["d"])


def _trits(packed: npt.NDArray[np.uint8], group: int, count: int) -> npt.NDArray[np.uint8]:
    """The first ``count`` base-3 digits of each byte, 0..2, plane after plane as in :func:`planes`.

    A byte is not the number v = sum of digit_i * 3^(4-i) itself but ceil(v * 256 / 243), a fraction of 256:
    digit i is then the integer part of 3 * frac(byte * 3^i / 256), found with a multiplication and a shift.
    """
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]  # (count, 1)
    groups = packed.reshape(len(packed), -1, 1, group)  # (n_blocks, n // group, 1, group)
    fraction = (groups * powers).astype(np.uint16)  # (n_blocks, n // group, count, group), of bytes: mod 256
    return (fraction * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)  # (n_blocks, n * count)


@block("TQ1_0", id=34, size=256, nbytes=54, fields=[("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
def tq1_0(b: Blocks) -> Weights:
    """w = d * (t - 1), t a base-3 digit: 5 digits in each of 32 + 16 bytes, 4 in each of the last 4."""
    parts = _trits(b["qs"][:, :32], 32, 5), _trits(b["qs"][:, 32:], 16, 5), _trits(b["qh"], 4, 4)
    t = np.concatenate(parts, axis=1)  # (n_blocks, 160 + 80 + 16)
    return scale(b["d"]) * (t.astype(np.int8) - np.int8(1))


@block("TQ2_0", id=35, size=256, nbytes=66, fields=[("qs", "u1", 64), ("d", "<f2")])
def tq2_0(b: Blocks) -> Weights:
    """w = d * (t - 1), t of 2 bits."""
    return scale(b["d"]) * (planes(b["qs"], 32, 2).astype(np.int8) - np.int8(1))


# ---- 4-bit floats: E2M1 numbers with a scale that is a small float, too -----------------------------------

# Twice the value of each of the 16 E2M1 codes, so that all are integers (OCP Microscaling Formats, table 5).
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def half_e8m0(e: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """2^(e - 128): half of the power of two that the byte names, which undoes the doubling above.

    e - 1 is the exponent field of a float32; for e of 0 and 1 the result is subnormal, one fraction bit.
    """
    wide = e.astype(np.uint32)
    subnormal = np.uint32(0x00200000) << np.minimum(wide, 1)
    return np.where(wide < 2, subnormal, (wide - np.uint32(1)) << np.uint32(23)).view(F32)


@block("MXFP4", id=39, size=32, nbytes=17, fields=[("e", "u1"), ("qs", "u1", 16)])
def mxfp4(b: Blocks) -> Weights:
    """w = 2^(e - 127) * E2M1[q], nibbles as in Q4_0."""
    w: Weights = half_e8m0(b["e"])[:, None] * E2M1_DOUBLED[planes(b["qs"], 16, 4)]
    return w


def half_ue4m3(x: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Half of an unsigned float of 4 exponent bits (bias 7) and 3 fraction bits; bit 7 is not used.

    0x7F, a NaN elsewhere, counts as 0 (``ggml_ue4m3_to_fp32`` in ggml-impl.h).
    """
    exponent = (x >> np.uint8(3) & np.uint8(0x0F)).astype(np.int32)
    fraction = (x & np.uint8(7)).astype(F32)
    normal = np.ldexp(F32(1) + fraction / F32(8), exponent - 7)
    value = np.where(exponent == 0, fraction * F32(2**-9), normal) * F32(0.5)
    return np.where(x == 0x7F, F32(0), value)


@block("NVFP4", id=40, size=64, nbytes=36, fields=[("d", "u1", 4), ("qs", "u1", 32)])
def nvfp4(b: Blocks) -> Weights:
    """w = d * E2M1[q]: 4 sub-blocks of 16 weights, each with a scale byte and 8 bytes of nibbles."""
    q = E2M1_DOUBLED[planes(b["qs"], 8, 4)].reshape(-1, 4, 16)  # (n_blocks, sub-block, weight)
    w: Weights = half_ue4m3(b["d"])[..., None] * q  # (n_blocks, 4, 16)
    return w.reshape(-1, 64)
