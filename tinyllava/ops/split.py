"""Two backends that share one language model: its last blocks on a device, and all else on the host.

    ops = split(host, device, n_layer=32, n_device=20)
    ops.layer(11) is host and ops.layer(12) is device
    ops.rms_norm(...)                                  # outside the blocks: the host's
    x = ops.to_layer(12, x)                            # copied to the device, if it is not there

Counted as in llama.cpp (llama-model.cpp, load_tensors): the blocks from the last, and when all of them are there,
the output head as one more. If the device computes the head, it computes all else, too: then it is not shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from tinyllava.ops import Array, Ops


def split(host: Ops, device: Ops, *, n_layer: int, n_device: int) -> Ops:
    """The backend of a model of ``n_layer`` blocks, the last ``n_device`` of them on ``device``.

    0 or less is the host itself; more than ``n_layer``, with the head, the device itself.
    """
    if n_device <= 0:
        return host
    if n_device > n_layer:
        return device
    return cast("Ops", Split(host, device, n_layer - n_device))  # its other operations: __getattr__


def hand_over(giver: Ops, taker: Ops, x: Array) -> Array:
    """An array of one backend as the other's, by way of NumPy; the same array if the two are one."""
    return x if giver is taker else taker.array(giver.numpy(x))


class Split:
    """The host's operations, but for the blocks from ``first`` on the device's."""

    def __init__(self, host: Ops, device: Ops, first: int) -> None:
        self.host = host
        self.device = device
        self.first = first
        self.name = f"{host.name}+{device.name}"

    def layer(self, i: int) -> Ops:
        """The backend of block ``i``."""
        return self.device if i >= self.first else self.host

    def to_layer(self, i: int | None, x: Array) -> Array:
        """An array of either backend as one of block ``i``'s backend, or of the host's if ``i`` is None."""
        giver = self.host if type(x) is np.ndarray else self.device
        return hand_over(giver, self.host if i is None else self.layer(i), x)

    def numpy(self, values: Array) -> Array:
        """An array of either backend in NumPy, so that a tap need not know whose it is."""
        return values if type(values) is np.ndarray else self.device.numpy(values)

    def capture(self, step: Callable[[Any], Array]) -> Callable[[Any], Array]:
        """``step`` as it is: a backend can capture its own operations only, not the other's."""
        return step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)
