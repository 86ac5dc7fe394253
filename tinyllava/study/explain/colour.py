"""The report's colour scale: dark violet over green to light yellow, each step looking as large as the next.

Computed in OKLab (Ottosson 2020, "A perceptual color space for image processing"), in which equal distances
look about equal: hue and lightness run along a curve, and 256 colours are taken at equal distances along it.
The lightness rises all the way, so that the scale also reads without colour, in print or by the colour-blind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]
N_COLOURS = 256

# Along the curve: lightness 0..1, chroma, hue in degrees (OKLCH).
LIGHTNESS = (0.24, 0.94)
CHROMA = (0.110, 0.094, 0.165)  # at the start, the middle, the end
HUE = (305.0, 104.0)

# OKLab -> cone responses (their cube roots) -> linear sRGB. The two matrices are Ottosson's.
TO_CONES = np.array([
    [1.0, 0.3963377774, 0.2158037573],
    [1.0, -0.1055613458, -0.0638541728],
    [1.0, -0.0894841775, -1.2914855480],
])  # fmt: skip
TO_RGB = np.array([
    [4.0767416621, -3.3077115913, 0.2309699292],
    [-1.2684380046, 2.6097574011, -0.3413193965],
    [-0.0041960863, -0.7034186147, 1.7076147010],
])  # fmt: skip


def ramp(n: int = N_COLOURS) -> npt.NDArray[np.uint8]:
    """The scale from its lowest to its highest colour: sRGB, (n, 3), 0..255."""
    curve = _curve(np.linspace(0.0, 1.0, 4096))  # (4096, 3)
    steps = np.linalg.norm(np.diff(curve, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])  # the way from the start, as the eye sees it
    even = np.interp(np.linspace(0.0, along[-1], n), along, np.linspace(0.0, 1.0, len(along)))
    return np.asarray(np.rint(255 * to_srgb(_curve(even))), dtype=np.uint8)


def _curve(t: Floats) -> Floats:
    """Points of the curve at t (n,) in 0..1 -> OKLab (n, 3)."""
    lightness = LIGHTNESS[0] + (LIGHTNESS[1] - LIGHTNESS[0]) * t
    start, middle, end = CHROMA
    chroma = start * (1 - t) * (1 - 2 * t) + 4 * middle * t * (1 - t) + end * t * (2 * t - 1)  # a parabola
    hue = np.radians(HUE[0] + (HUE[1] - HUE[0]) * t)
    return np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)


def to_srgb(lab: Floats) -> Floats:
    """OKLab (n, 3) -> sRGB (n, 3) in 0..1; what no screen can show is clipped."""
    linear = np.clip((lab @ TO_CONES.T) ** 3 @ TO_RGB.T, 0.0, 1.0)
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
