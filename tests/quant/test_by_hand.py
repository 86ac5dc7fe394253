"""Each block format on a block small enough to be worked out with pencil and paper.

A block is put together with struct, as its row in the docstring says, never with the code under test.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tinyllava.quant import TYPES, dequantize


def weights(name: str, *parts: bytes) -> list[float]:
    """One block's weights."""
    block = b"".join(parts)
    assert len(block) == TYPES[name].nbytes
    return dequantize(name, np.frombuffer(block, np.uint8)[None])[0].tolist()


def half(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


@pytest.mark.parametrize(
    ("name", "letter", "value"),
    [("F32", "f", 1.5), ("F16", "e", -0.25), ("F64", "d", 2.0), ("I8", "b", -7), ("I16", "h", -300),
     ("I32", "i", 70000), ("I64", "q", -9)],
)  # fmt: skip
def test_scalars(name: str, letter: str, value: float) -> None:
    assert weights(name, struct.pack("<" + letter, value)) == [value]


def test_float64_keeps_what_float32_cannot_hold() -> None:
    raw = np.array([[0.1, 1e300]], "<f8").view(np.uint8)
    assert dequantize("F64", raw, np.float64).tolist() == [[0.1, 1e300]]
    assert dequantize("F64", raw).tolist() == [[float(np.float32(0.1)), float("inf")]]


def test_bf16_is_the_upper_half_of_float32() -> None:
    assert weights("BF16", struct.pack("<f", 3.0)[2:]) == [3.0]


def test_q4_0() -> None:
    # Byte 0 = 0x2F: weight 0 has q 15, weight 16 has q 2. All others 0x88: q 8, so weight 0.
    w = weights("Q4_0", half(0.5), bytes([0x2F]), bytes([0x88] * 15))
    assert (w[0], w[16]) == (3.5, -3.0)
    assert w[1:16] == [0.0] * 15 == w[17:]


def test_q4_1() -> None:
    w = weights("Q4_1", half(0.5, -1.0), bytes([0x2F]), bytes(15))
    assert (w[0], w[16], w[1]) == (6.5, 0.0, -1.0)


def test_q5_0() -> None:
    # qh bits 0 and 31: weight 0 has q 16 + 3, weight 31 has q 16 + 1; the others q 0.
    w = weights("Q5_0", half(2.0), struct.pack("<I", 1 | 1 << 31), bytes([0x03] + [0] * 14 + [0x10]))
    assert (w[0], w[31], w[1]) == (6.0, 2.0, -32.0)


def test_q5_1() -> None:
    w = weights("Q5_1", half(2.0, 1.0), struct.pack("<I", 1), bytes([0x03] + [0] * 15))
    assert (w[0], w[16], w[31]) == (39.0, 1.0, 1.0)


def test_q8_0() -> None:
    w = weights("Q8_0", half(0.25), struct.pack("<32b", -128, 127, *range(30)))
    assert w == [-32.0, 31.75, *(0.25 * i for i in range(30))]


def test_q2_k() -> None:
    # Sub-block 0: s 3, m 2. Byte 0 of qs = 0b11_10_01_00: q 0, 1, 2, 3 for weights 0, 32, 64, 96.
    w = weights("Q2_K", bytes([0x23] + [0x01] * 15), bytes([0b11100100] + [0] * 63), half(1.0, 0.5))
    assert (w[0], w[1], w[32], w[64], w[96], w[128]) == (-1.0, -1.0, 1.0, 2.0, 3.0, 0.0)


def test_q3_k() -> None:
    # Scale 0 has its lower 4 bits in the low nibble of byte 0, its upper 2 in the low 2 bits of byte 8: 0x21 = 33.
    scales = bytes([0x01] + [0] * 7 + [0x02] + [0] * 3)
    w = weights("Q3_K", bytes([0x01] + [0] * 31), bytes([0x03] + [0] * 63), scales, half(1.0))
    assert w[0] == 3.0  # q = 3 + 4 - 4, times 33 - 32
    assert w[1] == -4.0  # no high bit: q = 0 - 4
    assert w[16] == -32 * -4.0  # scale 1 is 0


def test_q4_k_scales_of_six_bits() -> None:
    # s_0 = 5, m_0 = 6; s_4 = 0x31 (lower bits in byte 8, upper two in byte 0), m_4 = 0x12 (byte 8, byte 4)
    scales = bytes([5 | 0b11 << 6, 0, 0, 0, 6 | 0b01 << 6, 0, 0, 0, 0x21, 0, 0, 0])
    w = weights("Q4_K", half(1.0, 0.5), scales, bytes([0x21] + [0] * 127))
    assert w[0] == 5 * 1 - 0.5 * 6
    assert w[1] == -3.0
    assert w[32] == 0.0  # sub-block 1: s and m are 0
    assert w[128] == -0.5 * 0x12
    w = weights("Q4_K", half(1.0, 0.5), scales, bytes([0] * 64 + [0x01] + [0] * 63))
    assert w[128] == 0x31 - 0.5 * 0x12


def test_q5_k() -> None:
    scales = bytes([1] * 4 + [0] * 4 + [0x01] * 4)
    w = weights("Q5_K", half(1.0, 1.0), scales, bytes([0b10000001] + [0] * 31), bytes([0x02] + [0] * 127))
    assert (w[0], w[224], w[1]) == (18.0, 16.0, 0.0)


def test_q6_k() -> None:
    # Byte 0 of ql = 0x21: weight 0 gets 1, weight 64 gets 2; byte 0 of qh = 0b11: weight 0 gets 48 more.
    scales = struct.pack("<16b", *[-1] * 16)
    w = weights("Q6_K", bytes([0x21] + [0] * 127), bytes([0b11] + [0] * 63), scales, half(0.5))
    assert (w[0], w[64], w[1]) == (-0.5 * 17, 0.5 * 30, 16.0)


def test_q1_0_and_q2_0() -> None:
    w = weights("Q1_0", half(1.5), bytes([0b00000101] + [0] * 15))
    assert w[:4] == [1.5, -1.5, 1.5, -1.5]
    assert weights("Q2_0", half(1.5), bytes([0b11100100] + [0] * 15))[:5] == [-1.5, 0.0, 1.5, 3.0, -1.5]


def test_tq1_0() -> None:
    # Digits 2 0 1 0 2 are 2*81 + 9 + 2 = 173 of 243; the byte is ceil(173 * 256 / 243) = 183.
    w = weights("TQ1_0", bytes([183] + [0] * 47), bytes([255] + [0] * 3), half(2.0))
    assert [w[32 * i] for i in range(5)] == [2.0, -2.0, 0.0, -2.0, 2.0]
    assert [w[240 + 4 * i] for i in range(4)] == [2.0, 2.0, 2.0, 2.0]


def test_tq2_0() -> None:
    w = weights("TQ2_0", bytes([0b00100100] + [0] * 63), half(2.0))
    assert [w[32 * i] for i in range(5)] == [-2.0, 0.0, 2.0, -2.0, -2.0]


def test_mxfp4() -> None:
    # e = 128 doubles; codes: 1 is 0.5, 7 is 6, 0xF is -6.
    w = weights("MXFP4", bytes([128]), bytes([0x71, 0x0F] + [0] * 14))
    assert (w[0], w[16], w[1], w[2]) == (1.0, 12.0, -12.0, 0.0)
    assert weights("MXFP4", bytes([0]), bytes([0x02] * 16))[0] == 2.0**-127  # code 2 is 1


def test_nvfp4() -> None:
    # Scale bytes: 0x38 = 2^(7-7), 0x44 = 2^(8-7) * 1.5, 0x01 = 2^-9, 0x7F counts as 0.
    w = weights("NVFP4", bytes([0x38, 0x44, 0x01, 0x7F]), bytes([0x21] + [0x02] * 31))
    assert (w[0], w[8], w[16], w[32], w[48]) == (0.5, 1.0, 3.0, 2.0**-9, 0.0)


def test_iq4_nl() -> None:
    w = weights("IQ4_NL", half(2.0), bytes([0xF0] + [0x88] * 15))
    assert (w[0], w[16], w[1]) == (-254.0, 226.0, 2.0)


def test_iq4_xs() -> None:
    # Scale 0: lower bits 1, upper bits 0b10, so 33 - 32; scale 1: 0 - 32.
    qs = bytes([0x0F] + [0x88] * 127)
    w = weights("IQ4_XS", half(1.0), struct.pack("<H", 0b10), bytes([0x01, 0, 0, 0]), qs)
    assert (w[0], w[16], w[1], w[32]) == (113.0, -127.0, 1.0, -32.0)


# The first points of the grids, from the tables in ggml-common.h: IQ2 begins with (8, 8, 8, 8, 8, 8, 8, 8),
# (43, 8, 8, ...), (25, 25, 8, ...); IQ3_XXS with (4, 4, 4, 4), (20, 4, 4, 4); IQ3_S with (1, 1, 1, 1),
# (3, 1, 1, 1); IQ1 with (-1, ..., -1), (1, -1, ..., -1).


def test_iq2_xxs() -> None:
    # Index 1 for the first 8 weights; s = 1; sign pattern 1 of 7 bits: minus for weight 0, so for weight 7, too.
    words = struct.pack("<II", 0x00000001, 1 << 28 | 1)
    w = weights("IQ2_XXS", half(8.0), words, bytes(56))
    assert w[:9] == [-3.0 * 43, 24.0, 24.0, 24.0, 24.0, 24.0, 24.0, -24.0, 24.0]  # 8 * 1.5 / 4 = 3
    assert w[32] == 8.0  # s = 0: 8 * 0.5 / 4 = 1


def test_iq2_xs() -> None:
    w = weights("IQ2_XS", half(8.0), struct.pack("<H", 1 << 9 | 2), bytes(62), bytes([0x10] + [0] * 7))
    assert w[:9] == [-25.0, 25.0, 8.0, 8.0, 8.0, 8.0, 8.0, -8.0, 8.0]
    assert w[16] == 24.0  # the high nibble of the first scale byte


def test_iq2_s() -> None:
    w = weights("IQ2_S", half(8.0), bytes([1] + [0] * 31), bytes([0b10] + [0] * 31), bytes(8), bytes(8))
    assert w[:4] == [43.0, -8.0, 8.0, 8.0]


def test_iq3_xxs() -> None:
    w = weights("IQ3_XXS", half(4.0), bytes([1] + [0] * 63), struct.pack("<I", 1), bytes(28))
    assert w[:9] == [-20.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, -4.0, 4.0]


def test_iq3_s() -> None:
    w = weights("IQ3_S", half(2.0), bytes([1] + [0] * 63), bytes(8), bytes([1] + [0] * 31), bytes([0x21, 0, 0, 0]))
    assert w[:3] == [-2.0 * 3 * 3, 6.0, 6.0]
    assert w[32] == 2.0 * 5


def test_iq1_s() -> None:
    # qh 0: s = 1, delta negative.
    w = weights("IQ1_S", half(8.0), bytes([1] + [0] * 31), struct.pack("<H", 1 << 15 | 1 << 12), bytes(14))
    assert w[:3] == [24 * 0.875, 24 * -1.125, 24 * -1.125]
    assert w[32] == 8 * -0.875


def test_iq1_m_has_its_scale_in_four_pieces() -> None:
    bits = struct.unpack("<H", half(8.0))[0]
    pieces = [(bits >> 4 * i & 15) << 12 for i in range(4)]
    pieces[0] |= 0b001  # scale 0 of 3 bits
    w = weights("IQ1_M", bytes([1] + [0] * 31), bytes([0x80] + [0] * 15), struct.pack("<4H", *pieces))
    assert w[:2] == [24 * 1.125, 24 * -0.875]
    assert w[8] == 24 * -1.125  # delta's sign is the top bit of the second nibble
    assert w[16] == 8 * -0.875
