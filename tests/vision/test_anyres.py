"""Tiles and tokens of LLaVA-1.6, and LLaVA-1.5's one tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava.errors import PictureError
from tinyllava.vision.anyres import (
    Box,
    PicturePlan,
    fit_inside,
    make_tiles,
    merge,
    plan_picture,
    select_best_resolution,
    spatial_map,
    split_tiles,
    unpadded_box,
)
from tinyllava.vision.config import CLIP_MEAN, CLIP_STD, VisionConfig
from tinyllava.vision.image import Size, normalise

GRID = np.load(Path(__file__).parents[2] / "golden" / "anyres-grid.npz")
PINPOINTS = tuple(Size(h, w) for w, h in [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)])


def config(tile_px: int = 336, **changes: Any) -> VisionConfig:
    """A config whose picture part is LLaVA-1.6's; the tower's part is not used here."""
    scaled = tuple(Size(p.height * tile_px // 336, p.width * tile_px // 336) for p in PINPOINTS)
    values: dict[str, Any] = {
        **{"n_embd": 8, "n_ff": 8, "n_head": 1, "n_block": 1, "n_embd_llm": 8, "norm_eps": 1e-5},
        **{"image_px": tile_px, "patch_px": 14, "activation": "gelu_quick", "projector_activation": "gelu_erf"},
        **{"projector": "linear", "mean": CLIP_MEAN, "std": CLIP_STD, "aspect": "anyres", "pinpoints": scaled},
        **{"merge": "spatial_unpad", "ffn_swapped": False, "newline": "v."},
    }
    return VisionConfig(**values | changes)


SIZES = st.builds(Size, st.integers(1, 700), st.integers(1, 700))
SIDES = st.integers(1, 5000)


def tokens_of(plan: PicturePlan) -> int:
    """The tokens that merge() gives for features of one number each."""
    features = np.zeros((plan.n_tiles, plan.tile_patches**2, 1))
    return len(merge(features, plan, np.zeros(1)))


# ---- the original's answers


def test_grids_and_token_counts_of_3000_sizes_are_the_originals() -> None:
    for (width, height), grid, n_tokens in zip(GRID["size"], GRID["grid"], GRID["n_tokens"], strict=True):
        plan = plan_picture(Size(int(height), int(width)), config())
        found = (plan.resolution.width, plan.resolution.height, plan.n_tokens)
        assert found == (*grid.tolist(), n_tokens), f"{width}x{height}"


# ---- by hand


def test_a_640x480_picture_by_hand() -> None:
    plan = plan_picture(Size(480, 640), config())
    assert plan.resolution == (672, 672) and plan.grid == (2, 2) and plan.n_tiles == 5
    assert plan.resized == (504, 672)  # 480 * 672 / 640
    assert plan.unpadded == Box(top=6, left=0, height=36, width=48)  # 48 rows of patches, 36 of them picture
    assert plan.n_tokens == 24 * 24 + 36 * (48 + 1) == 2340


def test_of_equal_resolutions_the_first_wins() -> None:
    assert select_best_resolution(Size(100, 100), PINPOINTS) == Size(672, 336)  # (336, 672) in the file
    assert select_best_resolution(Size(100, 100), PINPOINTS[1::-1]) == Size(336, 672)


def test_a_picture_that_fits_nowhere_gets_the_smallest_resolution() -> None:
    assert select_best_resolution(Size(1, 5000), PINPOINTS[2:]) == Size(336, 1008)


def test_sizes_round_up_when_resizing_and_down_when_unpadding() -> None:
    assert fit_inside(Size(100, 301), Size(672, 672), "ceil") == Size(224, 672)  # 223.3
    assert unpadded_box(48, 48, Size(100, 301), "floor") == Box(16, 0, 16, 48)  # 15.9 -> 15 kept, padding 16
    assert fit_inside(Size(1, 5000), Size(336, 672), "floor") == Size(1, 672)


def test_padding_is_cut_evenly_so_an_odd_row_stays() -> None:
    assert unpadded_box(8, 4, Size(10, 10), "floor") == Box(2, 0, 4, 4)
    assert unpadded_box(8, 4, Size(13, 10), "floor") == Box(1, 0, 6, 4)  # 5.2 -> 5 kept, padding 1


@pytest.mark.parametrize(("side", "n_rows"), [(4, 0), (5, 1)])
def test_a_line_keeps_nothing_or_the_middle_row(side: int, n_rows: int) -> None:
    assert unpadded_box(side, side, Size(1, 100), "floor") == Box(2, 0, n_rows, side)


def test_merge_by_hand() -> None:
    """Two tiles side by side of 2 x 2 patches each, nothing to unpad, by name: overview o, tiles a and b."""
    plan = plan_picture(Size(28, 56), config(28, pinpoints=(Size(28, 56),)))
    features = np.array([["o0", "o1", "o2", "o3"], ["a0", "a1", "a2", "a3"], ["b0", "b1", "b2", "b3"]])[:, :, None]
    tokens = " ".join(merge(features, plan, np.array(["|"])).ravel())
    assert tokens == "o0 o1 o2 o3 a0 a1 b0 b1 | a2 a3 b2 b3 |"
    flat = plan_picture(Size(28, 56), config(28, pinpoints=(Size(28, 56),), merge="flat"))
    assert " ".join(merge(features, flat).ravel()) == "o0 o1 o2 o3 a0 a1 a2 a3 b0 b1 b2 b3"
    spatial = plan_picture(Size(28, 56), config(28, pinpoints=(Size(28, 56),), merge="spatial"))
    assert " ".join(merge(features, spatial).ravel()) == "o0 o1 o2 o3 a0 a1 b0 b1 a2 a3 b2 b3"


def test_unpadding_by_hand() -> None:
    """A picture half as high as its one tile: of 4 x 4 patches the two middle rows stay."""
    plan = plan_picture(Size(28, 56), config(56, pinpoints=(Size(56, 56),)))
    features = np.arange(32).reshape(2, 16, 1)
    tokens = merge(features, plan, np.array([-1])).ravel()
    assert tokens.tolist() == [*range(16), 20, 21, 22, 23, -1, 24, 25, 26, 27, -1]


def test_tiles_are_cut_row_by_row() -> None:
    rgb = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    tiles = split_tiles(rgb, 2)
    assert len(tiles) == 6
    assert np.array_equal(tiles[1], rgb[0:2, 2:4]) and np.array_equal(tiles[3], rgb[2:4, 0:2])


def test_tiles_by_hand() -> None:
    """A picture of one colour that fills half of its resolution: overview full, tiles half black."""
    rgb = np.full((28, 112, 3), (255, 0, 0), np.uint8)
    settings = config(56, pinpoints=(Size(56, 112),))
    tiles = make_tiles(rgb, plan_picture(Size(28, 112), settings), settings)
    red = normalise(rgb[:1, :1], CLIP_MEAN, CLIP_STD)
    black = normalise(0 * rgb[:1, :1], CLIP_MEAN, CLIP_STD)
    assert tiles.shape == (3, 3, 56, 56)
    assert (tiles[0] == red).all() and (tiles[1:, :, 14:42] == red).all()
    assert (tiles[1:, :, :14] == black).all() and (tiles[1:, :, 42:] == black).all()


# ---- properties


@given(SIZES, st.sampled_from(["flat", "spatial", "spatial_unpad"]), st.sampled_from([28, 42, 56]))
def test_the_plan_knows_tiles_and_tokens(size: Size, kind: str, tile_px: int) -> None:
    settings = config(tile_px, merge=kind)
    plan = plan_picture(size, settings)
    tiles = make_tiles(np.zeros((*size, 3), np.uint8), plan, settings)
    assert tiles.shape == (plan.n_tiles, 3, tile_px, tile_px)
    assert tokens_of(plan) == plan.n_tokens


@given(SIDES, SIDES, st.sampled_from(["pad", "square"]))
def test_one_tile_is_always_one_tile_of_tokens(height: int, width: int, aspect: str) -> None:
    try:
        plan = plan_picture(Size(height, width), config(aspect=aspect))
    except PictureError:
        assert aspect == "square" and max(height, width) > 1000 * min(height, width)
        return
    assert (plan.kind, plan.n_tiles, plan.n_tokens, tokens_of(plan)) == ("1.5", 1, 576, 576)


@given(SIZES, st.sampled_from(["pad", "square"]))
def test_one_tile_has_a_tiles_shape(size: Size, aspect: str) -> None:
    settings = config(28, aspect=aspect)
    rgb = np.zeros((*size, 3), np.uint8)
    assert make_tiles(rgb, plan_picture(size, settings), settings).shape == (1, 3, 28, 28)


@given(SIDES, SIDES)
def test_a_resolution_keeps_the_most_pixels(height: int, width: int) -> None:
    """The chosen resolution holds at least as much of the picture as any other does."""

    def kept(frame: Size) -> int:
        scale = min(frame.width / width, frame.height / height)
        return min(int(width * scale) * int(height * scale), width * height)

    best = select_best_resolution(Size(height, width), PINPOINTS)
    assert kept(best) == max(kept(pinpoint) for pinpoint in PINPOINTS)


@given(SIDES, SIDES, st.sampled_from(PINPOINTS))
def test_the_resized_picture_fills_one_side_of_its_frame(height: int, width: int, frame: Size) -> None:
    fitted = fit_inside(Size(height, width), frame, "ceil")
    assert 1 <= fitted.height <= frame.height and 1 <= fitted.width <= frame.width
    assert fitted.height == frame.height or fitted.width == frame.width


@given(st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]), st.integers(1, 5))
def test_the_map_lies_as_the_tiles_do(grid: tuple[int, int], side: int) -> None:
    """Cutting a map into tiles and laying them out again gives the map."""
    rows, columns = grid
    whole = np.random.default_rng(0).random((rows * side, columns * side, 3))
    tiles = np.stack([tile.reshape(side * side, 3) for tile in split_tiles(whole, side)])  # type: ignore[arg-type]
    plan = plan_picture(Size(1, 1), config(14 * side, pinpoints=(Size(14 * side * rows, 14 * side * columns),)))
    assert np.array_equal(spatial_map(tiles, plan), whole)


@given(SIZES)
def test_unpadding_keeps_every_patch_of_which_the_picture_has_pixels(size: Size) -> None:
    """The map's unpadded rows hold the resized picture, up to the one patch that rounding costs a side."""
    plan = plan_picture(size, config(56))
    box = plan.unpadded
    spans = zip(plan.resolution, plan.resized, (box.top, box.left), (box.height, box.width), strict=True)
    for frame, fitted, first, n_patches in spans:  # vertical, then horizontal
        start = (frame - fitted) // 2
        assert abs(14 * first - start) <= 14
        assert abs(14 * (first + n_patches) - (start + fitted)) <= 14


def test_too_elongated_for_a_square() -> None:
    for aspect in ("pad", "square"):
        with pytest.raises(PictureError, match="too elongated"):
            plan_picture(Size(1, 3_000_000), config(aspect=aspect))
    assert plan_picture(Size(1, 3_000_000), config()).n_tiles == 3
