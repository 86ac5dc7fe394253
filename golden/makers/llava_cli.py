"""The image embeddings of llama-llava-cli, llama.cpp's LLaVA program of 2023 to 2025, through its library."""

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from golden.clip_models import VISION, write_mmproj
from golden.dump_llava_cli import dump, embed, open_library
from golden.manifest import record, save_arrays, versions
from golden.pictures import Picture, picture

COLUMN_STEP = 8  # as in original-images.npz
SIZES = {
    "clip_15": [(56, 56), (100, 60), (60, 100), (57, 333), (640, 480)],
    "clip_16": [(56, 56), (40, 30), (100, 60), (113, 57), (333, 77)],
    "clip_gelu": [(56, 56)],
    "clip_silu": [(56, 56)],
}
DUMPED = {"clip_15": (100, 60), "clip_16": (56, 100)}


def png(rgb: Picture) -> bytes:
    """A file for the library's decoder: PNG, so that all decoders agree."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


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
                values = embed(library, clip, png(picture(width, height)), n_threads=2)
                arrays[f"{name}.{width}x{height}"] = np.ascontiguousarray(values[:, ::COLUMN_STEP])
            library.clip_free(clip)
    path = save_arrays("llava-cli-images.npz", arrays)
    tolerance = "2e-3 of the 2-norm: patches and the activation's table are rounded to F16"
    packages = versions("gguf", "numpy") | {"llama-cpp-python": "0.3.7"}
    record(path, "llava-cli-images LIBLLAVA", packages, tolerance)


def make_dump(library_path: str) -> None:
    """llava-cli-dump.npz: <spec>.<array> of dump_llava_cli.py's file, for LLaVA-1.5 and LLaVA-1.6"""
    library, arrays = open_library(library_path), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in DUMPED.items():
            path = Path(folder) / f"{name}.gguf"
            write_mmproj(path, VISION[name])
            found = dump(library, path, png(picture(*size)))
            arrays |= {f"{name}.{key}": values for key, values in found.items()}
    path = save_arrays("llava-cli-dump.npz", arrays)
    tolerance = "pixels 1e-6; embeddings 2e-3 of the 2-norm: patches and the activation's table are rounded to F16"
    packages = versions("gguf", "numpy") | {"llama-cpp-python": "0.3.7"}
    record(path, "llava-cli-dump LIBLLAVA", packages, tolerance)
