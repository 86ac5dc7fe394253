"""Small mmproj files for the tests of the vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from golden.clip_models import VISION, ClipSpec, add_key, clip_tensors, legacy_name, metadata, write_mmproj
from golden.draw import finish
from tests.vision.models import Write
from tinyllava.files.gguf import GGUFFile, open_gguf


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUFFile]:
    """Every golden vision model, opened."""
    folder = tmp_path_factory.mktemp("vision")
    for name, spec in VISION.items():
        write_mmproj(folder / f"{name}.gguf", spec)
    return {name: open_gguf(folder / f"{name}.gguf") for name in VISION}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(spec, keys={...}, tensors={...}): a file that departs from its spec; None drops a key or tensor."""

    def write_changed(
        spec: ClipSpec, keys: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
    ) -> GGUFFile:
        path = tmp_path / "mmproj.gguf"
        writer = gguf.GGUFWriter(str(path), "clip")
        for key, value in (metadata(spec) | (keys or {})).items():
            if value is not None:
                add_key(writer, key, value)
        names = legacy_name if spec.naming == "legacy" else str
        arrays = {names(name): values for name, values in clip_tensors(spec).items()}
        for name, values in (arrays | (tensors or {})).items():
            if values is not None:
                writer.add_tensor(name, np.asarray(values))
        finish(writer)
        return open_gguf(path)

    return write_changed
