"""How far two arrays are from each other, in numbers that are added up piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinyllava.tap import Array

PIECE = 1 << 20  # elements at once: 8 MB in float64, whatever the arrays' size

Verdict = Literal["equal", "close", "differs", "shape", "missing"]


@dataclass
class Distance:
    """Sums over pairs (a, b), in float64. Two NaN are equal, and so are equal infinities."""

    max_abs: float = 0.0
    squares: float = 0.0  # of a - b
    squares_a: float = 0.0
    squares_b: float = 0.0
    products: float = 0.0
    magnitudes: float = 0.0  # sum of |a|

    def add(self, a: Array, b: Array) -> None:
        """Count in two arrays of one shape."""
        a, b = a.reshape(-1), b.reshape(-1)
        for start in range(0, len(a), PIECE):
            self._add(a[start : start + PIECE].astype(np.float64), b[start : start + PIECE].astype(np.float64))

    def _add(self, a: Array, b: Array) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(a - b)
        difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
        difference[np.isnan(difference)] = np.inf
        self.max_abs = max(self.max_abs, float(difference.max(initial=0.0)))
        finite = np.isfinite(a) & np.isfinite(b)
        a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        with np.errstate(over="ignore"):
            self.squares += float(difference @ difference)
            self.squares_a += float(a @ a)
            self.squares_b += float(b @ b)
            self.products += float(a @ b)
            self.magnitudes += float(np.abs(a).sum())

    @property
    def relative(self) -> float:
        """|a - b| / |a| in the 2-norm; where a is all zeros, 0 if b is, too, and infinite if not."""
        if self.squares == 0.0:
            return 0.0
        return math.sqrt(self.squares / self.squares_a) if self.squares_a > 0.0 else math.inf

    @property
    def cosine(self) -> float:
        """Of the angle between a and b; 1 for two arrays of zeros, 0 if only one is."""
        lengths = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        if lengths == 0.0:
            return float(self.squares_a == self.squares_b)
        return max(-1.0, min(1.0, self.products / lengths))

    def verdict(self, tolerance: float, rounding: float = 0.0) -> Verdict:
        """``equal``: no difference at all; ``close``: ``relative`` is within the tolerance, or all is rounding."""
        if self.max_abs == 0.0:
            return "equal"
        return "close" if self.relative <= tolerance or self.max_abs <= 1.01 * rounding else "differs"


def pieces(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Rows in pieces of about PIECE elements, at least one row each."""
    step = max(1, PIECE // max(n_columns, 1))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
