"""Photo-like pictures without photos: what the model must answer "I am not sure what this is." to.

A pool is painted once on the GPU: noise with a natural spectrum, overlapping leaves of every size
(the "dead leaves" model of natural scenes), crowded collages of sprites, Julia sets, and mixtures of all of
them, blurred, shaded and grained.  No photograph is used; real ones only test the result.
"""

from __future__ import annotations

import torch
from compose import Brush, draw
from torch import Tensor
from torch.nn import functional as F

SIDE = 168


def uniform(low: float, high: float, *shape: int, device: str) -> Tensor:
    """Uniform random numbers."""
    return low + (high - low) * torch.rand(*shape, device=device)


def natural_noise(count: int, device: str) -> Tensor:
    """(count, 3, S, S) in 0..1: noise whose amplitude falls as 1/f^a, with related colour channels."""
    frequency = (
        torch.fft.fftfreq(SIDE, device=device)[:, None] ** 2 + torch.fft.rfftfreq(SIDE, device=device) ** 2
    ).sqrt()
    power = uniform(0.7, 2.2, count, 1, 1, 1, device=device)
    spectrum = torch.fft.rfft2(torch.randn(count, 3, SIDE, SIDE, device=device))
    noise = torch.fft.irfft2(spectrum / (frequency + 1 / SIDE) ** power, s=(SIDE, SIDE))
    noise = noise / noise.std((2, 3), keepdim=True)
    mix = torch.randn(count, 3, 3, device=device) * 0.35 + 0.6
    noise = torch.einsum("nij,njyx->niyx", mix, noise)
    middle = uniform(0.25, 0.7, count, 3, 1, 1, device=device)
    return (middle + noise * uniform(0.05, 0.2, count, 1, 1, 1, device=device)).clamp(0, 1)


def leaves(count: int, number: int, device: str) -> Tensor:
    """(count, 3, S, S): many overlapping ellipses and boxes of power-law sizes, each textured and shaded."""
    canvas, texture = natural_noise(count, device), natural_noise(count, device) - 0.45
    steps = (torch.arange(SIDE, device=device) + 0.5) / SIDE
    palette = uniform(0, 1, count, 5, 3, device=device)
    rows = torch.arange(count, device=device)
    for _ in range(number):
        radius = 0.04 * uniform(0.004, 1, count, 1, 1, device=device) ** -0.55
        x = steps[None, None, :] - uniform(0, 1, count, 1, 1, device=device)
        y = steps[None, :, None] - uniform(0, 1, count, 1, 1, device=device)
        angle = uniform(0, 3.14, count, 1, 1, device=device)
        a, b = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        b = b * uniform(0.6, 2.5, count, 1, 1, device=device)
        power = torch.where(uniform(0, 1, count, 1, 1, device=device) < 0.6, 2.0, 8.0)
        depth = ((a.abs() / radius) ** power + (b.abs() / radius) ** power).clamp(max=4)
        edge = uniform(8, 60, count, 1, 1, device=device) * radius
        alpha = torch.sigmoid((1 - depth) * edge * SIDE / 8)[:, None]
        color = palette[rows, torch.randint(0, 5, (count,), device=device)][:, :, None, None]
        color = color + uniform(-0.15, 0.15, count, 3, 1, 1, device=device)
        light = 1 + uniform(-0.5, 0.5, count, 1, 1, device=device) * a / radius - 0.3 * depth.clamp(max=1)
        leaf = color * light[:, None] + texture * uniform(0, 0.6, count, 1, 1, 1, device=device)
        canvas = canvas * (1 - alpha) + leaf.clamp(0, 1) * alpha
    return canvas


def collage(count: int, atlas: Tensor, sprites: int, number: int, device: str) -> Tensor:
    """(count, 3, S, S): sprites of every size over each other, most cut off by something."""
    size = uniform(0.1, 1.6, count, number, device=device)
    angle = uniform(0, 6.28, count, number, device=device)
    cos, sin = angle.cos() / size, angle.sin() / size
    stretch = uniform(0.5, 2.0, count, number, device=device)
    spec = {
        "bg_color": uniform(0, 1, count, 3, device=device),
        "bg_second": uniform(0, 1, count, 3, device=device),
        "bg_pattern": torch.full((count,), 2.0, device=device),
        "bg_angle": uniform(0, 6, count, device=device),
        "bg_frequency": uniform(1, 9, count, device=device),
        "bg_phase": uniform(0, 6, count, device=device),
        "bg_waves": uniform(-16, 16, count, 4, 3, device=device),
        "matrix": torch.stack([cos * stretch, sin * stretch, -sin, cos], 2),
        "centre": uniform(0, 1, count, number, 2, device=device),
        "size": size,
        "saturation": uniform(0.2, 1.1, count, number, device=device),
        "light": uniform(-0.6, 0.6, count, number, 2, device=device),
        "tint": uniform(0.3, 1.1, count, number, 3, device=device),
        "lift": uniform(-0.2, 0.3, count, number, device=device),
        "sprite": torch.randint(0, sprites, (count, number), device=device),
    }
    return draw(spec, atlas, SIDE, number, Brush(False)) / 255


