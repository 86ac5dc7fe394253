"""Which tiles a picture is cut into, and how the tiles' features become its tokens (LLaVA-1.6, "anyres").

    picture --resize--> overview, one square tile                                  \
    picture --resize, pad--> best resolution --cut--> grid of tiles, row by row     > vision tower, projector
                                                                                   /
    overview's tokens, then the grid's map without its padding, each row ending in image_newline

LLaVA-1.5 is the simple case: one tile, the picture padded to a square.
Source: llava/mm_utils.py and prepare_inputs_labels_for_multimodal in llava/model/llava_arch.py.

A tile is a square crop of 336 pixels, a patch a square of 14 pixels, a token one embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinyllava.errors import PictureError
from tinyllava.profile import PROFILES, Colour, Profile, Resample, Rounding
from tinyllava.vision.config import VisionConfig
from tinyllava.vision.image import (
    MAX_PIXELS,
    Pixels,
    Size,
    crop_centre,
    mean_colour,
    normalise,
    pad_to,
    pad_to_square,
    resize,
    size_of,
)

Floats = npt.NDArray[Any]
MAX_SQUARE_PIXELS = 2 * MAX_PIXELS  # of a picture grown to a square: a side of 20000
ROUND = {"floor": math.floor, "ceil": math.ceil}


@dataclass(frozen=True)
class Box:
    """The part of a map that lies in rows top..top+height, columns left..left+width."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class PicturePlan:
    """What will be done with one picture. Computed from sizes alone, before any pixel is touched."""

    kind: Literal["1.5", "1.6"]
    size: Size  # the picture, pixels
    resized: Size  # the picture after its resize, pixels, without padding
    resolution: Size  # what the tiles are cut from, pixels
    tile_px: int
    grid: tuple[int, int]  # rows and columns of tiles, without the overview
    n_tiles: int  # all that the vision tower sees, with the overview
    tile_patches: int  # patches along a tile's side
    merge: Literal["single", "flat", "spatial", "spatial_unpad"]  # "single": one tile's tokens as they are
    unpadded: Box  # what is kept of the grid's map, in patches
    n_tokens: int


# ---- the plan


def plan_picture(size: Size, config: VisionConfig, profile: Profile = PROFILES["llava"]) -> PicturePlan:
    """The plan for a picture of ``size``. PictureError for one too elongated to pad to a square."""
    if config.aspect == "anyres":
        return _plan_tiles(size, config, profile)
    tile = Size(config.image_px, config.image_px)
    side = config.grid_patches
    return PicturePlan(
        kind="1.5",
        size=size,
        resized=_fit_one_tile(size, config),
        resolution=tile,
        tile_px=config.image_px,
        grid=(1, 1),
        n_tiles=1,
        tile_patches=side,
        merge="single",
        unpadded=Box(0, 0, side, side),
        n_tokens=side * side,
    )


def _plan_tiles(size: Size, config: VisionConfig, profile: Profile) -> PicturePlan:
    best = select_best_resolution(size, config.pinpoints)
    rows, columns = best.height // config.image_px, best.width // config.image_px
    side = config.grid_patches
    whole = Box(0, 0, rows * side, columns * side)
    unpad = config.merge == "spatial_unpad"
    kept = unpadded_box(whole.height, whole.width, size, profile.unpad_rounding) if unpad else whole
    newlines = kept.height if unpad else 0  # one for each row
    return PicturePlan(
        kind="1.6",
        size=size,
        resized=fit_inside(size, best, profile.fit_rounding),
        resolution=best,
        tile_px=config.image_px,
        grid=(rows, columns),
        n_tiles=1 + rows * columns,
        tile_patches=side,
        merge=config.merge,
        unpadded=kept,
        n_tokens=side * side + kept.height * kept.width + newlines,
    )


def _fit_one_tile(size: Size, config: VisionConfig) -> Size:
    """The picture inside its one tile, in pixels: what padding leaves of it, or what cropping starts from."""
    short, long = min(size), max(size)
    shortest_edge = config.image_px
    longest = int(shortest_edge * long / short)  # rounding of CLIPImageProcessor
    needed = long * long if config.aspect == "pad" else shortest_edge * longest
    if needed > MAX_SQUARE_PIXELS:
        raise PictureError(f"picture of {size}", "too elongated for a square tile", hint="Crop it first")
    if config.aspect == "pad":
        return fit_inside(size, Size(shortest_edge, shortest_edge), "ceil")
    return Size(longest, shortest_edge) if size.height > size.width else Size(shortest_edge, longest)


