"""A picture's whole way through a small mmproj file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tinyllava.files.gguf import GGUFFile
from tinyllava.ops import Ops
from tinyllava.ops.select import select
from tinyllava.profile import LLAVA, Profile
from tinyllava.tap import NULL, Tap
from tinyllava.vision.anyres import make_tiles, merge, plan_picture
from tinyllava.vision.clip import VisionConfig, VisionWeights, load_vision, tile_features
from tinyllava.vision.image import Pixels, size_of
from tinyllava.vision.projector import ProjectorWeights, load_projector, project

Write = Callable[..., GGUFFile]  # conftest.py's fixture `write`


class Eye(NamedTuple):
    """A loaded mmproj file."""

    config: VisionConfig
    weights: VisionWeights
    projector: ProjectorWeights
    ops: Ops
    profile: Profile


def load_eye(file: GGUFFile, ops: Ops | None = None, profile: Profile = LLAVA, **changes: Any) -> Eye:
    """Load a file's tower and projector; ``changes`` replace fields of its config."""
    ops = ops or select("numpy")
    config = replace(VisionConfig.from_gguf(file, profile), **changes)
    return Eye(config, load_vision(file, config, ops), load_projector(file, config, ops), ops, profile)


def see(rgb: Pixels, eye: Eye, tap: Tap = NULL) -> np.ndarray[Any, Any]:
    """A picture's tokens (n_tokens, n_embd_llm)."""
    plan = plan_picture(size_of(rgb), eye.config, eye.profile)
    features = []
    for tile in make_tiles(rgb, plan, eye.config, eye.profile):
        x = tile_features(tile, eye.weights, eye.config, eye.ops, tap.at("vit"))
        features.append(project(x, eye.projector, eye.ops, tap.at("mm")))
    return merge(np.stack(features), plan, eye.projector.image_newline)
