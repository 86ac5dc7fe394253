"""libmtmd on the pictures of golden/compat.py."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import mtmd_cpp

from golden.clip_models import CLIP_MEAN, CLIP_STD, ClipSpec
from golden.compat import Tiles
from golden.makers.compat import make, pixels_of
from golden.makers.mtmd import Mtmd
from golden.manifest import versions
from golden.pictures import Picture


class Tile(ctypes.Structure):
    """clip_image_f32 of llama-cpp-python 0.3.36's libmtmd; a std::vector begins with its begin and end."""

    _fields_ = (
        ("flags", ctypes.c_int * 6),
        ("begin", ctypes.POINTER(ctypes.c_float)),
        ("end", ctypes.c_void_p),
        ("capacity", ctypes.c_void_p),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
    )


class ImageTokens(ctypes.Structure):
    """The beginning of mtmd_image_tokens, up to its vector of tiles."""

    _fields_ = (("numbers", ctypes.c_int * 6), ("begin", ctypes.POINTER(Tile)), ("end", ctypes.c_void_p))


class Libmtmd(Mtmd):
    """tools/mtmd with one vision model."""

    def __init__(self, folder: Path, spec: ClipSpec) -> None:
        super().__init__(str(folder), spec)

    def tiles(self, rgb: Picture) -> Tiles:
        """In the order of their tokens: the overview last."""
        chunks, tiles = self.chunks_of(rgb), []
        for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_image(mtmd_cpp.mtmd_input_chunks_get(chunks, i))
            if not tokens:
                continue
            image = ctypes.cast(tokens, ctypes.POINTER(ImageTokens)).contents
            first = ctypes.cast(image.begin, ctypes.c_void_p).value
            for j in range((image.end - first) // ctypes.sizeof(Tile)):
                tile = image.begin[j]
                values = np.ctypeslib.as_array(tile.begin, (tile.height, tile.width, 3))
                tiles.append(pixels_of(values, CLIP_MEAN, CLIP_STD))
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        return tiles

    def embed(self, rgb: Any) -> np.ndarray[Any, Any]:
        return self.embed_chunks(self.chunks_of(rgb))


def make_compat() -> None:
    """compat-mtmd.npz"""
    make("mtmd", Libmtmd, versions("llama-cpp-python", "gguf", "numpy"), "compat-mtmd")
