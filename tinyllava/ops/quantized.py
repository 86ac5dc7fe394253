"""A product with a quantized matrix, done with integers: what the CPU's kernels compute, in plain NumPy.

    y = x W^T + b    activations x (n, d_in) float32, weights W (d_out, d_in) in the file's blocks

Both factors become integers with a scale for each group of neighbouring columns:

    w = d * q + m    as stored: q of 2 to 8 bits; a scale d, and in some formats a minimum m, for 16 or 32 columns
    x ~ s * p        rounded here: p of 8 bits; a scale s for 32 columns (128: prompts against Q2_K to Q6_K)

so a group of columns contributes s * (d * sum(p * q) + m * sum(p)) to y. Both sums are of integers, hence exact,
and processors have an instruction that adds up 64 products of bytes (cpu/simd/llvm.py). Activations that are far
larger than the rest of their token are multiplied separately (outliers), and 16-bit weights meet a prompt as int16
(int16_weights).

The kernels of ops/cpu keep the same numbers in other orders and add up in float32. Here, what leads to an integer
is float32 in the kernels' order of operations, so that every integer is theirs; what follows is float64. The
kernels differ from this page by the rounding of float32 sums, and by nothing else.

Letters in the shapes: n tokens, g groups of columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinyllava.ops import Array
from tinyllava.quant.block_type import planes, scale
from tinyllava.quant.blocks import TYPES
from tinyllava.quant.plain import k_scales

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor

F32, F64 = np.float32, np.float64
ONE_BY_ONE = 2  # up to this many tokens are multiplied one after the other; more are a prompt
BLOCK, WIDE_BLOCK = 32, 128  # columns that share a scale s
LARGEST = (-128, -127, -126, -125)  # what the number of largest magnitude of a block may become
FLOAT16 = "F16", "BF16"
OUTLIER, OUTLIER_ROWS = 20.0, 2  # times a token's root mean square; tokens that may have any (or n / 16, if more)
X_INT16, W_INT16, W_SUM_INT16 = -11585.0, 32767.0, 185300.0  # the largest p; the largest q, and sum of 64 |q|


class Groups(NamedTuple):
    """A matrix of integers times their group's scale, plus its minimum."""

    integers: Array  # (rows, g, columns of a group)
    scales: Array  # (rows, g)
    minima: Array | None = None  # (rows, g)


def integer_product(x: Array, tensor: Tensor, bias: Array | None = None) -> Array:
    """x (n, d_in) @ W^T + bias -> (n, d_out) float64.

    Against quantized weights, NaN or infinity in a token makes all its results NaN, and no other token's.
    """
    x, is_prompt = np.asarray(x, F32), len(x) > ONE_BY_ONE
    with np.errstate(all="ignore"):  # NaN and infinity go their way
        if tensor.type == "F32" or (tensor.type in FLOAT16 and not is_prompt):
            y: Array = x.astype(F64) @ tensor.dequantize(F64).T  # nothing is rounded to integers
        elif tensor.type in FLOAT16:
            y = multiply(int16_activations(x), int16_weights(tensor.dequantize()))
        elif is_prompt:
            y = multiply_prompt(x, tensor)
        else:
            y = multiply(quantize(x, BLOCK), unpack(tensor))
    return y if bias is None else y + bias


def multiply_prompt(x: Array, tensor: Tensor) -> Array:
    """x (n, d_in) against quantized weights -> (n, d_out)."""
    w, size = unpack(tensor), BLOCK
    if TYPES[tensor.type].block_size > BLOCK:  # super-blocks
        w, size = int16_minima(w), WIDE_BLOCK
    large = outliers(x)
    usual, others = np.where(large, 0, x), np.where(large, x, 0)
    y: Array = multiply(quantize(usual, size), w) + multiply(quantize(others, size), w)
    return y


