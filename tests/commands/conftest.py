"""A small model pair and pictures for the commands, and the command line as a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyllava
from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj


class Files:
    """A small pair of either kind, and pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model.gguf"
        self.mmproj = folder / "mmproj.gguf"
        self.mmproj_16 = folder / "mmproj-1.6.gguf"
        self.picture = folder / "photo.png"
        self.small = folder / "small.png"
        write_language_model(self.model, LANGUAGE["llama_gqa"], dtype="F32")
        write_mmproj(self.mmproj, VISION["clip_15"])
        write_mmproj(self.mmproj_16, VISION["clip_16"])
        rng = np.random.default_rng(0)
        for path, shape in ((self.picture, (60, 100, 3)), (self.small, (30, 40, 3))):
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)

    def pair(self, *words: object, mmproj: Path | None = None) -> list[str]:
        """A command line for the pair that is quick: no compilation, few tokens, greedy."""
        pair = ["-m", self.model, "--mmproj", mmproj or self.mmproj, "--backend", "numpy"]
        return [str(word) for word in [*pair, "--temp", 0, *words]]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[bytes]]:
    """Starts the command line as a process of its own, with its output in pipes."""
    root = Path(tinyllava.__file__).parent.parent

    def start(*words: object, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "tinyllava", *map(str, words)]
        return subprocess.Popen(line, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start
