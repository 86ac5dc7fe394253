"""Which tiles a picture is cut into, and how the tiles' features become its tokens (LLaVA-1.6, "anyres").

    picture --resize--> overview, one square tile                                  \
    picture --resize, pad--> best resolution --cut--> grid of tiles, row by row     > vision tower, projector
                                                                                   /
    overview's tokens, then the grid's map without its padding, each row ending in image_newline

LLaVA-1.5 is the simple case: one tile, the picture padded to a square. Both as the original LLaVA does it;
a profile's choices (profile.py) say otherwise.
Source: llava/mm_utils.py and prepare_inputs_labels_for_multimodal in llava/model/llava_arch.py.

A tile is a square crop of 336 pixels, a patch a square of 14 pixels, a token one embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinyllava.errors import PictureError
from tinyllava.profile import LLAVA, Colour, Overview, Profile, Real, Resample, Rounding
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
ROUND: dict[Rounding, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "floor_of_7_digits": lambda x: math.floor(round(x, 7)),
}
REAL: dict[Real, Callable[[float], Any]] = {"float64": float, "float32": np.float32}


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
    grid: tuple[int, int]  # rows and columns of tiles, without the overview; (0, 0) when it is alone
    n_tiles: int  # all that the vision tower sees, with the overview
    tile_patches: int  # patches along a tile's side
    merge: Literal["single", "flat", "spatial", "spatial_unpad"]  # "single": one tile's tokens as they are
    overview: Overview  # its place among the tokens; among the tiles it is always the first
    unpadded: Box  # what is kept of the grid's map, in patches
    n_tokens: int


# ---- the plan


def plan_picture(size: Size, config: VisionConfig, profile: Profile = LLAVA) -> PicturePlan:
    """The plan for a picture of ``size``. PictureError for one too elongated to pad to a square."""
    if config.aspect != "anyres":
        return _plan_one_tile("1.5", size, _fit_one_tile(size, config, profile), config)
    if config.merge != "spatial_unpad" and profile.tiles_of_flat_files == "overview_only":
        if size.height != size.width:
            return _plan_one_tile("1.5", size, _fit_one_tile(size, config, profile), config)
        return _plan_overview(size, config)
    if max(size) <= config.image_px and profile.small_pictures == "overview_only":
        return _plan_overview(size, config)
    return _plan_tiles(size, config, profile)


def _plan_one_tile(kind: Literal["1.5", "1.6"], size: Size, resized: Size, config: VisionConfig) -> PicturePlan:
    side = config.grid_patches
    return PicturePlan(
        kind=kind,
        size=size,
        resized=resized,
        resolution=Size(config.image_px, config.image_px),
        tile_px=config.image_px,
        grid=(1, 1) if kind == "1.5" else (0, 0),
        n_tiles=1,
        tile_patches=side,
        merge="single",
        overview="first",
        unpadded=Box(0, 0, side, side),
        n_tokens=side * side,
    )


def _plan_overview(size: Size, config: VisionConfig) -> PicturePlan:
    """Only the picture as a whole, stretched to one tile."""
    return _plan_one_tile("1.6", size, Size(config.image_px, config.image_px), config)


def _plan_tiles(size: Size, config: VisionConfig, profile: Profile) -> PicturePlan:
    pinpoints = config.pinpoints
    if profile.pinpoint_order == "height_width":  # config.py read them as (width, height)
        pinpoints = tuple(Size(height=point.width, width=point.height) for point in pinpoints)
    real = REAL[profile.size_precision]
    best = select_best_resolution(size, pinpoints, real)
    rows, columns = best.height // config.image_px, best.width // config.image_px
    side = config.grid_patches
    whole = Box(0, 0, rows * side, columns * side)
    merge = config.merge if profile.merge == "by_file" else profile.merge
    unpad = merge == "spatial_unpad"
    kept = unpadded_box(whole.height, whole.width, size, profile.unpad_rounding) if unpad else whole
    newlines = kept.height if unpad else 0  # one for each row
    return PicturePlan(
        kind="1.6",
        size=size,
        resized=fit_inside(size, best, "ceil", real),
        resolution=best,
        tile_px=config.image_px,
        grid=(rows, columns),
        n_tiles=1 + rows * columns,
        tile_patches=side,
        merge=merge,
        overview=profile.overview,
        unpadded=kept,
        n_tokens=side * side + kept.height * kept.width + newlines,
    )


def one_tile_way(config: VisionConfig, profile: Profile) -> str:
    """What makes one square tile of a picture: one of profile.one_tile's values but "by_file"."""
    if profile.one_tile != "by_file":
        return profile.one_tile
    return "crop" if config.aspect == "square" else "pad_then_resize"


def _fit_one_tile(size: Size, config: VisionConfig, profile: Profile) -> Size:
    """The picture inside its one tile, in pixels: what padding leaves of it, or what cropping starts from."""
    short, long = min(size), max(size)
    way, side = one_tile_way(config, profile), config.image_px
    longest = int(side * long / short)  # rounding of CLIPImageProcessor
    needed = {"pad_then_resize": long * long, "crop": side * longest}.get(way, 0)
    if needed > MAX_SQUARE_PIXELS:
        raise PictureError(f"picture of {size}", "too elongated for a square tile", hint="Crop it first")
    if way == "crop":
        return Size(longest, side) if size.height > size.width else Size(side, longest)
    return fit_inside(size, Size(side, side), "ceil", REAL[profile.size_precision])