def multiply(x: Groups, w: Groups) -> Array:
    """x (n, d_in) @ w^T for w (d_out, d_in) -> (n, d_out) float64. A group of x may be several of w."""
    n, _, columns = x.integers.shape
    p = x.integers.reshape(n, -1, w.integers.shape[2])  # (n, g of w, columns of w's group)
    s = x.scales.repeat(columns // p.shape[2], axis=1).astype(F64)  # (n, g)
    dots = np.einsum("ngi,ogi->ngo", p, w.integers, dtype=np.int64)  # the integer dot products
    y: Array = np.einsum("ng,ngo,og->no", s, dots, w.scales.astype(F64))
    if w.minima is not None:
        y += (s * p.sum(axis=2)) @ w.minima.astype(F64).T
    return y


# ---- activations become integers


def quantize(x: Array, size: int) -> Groups:
    """x (n, d) as int8, with a scale for each ``size`` columns, 32 or 128.

    The number of largest magnitude becomes -128, -127, -126 or -125 (of 128 columns: -128 or -127), whichever
    makes the sum of squared rounding errors smallest. (Negative because int8 has no 128: a number as large, but of
    the other sign, becomes 127.) NaN or infinity in a block makes its scale NaN; so does a largest magnitude above
    0 and below 4e-37, whose inverse times 128 float32 cannot hold.
    """
    blocks = x.reshape(len(x), -1, size // BLOCK, BLOCK)  # (n, g, blocks, 32)
    largest = extreme(x.reshape(len(x), -1, size))  # (n, g)
    best, least = np.full_like(largest, np.nan), np.full_like(largest, np.inf)  # NaN stays if no error is finite
    for top in LARGEST[: 4 if size == BLOCK else 2]:
        quotients = blocks * (inverse(largest) * F32(top))[..., None, None]
        errors = sum_of_squares(quotients - np.rint(quotients)) * F32(1 / top**2)  # (n, g, blocks), over largest^2
        while errors.shape[2] > 1:
            errors = errors[..., ::2] + errors[..., 1::2]  # neighbours
        error = errors[..., 0]  # (n, g)
        best = np.where(error < least, largest * F32(1 / top), best)
        least = np.where(error < least, error, least)
    p = np.minimum(np.rint(x.reshape(*largest.shape, size) * inverse(best)[..., None]), 127)
    return Groups(np.nan_to_num(p).astype(np.int8), best)


def sum_of_squares(v: Array) -> Array:
    """v (..., 32) float32 -> (...), added up as a vector's 16 lanes are, the upper half to the lower one.

    The order matters only where two candidates are as good as equal, but then the integers depend on it.
    """
    squares = v.astype(F64) ** 2  # exact, as in the fused multiply-add of the second 16
    lanes = (squares[..., :16].astype(F32) + squares[..., 16:]).astype(F32)
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width:]
    sums: Array = lanes[..., 0]
    return sums


def extreme(x: Array) -> Array:
    """The number of largest magnitude along the last axis, sign included."""
    high, low = x.max(axis=-1), x.min(axis=-1)
    end: Array = np.where(high > -low, high, low)
    return end


def inverse(v: Array) -> Array:
    """1 / v, and 0 where v is 0."""
    return np.divide(1, v, out=np.zeros_like(v), where=v != 0)


def outliers(x: Array) -> Array:
    """Which activations of a prompt (n, d) are multiplied separately: above 20 x their token's root mean square.

    A number that large would leave few of the 8 bits to the others in its block (cf. LLM.int8(), Dettmers et al.
    2022). LLaMA has such numbers in few tokens (Sun et al. 2024, "Massive Activations"). Where many tokens have
    any, they are the long tail of ordinary numbers, and nothing is separated.
    """
    squares = x**2
    large = squares > F32(OUTLIER**2) * squares.mean(axis=1, keepdims=True)  # (n, d)
    is_rare = large.any(axis=1).sum() <= max(OUTLIER_ROWS, len(x) // 16)
    return large if is_rare else np.zeros_like(large)


# ---- blocks become integers, scales and minima: the formulas of quant/plain.py, not yet multiplied out


def unpack(tensor: Tensor) -> Groups:
    """W (d_out, d_in) as stored."""
    kind, rows = TYPES[tensor.type], (tensor.shape[0], -1)
    blocks = np.ascontiguousarray(tensor.raw).reshape(-1).view(kind.dtype)  # (n_blocks,)
    q, d, m = unpack_blocks(kind.name, blocks)
    columns = kind.block_size // d.shape[1]  # of a group
    return Groups(q.reshape(*rows, columns), d.reshape(rows), None if m is None else m.reshape(rows))


def unpack_blocks(kind: str, b: Any) -> tuple[Array, Array, Array | None]:
    """Integers q (n_blocks, 32 or 256), scales d and minima m (n_blocks, groups of a block): w = d * q + m."""
    d = scale(b["d"])
    if kind == "Q8_0":
        return b["qs"], d, None
    if kind == "Q4_0":
        return signed(planes(b["qs"], 16, 4), 8), d, None
    if kind == "Q4_1":
        return planes(b["qs"], 16, 4), d, scale(b["m"])
    if kind in ("Q5_0", "Q5_1"):
        q = planes(b["qs"], 16, 4) | planes(b["qh"][:, None], 1, 1) << 4
        return (signed(q, 16), d, None) if kind == "Q5_0" else (q, d, scale(b["m"]))
    s = b["scales"]  # of K-quants: small integers, times the super-block's d and dmin
    if kind == "Q2_K":
        return planes(b["qs"], 32, 2), d * (s & 15), -scale(b["dmin"]) * (s >> 4)
    if kind == "Q3_K":
        s = planes(s[:, :8], 8, 4) | planes(s[:, 8:], 4, 2) << 4
        return signed(planes(b["qs"], 32, 2) | planes(b["hmask"], 32, 1) << 2, 4), d * signed(s, 32), None
    if kind == "Q6_K":
        return signed(planes(b["ql"], 64, 4) | planes(b["qh"], 32, 2) << 4, 32), d * s, None
    q = planes(b["qs"], 32, 4) if kind == "Q4_K" else planes(b["qs"], 32, 4) | planes(b["qh"], 32, 1) << 4
    s, m = k_scales(s)
    return q, d * s, -scale(b["dmin"]) * m


def signed(q: Array, offset: int) -> Array:
    """Unsigned integers of up to 7 bits, minus an offset."""
    return q.astype(np.int8) - np.int8(offset)


def int16_minima(w: Groups) -> Groups:
    """For a prompt: minima as int16, in a unit for each row and 128 columns. So their sums are integers, too."""
    if w.minima is None:
        return w
    m = w.minima.reshape(len(w.minima), -1, WIDE_BLOCK // w.integers.shape[2])  # (d_out, d_in / 128, 4 or 8)
    unit = np.abs(m).max(axis=2, keepdims=True) * F32(1 / 32767)
    return w._replace(minima=(unit.astype(F64) * np.rint(m * inverse(unit))).reshape(w.minima.shape))


# ---- F16 and BF16 against a prompt: both factors as int16, with a scale for each 64 columns


def int16_activations(x: Array) -> Groups:
    """x (n, d) as int16: the number of largest magnitude becomes -11585."""
    columns = by_64(x)
    s = extreme(columns) / F32(X_INT16)
    s += 0 * s  # NaN if infinite
    p = np.rint(columns * inverse(s)[..., None])
    return Groups(np.nan_to_num(p).astype(np.int16), s)


def int16_weights(w: Array) -> Groups:
    """w (d_out, d_in) float32 as int16.

    The largest becomes 32767 or less, and the 64 magnitudes add up to 185300 or less: times 11585 that is below
    2^31, so that the sum of 64 products fits in int32.
    """
    columns = by_64(w)
    magnitudes = np.abs(columns)
    sums = magnitudes.cumsum(axis=2)[..., -1]  # from left to right, as the kernels do
    d = np.maximum(magnitudes.max(axis=2) * F32(1 / W_INT16), sums * F32(1 / W_SUM_INT16))  # (d_out, g)
    return Groups(np.rint(columns * inverse(d)[..., None]).astype(np.int16), d)


def by_64(x: Array) -> Array:
    """x (n, d) -> (n, g, 64); zeros fill the last group."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 64))).reshape(len(x), -1, 64)