def select_best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The resolution that keeps most of the picture's pixels; of equals, which wastes least; then the first.

    "Keeps" is the picture's area after shrinking it into the resolution, at most its own area: enlarging
    gains nothing. A picture so thin that a side rounds to 0 pixels everywhere is kept nowhere, so it gets
    the smallest resolution. Source: llava/mm_utils.py.
    """
    kept = [_kept_pixels(size, pinpoint) for pinpoint in pinpoints]
    wasted = [point.height * point.width - n for point, n in zip(pinpoints, kept, strict=True)]
    # max() takes the first of equals.
    return pinpoints[max(range(len(pinpoints)), key=lambda i: (kept[i], -wasted[i]))]


def _kept_pixels(size: Size, pinpoint: Size) -> int:
    scale = min(pinpoint.width / size.width, pinpoint.height / size.height)
    shrunk = int(size.width * scale) * int(size.height * scale)
    return min(shrunk, size.width * size.height)


def fit_inside(size: Size, frame: Size, rounding: Rounding) -> Size:
    """The largest size of the same shape inside ``frame``: it fills one side, the other is rounded, >= 1."""
    scale_w, scale_h = frame.width / size.width, frame.height / size.height
    if scale_w < scale_h:
        height = ROUND[rounding](size.height * scale_w)
        return Size(min(max(height, 1), frame.height), frame.width)
    width = ROUND[rounding](size.width * scale_h)
    return Size(frame.height, min(max(width, 1), frame.width))


def unpadded_box(height: int, width: int, size: Size, rounding: Rounding) -> Box:
    """What remains of a map of ``height`` x ``width`` patches when the padding around the picture goes.

    Padding is the same on both sides, so an odd patch of it stays. A picture so thin that it rounds to no
    patch leaves an empty box if the map's side is even, and one row or column if it is odd: the original's
    arithmetic, which works there. Source: unpad_image.
    """
    if size.width / size.height > width / height:
        kept = ROUND[rounding](size.height * (width / size.width))
        padding = (height - kept) // 2
        return Box(padding, 0, height - 2 * padding, width)
    kept = ROUND[rounding](size.width * (height / size.height))
    padding = (width - kept) // 2
    return Box(0, padding, height, width - 2 * padding)


# ---- pixels


def make_tiles(
    rgb: Pixels, plan: PicturePlan, config: VisionConfig, profile: Profile = PROFILES["llava"]
) -> npt.NDArray[np.float32]:
    """The picture's tiles, ready for the vision tower: (h, w, 3) -> (n_tiles, 3, tile_px, tile_px)."""
    if plan.kind == "1.6":
        whole = resize_and_pad(rgb, plan, profile.anyres_pad_colour, profile.resample)
        tile = Size(plan.tile_px, plan.tile_px)
        tiles = [resize(rgb, tile, profile.resample), *split_tiles(whole, plan.tile_px)]
    else:
        tiles = [_one_tile(rgb, plan, config, profile)]
    return np.stack([normalise(tile, config.mean, config.std) for tile in tiles])


def _one_tile(rgb: Pixels, plan: PicturePlan, config: VisionConfig, profile: Profile) -> Pixels:
    """LLaVA-1.5's only tile, (tile_px, tile_px, 3): padded and resized, or resized and cropped.

    The original's CLIPImageProcessor takes an array whose first axis is 1 or 3 for one with colours first,
    and so garbles pictures that are 1 or 3 pixels high when they reach it. Here they are pictures.
    """
    if config.aspect == "square":
        return crop_centre(resize(rgb, plan.resized, profile.resample), plan.resolution)
    colour = mean_colour(config.mean) if profile.pad_colour == "mean" else profile.pad_colour
    return resize(pad_to_square(rgb, colour), plan.resolution, profile.resample)


def resize_and_pad(rgb: Pixels, plan: PicturePlan, colour: Colour, resample: Resample) -> Pixels:
    """The picture in the middle of its best resolution: (h, w, 3) -> (*plan.resolution, 3)."""
    return pad_to(resize(rgb, plan.resized, resample), plan.resolution, colour)


def split_tiles(rgb: Pixels, tile_px: int) -> list[Pixels]:
    """Cut into square tiles, row by row: (rows * px, columns * px, 3) -> rows * columns of (px, px, 3)."""
    height, width = size_of(rgb)
    return [
        rgb[top : top + tile_px, left : left + tile_px]
        for top in range(0, height, tile_px)
        for left in range(0, width, tile_px)
    ]


# ---- features


def merge(features: Floats, plan: PicturePlan, newline: Floats | None = None) -> Floats:
    """The tokens of a picture: features (n_tiles, n_patches, n_embd) -> (n_tokens, n_embd).

    ``newline`` (n_embd,) ends each row of the map; only merge "spatial_unpad" has it.
    """
    n_embd = features.shape[-1]
    if plan.merge in ("single", "flat"):
        return features.reshape(-1, n_embd)  # (n_tiles * n_patches, n_embd)
    overview, tiles = features[0], features[1:]
    grid = spatial_map(tiles, plan)  # (rows * side, columns * side, n_embd)
    if plan.merge == "spatial_unpad":
        assert newline is not None, "config.py refuses such files"
        grid = unpad(grid, plan.unpadded)  # (kept height, kept width, n_embd)
        ends = np.broadcast_to(newline, (grid.shape[0], 1, n_embd))
        grid = np.concatenate([grid, ends], axis=1)  # (kept height, kept width + 1, n_embd)
    return np.concatenate([overview, grid.reshape(-1, n_embd)])  # (n_tokens, n_embd)


def spatial_map(tiles: Floats, plan: PicturePlan) -> Floats:
    """Tiles laid out as in the picture: (n_tiles - 1, n_patches, n) -> (rows * side, columns * side, n)."""
    rows, columns = plan.grid
    side = plan.tile_patches
    grid = tiles.reshape(rows, columns, side, side, -1)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, -1)


def unpad(grid: Floats, box: Box) -> Floats:
    """The part of a map (height, width, n) that lies in the box."""
    return grid[box.top : box.top + box.height, box.left : box.left + box.width]
