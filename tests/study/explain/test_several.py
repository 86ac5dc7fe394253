"""`tinyllava explain` on several pictures in one prompt: each has its own figures, views and maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyllava
from golden.pictures import picture
from tests.study.explain.explained import Page
from tinyllava import cli
from tinyllava.study.explain.explain import Explanation, explain, picture_columns
from tinyllava.study.explain.maps import NOWHERE, PICTURE, SEGMENTS, MapKeeper, choose_maps
from tinyllava.study.explain.page import render
from tinyllava.tap import Recorder

SIZES = [(100, 60), (40, 56)]
PROMPT = "First <image> then <image> which?"


@pytest.fixture(scope="module", params=["clip_15", "clip_16"])
def explained(request: pytest.FixtureRequest, folder: Path) -> Explanation:
    llava = tinyllava.load(folder / "vicuna.gguf", folder / f"{request.param}.gguf", backend="numpy")
    return explain(llava, PROMPT, [Image.fromarray(picture(*size)) for size in SIZES], max_tokens=5)


def test_columns_are_where_the_pictures_stand(explained: Explanation) -> None:
    columns, plan = picture_columns(explained.plan), explained.plan
    first, between, second = plan.parts[0], plan.parts[2], plan.pictures[1].n_tokens
    n = plan.pictures[0].n_tokens
    assert columns[:n].tolist() == list(range(len(first), len(first) + n))
    start = len(first) + n + len(between)
    assert columns[n:].tolist() == list(range(start, start + second))


def test_each_view_shows_its_own_pictures_tiles_and_tokens(explained: Explanation) -> None:
    counts = [plan.n_tokens for plan in explained.plan.pictures]
    tiles = [plan.n_tiles for plan in explained.plan.pictures]
    assert [panel.picture for panel in explained.panels] == ([0, 1] if tiles == [1, 1] else [0, 0, 1, 1])
    for panel in explained.panels:
        seen = panel.tokens[panel.tokens != NOWHERE]
        low = sum(counts[: panel.picture])
        assert seen.size and low <= seen.min() and seen.max() < low + counts[panel.picture]
        numbers = [number for row in panel.tiles for number in row]
        assert sum(tiles[: panel.picture]) <= min(numbers) and max(numbers) < sum(tiles[: panel.picture + 1])
        assert panel.title.startswith(f"Picture {panel.picture + 1}")
    assert len(explained.tiles) == sum(tiles)


def test_maps_and_shares_are_the_traces(explained: Explanation) -> None:
    tap = Recorder()
    for _ in explained.llava.answer(explained.plan, tap=tap):
        pass
    last = explained.llava.language.llama.config.n_layer - 1
    columns, n_prompt = picture_columns(explained.plan), explained.plan.prompt_tokens
    for step, weights in enumerate(tap.values[f"llm.blk.{last}.attn_weights"]):
        newest = weights[:, -1]  # (n_head, m)
        assert np.allclose(explained.maps[step, 1 + last, 1:], newest[:, columns], atol=1e-6)
        shares = explained.shares[step, 1 + last, 1:]  # (n_head, segments)
        assert np.allclose(shares[:, PICTURE], newest[:, columns].sum(axis=1), atol=1e-5)
        assert np.allclose(shares[:, 0], newest[:, 0], atol=1e-6)
        assert np.allclose(shares[:, 1], newest[:, 1 : columns[0]].sum(axis=1), atol=1e-5)
        assert np.allclose(shares[:, 4], newest[:, n_prompt:].sum(axis=1), atol=1e-5)
        assert np.allclose(shares.sum(axis=1), 1, atol=1e-5)


def test_the_page_shows_all_of_them(explained: Explanation) -> None:
    page = Page(render(explained))
    labels = [attributes.get("aria-label", "") for attributes in page.all("svg")]
    for number in (1, 2):
        assert f"Picture {number} as given" in labels
        assert f"Picture {number} as prepared for the vision tower" in labels
        assert any(label.startswith(f"Picture {number}") and "cut into" in label for label in labels)
    assert page.data["maps"]["segments"][PICTURE] == "the pictures"
    assert [panel["picture"] for panel in page.data["panels"]] == [panel.picture for panel in explained.panels]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_walk_counts_all_of_them(explained: Explanation) -> None:
    by_tap = {row.tap: row for row in explained.walk}
    assert by_tap["decode"].times == 2 and by_tap["decode"].shape == (60, 100, 3)
    assert by_tap["pixels"].shape[0] * by_tap["pixels"].times == len(explained.tiles)


def test_a_question_about_two_pictures_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    pair = ["-m", folder / "vicuna.gguf", "--mmproj", folder / "clip_15.gguf", "--backend", "numpy"]
    pictures = ["--image", folder / "picture.png"] * 2
    words = ["explain", *pair, *pictures, "-p", "Which?", "-n", 2, "-q", "-o", tmp_path / "out.html"]
    assert cli.main([str(word) for word in words]) == 0
    assert "2 pictures" in Page((tmp_path / "out.html").read_text(encoding="utf-8")).text


def test_what_is_kept_of_a_7b_model_is_small() -> None:
    """LLaVA-1.6's longest prompt, 64 tokens: no map of a layer outlives its layer."""
    n_layer, n_head, n_picture, n_prompt, n_tokens = 32, 32, 2880, 2940, 64
    keep = choose_maps(n_layer, n_head, n_picture, n_tokens)
    keeper = MapKeeper(n_layer, np.arange(36, 36 + n_picture), n_prompt, keep)
    weights = np.full((n_head, n_prompt), 1 / n_prompt, np.float32)
    for layer in range(n_layer):
        keeper.add(layer, weights)
    keeper.finish()
    (one,), (shares,) = keeper.maps, keeper.shares
    assert one.nbytes * n_tokens < 20e6 and np.allclose(shares.sum(axis=-1), 1, atol=1e-4)
    assert shares.shape[-1] == len(SEGMENTS) and np.allclose(one[0], 1 / n_prompt)