def select_best_resolution(size: Size, pinpoints: Sequence[Size], real: Callable[[float], Any] = float) -> Size:
    """The resolution that keeps most of the picture's pixels; of equals, which wastes least; then the first.

    "Keeps" is the picture's area after shrinking it into the resolution, at most its own area: enlarging
    gains nothing. A picture so thin that a side rounds to 0 pixels everywhere is kept nowhere, so it gets
    the smallest resolution. Source: llava/mm_utils.py.
    """
    kept = [_kept_pixels(size, pinpoint, real) for pinpoint in pinpoints]
    wasted = [point.height * point.width - n for point, n in zip(pinpoints, kept, strict=True)]
    # max() takes the first of equals.
    return pinpoints[max(range(len(pinpoints)), key=lambda i: (kept[i], -wasted[i]))]


def _kept_pixels(size: Size, pinpoint: Size, real: Callable[[float], Any]) -> int:
    height, width = real(size.height), real(size.width)
    scale = min(real(pinpoint.width) / width, real(pinpoint.height) / height)
    return min(int(width * scale) * int(height * scale), size.width * size.height)


def fit_inside(size: Size, frame: Size, rounding: Rounding, real: Callable[[float], Any] = float) -> Size:
    """The largest size of the same shape inside ``frame``: it fills one side, the other is rounded, >= 1."""
    scale_w, scale_h = real(frame.width) / real(size.width), real(frame.height) / real(size.height)
    if scale_w < scale_h:
        height = ROUND[rounding](real(size.height) * scale_w)
        return Size(min(max(height, 1), frame.height), frame.width)
    width = ROUND[rounding](real(size.width) * scale_h)
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
    rgb: Pixels, plan: PicturePlan, config: VisionConfig, profile: Profile = LLAVA
) -> npt.NDArray[np.float32]:
    """The picture's tiles, ready for the vision tower: (h, w, 3) -> (n_tiles, 3, tile_px, tile_px)."""
    tiles = cut_tiles(rgb, plan, config, profile)
    return np.stack([normalise(tile, config.mean, config.std) for tile in tiles])


def cut_tiles(rgb: Pixels, plan: PicturePlan, config: VisionConfig, profile: Profile = LLAVA) -> list[Pixels]:
    """The picture's tiles as pixels, the overview first: (h, w, 3) -> n_tiles of (tile_px, tile_px, 3)."""
    if plan.kind == "1.5":
        return [_one_tile(rgb, plan, config, profile)]
    tiles = [resize(rgb, Size(plan.tile_px, plan.tile_px), profile.anyres_resample)]
    if plan.n_tiles > 1:
        whole = resize_and_pad(rgb, plan, profile.anyres_pad_colour, profile.anyres_resample)
        tiles += split_tiles(whole, plan.tile_px)
    return tiles


def _one_tile(rgb: Pixels, plan: PicturePlan, config: VisionConfig, profile: Profile) -> Pixels:
    """LLaVA-1.5's only tile, (tile_px, tile_px, 3): padded and resized, in one order or the other, or cropped.

    The original's CLIPImageProcessor takes an array whose first axis is 1 or 3 for one with colours first,
    and so garbles pictures that are 1 or 3 pixels high when they reach it. Here they are pictures.
    """
    way = one_tile_way(config, profile)
    colour = mean_colour(config.mean) if profile.pad_colour == "mean" else profile.pad_colour
    if way == "pad_then_resize":
        return resize(pad_to_square(rgb, colour, profile.pad_place), plan.resolution, profile.resample)
    resized = resize(rgb, plan.resized, profile.resample)
    if way == "crop":
        return crop_centre(resized, plan.resolution)
    return pad_to(resized, plan.resolution, colour, profile.pad_place)


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
    overview, tiles = features[0], features[1:]  # (n_patches, n_embd), (n_tiles - 1, n_patches, n_embd)
    if plan.merge in ("spatial", "spatial_unpad"):
        tiles = spatial_map(tiles, plan)  # (rows * side, columns * side, n_embd)
    if plan.merge == "spatial_unpad":
        assert newline is not None, "config.py refuses such files"
        tiles = unpad(tiles, plan.unpadded)  # (kept height, kept width, n_embd)
        ends = np.broadcast_to(newline, (tiles.shape[0], 1, n_embd))
        tiles = np.concatenate([tiles, ends], axis=1)  # (kept height, kept width + 1, n_embd)
    tokens = [overview, tiles.reshape(-1, n_embd)]
    return np.concatenate(tokens if plan.overview == "first" else tokens[::-1])  # (n_tokens, n_embd)


def spatial_map(tiles: Floats, plan: PicturePlan) -> Floats:
    """Tiles laid out as in the picture: (n_tiles - 1, n_patches, n) -> (rows * side, columns * side, n)."""
    rows, columns = plan.grid
    side = plan.tile_patches
    grid = tiles.reshape(rows, columns, side, side, -1)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, -1)


def unpad(grid: Floats, box: Box) -> Floats:
    """The part of a map (height, width, n) that lies in the box."""
    return grid[box.top : box.top + box.height, box.left : box.left + box.width]
