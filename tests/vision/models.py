"""A picture's whole way through a small mmproj file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tinyllava.files.gguf import GGUFFile
from tinyllava.ops import Ops
from tinyllava.ops.select import select
from tinyllava.profile import LLAVA, Profile
from tinyllava.tap import NULL, Tap
from tinyllava.vision.clip import load_vision
from tinyllava.vision.config import VisionConfig
from tinyllava.vision.encoder import VisionModel
from tinyllava.vision.image import Pixels
from tinyllava.vision.projector import load_projector

Write = Callable[..., GGUFFile]  # conftest.py's fixture `write`


def load_model(
    file: GGUFFile, ops: Ops | None = None, profile: Profile = LLAVA, **changes: Any
) -> VisionModel:
    """Load a file's tower and projector; ``changes`` replace fields of its config."""
    ops = ops or select("numpy")
    config = replace(VisionConfig.from_gguf(file, profile), **changes)
    weights, projector = load_vision(file, config, ops), load_projector(file, config, ops)
    return VisionModel(file.path, config, weights, projector, profile, ops)


def encode(rgb: Pixels, model: VisionModel, tap: Tap = NULL) -> np.ndarray[Any, Any]:
    """A picture's tokens (n_tokens, n_embd_llm)."""
    return model.ops.numpy(model.encode(rgb, tap))
