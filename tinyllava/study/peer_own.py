"""This package as one of the programs of peers.py."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

import tinyllava
from tinyllava.language.cache import KVCache
from tinyllava.language.llama import embed, forward, unembed
from tinyllava.ops import Array
from tinyllava.study.peers import Work


def noise(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A picture (height, width, 3) of a (width, height)."""
    return np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


class Own:
    """This package's models, one forward pass at a time."""

    def __init__(self, work: Work) -> None:
        files = (work.model, work.mmproj)
        self.llava = tinyllava.load(*files, backend=work.backend, threads=work.threads, compat=work.compat)
        self.llava.profile = replace(self.llava.profile, small_pictures="overview_only")
        self.llama, self.ops = self.llava.language.llama, self.llava.ops
        self.cache = KVCache(self.llama.config, work.n_ctx, self.ops)
        self.step = self.ops.capture(self._read)
        self.pictures = [noise(size) for size in work.pictures]

    def _read(self, ids: list[int]) -> Array:
        """One more token (1,) -> the logits after it (1, n_vocab), as generate.py does it."""
        x = forward(embed(ids, self.llama, self.ops), self.llama, self.cache, self.ops)  # (1, n_embd)
        return unembed(x, self.llama, self.ops)

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt into an empty cache; the logits after its last token."""
        self.cache.truncate(0)
        for piece in self.llava.pieces(ids):
            x = forward(piece, self.llama, self.cache, self.ops)
        self.ops.numpy(unembed(x[-1:], self.llama, self.ops))

    def decode(self, ids: list[int], depth: int) -> None:
        """Read ids one by one after the first ``depth`` tokens; the logits after each."""
        self.cache.truncate(depth)
        for token in ids:
            self.ops.numpy(self.step([token]))

    def encode(self, picture: int) -> int:
        """A picture's embeddings; returns how many."""
        return len(self.ops.numpy(self.llava.encode_pixels(self.pictures[picture])))

    def about(self) -> dict[str, Any]:
        """Where and with what it is measured."""
        packages = ("numpy", "numba", "llvmlite")
        versions = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
        own = {"tinyllava": tinyllava.__version__, "python": platform.python_version()}
        return {
            "threads": self.ops.threads,
            "backend": self.ops.name,
            "versions": {**own, **versions},
        }