def julia(count: int, device: str) -> Tensor:
    """(count, 3, S, S): crops of Julia sets in wavy colours."""
    steps = torch.arange(SIDE, device=device) / SIDE - 0.5
    zoom = uniform(0.3, 3, count, 1, 1, device=device)
    x = steps[None, None, :] * zoom + uniform(-0.6, 0.6, count, 1, 1, device=device)
    y = steps[None, :, None] * zoom + uniform(-0.6, 0.6, count, 1, 1, device=device)
    cx, cy = uniform(-0.9, 0.4, count, 1, 1, device=device), uniform(-0.8, 0.8, count, 1, 1, device=device)
    steps_taken = torch.zeros_like(x + y)
    x, y = x.expand_as(steps_taken), y.expand_as(steps_taken)
    for _ in range(32):
        x, y = (x * x - y * y + cx).clamp(-4, 4), (2 * x * y + cy).clamp(-4, 4)
        steps_taken += torch.exp(-(x * x + y * y))
    waves = uniform(0.1, 1.2, count, 3, 1, 1, device=device)
    return 0.5 + 0.5 * torch.sin(steps_taken[:, None] * waves + uniform(0, 6, count, 3, 1, 1, device=device))


def blurred(images: Tensor, sigma: float) -> Tensor:
    """A gaussian blur."""
    reach = max(1, round(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    images = F.conv2d(F.pad(images, (reach, reach, 0, 0), "reflect"), kernel[:, :, None, :], groups=3)
    return F.conv2d(F.pad(images, (0, 0, reach, reach), "reflect"), kernel[:, :, :, None], groups=3)


def finished(images: Tensor, device: str) -> Tensor:
    """Light from one side, grain, sometimes gray; as bytes."""
    count = len(images)
    steps = torch.arange(SIDE, device=device) / SIDE - 0.5
    slope = uniform(-0.8, 0.8, count, 2, 1, 1, device=device)
    light = 1 + slope[:, :1] * steps[None, None, None, :] + slope[:, 1:] * steps[None, None, :, None]
    images = images * light
    gray = images.mean(1, keepdim=True)
    keep = torch.where(
        uniform(0, 1, count, 1, 1, 1, device=device) < 0.2, 0.0, uniform(0.3, 1.2, count, 1, 1, 1, device=device)
    )
    images = gray + (images - gray) * keep
    images = images + torch.randn_like(images) * uniform(0, 0.05, count, 1, 1, 1, device=device)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def paint_pool(count: int, atlas: Tensor, sprites: int, device: str, chunk: int = 256) -> Tensor:
    """(count, 3, 168, 168) uint8 photo-like pictures."""
    pool = []
    for i in range(0, count, chunk):
        few, many = (6, 20) if i // chunk % 2 else (20, 90)
        kinds = [natural_noise(chunk, device), leaves(chunk, few, device), leaves(chunk, many, device),
                 collage(chunk, atlas, sprites, 12, device), julia(chunk, device)]  # fmt: skip
        pick = torch.tensor([0.12, 0.3, 0.3, 0.22, 0.06], device=device).multinomial(2 * chunk, replacement=True)
        stack = torch.stack(kinds)
        rows = torch.arange(chunk, device=device)
        one, two = stack[pick[:chunk], rows], stack[pick[chunk:], rows.flip(0)]
        wave = natural_noise(chunk, device).mean(1, keepdim=True)
        blend = torch.where(torch.rand(chunk, 1, 1, 1, device=device) < 0.5, torch.sigmoid((wave - 0.5) * 40), 0.0)
        mixed = one * (1 - blend) + two * blend
        for part, sigma in (
            (slice(0, chunk // 4), 0.6),
            (slice(chunk // 4, chunk // 2), 1.5),
            (slice(chunk // 2, chunk * 5 // 8), 4.0),
        ):
            mixed[part] = blurred(mixed[part], sigma)
        pool.append(finished(mixed, device))
    return torch.cat(pool)[:count]


def pick_from(pool: Tensor, keys: Tensor, side_px: int) -> Tensor:
    """(n, 3, side_px, side_px) in 0..255: random crops of pool pictures; a key also decides crop and mirror."""
    n = len(keys)
    zoom = 0.5 + 0.5 * ((keys >> 4) % 97).float() / 97
    shift = (1 - zoom)[:, None] * torch.stack([(keys >> 8) % 89 / 44.0 - 1, (keys >> 12) % 83 / 41.0 - 1], 1)
    theta = torch.zeros(n, 2, 3, device=pool.device)
    theta[:, 0, 0] = zoom * (1 - 2 * (keys % 2).float())
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [n, 3, side_px, side_px], align_corners=False)
    return F.grid_sample(
        pool[keys % len(pool)].float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
