"""The searches behind the K- and IQ4-quants, compiled by Numba: for each group of weights, a good scale.

Rounding to a grid is easy once the grid is chosen; choosing it is the work. For *fixed codes* q the best scale
is a least-squares fit, in closed form; for a *fixed scale* the best codes are the nearest ones. Neither finds
the best pair, since the error as a function of the scale has many local minima. So every search here starts
from a few grids about the obvious one, which maps the largest weight to the last code: it rounds to each, fits
the scale to the codes, and keeps the fit with the least error. (ggml's ``make_qkx2_quants`` and
``make_qx_quants`` of ggml-quants.c pursue the same aims over the same ranges of grids.)

Errors are weighted: a larger weight takes part in larger products, and its error matters more. llama.cpp found by
the perplexity of models that this helps. Here a constant of the size of the mean is added in every format, which
costs the large weights little and lowers the plain error of all.

Arrays are x (n_groups, size) float32; each group is searched by itself, so that the result does not depend on
how the groups are shared among threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Multiples = npt.NDArray[np.int32]
F32 = np.float32
Number = Any  # a float32 or an int32, which only Numba tells apart

# Sums may be reordered, or they could not use vector registers. What a kernel computes then depends on how LLVM
# optimises it, so each exists once only: inlined where it is called. Called as a function, it would have a copy in
# its caller's module, optimised once more, and whether that one or the original runs depends on what was compiled
# in this process and what came from the cache.
FAST = {"reassoc", "contract", "nsz", "arcp"}
kernel = njit(cache=True, nogil=True, fastmath=FAST, forceinline=True, error_model="numpy")


@kernel
def nearest(y: Number, largest: int) -> Number:
    """The code of 0..largest nearest to y. Adding a half and cutting is what vector registers do fastest."""
    q = np.int32(y + F32(0.5))
    return min(max(q, np.int32(0)), np.int32(largest))


# ---- x ~ scale * q - minimum, q of 0..largest


@kernel
def fit_affine(x: Floats, largest: int, first: Number, n_grids: int, scale: Floats, low: Floats) -> None:
    """For each group, scale and low >= 0 of x ~ scale * q - low: into scale, low (n_groups,).

    Tries the grids of step (max - min) / (largest + first + 0.1 k) for k in 0..n_grids - 1.
    """
    size = x.shape[1]
    w = np.empty(size, np.float32)
    for g in range(x.shape[0]):
        group = x[g]
        lowest, highest = weigh(group, w)
        scale[g], low[g] = F32(0), -lowest
        if highest > lowest:
            scale[g], low[g] = search_affine(group, w, lowest, highest, largest, first, n_grids)


@kernel
def weigh(x: Floats, w: Floats) -> tuple[Number, Number]:
    """The weighting rms(x) + abs(x) of a group into w; the group's least value (at most 0) and its greatest."""
    lowest, highest, squares = F32(0), x[0], F32(0)
    for i in range(x.shape[0]):
        lowest = min(lowest, x[i])
        highest = max(highest, x[i])
        squares += x[i] * x[i]
    base = np.sqrt(squares / F32(x.shape[0]))
    for i in range(x.shape[0]):
        w[i] = base + abs(x[i])
    return lowest, highest


@kernel
def search_affine(
    x: Floats, w: Floats, lowest: Number, highest: Number, largest: int, first: Number, n_grids: int
) -> tuple[Number, Number]:
    """The best of the grids for one group: scale, low. A grid starts at the best minimum found so far."""
    sum_w = sum_wx = F32(0)
    for i in range(x.shape[0]):
        sum_w += w[i]
        sum_wx += w[i] * x[i]
    best, best_scale, best_low = F32(np.inf), F32(0), -lowest
    for k in range(-1, n_grids):  # -1 is the obvious grid as it is, without a fit
        origin = -best_low
        steps = F32(largest) if k < 0 else F32(largest + first + 0.1 * k)
        inverse = steps / (highest - origin)
        scale, low = F32(1) / inverse, best_low
        if k >= 0:
            scale, low = regress(x, w, origin, inverse, largest, sum_w, sum_wx)
        error = F32(0)
        for i in range(x.shape[0]):
            q = nearest((x[i] - origin) * inverse, largest)
            miss = scale * F32(q) - low - x[i]
            error += w[i] * miss * miss
        if error < best:
            best, best_scale, best_low = error, scale, low
    return best_scale, best_low


