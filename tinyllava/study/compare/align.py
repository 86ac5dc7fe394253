"""Before two programs' arrays of one activation can be compared: the same layout, the same rows, the same part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyllava.study import tap_names
from tinyllava.study.compare.dumps import Dump, Value
from tinyllava.tap import Array


@dataclass(frozen=True)
class Seen:
    """The values of an activation that a dump has. ``where``: their indices along each axis, or None for all."""

    values: Array
    shape: tuple[int, ...]  # of all of it
    where: tuple[Array, ...] | None = None


def align(name: str, a: Dump, b: Dump) -> tuple[Seen, Seen]:
    """Both dumps' activation ``name`` in our layout, cut to what both have. Shapes that still differ stay so."""
    x, y = _squeeze(_load(a.values[name])), _squeeze(_load(b.values[name]))
    entry = tap_names.entry(name)
    if entry is not None:
        x, y = _our_layout(x, a, b, entry, y.shape), _our_layout(y, b, a, entry, x.shape)
        x, y = _overview_alone(x, y, a, entry), _overview_alone(y, x, b, entry)
        x, y = _same_rows(x, y, a, b, entry)
    if x.where is None and y.where is None and x.shape != y.shape and _splits(x.shape, y.shape):
        y = Seen(y.values.reshape(x.shape), x.shape)  # heads side by side, or apart
    return _same_part(x, y)


def _load(value: Value) -> Seen:
    values = value.load()
    return Seen(values, value.shape if value.seen is not None else values.shape, value.seen)


def _squeeze(x: Seen) -> Seen:
    """Without leading axes of length 1: a batch of one, one tile, one token."""
    while len(x.shape) > 1 and x.shape[0] == 1:
        x = Seen(x.values[0], x.shape[1:], None if x.where is None else x.where[1:])
    return x


# ---- layout


def _our_layout(x: Seen, own: Dump, other: Dump, entry: tap_names.Entry, shape: tuple[int, ...]) -> Seen:
    """transformers' array as ours; others are so already. ``shape``: the other side's, which shows the heads."""
    if own.program == "llama.cpp" and other.is_trace and entry.stage in ("vit", "mm"):
        return _overview_first(x, other)
    if own.program != "transformers" or other.program == "transformers" or x.where is not None:
        return x
    values = x.values
    if entry.order == "channels_first" and values.ndim >= 3:
        values = values.reshape(*values.shape[:-2], -1).swapaxes(-1, -2)  # (..., patches, features)
    if entry.order == "turned" and _rope_kind(other) == "norm" and len(shape) == 3:
        values = pairs_from_halves(values, n_head=shape[1])
    return Seen(values, values.shape)


def _overview_first(x: Seen, trace: Dump) -> Seen:
    """llama-mtmd-cli encodes a picture's overview after its tiles; our taps see it before them."""
    order: list[int] = []
    for picture in trace.settings.get("pictures", []):
        start, n = len(order), picture["n_tiles"]
        order += [start + n - 1, *range(start, start + n - 1)]
    if len(order) < 2 or x.shape[0] != len(order) or (x.where is not None and len(x.where[0]) != len(order)):
        return x
    return Seen(x.values[order], x.shape, x.where)


def _overview_alone(x: Seen, other: Seen, own: Dump, entry: tap_names.Entry) -> Seen:
    """Of a picture's tokens the overview's, where MTMD_DEBUG_EMBEDDINGS kept only what was encoded last."""
    pictures = own.settings.get("pictures", [])
    if entry.name != "image_tokens" or x.shape == other.shape or len(pictures) != 1:
        return x
    n = pictures[0]["tile_patches"] ** 2
    if other.shape[0] != n:
        return x
    rows = slice(-n, None) if pictures[0].get("overview") == "last" else slice(n)
    return Seen(x.values[rows], (n, *x.shape[1:]))


