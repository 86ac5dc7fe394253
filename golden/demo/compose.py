"""Draw scenes on the GPU: a batch of descriptions in, a batch of LLaVA's network inputs out.

`atlas` holds every sprite three times (128, 64 and 32 pixels), premultiplied, one int32 a pixel.  `draw`
paints background, objects and padding on a canvas of any size R, and `shrink` brings the canvas to 168
pixels with the weights of PIL's bicubic filter, rounding to bytes where PIL rounds.
"""

from __future__ import annotations

import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vocabulary import COLOR_NAMES, COLORS, SHAPES, read_nouns

IMAGE_PX, PATCH_PX, GRID = 168, 14, 12
PAD_COLOR = (122.0, 116.0, 104.0)  # int(255 * CLIP mean), what expand2square fills with
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIDES = (128, 64, 32)  # sprite pixels at the three levels
LEVEL_OFFSETS = (0, 128 * 128, 128 * 128 + 64 * 64)
SPRITE_SIZE = 128 * 128 + 64 * 64 + 32 * 32
BACKGROUND_CLASS, PAD_CLASS, UNKNOWN_CLASS, FIRST_NOUN_CLASS = 0, 1, 2, 3


POLYGONS = {
    "square": "-.9 -.9  .9 -.9  .9 .9  -.9 .9",
    "rectangle": "-1 -.5  1 -.5  1 .5  -1 .5",
    "triangle": "0 -.9  1 .85  -1 .85",
    "diamond": "0 -1  .62 0  0 1  -.62 0",
    "cross": "-.33 -1  .33 -1  .33 -.33  1 -.33  1 .33  .33 .33  "
    ".33 1  -.33 1  -.33 .33  -1 .33  -1 -.33  -.33 -.33",
    "arrow": "-1 -.28  .1 -.28  .1 -.75  1 0  .1 .75  .1 .28  -1 .28",
}


def heart_point(t: float) -> tuple[float, float]:
    """The well-known heart curve."""
    return math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16


def shape_polygon(name: str) -> list[tuple[float, float]]:
    """The corners of a plain shape in -1..1, y downwards; curves are fine polygons."""
    if name in POLYGONS:
        numbers = [float(n) for n in POLYGONS[name].split()]
        return list(zip(numbers[::2], numbers[1::2], strict=True))
    turn = [2 * math.pi * i / 120 for i in range(120)]
    if name in ("circle", "oval"):
        return [(math.cos(t), (1 if name == "circle" else 0.55) * math.sin(t)) for t in turn]
    if name == "heart":
        return [heart_point(t) for t in turn]
    corners = {"pentagon": 5, "hexagon": 6, "star": 10}[name]
    radii = [0.4 if name == "star" and i % 2 else 1.0 for i in range(corners)]
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, angles, strict=True)]


def shape_sprite(name: str) -> np.ndarray:
    """One white shape, (128, 128, 4) uint8, drawn four times larger and averaged."""
    from PIL import ImageDraw

    side = SIDES[0] * 4
    mask = Image.new("L", (side, side))
    points = [(side / 2 * (1 + 0.99 * x), side / 2 * (1 + 0.99 * y)) for x, y in shape_polygon(name)]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    alpha = np.asarray(mask.resize((SIDES[0], SIDES[0]), Image.Resampling.BOX))
    return np.dstack([np.full_like(alpha, 255)] * 3 + [alpha])


def load_sprites(path: Path) -> tuple[np.ndarray, list[dict]]:
    """All sprites as straight RGBA (n, 128, 128, 4) uint8, and their facts; the plain shapes come last."""
    data = np.load(path)
    blob, ends = data["blob"].tobytes(), data["ends"].tolist()
    facts = json.loads(data["facts"].tobytes())
    pixels = np.empty((len(facts) + len(SHAPES), SIDES[0], SIDES[0], 4), np.uint8)

    def decode(i: int) -> None:
        with Image.open(io.BytesIO(blob[ends[i - 1] if i else 0 : ends[i]])) as image:
            pixels[i] = np.asarray(image.convert("RGBA"))

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(facts))))
    first = len(read_nouns()) - len(SHAPES)
    for i, name in enumerate(SHAPES):
        points = np.array(shape_polygon(name))
        wide, high = np.ptp(points, axis=0) / 2
        pixels[len(facts)] = shape_sprite(name)
        facts.append({"icon_set": "shapes", "icon": name, "noun": first + i, "role": "train", "tinted": True,
                      "outlined": False, "width": float(wide), "height": float(high)})  # fmt: skip
    return pixels, facts


def contrast_table(pixels: np.ndarray) -> np.ndarray:
    """(n_sprites, 11): the share of each sprite's visible pixels that differ clearly from each colour."""
    small = pixels[:, ::8, ::8].reshape(len(pixels), -1, 4).astype(np.float32)
    visible = small[..., 3] > 128
    shares = []
    for name in COLOR_NAMES:
        distance = np.sqrt(((small[..., :3] - np.array(COLORS[name], np.float32)) ** 2).sum(-1))
        shares.append((visible & (distance > 75)).sum(1) / np.maximum(visible.sum(1), 1))
    return np.stack(shares, 1)


