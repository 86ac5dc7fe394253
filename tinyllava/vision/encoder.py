"""VisionModel: a picture becomes the embeddings that the language model reads.

    picture --anyres.py--> tiles --clip.py--> features --projector.py--> embeddings --anyres.py--> one sequence

An mmproj file holds the weights of the two steps in the middle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllava.files.gguf import GGUFFile
from tinyllava.ops import Array, Ops
from tinyllava.profile import Profile
from tinyllava.progress import Progress, no_progress
from tinyllava.tap import NULL, Tap, Taps, of_blocks
from tinyllava.vision.anyres import PicturePlan, make_tiles, merge, plan_picture
from tinyllava.vision.clip import VISION_TAPS, load_vision, tile_features
from tinyllava.vision.config import VisionConfig
from tinyllava.vision.image import Pixels, size_of
from tinyllava.vision.projector import KINDS, ProjectorWeights, load_projector, project


class Tower(NamedTuple):
    """What a kind of vision tower is: how its weights are loaded, its forward pass, the taps that this fires."""

    load: Callable[[GGUFFile, VisionConfig, Ops], Any]
    features: Callable[[npt.NDArray[Any], Any, VisionConfig, Ops, Tap], Array]  # (3, H, W) -> (n_patches, n_embd)
    taps: Taps


TOWERS = {"clip": Tower(load_vision, tile_features, VISION_TAPS)}
PICTURE_TAPS = {
    "pixels": ("n_tiles", "3", "image_px", "image_px"),
    "image_tokens": ("n_image_tokens", "n_embd_llm"),
}


@dataclass(eq=False)
class VisionModel:
    """A loaded mmproj file: vision tower and projector, with the backend that computes them."""

    path: Path
    config: VisionConfig
    weights: Any  # of the tower: what its load() gives
    projector: ProjectorWeights
    profile: Profile
    ops: Ops  # not the language model's backend if a GPU holds only some of that model's layers

    def plan(self, rgb: Pixels) -> PicturePlan:
        """How a decoded picture (h, w, 3) will be tiled, and how many tokens it will take."""
        return plan_picture(size_of(rgb), self.config, self.profile)

    def encode(self, rgb: Pixels, tap: Tap = NULL, progress: Progress = no_progress) -> Array:
        """Decoded pixels (h, w, 3) -> embeddings (n_tokens, n_embd_llm), an array of this model's backend."""
        plan = self.plan(rgb)
        tiles = tap("pixels", make_tiles(rgb, plan, self.config, self.profile))  # (n_tiles, 3, H, W)
        encode_tile = self.captured_encode if tap is NULL else partial(self.encode_tile, tap=tap)
        embeddings = []
        for done, tile in enumerate(tiles):
            progress("picture", done, len(tiles))
            # (n_patches, n_embd_llm), copied because a captured step writes into the same memory for the next tile
            embeddings.append(encode_tile(tile).copy())
        progress("picture", len(tiles), len(tiles))
        return tap("image_tokens", merge(np.stack(embeddings), plan, self.projector.image_newline))

    def encode_tile(self, tile: npt.NDArray[Any], tap: Tap = NULL) -> Array:
        """One tile of normalised pixels (3, H, W) -> the embeddings of its patches (n_patches, n_embd_llm)."""
        features = TOWERS[self.config.tower].features
        x = features(tile, self.weights, self.config, self.ops, tap.at("vit"))  # (n_patches, n_embd)
        return project(x, self.projector, self.ops, tap.at("mm"))

    @cached_property
    def captured_encode(self) -> Callable[[Any], Array]:
        """:meth:`encode_tile` as a captured step, which the backend may replay for each further tile."""
        return self.ops.capture(self.encode_tile)

    def taps(self) -> dict[str, tuple[str, ...]]:
        """Every tap that :meth:`encode` fires, by its full name, with the shape of one firing in letters."""
        tower = of_blocks(TOWERS[self.config.tower].taps, "vit", self.config.n_block)
        projector = {f"mm.{name}": shape for name, shape in KINDS[self.config.projector].taps.items()}
        return PICTURE_TAPS | tower | projector


def load_vision_model(file: GGUFFile, profile: Profile, ops: Ops) -> VisionModel:
    """The model in an mmproj file. ModelError if its configuration is not supported or a tensor is wrong."""
    config = VisionConfig.from_gguf(file, profile)
    weights, projector = TOWERS[config.tower].load(file, config, ops), load_projector(file, config, ops)
    return VisionModel(file.path, config, weights, projector, profile, ops)
