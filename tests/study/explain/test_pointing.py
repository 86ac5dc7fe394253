"""The pointing game: its geometry by hand, its stored figures, and some of its scenes played again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tinyllava
from golden.makers.pointing import Trial, covered, figures, hits, mirrored, patch_middles, play, rival_rate, scenes
from golden.manifest import MANIFEST, sha256
from tinyllava import demo

FIGURES = Path(__file__).parents[3] / "golden" / "pointing.json"


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    return found


def test_the_figures_are_of_the_embedded_pair() -> None:
    entry = json.loads(MANIFEST.read_text())["pointing.json"]
    assert entry["files"][demo.MODEL.name] == sha256(demo.MODEL)
    assert entry["files"][demo.MMPROJ.name] == sha256(demo.MMPROJ)
    assert entry["sha256"] == sha256(FIGURES)


def test_the_map_of_a_word_peaks_on_its_object(stored: dict[str, Any]) -> None:
    everything, several = stored["all"], stored["several_kinds"]
    assert stored["pictures"] >= 50 and everything["words"] >= 100
    low, high = everything["mean_95_percent"]
    assert low <= everything["mean"] <= high
    assert low > 2 * everything["middle"] > 2 * everything["chance"]
    assert several["mean"] > 3 * several["middle"] and several["other_word"] < several["chance"]


def test_some_scenes_played_again(stored: dict[str, Any]) -> None:
    llava = tinyllava.load()
    chosen = [scene for i, scene in enumerate(scenes()) if i in (4, 5, 6, 7, 26, 27)]
    trials = [trial for scene in chosen for trial in play(llava, *scene)]
    found = hits(trials, "choosing")[:, 0, 0]
    assert len(found) >= 12
    assert found.mean() > stored["all"]["mean"] - 0.15


def test_patches_of_a_wide_picture_worked_by_hand() -> None:
    x, y = patch_middles(Image.new("RGB", (40, 20)), 4)  # in a square of 40 with 10 rows of padding above
    assert x[0].tolist() == [5, 15, 25, 35]
    assert y[:, 0].tolist() == [-5, 5, 15, 25]
    assert covered(x, y, [(10, 0, 30, 10), (30, 10, 40, 20)]).astype(int).tolist() == [
        [0, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]
    assert mirrored((0, 1, 10, 5), 40) == (30, 1, 40, 5)


def test_rates_worked_by_hand() -> None:
    left = np.array([[True, False]])
    drawn = np.array([[True, True]])
    bright_left, bright_right = np.array([[2.0, 1.0]]), np.array([[1.0, 2.0]])

    def maps(block: Any) -> np.ndarray[Any, Any]:  # (1 + 1 layer, 1 + 1 head, 1, 2), all alike
        return np.broadcast_to(block, (2, 2, 1, 2))

    trials = [
        Trial(0, left, drawn, maps(bright_left), maps(bright_right)),
        Trial(1, left, drawn, maps(bright_right), maps(bright_right)),
        Trial(3, ~left, drawn, maps(bright_right), maps(bright_left)),
    ]
    found = figures(trials)
    assert found["words"] == 3 and found["chance"] == 0.5
    assert found["mean"] == pytest.approx(2 / 3) and found["mean_while_reading"] == 0
    assert found["best_layer"] == {"block": 0, "odd_scenes": 0.5}
    assert rival_rate([[trials[0], trials[2]]]) == 0.0
