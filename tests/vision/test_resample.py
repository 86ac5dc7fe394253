"""llama-llava-cli's two filters, by hand; tests/compat holds them to the program itself."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyllava.vision.image import RESAMPLERS, Size, decode, resize
from tinyllava.vision.resample import bicubic_point, bilinear_point


def grey(rows: list[list[int]]) -> np.ndarray:
    return np.repeat(np.array(rows, np.uint8)[:, :, None], 3, axis=2)  # (h, w, 3)


def test_bilinear_by_hand() -> None:
    """Middles at -0.25, 0.25, 0.75, 1.25: the line is prolonged before the first pixel, level after the last."""
    found = bilinear_point(grey([[40, 80], [40, 80]]), 4, 4)[0, :, 0]
    assert found.tolist() == [30, 50, 70, 80]


def test_bicubic_by_hand() -> None:
    """Points at 0, 0.5, 1, 1.5, corners first; the parabola x * x is its own cubic away from the edges."""
    squares = grey([[x * x for x in range(8)]] * 8)
    found = bicubic_point(squares, 16, 16)[0, :, 0]
    assert found[2:12].tolist() == [1, 2, 4, 6, 9, 12, 16, 20, 25, 30]  # 1.5 ** 2 = 2.25, 2.5 ** 2 = 6.25, ...


def test_points_between_are_not_seen() -> None:
    """Every other column is black: Pillow averages them, a filter of points sees one kind only."""
    stripes = grey([[0, 255] * 32] * 64)
    assert set(np.unique(bicubic_point(stripes, 8, 8))) == {0}
    assert 100 < resize(stripes, Size(8, 8)).mean() < 156


@pytest.mark.parametrize("name", RESAMPLERS)
@given(value=st.integers(0, 255), side=st.integers(1, 40), height=st.integers(1, 40), width=st.integers(1, 40))
def test_one_colour_stays_one_colour(name: str, value: int, side: int, height: int, width: int) -> None:
    flat = np.full((side, side, 3), value, np.uint8)
    if name == "bilinear_point":
        width = height  # it is for squares
    resized = RESAMPLERS[name](flat, height, width)  # type: ignore[index]
    assert resized.shape == (height, width, 3) and (resized == value).all()


def test_a_rotation_mark_is_applied_where_a_profile_says_so() -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turn by 90 degrees
    rgb = grey([[0, 100, 200]])
    Image.fromarray(rgb).save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode(buffer.getvalue()), rgb)
    assert np.array_equal(decode(buffer.getvalue(), "rotate"), np.rot90(rgb, -1))
