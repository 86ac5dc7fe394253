"""The small checkpoints, written once, and what was made of them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.checkpoints import CHECKPOINTS, write_checkpoint
from tinyllava.convert.pipeline import Settings, Written, convert
from tinyllava.files.gguf import open_gguf

GOLDEN = Path(__file__).parents[2] / "golden"
Convert = Callable[..., tuple[Path, Path]]


def load_json(name: str) -> Any:
    return json.loads(gzip.decompress((GOLDEN / name).read_bytes()))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every checkpoint in a folder of its name. Not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, spec in CHECKPOINTS.items():
        write_checkpoint(root / name, spec)
    return root


@pytest.fixture(scope="session")
def converted(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """convert(name, outtype, mmproj outtype) -> (mmproj, model), made once for each set of arguments."""
    made: dict[tuple[str | None, ...], tuple[Path, Path]] = {}

    def run(name: str, outtype: str | None = None, mmproj: str | None = None) -> tuple[Path, Path]:
        key = (name, outtype, mmproj)
        if key not in made:
            out = tmp_path_factory.mktemp("out")
            made[key] = tuple(file.path for file in convert_checkpoint(checkpoints / name, out, outtype, mmproj))
        return made[key]

    return run


def convert_checkpoint(
    folder: Path, out: Path, outtype: str | None = None, mmproj: str | None = None
) -> list[Written]:
    tower = folder / "clip" if (folder / "clip").exists() else None
    settings = Settings(folder, vision_tower=tower, out=out, outtype=outtype, mmproj_outtype=mmproj)
    return convert(settings, lambda _: None, lambda *_: None)


def tensors_of(path: Path) -> dict[str, list[Any]]:
    """name -> [type, shape, crc32]"""
    with open_gguf(path) as file:
        return {
            t.name: [t.type, list(t.shape), zlib.crc32(np.ascontiguousarray(t.raw))] for t in file.tensors.values()
        }


def metadata_of(path: Path) -> dict[str, Any]:
    with open_gguf(path) as file:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