@kernel
def regress(
    x: Floats, w: Floats, lowest: Number, inverse: Number, largest: int, sum_w: Number, sum_wx: Number
) -> tuple[Number, Number]:
    """Weighted linear regression of x on the codes of a grid: the line scale * q - low, low >= 0."""
    sum_q = sum_qq = sum_qx = F32(0)
    for i in range(x.shape[0]):
        q = F32(nearest((x[i] - lowest) * inverse, largest))
        wq = w[i] * q
        sum_q += wq
        sum_qq += wq * q
        sum_qx += wq * x[i]
    spread = sum_w * sum_qq - sum_q * sum_q  # of the codes; 0 if all are the same
    if spread <= F32(0):
        return F32(0), -lowest
    low = (sum_q * sum_qx - sum_qq * sum_wx) / spread
    if low >= F32(0):
        return (sum_w * sum_qx - sum_wx * sum_q) / spread, low
    return sum_qx / sum_qq, F32(0)  # the formats cannot hold a negative one: a line through 0 instead


@kernel
def settle_affine(
    x: Floats, largest: int, units: int, d: Floats, dmin: Floats, s: Multiples, m: Multiples, codes: Codes
) -> None:
    """Codes for d * s * q - dmin * m, once d and dmin (n_groups,) are known; s and m (n_groups,) move by one.

    Rounding s and m each for itself is not the best for the two together: of the nine pairs about the
    rounded ones, the one with the least error is kept.
    """
    w = np.empty(x.shape[1], np.float32)
    for g in range(x.shape[0]):
        weigh(x[g], w)
        best, best_s, best_m = F32(np.inf), s[g], m[g]
        for try_s in range(max(s[g] - 1, 0), min(s[g] + 1, units) + 1):
            for try_m in range(max(m[g] - 1, 0), min(m[g] + 1, units) + 1):
                error = affine_error(x[g], w, d[g] * F32(try_s), dmin[g] * F32(try_m), largest)
                if error < best:
                    best, best_s, best_m = error, try_s, try_m
        s[g], m[g] = best_s, best_m
        round_affine(x[g], d[g] * F32(best_s), dmin[g] * F32(best_m), largest, codes[g])


@kernel
def affine_error(x: Floats, w: Floats, scale: Number, low: Number, largest: int) -> Number:
    """The weighted squared error of rounding a group to scale * q - low."""
    inverse = F32(1) / scale if scale > F32(0) else F32(0)
    error = F32(0)
    for i in range(x.shape[0]):
        miss = scale * F32(nearest((x[i] + low) * inverse, largest)) - low - x[i]
        error += w[i] * miss * miss
    return error


@kernel
def round_affine(x: Floats, scale: Number, low: Number, largest: int, codes: Codes) -> None:
    """The nearest codes of scale * q - low for one group."""
    inverse = F32(1) / scale if scale > F32(0) else F32(0)
    for i in range(x.shape[0]):
        codes[i] = nearest((x[i] + low) * inverse, largest)


# ---- x ~ scale * (q - half), q of 0..2 half - 1


@kernel
def fit_symmetric(x: Floats, half: int, n_grids: int, scale: Floats) -> None:
    """For each group, the scale of x ~ scale * (q - half), which may be negative: into scale (n_groups,).

    There is one code more below zero than above, so the weight of the largest magnitude is mapped to the lowest
    code, by a scale of the other sign if it is positive. Tries the grids that put it at half + 0.1 k for k from
    -n_grids to n_grids.
    """
    w = np.empty(x.shape[1], np.float32)
    for g in range(x.shape[0]):
        group = x[g]
        peak = weigh_squared(group, w)
        best = best_scale = F32(0)
        for k in range(-n_grids, n_grids + 1):
            if peak == F32(0):
                break
            inverse = -F32(half + 0.1 * k) / peak
            sum_qx, sum_qq = products(group, w, inverse, half)
            # With the fitted scale sum_qx / sum_qq, the error is sum(w x^2) - sum_qx^2 / sum_qq.
            if sum_qq > F32(0) and sum_qx * sum_qx > best * sum_qq:
                best_scale = sum_qx / sum_qq
                best = best_scale * sum_qx
        scale[g] = best_scale


@kernel
def weigh_squared(x: Floats, w: Floats) -> Number:
    """The weighting mean(x^2) + x^2 of a group into w; the value (signed) that is farthest from 0."""
    lowest = highest = squares = F32(0)
    for i in range(x.shape[0]):
        lowest = min(lowest, x[i])
        highest = max(highest, x[i])
        squares += x[i] * x[i]
    base = squares / F32(x.shape[0])
    for i in range(x.shape[0]):
        w[i] = base + x[i] * x[i]
    return highest if highest >= -lowest else lowest


@kernel
def products(x: Floats, w: Floats, inverse: Number, half: int) -> tuple[Number, Number]:
    """sum(w q x) and sum(w q q) over a group, for the codes q - half nearest to x * inverse."""
    sum_qx = sum_qq = F32(0)
    for i in range(x.shape[0]):
        q = F32(nearest(x[i] * inverse + F32(half), 2 * half - 1) - half)
        sum_qx += w[i] * q * x[i]
        sum_qq += w[i] * q * q
    return sum_qx, sum_qq


