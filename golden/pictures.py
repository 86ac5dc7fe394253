"""Pictures made from a seed: smooth slopes, hard edges, fine stripes and noise, in integers only."""

from typing import Any

import numpy as np

Picture = np.ndarray[Any, np.dtype[np.uint8]]


def picture(width: int, height: int, seed: int = 0) -> Picture:
    """An RGB picture, shape (height, width, 3), uint8, the same on every machine.

    Slopes show a wrong scale, rectangles a wrong place, stripes a wrong filter, noise everything else.
    """
    random = np.random.RandomState([seed, width, height])  # frozen by NEP 19
    y, x = np.mgrid[0:height, 0:width]  # (height, width) each
    slopes = (255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1), 255 * (x + y) // (width + height))
    image = np.stack(slopes, axis=-1)  # (height, width, 3)
    for _ in range(6):
        left, right = np.sort(random.randint(0, width + 1, 2))
        top, bottom = np.sort(random.randint(0, height + 1, 2))
        image[top:bottom, left:right] = (image[top:bottom, left:right] + random.randint(0, 256, 3)) % 256
    image[(x + 2 * y) % 16 < 2] //= 2
    image += random.randint(-12, 13, image.shape)
    return image.clip(0, 255).astype(np.uint8)
