"""llama-llava-cli's library on the pictures of golden/compat.py."""

import ctypes
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from golden.clip_models import CLIP_MEAN, CLIP_STD, ClipSpec, write_mmproj
from golden.compat import Tiles
from golden.makers.compat import make, pixels_of
from golden.makers.llava_cli import open_library
from golden.manifest import versions
from golden.pictures import Picture


class Tile(ctypes.Structure):
    """clip_image_f32: a std::vector begins with pointers to its begin and end."""

    _fields_ = (
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("begin", ctypes.POINTER(ctypes.c_float)),
        ("end", ctypes.c_void_p),
        ("capacity", ctypes.c_void_p),
    )


class Batch(ctypes.Structure):
    """clip_image_f32_batch"""

    _fields_ = (("data", ctypes.POINTER(Tile)), ("size", ctypes.c_size_t))


class LlavaCli:
    """examples/llava's clip.cpp and llava.cpp with one vision model."""

    def __init__(self, library: ctypes.CDLL, folder: Path, spec: ClipSpec) -> None:
        path = folder / "mmproj.gguf"
        write_mmproj(path, spec)
        self.library, self.n_llm = library, spec.n_llm
        self.clip = library.clip_model_load(str(path).encode(), 0)

    def tiles(self, rgb: Picture) -> Tiles:
        image = self.library.clip_image_u8_init()
        data = as_png(rgb)
        if not self.library.clip_image_load_from_bytes(data, len(data), image):
            raise SystemExit("stb_image does not read the PNG")
        batch = Batch(None, 0)
        if not self.library.clip_image_preprocess(self.clip, image, ctypes.byref(batch)):
            raise ValueError("clip_image_preprocess fails")
        tiles = [batch.data[i] for i in range(batch.size)]
        arrays = [np.ctypeslib.as_array(tile.begin, (tile.height, tile.width, 3)).copy() for tile in tiles]
        self.library.clip_image_u8_free(image)
        return [pixels_of(array, CLIP_MEAN, CLIP_STD) for array in arrays]

    def embed(self, rgb: Picture) -> np.ndarray[Any, Any]:
        data = as_png(rgb)
        embedding = self.library.llava_image_embed_make_with_bytes(self.clip, 1, data, len(data))
        values = np.ctypeslib.as_array(embedding.contents.values, (embedding.contents.n_rows, self.n_llm)).copy()
        self.library.llava_image_embed_free(embedding)
        return values


def as_png(rgb: Picture) -> bytes:
    """A file for the library's decoder: PNG, so that all decoders agree."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def make_compat(library_path: str) -> None:
    """compat-llava-cli.npz"""
    library = open_library(library_path)
    library.clip_image_u8_init.restype = ctypes.c_void_p
    library.clip_image_u8_free.argtypes = [ctypes.c_void_p]
    library.clip_image_load_from_bytes.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    library.clip_image_load_from_bytes.restype = ctypes.c_bool
    library.clip_image_preprocess.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(Batch)]
    library.clip_image_preprocess.restype = ctypes.c_bool
    packages = versions("gguf", "numpy") | {"llama-cpp-python": "0.3.7"}
    make("llava-cli", lambda *args: LlavaCli(library, *args), packages, "compat-llava-cli LIBLLAVA")
