"""Matrices to quantize, rebuilt from a seed: shapes of distributions that weights have, and some they have not."""

from collections.abc import Callable
from typing import Any

import numpy as np

Matrix = np.ndarray[Any, np.dtype[np.float32]]
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
SHAPE = (64, 1024)


def _sample(seed: int, draw: Callable[[np.random.Generator], Any]) -> Callable[[], Matrix]:
    # PCG64 gives the same uniform numbers in every NumPy; normal ones it does not promise.
    return lambda: np.asarray(draw(np.random.Generator(np.random.PCG64(seed))), np.float32)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> Any:
    return rng.random(shape)


def _bell(rng: np.random.Generator) -> Any:
    """Nearly normal, of standard deviation 1: a sum of 12 uniform numbers."""
    return sum(_uniform(rng) for _ in range(12)) - 6


SAMPLES: dict[str, Callable[[], Matrix]] = {
    "bell": _sample(1, lambda rng: 0.02 * _bell(rng)),
    "uniform": _sample(2, lambda rng: 2 * _uniform(rng) - 1),
    "positive": _sample(3, _uniform),
    "negative": _sample(4, lambda rng: -_uniform(rng)),
    "heavy tails": _sample(5, lambda rng: _bell(rng) / (0.05 + _uniform(rng))),
    "sparse": _sample(6, lambda rng: _bell(rng) * (_uniform(rng) < 0.1)),
    "rows of all sizes": _sample(7, lambda rng: _bell(rng) * 2.0 ** -(16 * _uniform(rng, (64, 1)))),
    "columns of all sizes": _sample(8, lambda rng: _bell(rng) * 2.0 ** -(6 * _uniform(rng, (1, 1024)))),
    "far from zero": _sample(9, lambda rng: 3 + 0.1 * _bell(rng)),
    "one outlier a row": _sample(10, lambda rng: 0.02 * _bell(rng) + 2 * (np.arange(1024) == 77)),
    "few levels": _sample(11, lambda rng: np.floor(7 * _uniform(rng)) - 3),
}
