"""This package as one of the programs of worker.py."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava.llava import load
from tinyllava.study.peers.worker import Work
from tinyllava.version import __version__


def noise(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A picture (height, width, 3) of a (width, height)."""
    return np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


class Own:
    """This package's models, one forward pass at a time."""

    def __init__(self, work: Work) -> None:
        files = (work.model, work.mmproj)
        self.llava = load(*files, backend=work.backend, threads=work.threads, compat=work.compat)
        if self.llava.vision is not None:
            self.llava.vision.profile = replace(self.llava.profile, small_pictures="overview_only")
        self.language, self.ops = self.llava.language, self.llava.ops
        self.cache = self.language.new_cache(work.n_ctx)
        self.step = self.ops.capture(partial(self.language.step, cache=self.cache))  # as generate.py does
        self.pictures = [noise(size) for size in work.pictures]

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt into an empty cache; the logits after its last token."""
        self.cache.truncate(0)
        for piece in self.language.pieces(ids):
            hidden = self.language.forward(piece, self.cache)
        self.ops.numpy(self.language.unembed(hidden[-1:]))

    def decode(self, ids: list[int], depth: int) -> None:
        """Read ids one by one after the first ``depth`` tokens; the logits after each."""
        self.cache.truncate(depth)
        for token in ids:
            self.ops.numpy(self.step([token]))

    def encode(self, picture: int) -> int:
        """A picture's embeddings; returns how many."""
        vision = self.llava.vision_model
        return len(vision.ops.numpy(vision.encode(self.pictures[picture])))

    def about(self) -> dict[str, Any]:
        """Where and with what it is measured."""
        packages = ("numpy", "numba", "llvmlite")
        versions = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
        own = {"tinyllava": __version__, "python": platform.python_version()}
        return {
            "threads": self.ops.threads,
            "backend": self.ops.name,
            "versions": {**own, **versions},
        }
