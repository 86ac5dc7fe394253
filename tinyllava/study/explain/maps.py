"""Attention over a picture: which token stands for which patch, and maps small enough to embed in a page.

A picture's tokens are its patches, but for LLaVA-1.6 not in the order of the picture: an overview, then the tiles'
map without its padding, each row ending in a token that is no patch. Where each token came from is not computed
here a second time: anyres.merge() is asked, with features that say their own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.vision.anyres import PicturePlan, merge

Floats = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
NOWHERE = -1  # in a panel: no token sees this patch (padding that was cut away)
MAX_BYTES = 1_250_000  # of all maps together; base64 makes a third more of it
SEGMENTS = ("the first token", "text before the picture", "the picture", "text after it", "the answer so far")
SEGMENTS_OF_SEVERAL = (SEGMENTS[0], "text before them", "the pictures", "text between and after", SEGMENTS[4])
FIRST, BEFORE, PICTURE, AFTER, ANSWER = range(5)


@dataclass(frozen=True)
class Panel:
    """A view of the picture that the model has: ``tokens`` (rows, columns) says which token is which patch."""

    title: str
    tiles: tuple[tuple[int, ...], ...]  # the tiles' numbers, laid out as they lie in the picture
    tokens: Ints
    picture: int = 0  # of several: which

    @property
    def tile_patches(self) -> int:
        """Patches along a tile's side."""
        return len(self.tokens) // len(self.tiles)


def make_panels(plan: PicturePlan) -> list[Panel]:
    """The views of a picture: one for LLaVA-1.5; the overview and the map of tiles for LLaVA-1.6."""
    side, (rows, columns) = plan.tile_patches, plan.grid
    by_tile = token_of_patch(plan)  # (n_tiles, side, side)
    n_grid = rows * columns
    first = plan.n_tiles - n_grid  # the tiles before the grid: the overview, if there is one
    numbers = np.arange(first, plan.n_tiles).reshape(rows, columns)
    grid = by_tile[numbers].transpose(0, 2, 1, 3).reshape(rows * side, columns * side)  # (rows * side, ...)
    whole = Panel("The picture" if first == 0 else "The tiles", tuple(map(tuple, numbers.tolist())), grid)
    if first == 0:
        return [whole]
    overview = Panel("The overview", ((0,),), by_tile[0])
    return [overview, whole] if n_grid else [overview]


def panels_of_all(plans: Sequence[PicturePlan]) -> list[Panel]:
    """The views of all pictures of a prompt; tiles and tokens are counted through."""
    if len(plans) == 1:
        return make_panels(plans[0])
    panels, n_tiles, n_tokens = [], 0, 0
    for i, plan in enumerate(plans):
        for panel in make_panels(plan):
            title = f"Picture {i + 1}" if plan.n_tiles == 1 else f"Picture {i + 1}, {panel.title.lower()}"
            tiles = tuple(tuple(number + n_tiles for number in row) for row in panel.tiles)
            tokens = np.where(panel.tokens == NOWHERE, NOWHERE, panel.tokens + n_tokens)
            panels.append(replace(panel, title=title, tiles=tiles, tokens=tokens, picture=i))
        n_tiles, n_tokens = n_tiles + plan.n_tiles, n_tokens + plan.n_tokens
    return panels


def token_of_patch(plan: PicturePlan) -> Ints:
    """(n_tiles, side, side): the picture's token that each patch became, NOWHERE for one that was cut away."""
    side = plan.tile_patches
    n_patches = plan.n_tiles * side * side
    own_place = np.arange(n_patches).reshape(plan.n_tiles, side * side, 1)  # one "feature": the patch's number
    origin = merge(own_place, plan, np.array([NOWHERE]))[:, 0]  # (n_tokens,): the patch of each token
    tokens = np.full(n_patches, NOWHERE)
    is_patch = origin != NOWHERE
    tokens[origin[is_patch]] = np.flatnonzero(is_patch)
    return tokens.reshape(plan.n_tiles, side, side)


@dataclass(frozen=True)
class Keep:
    """Which maps a report has room for: the mean over everything always, and single layers and heads."""

    layers: tuple[int, ...]
    heads: int  # 0: only their mean
    note: str = ""  # what was left out, for people


def choose_maps(n_layer: int, n_head: int, n_patches: int, n_steps: int, room: int = MAX_BYTES) -> Keep:
    """All layers and heads if ``room`` bytes hold them, a byte a patch; else heads averaged, else fewer layers."""
    each = max(1, n_patches * n_steps)
    if (1 + n_layer) * (1 + n_head) * each <= room:
        return Keep(tuple(range(n_layer)), n_head)
    n_kept = min(n_layer, max(0, room // each - 1))
    layers = sorted({round(i) for i in np.linspace(n_layer - 1, 0, n_kept)}) if n_kept else []
    left_out = f"the {n_head} heads of each layer are averaged"
    if n_kept < n_layer:
        left_out += f", and {n_kept} of {n_layer} layers are kept; the mean is over all of them"
    return Keep(tuple(layers), 0, f"To keep this page small, {left_out}.")


@dataclass
class MapKeeper:
    """Collects the attention of the tokens being made: ``add`` once a layer, ``finish`` once a token."""

    n_layer: int
    columns: Ints  # where the pictures' tokens stand in the context, in their order
    n_prompt: int
    keep: Keep
    maps: list[Floats] = field(default_factory=list)  # of each token (1 + layers kept, 1 + heads kept, n_tokens)
    shares: list[Floats] = field(default_factory=list)  # the same, with SEGMENTS instead of tokens
    _layers: dict[int, Floats] = field(default_factory=dict)
    _sum: Floats | float = 0.0

    def add(self, layer: int, weights: Floats) -> None:
        """One layer's attention of the newest position: (n_head, m), each row summing to 1."""
        mean = weights.mean(axis=0, keepdims=True)  # (1, m)
        wanted = np.concatenate([mean, weights]) if self.keep.heads else mean  # (1 + heads, m)
        self._sum = self._sum + wanted
        if layer in self.keep.layers:
            self._layers[layer] = wanted

    def finish(self) -> None:
        """All layers of a token are there: keep their maps, the mean of all layers first."""
        mean = np.asarray(self._sum) / self.n_layer
        whole = np.stack([mean, *(self._layers[layer] for layer in self.keep.layers)])  # (layers, heads, m)
        self.maps.append(whole[..., self.columns].astype(np.float32))
        self.shares.append(self._shares(whole))
        self._layers, self._sum = {}, 0.0

    def _shares(self, whole: Floats) -> Floats:
        """How the attention (..., m) is divided among SEGMENTS -> (..., 5)."""
        position = np.arange(whole.shape[-1])
        segment = np.where(position < self.columns[0], BEFORE, np.where(position < self.n_prompt, AFTER, ANSWER))
        segment[0] = FIRST
        segment[self.columns] = PICTURE
        parts = [whole[..., segment == i].sum(axis=-1) for i in range(len(SEGMENTS))]
        return np.stack(parts, axis=-1).astype(np.float32)


def quantise(maps: Floats) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """(..., n) of numbers >= 0 -> 0..255 of the same shape, and each row's largest (...): the value of 255."""
    top = maps.max(axis=-1) if maps.shape[-1] else np.zeros(maps.shape[:-1])
    scale = np.where(top > 0, top, 1.0)
    return np.rint(maps / scale[..., None] * 255).astype(np.uint8), top.astype(np.float32)
