"""The original LLaVA on the pictures of golden/compat.py."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava.mm_utils import process_images
from PIL import Image

from golden.clip_models import CLIP_MEAN, CLIP_STD, ClipSpec
from golden.compat import Tiles
from golden.makers.compat import make, pixels_of
from golden.makers.original import IMAGE, original_model, original_versions
from golden.pictures import Picture


class Original:
    """LlavaLlamaForCausalLM with one vision model."""

    def __init__(self, folder: Path, spec: ClipSpec) -> None:
        self.aspect = "anyres" if spec.pinpoints else "pad"
        self.model = original_model(str(folder), spec, self.aspect)

    def pixels(self, rgb: Picture) -> Any:
        """(1, n_tiles, 3, px, px), or (1, 3, px, px)."""
        if self.aspect == "pad" and max(rgb.shape[:2]) in (1, 3):
            raise ValueError("its image processor takes the height for the colours")
        processor = self.model.get_vision_tower().image_processor
        return process_images([Image.fromarray(rgb)], processor, self.model.config)

    def tiles(self, rgb: Picture) -> Tiles:
        pixels = self.pixels(rgb).numpy()
        tiles = pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)  # (n_tiles, px, px, 3)
        return list(pixels_of(tiles, CLIP_MEAN, CLIP_STD))

    def embed(self, rgb: Picture) -> np.ndarray[Any, Any]:
        height, width = rgb.shape[:2]
        ids, pixels = torch.tensor([[5, IMAGE, 6]]), self.pixels(rgb)
        with torch.no_grad():
            embeddings = self.model.prepare_inputs_labels_for_multimodal(
                ids, None, None, None, None, pixels, image_sizes=[(width, height)]
            )[4]
        return embeddings[0, 1:-1].numpy()


def make_compat() -> None:
    """compat-llava.npz"""
    torch.set_num_threads(1)
    make("llava", Original, original_versions(), "compat-llava")