@kernel
def settle_symmetric(x: Floats, half: int, units: int, d: Floats, s: Multiples, codes: Codes) -> None:
    """Codes for d * s * (q - half), once d (n_groups,) is known; s (n_groups,) moves if another is better.

    Tried are s, its neighbours, and -units, the scale of the block's leading group, which d holds exactly: where
    the groups are alike, that beats any scale of their own that has to be rounded.
    """
    w = np.empty(x.shape[1], np.float32)
    for g in range(x.shape[0]):
        weigh_squared(x[g], w)
        best, best_s = F32(np.inf), s[g]
        for k in range(4):
            try_s = max(s[g] - 1 + k, -units) if k < 3 else -units
            error = symmetric_error(x[g], w, d[g] * F32(try_s), half)
            if try_s < units and error < best:
                best, best_s = error, try_s
        s[g] = best_s
        round_symmetric(x[g], d[g] * F32(best_s), half, codes[g])


@kernel
def symmetric_error(x: Floats, w: Floats, scale: Number, half: int) -> Number:
    """The weighted squared error of rounding a group to scale * (q - half)."""
    inverse = F32(1) / scale if scale != F32(0) else F32(0)
    error = F32(0)
    for i in range(x.shape[0]):
        miss = scale * F32(nearest(x[i] * inverse + F32(half), 2 * half - 1) - half) - x[i]
        error += w[i] * miss * miss
    return error


@kernel
def round_symmetric(x: Floats, scale: Number, half: int, codes: Codes) -> None:
    """The nearest codes of scale * (q - half) for one group."""
    inverse = F32(1) / scale if scale != F32(0) else F32(0)
    for i in range(x.shape[0]):
        codes[i] = nearest(x[i] * inverse + F32(half), 2 * half - 1)


# ---- x ~ scale * values[q]


@kernel
def nearest_value(y: Number, middles: Floats) -> Number:
    """The index of the value nearest to y: how many of the middles between neighbours lie below it."""
    index = np.int32(0)
    for k in range(15):
        index += np.int32(y > middles[k])
    return index


@kernel
def fit_values(x: Floats, values: Floats, middles: Floats, n_grids: int, scale: Floats) -> None:
    """For each group, the scale of x ~ scale * values[q]: into scale (n_groups,).

    Tries the grids that put the weight of the largest magnitude at the first value or at the last, which is
    smaller, or up to n_grids beside them.
    """
    w = np.empty(x.shape[1], np.float32)
    for g in range(x.shape[0]):
        group = x[g]
        peak = weigh_squared(group, w)
        best = best_scale = F32(0)
        for k in range(-n_grids, 3 * n_grids + 2):
            if peak == F32(0):
                break
            end = values[0] + F32(k) if k <= n_grids else values[15] + F32(k - 2 * n_grids - 1)
            inverse = end / peak
            sum_vx = sum_vv = F32(0)
            for i in range(group.shape[0]):
                v = values[nearest_value(group[i] * inverse, middles)]
                sum_vx += w[i] * v * group[i]
                sum_vv += w[i] * v * v
            if sum_vv > F32(0) and sum_vx * sum_vx > best * sum_vv:
                best_scale = sum_vx / sum_vv
                best = best_scale * sum_vx
        scale[g] = best_scale


@kernel
def settle_values(
    x: Floats, values: Floats, middles: Floats, units: int, d: Floats, s: Multiples, codes: Codes
) -> None:
    """Codes for d * s * values[q], once d (n_groups,) is known; s (n_groups,) moves as in settle_symmetric.

    Where the format has no s, units is 0: then nothing is tried, and s, all ones, stays as it is.
    """
    w = np.empty(x.shape[1], np.float32)
    for g in range(x.shape[0]):
        weigh_squared(x[g], w)
        best, best_s = F32(np.inf), s[g]
        for k in range(4):
            try_s = max(s[g] - 1 + k, -units) if k < 3 else -units
            error = value_error(x[g], w, d[g] * F32(try_s), values, middles)
            if try_s < units and error < best:
                best, best_s = error, try_s
        s[g] = best_s
        round_values(x[g], d[g] * F32(best_s), middles, codes[g])


@kernel
def value_error(x: Floats, w: Floats, scale: Number, values: Floats, middles: Floats) -> Number:
    """The weighted squared error of rounding a group to scale * values[q]."""
    inverse = F32(1) / scale if scale != F32(0) else F32(0)
    error = F32(0)
    for i in range(x.shape[0]):
        miss = scale * values[nearest_value(x[i] * inverse, middles)] - x[i]
        error += w[i] * miss * miss
    return error


@kernel
def round_values(x: Floats, scale: Number, middles: Floats, codes: Codes) -> None:
    """The nearest codes of scale * values[q] for one group."""
    inverse = F32(1) / scale if scale != F32(0) else F32(0)
    for i in range(x.shape[0]):
        codes[i] = nearest_value(x[i] * inverse, middles)
