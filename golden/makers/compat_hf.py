"""transformers' LLaVA classes on the pictures of golden/compat.py."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from golden.clip_models import CLIP_MEAN, CLIP_STD, ClipSpec
from golden.compat import Tiles
from golden.makers.compat import make, pixels_of
from golden.makers.hf_llava import llava, pinpoints
from golden.manifest import versions
from golden.pictures import Picture


class Transformers:
    """LlavaForConditionalGeneration, or LlavaNext's, with its image processor on Pillow."""

    def __init__(self, _folder: Path, spec: ClipSpec) -> None:
        self.model = llava(spec)
        side = spec.image_size
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        if spec.pinpoints:
            self.processor: Any = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints(spec))
        else:
            self.processor = LlavaImageProcessorPil(**size)

    def batch(self, rgb: Picture) -> Any:
        # Said, since it takes a picture of 1 or 3 rows for one with colours first.
        image = Image.fromarray(rgb)
        return self.processor(image, input_data_format="channels_last", return_tensors="pt")

    def tiles(self, rgb: Picture) -> Tiles:
        pixels = self.batch(rgb)["pixel_values"].numpy()
        tiles = pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)  # (n_tiles, px, px, 3)
        return list(pixels_of(tiles, CLIP_MEAN, CLIP_STD))

    def embed(self, rgb: Picture) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return self.model.get_image_features(**self.batch(rgb)).pooler_output[0].numpy()


def make_compat() -> None:
    """compat-hf.npz"""
    torch.set_num_threads(1)
    make("hf", Transformers, versions("torch", "transformers", "pillow", "numpy"), "compat-hf")
