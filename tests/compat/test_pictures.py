"""Each profile against the implementation that it stands for, on 217 picture sizes (golden/compat.py)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.clip_models import write_mmproj
from golden.compat import (
    COLUMN_STEP,
    EMBEDDINGS_EVERY,
    PIXELS_EVERY,
    REAL_16,
    SPECS,
    Tiles,
    digest,
    sizes,
    wanted,
)
from golden.pictures import picture
from tests.vision.models import encode, load_model
from tinyllava.files.gguf import GGUFFile, open_gguf
from tinyllava.profile import PROFILES
from tinyllava.vision.anyres import cut_tiles, plan_picture
from tinyllava.vision.encoder import VisionModel
from tinyllava.vision.image import Size

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = {"llava": 2e-5, "hf": 2e-5, "llava-cli": 2e-3, "mtmd": 2e-3}  # the latter two round to F16
CASES = [(name, spec) for name in PROFILES for spec in SPECS]


@lru_cache(None)
def golden(name: str) -> Any:
    return np.load(GOLDEN / f"compat-{name}.npz")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUFFile]:
    folder = tmp_path_factory.mktemp("compat")
    for name, spec in SPECS.items():
        write_mmproj(folder / f"{name}.gguf", spec)
    return {name: open_gguf(folder / f"{name}.gguf") for name in SPECS}


def answered(name: str, spec: str) -> list[tuple[int, tuple[int, int], int, int]]:
    """(index, size, tiles, tokens) of each size on which the implementation does not fail."""
    counts = zip(golden(name)[f"{spec}.n_tiles"].tolist(), golden(name)[f"{spec}.n_tokens"].tolist(), strict=True)
    rows = [(i, size, *count) for i, (size, count) in enumerate(zip(sizes(), counts, strict=True))]
    return [row for row in rows if row[2] > 0]


def model_of(name: str, file: GGUFFile) -> VisionModel:
    return load_model(file, profile=PROFILES[name])


def test_the_sizes_are_those_of_the_golden_files() -> None:
    assert len(set(sizes())) >= 200
    for name in PROFILES:
        assert golden(name)["size"].tolist() == [list(size) for size in sizes()]


@pytest.mark.parametrize("name, spec", CASES)
def test_tiles_and_tokens_are_as_many(name: str, spec: str, files: dict[str, GGUFFile]) -> None:
    config = model_of(name, files[spec]).config
    rows = answered(name, spec)
    assert len(rows) >= 200
    for _, (width, height), n_tiles, n_tokens in rows:
        plan = plan_picture(Size(height, width), config, PROFILES[name])
        assert (plan.n_tiles, plan.n_tokens) == (n_tiles, n_tokens), f"{width}x{height}"


@pytest.mark.parametrize("spec", SPECS)
def test_pixels_are_equal(spec: str, files: dict[str, GGUFFile]) -> None:
    configs = {name: model_of(name, files[spec]).config for name in PROFILES}
    wrong = []
    for index, (width, height) in enumerate(sizes()):
        if not wanted(PIXELS_EVERY, spec, index):
            continue
        rgb = picture(width, height)
        for name, profile in PROFILES.items():
            if golden(name)[f"{spec}.n_tiles"][index] == 0:
                continue
            plan = plan_picture(Size(height, width), configs[name], profile)
            tiles: Tiles = cut_tiles(rgb, plan, configs[name], profile)
            if profile.overview == "last":
                tiles = [*tiles[1:], tiles[0]]
            if digest(tiles) != golden(name)[f"{spec}.digest"][index].tobytes():
                wrong.append(f"{name} {width}x{height}")
    assert not wrong


@pytest.mark.parametrize("name, spec", [case for case in CASES if SPECS[case[1]] is not REAL_16])
def test_embeddings_are_equal(name: str, spec: str, files: dict[str, GGUFFile]) -> None:
    model = model_of(name, files[spec])
    for index, (width, height), _, _ in answered(name, spec):
        if wanted(EMBEDDINGS_EVERY, spec, index):
            theirs = golden(name)[f"{spec}.{width}x{height}"]
            ours = encode(picture(width, height), model)[:, ::COLUMN_STEP]
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert error < TOLERANCE[name], f"{width}x{height}"
