"""Formats whose bits are an index into a table: the IQ family.

An IQ2 or IQ3 index names a point of 8 or 4 magnitudes in a grid (grids.py); the signs are stored apart, and
each group of 16 or 32 weights has a 4-bit scale. IQ1 points hold -1, 0 and 1 themselves. IQ4 has a table of
16 values, spaced as weights are: densely about zero.

Layouts as in ggml-common.h, formulas as ``dequantize_row_iq*`` in ggml-quants.c; where ggml reads bytes as
wider words, the fields here are declared as those words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.quant.block_type import Blocks, Weights, block, planes, scale
from tinyllava.quant.grids import points

F32 = np.float32
Numbers = npt.NDArray[Any]

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
IQ1_DELTA = F32(0.125)  # IQ1 shifts each group's grid points by plus or minus this

_SEVEN_BITS = np.arange(128, dtype=np.uint8)
_ODD = np.unpackbits(_SEVEN_BITS[:, None], axis=1).sum(axis=1, dtype=np.uint8) & np.uint8(1)  # (128,)
# 8 signs from 7 stored bits: the number of minus signs is even, so the eighth is known (``ksigns_iq2xs``).
EVEN_SIGNS = _SEVEN_BITS | _ODD << np.uint8(7)  # (128,)


def _signs(packed: Numbers) -> npt.NDArray[np.float32]:
    """Sign bytes (n_blocks, 32) to +1 and -1 (n_blocks, 256); a set bit is a minus, lowest bit first."""
    negative = planes(packed, 1, 1)  # (n_blocks, 256)
    return np.where(negative, F32(-1), F32(1))


def _by_group(d: Numbers, values: Numbers) -> Weights:
    """Scales (n_blocks, n_groups) times values, which split evenly among the groups: (n_blocks, 256)."""
    groups = values.reshape(*d.shape, -1)  # (n_blocks, n_groups, 256 // n_groups)
    return (d[..., None] * groups).reshape(len(d), -1)  # (n_blocks, 256)


@block("IQ2_XXS", id=16, size=256, nbytes=66, fields=[("d", "<f2"), ("qs", "<u4", 16)])
def iq2_xxs(b: Blocks) -> Weights:
    """w = d * (0.5 + s) * 0.25 * point * sign over 8 groups of 32 weights, two 32-bit words each.

    The first word is 4 indices of 8 bits, the second 4 times 7 sign bits and above them the 4-bit scale s.
    """
    indices, rest = b["qs"][:, 0::2], b["qs"][:, 1::2]  # (n_blocks, 8) each
    d = scale(b["d"]) * (F32(0.5) + (rest >> np.uint32(28)).astype(F32)) * F32(0.25)  # (n_blocks, 8)
    magnitudes = points("IQ2_XXS")[planes(indices, 1, 8)]  # (n_blocks, 32, 8)
    signs = _signs(EVEN_SIGNS[planes(rest, 1, 7)])  # (n_blocks, 256)
    return _by_group(d, magnitudes) * signs


def _iq2_scales(b: Blocks) -> npt.NDArray[np.float32]:
    """d * (0.5 + s) * 0.25 for 16 groups of 16 weights, a nibble s each: (n_blocks, 16)."""
    s = planes(b["scales"], 1, 4).astype(F32)  # (n_blocks, 16)
    return scale(b["d"]) * (F32(0.5) + s) * F32(0.25)


@block("IQ2_XS", id=17, size=256, nbytes=74, fields=[("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
def iq2_xs(b: Blocks) -> Weights:
    """IQ2_XXS with a larger grid and more scales: a 16-bit word is a 9-bit index below 7 sign bits."""
    magnitudes = points("IQ2_XS")[b["qs"] & np.uint16(511)]  # (n_blocks, 32, 8)
    return _by_group(_iq2_scales(b), magnitudes) * _signs(EVEN_SIGNS[b["qs"] >> np.uint16(9)])


@block(
    "IQ2_S", id=22, size=256, nbytes=82,
    fields=[("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)],
)  # fmt: skip
def iq2_s(b: Blocks) -> Weights:
    """IQ2_XS with all 8 signs stored and a 10-bit index: 8 bits in ``qs``, the upper 2 in ``qh``."""
    index = b["qs"] | planes(b["qh"], 1, 2).astype(np.uint16) << np.uint16(8)  # (n_blocks, 32)
    return _by_group(_iq2_scales(b), points("IQ2_S")[index]) * _signs(b["signs"])


@block(
    "IQ3_XXS", id=18, size=256, nbytes=98,
    fields=[("d", "<f2"), ("qs", "u1", 64), ("scales_and_signs", "<u4", 8)],
)  # fmt: skip
def iq3_xxs(b: Blocks) -> Weights:
    """w = d * (0.5 + s) * 0.5 * point * sign: points of 4 weights, 8 groups of 32 as in IQ2_XXS."""
    rest = b["scales_and_signs"]  # (n_blocks, 8)
    d = scale(b["d"]) * (F32(0.5) + (rest >> np.uint32(28)).astype(F32)) * F32(0.5)  # (n_blocks, 8)
    magnitudes = points("IQ3_XXS")[b["qs"]]  # (n_blocks, 64, 4)
    return _by_group(d, magnitudes) * _signs(EVEN_SIGNS[planes(rest, 1, 7)])


@block(
    "IQ3_S", id=21, size=256, nbytes=110,
    fields=[("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)],
)  # fmt: skip
def iq3_s(b: Blocks) -> Weights:
    """w = d * (1 + 2 s) * point * sign: 9-bit indices, the ninth in ``qh``; 8 groups with a nibble s each."""
    index = b["qs"] | planes(b["qh"], 1, 1).astype(np.uint16) << np.uint16(8)  # (n_blocks, 64)
    d = scale(b["d"]) * (1 + 2 * planes(b["scales"], 1, 4))  # (n_blocks, 8)
    return _by_group(d, points("IQ3_S")[index]) * _signs(b["signs"])


@block("IQ1_S", id=19, size=256, nbytes=50, fields=[("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
def iq1_s(b: Blocks) -> Weights:
    """w = d * (2 s + 1) * (point + delta), 8 groups of 32 weights, a word of ``qh`` each.

    The word: 4 times the upper 3 bits of an 11-bit index, the 3-bit scale s, and the sign of delta.
    """
    qh = b["qh"]  # (n_blocks, 8)
    index = b["qs"] | planes(qh, 1, 3, count=4) << np.uint16(8)  # (n_blocks, 32)
    d = scale(b["d"]) * (2 * (qh >> np.uint16(12) & np.uint16(7)) + 1)  # (n_blocks, 8)
    delta = np.where(qh >> np.uint16(15) == 0, IQ1_DELTA, -IQ1_DELTA)  # (n_blocks, 8)
    shifted = points("IQ1_S")[index].reshape(*qh.shape, 32) + delta[..., None]  # (n_blocks, 8, 32)
    return _by_group(d, shifted)


@block("IQ1_M", id=29, size=256, nbytes=56, fields=[("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])
def iq1_m(b: Blocks) -> Weights:
    """IQ1_S with 16 groups of 16 weights, and a delta for each point of 8.

    A nibble of ``qh`` is the upper 3 bits of an index and the sign of delta. A word of ``scales`` is 4 scales
    of 3 bits; the 4 bits left over in each of the 4 words make up the float16 ``d``, lowest nibble first.
    """
    nibbles = planes(b["qh"], 1, 4).astype(np.uint16)  # (n_blocks, 32)
    index = b["qs"] | (nibbles & np.uint16(7)) << np.uint16(8)  # (n_blocks, 32)
    delta = np.where(nibbles >> np.uint16(3) == 0, IQ1_DELTA, -IQ1_DELTA)  # (n_blocks, 32)
    d_nibbles = (b["scales"] >> np.uint16(12)) << np.arange(0, 16, 4, dtype=np.uint16)  # (n_blocks, 4)
    d_bits = np.bitwise_or.reduce(d_nibbles, axis=1).astype(np.uint16)  # (n_blocks,)
    d = scale(d_bits.view(np.float16)) * (2 * planes(b["scales"], 1, 3, count=4) + 1)  # (n_blocks, 16)
    return _by_group(d, points("IQ1_S")[index] + delta[..., None])


@block("IQ4_NL", id=20, size=32, nbytes=18, fields=[("d", "<f2"), ("qs", "u1", 16)])
def iq4_nl(b: Blocks) -> Weights:
    """w = d * value[q], nibbles as in Q4_0."""
    w: Weights = scale(b["d"]) * IQ4_VALUES[planes(b["qs"], 16, 4)]
    return w


@block(
    "IQ4_XS", id=23, size=256, nbytes=136,
    fields=[("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)],
)  # fmt: skip
def iq4_xs(b: Blocks) -> Weights:
    """w = d * (s - 32) * value[q]: 8 groups of 32 weights as in IQ4_NL, s of 4 + 2 bits."""
    high = planes(b["scales_h"][:, None], 1, 2).astype(np.uint8)  # (n_blocks, 8)
    s = (planes(b["scales_l"], 1, 4) | high << np.uint8(4)).astype(np.int8) - np.int8(32)  # (n_blocks, 8)
    return _by_group(scale(b["d"]) * s, IQ4_VALUES[planes(b["qs"], 16, 4)])
