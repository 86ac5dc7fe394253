"""llama-llava-cli's library on the pictures of golden/compat.py."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from golden.clip_models import CLIP_MEAN, CLIP_STD, ClipSpec, write_mmproj
from golden.compat import Tiles
from golden.dump_llava_cli import embed, open_library, preprocess
from golden.makers.compat import make, pixels_of
from golden.makers.llava_cli import png
from golden.manifest import versions
from golden.pictures import Picture


class LlavaCli:
    """examples/llava's clip.cpp and llava.cpp with one vision model."""

    def __init__(self, library: ctypes.CDLL, folder: Path, spec: ClipSpec) -> None:
        path = folder / "mmproj.gguf"
        write_mmproj(path, spec)
        self.library = library
        self.clip = library.clip_model_load(str(path).encode(), 0)

    def tiles(self, rgb: Picture) -> Tiles:
        return list(pixels_of(preprocess(self.library, self.clip, png(rgb)), CLIP_MEAN, CLIP_STD))

    def embed(self, rgb: Picture) -> np.ndarray[Any, Any]:
        return embed(self.library, self.clip, png(rgb))


def make_compat(library_path: str) -> None:
    """compat-llava-cli.npz"""
    library = open_library(library_path)
    packages = versions("gguf", "numpy") | {"llama-cpp-python": "0.3.7"}
    make("llava-cli", lambda *args: LlavaCli(library, *args), packages, "compat-llava-cli LIBLLAVA")