def make_atlas(pixels: np.ndarray, device: str) -> Tensor:
    """(n * SPRITE_SIZE,) int32: premultiplied RGBA at three sizes, packed r | g<<8 | b<<16 | a<<24."""
    parts = []
    for chunk in np.array_split(pixels, max(1, len(pixels) // 1000)):
        full = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2).float()
        alpha = full[:, 3:] / 255
        full = torch.cat([full[:, :3] * alpha, full[:, 3:]], 1)
        levels = [full, torch.nn.functional.avg_pool2d(full, 2), torch.nn.functional.avg_pool2d(full, 4)]
        flat = torch.cat([level.flatten(2) for level in levels], 2).round().to(torch.int32)  # (n, 4, SPRITE_SIZE)
        parts.append(flat[:, 0] | flat[:, 1] << 8 | flat[:, 2] << 16 | flat[:, 3] << 24)
    return torch.cat(parts).flatten()


def fetch(
    atlas: Tensor, start: Tensor, side: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bilinear samples at (u, v) in 0..1 of a sprite whose level starts at `start`; transparent outside."""
    x, y = u * side - 0.5, v * side - 0.5
    left, top = x.floor(), y.floor()
    sums = [torch.zeros_like(x) for _ in range(4)]
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = left + dx, top + dy
            inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
            weight = torch.where(inside, (1 - (x - column).abs()) * (1 - (y - row).abs()), 0.0)
            at = start + (row.clamp(0) * side + column.clamp(0)).long()
            packed = atlas[torch.where(inside, at, start)]
            for channel in range(4):
                sums[channel] = sums[channel] + weight * ((packed >> (8 * channel)) & 255).float()
    return sums[0], sums[1], sums[2], sums[3]


def background(spec: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """(B, 3, R, R) in 0..255: plain, shaded, cloudy, striped, checkered or dotted."""

    def number(name: str) -> Tensor:
        return spec[name][:, None, None]

    cos, sin, frequency = number("bg_angle").cos(), number("bg_angle").sin(), number("bg_frequency")
    along, across = (x - 0.5) * cos + (y - 0.5) * sin, (y - 0.5) * cos - (x - 0.5) * sin
    phase = number("bg_phase")
    clouds = torch.zeros_like(along)
    for i in range(4):
        wave = spec["bg_waves"][:, i, :, None, None]
        clouds = clouds + torch.sin(wave[:, 0] * x + wave[:, 1] * y + wave[:, 2])
    a, b = (torch.sin(6.2832 * frequency * along + phase), torch.sin(6.2832 * frequency * across + phase))
    sharp = 40 / frequency
    stripe, checker = (a * sharp).clamp(-1, 1), (a * b * sharp).clamp(-1, 1)
    dot = ((a + b - 1.1) * sharp).clamp(-1, 1)
    pattern = number("bg_pattern")
    t = torch.zeros_like(along)
    for index, value in enumerate((along * 1.4, clouds / 3, stripe, checker, dot), start=1):
        t = torch.where(pattern == index, value, t)
    t = (0.5 + 0.5 * t).clamp(0, 1)[:, None]
    one, two = spec["bg_color"][:, :, None, None], spec["bg_second"][:, :, None, None]
    return 255 * torch.where((pattern == 0)[:, None], one, one + (two - one) * t)


def local(spec: dict[str, Tensor], k: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Canvas coordinates -> object k's own coordinates, 0..1 over its sprite."""
    matrix, centre = spec["matrix"][:, k], spec["centre"][:, k]
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    u = matrix[:, 0, None, None] * dx + matrix[:, 1, None, None] * dy
    v = matrix[:, 2, None, None] * dx + matrix[:, 3, None, None] * dy
    return u + 0.5, v + 0.5


def add_object(
    canvas: Tensor, atlas: Tensor, start: Tensor, side: Tensor, look: Tensor, u: Tensor, v: Tensor
) -> Tensor:
    """Paint one object of every picture.  look (B, 7): saturation, light (2), lift, tint (3)."""
    red, green, blue, alpha = fetch(atlas, start[:, None, None], side[:, None, None], u, v)
    alpha = (alpha / 255)[:, None]
    rgb = torch.stack([red, green, blue], 1)  # premultiplied
    gray = rgb.mean(1, keepdim=True)
    rgb = gray + (rgb - gray) * look[:, 0, None, None, None]
    shade = 1 + look[:, 1, None, None] * (u - 0.5) + look[:, 2, None, None] * (v - 0.5)
    rgb = rgb * shade[:, None] * look[:, 4:, None, None] + 255 * look[:, 3, None, None, None] * alpha
    return canvas * (1 - alpha) + torch.minimum(rgb.clamp(min=0), alpha * 255)


class Brush:
    """The two drawing steps, compiled once for all canvas sizes where there is a GPU."""

    def __init__(self, compiled: bool) -> None:
        """compiled: through torch.compile."""
        self.background = torch.compile(background, dynamic=True) if compiled else background
        self.add_object = torch.compile(add_object, dynamic=True) if compiled else add_object


def draw(spec: dict[str, Tensor], atlas: Tensor, side_px: int, objects: int, brush: Brush) -> Tensor:
    """Background and objects on a canvas, (B, 3, side_px, side_px) in 0..255, before padding."""
    steps = (torch.arange(side_px, device=atlas.device) + 0.5) / side_px
    x, y = steps[None, None, :].expand(1, side_px, side_px), steps[None, :, None].expand(1, side_px, side_px)
    scenery = {name: value for name, value in spec.items() if name.startswith("bg_")}
    canvas = brush.background(scenery, x, y)
    for k in range(objects):
        drawn_px = spec["size"][:, k] * side_px
        level = (drawn_px < 85).long() + (drawn_px < 42).long()
        offsets = torch.tensor(LEVEL_OFFSETS, device=atlas.device)
        start = spec["sprite"][:, k] * SPRITE_SIZE + offsets[level]
        look = torch.cat(
            [spec["saturation"][:, k, None], spec["light"][:, k], spec["lift"][:, k, None], spec["tint"][:, k]], 1
        )
        u, v = local(spec, k, x, y)
        canvas = brush.add_object(canvas, atlas, start, (128 >> level).float(), look, u, v)
    return canvas


def inside_picture(spec: dict[str, Tensor], side_px: int, device: torch.device) -> Tensor:
    """(B, 1, side_px, side_px) bool: the picture itself, without expand2square's borders; whole pixels."""
    index = torch.arange(side_px, device=device)
    size = (spec["extent"] * side_px).round().clamp(min=1)  # (B, 2) width, height
    start = ((side_px - size) / 2).floor()
    x_in = (index >= start[:, :1]) & (index < start[:, :1] + size[:, :1])
    y_in = (index >= start[:, 1:]) & (index < start[:, 1:] + size[:, 1:])
    return (y_in[:, :, None] & x_in[:, None, :])[:, None]


def bicubic_matrix(source_px: int, target_px: int) -> np.ndarray:
    """(target, source) weights of PIL's antialiased bicubic filter (a = -0.5)."""
    scale = max(source_px / target_px, 1.0)
    centres = (np.arange(target_px) + 0.5) * source_px / target_px
    distance = np.abs(np.arange(source_px)[None, :] + 0.5 - centres[:, None]) / scale
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def shrink(canvas: Tensor, matrix: Tensor | None) -> Tensor:
    """Canvas of bytes -> (B, 3, 168, 168) network input; matrix None if the canvas has 168 pixels already."""
    if matrix is not None:
        canvas = (canvas @ matrix.T).round().clamp(0, 255)
        canvas = (matrix @ canvas).round().clamp(0, 255)
    mean, std = (torch.tensor(v, device=canvas.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (canvas / 255 - mean) / std


def patch_classes(spec: dict[str, Tensor], atlas: Tensor, objects: int) -> Tensor:
    """(B, 144) int64: what covers most of each patch: background, padding, something unknown or a noun."""
    steps = (torch.arange(GRID * 4, device=atlas.device) + 0.5) / (GRID * 4)
    x, y = steps[None, None, :], steps[None, :, None]
    places = [local(spec, k, x, y) for k in range(objects)]
    u, v = torch.stack([p[0] for p in places], 1), torch.stack([p[1] for p in places], 1)  # (B, K, 48, 48)
    start = spec["sprite"][:, :objects, None, None] * SPRITE_SIZE + LEVEL_OFFSETS[2]
    at = start + ((v * 32).long().clamp(0, 31) * 32 + (u * 32).long().clamp(0, 31))
    inside = (u > 0) & (u < 1) & (v > 0) & (v < 1)
    alpha = torch.where(inside, ((atlas[at] >> 24) & 255).float() / 255, 0.0)
    free = (1 - alpha).flip(1).cumprod(1).flip(1)  # what object k and those above it leave free
    free = torch.cat([free[:, 1:], torch.ones_like(free[:, :1])], 1)
    covers = torch.nn.functional.avg_pool2d(alpha * free, 4).flatten(2)  # (B, K, 144)
    most, which = covers.max(1)  # (B, 144)
    classes = torch.where(most > 0.2, spec["class"].gather(1, which), BACKGROUND_CLASS)
    classes = torch.where(spec["photo"][:, None] >= 0, UNKNOWN_CLASS, classes)
    middle = (torch.arange(GRID, device=atlas.device) + 0.5) / GRID - 0.5
    outside_x = middle.abs()[None] > spec["extent"][:, :1] / 2  # (B, 12)
    outside_y = middle.abs()[None] > spec["extent"][:, 1:] / 2
    outside = (outside_y[:, :, None] | outside_x[:, None, :]).flatten(1)
    return torch.where(outside, PAD_CLASS, classes)
