"""The image embeddings of llama-llava-cli, llama.cpp's LLaVA program of 2023 to 2025, through its library."""

import ctypes
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from golden.clip_models import VISION, write_mmproj
from golden.manifest import record, save_arrays, versions
from golden.pictures import picture

COLUMN_STEP = 8  # as in original-images.npz
SIZES = {
    "clip_15": [(56, 56), (100, 60), (60, 100), (57, 333), (640, 480)],
    "clip_16": [(56, 56), (40, 30), (100, 60), (113, 57), (333, 77)],
    "clip_gelu": [(56, 56)],
    "clip_silu": [(56, 56)],
}


class ImageEmbedding(ctypes.Structure):
    """What the library returns: rows of n_llm numbers."""

    _fields_ = (("values", ctypes.POINTER(ctypes.c_float)), ("n_rows", ctypes.c_int))


def open_library(path: str) -> ctypes.CDLL:
    """The shared library "llava" of llama-cpp-python 0.3.7 (its build target is llava_shared)."""
    library = ctypes.CDLL(path)
    library.clip_model_load.restype = ctypes.c_void_p
    library.clip_model_load.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.clip_free.argtypes = [ctypes.c_void_p]
    library.llava_image_embed_make_with_bytes.restype = ctypes.POINTER(ImageEmbedding)
    library.llava_image_embed_make_with_bytes.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
    ]
    library.llava_image_embed_free.argtypes = [ctypes.POINTER(ImageEmbedding)]
    return library


def embed(library: ctypes.CDLL, clip: Any, size: tuple[int, int], n_llm: int) -> np.ndarray[Any, Any]:
    """The embeddings that take the place of a picture, (n_image_tokens, n_llm)."""
    png = io.BytesIO()
    Image.fromarray(picture(*size)).save(png, "PNG")
    data = png.getvalue()
    embedding = library.llava_image_embed_make_with_bytes(clip, 2, data, len(data))
    shape = (embedding.contents.n_rows, n_llm)
    values = np.ctypeslib.as_array(embedding.contents.values, shape).copy()
    library.llava_image_embed_free(embedding)
    return values


def make_images(library_path: str) -> None:
    """llava-cli-images.npz: <spec>.<width>x<height>, columns 0, 8, 16, ..."""
    library = open_library(library_path)
    arrays = {}
    for name, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mmproj.gguf"
            write_mmproj(path, VISION[name])
            clip = library.clip_model_load(str(path).encode(), 0)
            for width, height in sizes:
                values = embed(library, clip, (width, height), VISION[name].n_llm)
                arrays[f"{name}.{width}x{height}"] = np.ascontiguousarray(values[:, ::COLUMN_STEP])
            library.clip_free(clip)
    path = save_arrays("llava-cli-images.npz", arrays)
    tolerance = "2e-3 of the 2-norm: patches and the activation's table are rounded to F16"
    packages = versions("gguf", "numpy") | {"llama-cpp-python": "0.3.7"}
    record(path, "llava-cli-images LIBLLAVA", packages, tolerance)
