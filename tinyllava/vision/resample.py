"""Resizing by looking at points: the two filters that llama-llava-cli has instead of Pillow's.

Each new pixel is a point in the old picture, and its colour a curve through the few pixels around. When the
picture shrinks, pixels between the points are not seen at all, so fine stripes turn into coarse ones.
All sums are float32 in llama.cpp's order, so that the 8-bit results are the same.
Source: clip_image_preprocess and bicubic_resize in llama.cpp's examples/llava/clip.cpp (January 2025).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # (h, w, 3)
Floats = npt.NDArray[np.float32]
F32 = np.float32


def bilinear_point(rgb: Pixels, height: int, width: int) -> Pixels:
    """Straight lines between the 2x2 pixels around: (h, w, 3) -> (height, width, 3), for square pictures.

    Pixels count from their middles. Beyond the first middle the line is prolonged (the weight is negative),
    beyond the last one it is level.
    """
    source = rgb.astype(F32)
    scale = F32(max(rgb.shape[:2])) / F32(max(height, width))
    top, below, down = _neighbours(height, rgb.shape[0], scale)
    left, right, along = _neighbours(width, rgb.shape[1], scale)
    along, down = along[None, :, None], down[:, None, None]
    upper = _line(source[top][:, left], source[top][:, right], along)  # (height, width, 3)
    lower = _line(source[below][:, left], source[below][:, right], along)
    return _to_bytes(_line(upper, lower, down))


def _neighbours(n: int, n_source: int, scale: np.float32) -> tuple[Any, Any, Floats]:
    """For n points: the pixel before, the pixel after, and how far the point is from the former."""
    point = (np.arange(n, dtype=F32) + F32(0.5)) * scale - F32(0.5)
    before = np.maximum(np.floor(point).astype(int), 0)
    return before, np.minimum(before + 1, n_source - 1), point - before.astype(F32)


def _line(start: Floats, end: Floats, t: Floats) -> Floats:
    line: Floats = start * (F32(1) - t) + end * t
    return line


def bicubic_point(rgb: Pixels, height: int, width: int) -> Pixels:
    """Cubic curves through the 4x4 pixels around: (h, w, 3) -> (height, width, 3).

    Points count from the pixels' upper left corners, so the picture moves by up to half a pixel. The curve
    is the cubic through four points (Lagrange), where Pillow has a cubic spline.
    """
    columns, along = _corners(width, rgb.shape[1])  # (4, width), (width,)
    rows, down = _corners(height, rgb.shape[0])
    seen, rows = np.unique(rows, return_inverse=True)  # (n_seen,), rows now number these
    source = rgb[seen].astype(F32)  # (n_seen, w, 3)
    smooth = _cubic([source[:, columns[i]] for i in range(4)], along[None, :, None])  # (n_seen, width, 3)
    rows = rows.reshape(4, height)
    return _to_bytes(_cubic([smooth[rows[i]] for i in range(4)], down[:, None, None]))


def _corners(n: int, n_source: int) -> tuple[Any, Floats]:
    """For n points: the four pixels around each (4, n), and how far the point is from the second (n,)."""
    point = F32(n_source) / F32(n) * np.arange(n, dtype=F32)
    second = point.astype(int)
    pixels = np.clip(second[None] + np.arange(-1, 3)[:, None], 0, n_source - 1)
    return pixels, point - second.astype(F32)


def _cubic(points: list[Floats], t: Floats) -> Floats:
    """The cubic through four values at -1, 0, 1, 2, at t in 0..1. Its coefficients pass through float64."""
    before, start, end, after = points
    d0, d2, d3 = (x.astype(np.float64) for x in (before - start, end - start, after - start))
    a1 = (-1.0 / 3 * d0 + d2 - 1.0 / 6 * d3).astype(F32)
    a2 = (1.0 / 2 * d0 + 1.0 / 2 * d2).astype(F32)
    a3 = (-1.0 / 6 * d0 - 1.0 / 2 * d2 + 1.0 / 6 * d3).astype(F32)
    result: Floats = start + a1 * t + a2 * t * t + a3 * t * t * t
    return result


def _to_bytes(x: Floats) -> Pixels:
    """Rounded to the nearest of 0..255, halves up."""
    return np.clip(np.floor(x.astype(np.float64) + 0.5), 0, 255).astype(np.uint8)
