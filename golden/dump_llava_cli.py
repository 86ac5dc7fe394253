"""Dump what llama-llava-cli sees and what it makes of it, for `tinyllava compare`, through its library.

    python -m golden.dump_llava_cli LIBLLAVA mmproj.gguf picture.png theirs.npz

LIBLLAVA is the shared library "llava" of llama-cpp-python 0.3.7 (its build target is llava_shared). The program
itself prints nothing of its graph. The file holds the normalised pixels of all tiles and the picture's embeddings,
under tinyllava's own names.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = {"compat": "llava-cli"}  # by which compare knows whose choices these are


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


class ImageEmbedding(ctypes.Structure):
    """llava_image_embed: rows of n_llm numbers."""

    _fields_ = (("values", ctypes.POINTER(ctypes.c_float)), ("n_rows", ctypes.c_int))


def open_library(path: str) -> ctypes.CDLL:
    """The shared library with the functions that are called here declared."""
    library = ctypes.CDLL(path)
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    embedding = ctypes.POINTER(ImageEmbedding)
    for name, result, *arguments in (
        ("clip_model_load", pointer, text, ctypes.c_int),
        ("clip_free", None, pointer),
        ("clip_n_mmproj_embd", ctypes.c_int, pointer),
        ("clip_image_u8_init", pointer),
        ("clip_image_u8_free", None, pointer),
        ("clip_image_load_from_bytes", ctypes.c_bool, text, size, pointer),
        ("clip_image_preprocess", ctypes.c_bool, pointer, pointer, ctypes.POINTER(Batch)),
        ("llava_image_embed_make_with_bytes", embedding, pointer, ctypes.c_int, text, ctypes.c_int),
        ("llava_image_embed_free", None, embedding),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def preprocess(library: ctypes.CDLL, clip: Any, data: bytes) -> np.ndarray[Any, Any]:
    """A picture file's tiles as the vision tower gets them, normalised: (n_tiles, h, w, 3)."""
    image = library.clip_image_u8_init()
    if not library.clip_image_load_from_bytes(data, len(data), image):
        raise SystemExit("stb_image does not read the picture")
    batch = Batch(None, 0)
    if not library.clip_image_preprocess(clip, image, ctypes.byref(batch)):
        raise ValueError("clip_image_preprocess fails")
    tiles = [batch.data[i] for i in range(batch.size)]
    arrays = [np.ctypeslib.as_array(tile.begin, (tile.height, tile.width, 3)).copy() for tile in tiles]
    library.clip_image_u8_free(image)
    return np.stack(arrays)


def embed(library: ctypes.CDLL, clip: Any, data: bytes, n_threads: int = 1) -> np.ndarray[Any, Any]:
    """The embeddings that take a picture file's place, (n_image_tokens, n_llm)."""
    embedding = library.llava_image_embed_make_with_bytes(clip, n_threads, data, len(data))
    shape = (embedding.contents.n_rows, library.clip_n_mmproj_embd(clip))
    values = np.ctypeslib.as_array(embedding.contents.values, shape).copy()
    library.llava_image_embed_free(embedding)
    return values


def dump(library: ctypes.CDLL, mmproj: str | Path, data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """What the program makes of a picture file, as arrays for np.savez()."""
    clip = library.clip_model_load(str(mmproj).encode(), 0)
    pixels = preprocess(library, clip, data).transpose(0, 3, 1, 2)  # (n_tiles, 3, h, w)
    arrays = {"pixels": np.ascontiguousarray(pixels), "image_tokens": embed(library, clip, data)}
    library.clip_free(clip)
    return arrays | {"settings": np.frombuffer(json.dumps(SETTINGS).encode(), np.uint8)}


if __name__ == "__main__":
    _, library_path, mmproj_path, picture_path, output = sys.argv
    np.savez(output, **dump(open_library(library_path), mmproj_path, Path(picture_path).read_bytes()))
