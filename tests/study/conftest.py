"""Small pairs and pictures for the tests of tinyllava.study, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import tinyllava
from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj
from golden.pictures import picture
from tests.study.explain.explained import make, make_files
from tinyllava.llava import LLaVA
from tinyllava.study.explain.explain import Explanation


class Pairs:
    """The golden models and pictures as files, written when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str) -> Path:
        path = self.folder / f"{name}.gguf"
        if not path.exists():
            if name in LANGUAGE:
                write_language_model(path, LANGUAGE[name])
            else:
                write_mmproj(path, VISION[name])
        return path

    def load(self, model: str | None = "vicuna", mmproj: str | None = None, **settings: object) -> LLaVA:
        files = [self.file(name) if name else None for name in (model, mmproj)]
        return tinyllava.load(*files, **{"backend": "numpy", **settings})

    def picture(self, width: int, height: int) -> Path:
        path = self.folder / f"{width}x{height}.png"
        if not path.exists():
            Image.fromarray(picture(width, height)).save(path)
        return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("explain"))


@pytest.fixture(scope="module", params=["clip_15", "clip_16"])
def explained(request: pytest.FixtureRequest, folder: Path) -> Explanation:
    return make(folder, request.param)