def _rope_kind(dump: Dump) -> str:
    """Which features RoPE pairs: what the trace says; LLaVA's language models are "llama", so neighbours."""
    return str(dump.settings.get("llm", {}).get("rope_kind", "norm"))


def pairs_from_halves(x: Array, n_head: int) -> Array:
    """q or k of a checkpoint (n, n_head * head_dim) with each head's features in the order of GGUF.

    Feature j of the checkpoint rotates with j + head_dim / 2; in GGUF the two are neighbours.
    """
    heads = x.reshape(len(x), n_head, 2, -1)  # (n, n_head, half, pair)
    return heads.swapaxes(2, 3).reshape(len(x), n_head, -1)  # (n, n_head, head_dim)


def _splits(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one shape only splits the other's last axis: (n, n_head, head_dim) and (n, n_head * head_dim)."""
    shorter, longer = sorted((a, b), key=len)
    kept = len(shorter) - 1
    return shorter[:kept] == longer[:kept] and np.prod(a, dtype=np.int64) == np.prod(b, dtype=np.int64)


# ---- rows


def _same_rows(x: Seen, y: Seen, a: Dump, b: Dump, entry: tap_names.Entry) -> tuple[Seen, Seen]:
    """The positions that both have.

    The answer's rows go where the other side read the prompt alone, or another answer to it. A single row is that
    of the last position: llama.cpp computes no others where only the next token is asked for. Columns of
    attention beyond the shorter side's are llama.cpp's unused cache.
    """
    if entry.stage != "llm":
        return x, y
    axis = entry.shape.index("n")
    if x.shape != y.shape and a.settings.get("prompt_tokens") != b.settings.get("prompt_tokens"):
        x, y = _prompt_rows(x, a, axis, entry), _prompt_rows(y, b, axis, entry)
    elif a.is_trace and b.is_trace and len(x.shape) == len(y.shape):
        n = min(x.shape[axis], y.shape[axis])
        x, y = _take(x, axis, slice(n)), _take(y, axis, slice(n))
    if "m" in entry.shape and len(x.shape) == len(y.shape):
        m = min(x.shape[-1], y.shape[-1])
        x, y = _take(x, -1, slice(m)), _take(y, -1, slice(m))
    x, y = _squeeze(x), _squeeze(y)
    if a.is_trace and b.is_trace:
        return x, y
    if axis == 0 and x.where is None and x.shape[1:] == y.shape and x.shape != y.shape:
        x = Seen(x.values[-1], y.shape)
    if axis == 0 and y.where is None and y.shape[1:] == x.shape and x.shape != y.shape:
        y = Seen(y.values[-1], x.shape)
    return x, y


def _prompt_rows(x: Seen, dump: Dump, axis: int, entry: tap_names.Entry) -> Seen:
    n = dump.settings.get("prompt_tokens")
    if n is None or len(x.shape) != len(entry.shape):
        return x
    return _take(x, axis, slice(1 if entry.name == "llm.result_output" else int(n)))


def _take(x: Seen, axis: int, part: slice) -> Seen:
    """The first so many along one axis."""
    axis %= len(x.shape)
    n = len(range(x.shape[axis])[part])
    if n == x.shape[axis]:
        return x
    shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
    index: list[Any] = [slice(None)] * len(x.shape)
    if x.where is None:
        index[axis] = part
        return Seen(x.values[tuple(index)], shape)
    keep = x.where[axis] < n
    index[axis] = keep
    where = (*x.where[:axis], x.where[axis][keep], *x.where[axis + 1 :])
    return Seen(x.values[tuple(index)], shape, where)


def _same_part(x: Seen, y: Seen) -> tuple[Seen, Seen]:
    """Where one side has only corners, the other's corners."""
    if x.shape != y.shape:
        return x, y
    if y.where is not None and x.where is None:
        x = replace(x, values=x.values[np.ix_(*y.where)])
    elif x.where is not None and y.where is None:
        y = replace(y, values=y.values[np.ix_(*x.where)])
    return x, y
