"""What llama.cpp prints of a graph: llama-eval-callback, and llama-mtmd-cli with MTMD_DEBUG_GRAPH set.

    common_debug_cb_eval:      Qcur-0 = (f32)  ROPE(Qcur-0{96, 8, 11, 1}, inp_pos{11, 1, 1, 1}}) = {96, 8, 11, 1}
        [
            [
                [     -0.4558,       0.2088,      -0.9536,    ...,      -0.3864,      -1.4120,      -1.9931  ],
                ...,
        sum = 49.833206

Of each axis longer than six, the first and the last three are printed, with four decimals, and then the sum of
all. So a comparison sees the corners of a tensor, and through the sum a little of the rest. Axes run from the
fastest-varying one to the slowest. (common/debug.cpp of 0c1e57098; programs of 2023 to 2025 say ggml_debug.)

The programs may end before their log is written: a tensor without its sum is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from tinyllava.tap import Array

ROUNDING = 5e-5  # the largest error of a number with four decimals
EDGE = 3  # numbers printed at each end of an axis
_SHAPE = r"\{(\d+), (\d+), (\d+), (\d+)\}"
HEADER = re.compile(r"^\w+_(?:debug|eval): +(.*?) = \((\w+)\) +(\w+)\((.*)\) = " + _SHAPE + r"\s*$")
_SECOND_SOURCE = re.compile(_SHAPE.replace("(\\d+)", "\\d+") + r", (.*?)\{")
_NUMBER = re.compile(r"-?(?:\d+\.\d+|inf|nan)")
_SUM = re.compile(r"^\s*sum = (\S+)\s*$")


@dataclass(frozen=True)
class Printed:
    """A tensor as printed: the shape of all of it, and the corners."""

    name: str
    operation: str
    source: str  # the second operand's name, or ""
    shape: tuple[int, ...]  # NumPy's order, leading axes of length 1 removed
    corners: Array  # float64, at most six along each axis
    total: float  # the sum of all elements, as llama.cpp added them up in float32


def looks_like_callback(head: bytes) -> bool:
    """Whether the beginning of a file has a tensor's header in it."""
    return any(HEADER.match(line) for line in head.decode("utf-8", "replace").splitlines())


def read_callback(lines: Iterator[str]) -> Iterator[Printed]:
    """The tensors of a log, one after the other; lines of other kinds are passed over."""
    header: re.Match[str] | None = None
    numbers: list[float] = []
    for line in lines:
        start = HEADER.match(line)
        if start:
            header, numbers = start, []
        elif header is not None:
            end = _SUM.match(line)
            if end is None:
                numbers += [float(word) for word in _NUMBER.findall(line)]
                continue
            printed = _printed(header, numbers, end[1])
            header = None
            if printed is not None:
                yield printed


def edges(length: int) -> Array:
    """The indices that are printed of an axis: all, or the first and the last three."""
    every = np.arange(length)
    return every if length <= 2 * EDGE else np.concatenate([every[:EDGE], every[-EDGE:]])


def _printed(header: re.Match[str], numbers: list[float], total: str) -> Printed | None:
    """None if numbers are missing (an old program that prints one batch's sum a time, or a broken line)."""
    shape = tuple(int(n) for n in header.groups()[4:])[::-1]
    seen = tuple(len(edges(n)) for n in shape)
    if len(numbers) != prod(seen):
        return None
    while len(shape) > 1 and shape[0] == 1:
        shape, seen = shape[1:], seen[1:]
    source = _SECOND_SOURCE.search(header[4])
    try:
        number = float(total)
    except ValueError:
        return None
    corners = np.array(numbers, np.float64).reshape(seen)
    return Printed(header[1], header[3].strip(), source[1] if source else "", shape, corners, number)
