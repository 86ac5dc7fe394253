"""Where two runs part ways, and which known difference explains it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinyllava.profile import PROFILES
from tinyllava.study.compare import differences
from tinyllava.study.compare.compare import compare_dumps
from tinyllava.study.compare.dumps import from_trace
from tinyllava.study.trace import trace


def test_float64_is_the_truth_that_float32_is_close_to(pairs) -> None:
    question, picture = "What?", [pairs.picture(100, 60)]
    exact = trace(pairs.load("vicuna", "clip_16", dtype="float64"), question, picture, attention=True)
    for backend, tolerance in (("numpy", 1e-5), ("numba", 2e-3)):  # the fast backend may round activations
        found = trace(pairs.load("vicuna", "clip_16", backend=backend), question, picture, attention=True)
        comparison = compare_dumps(from_trace(exact), from_trace(found), tolerance)
        assert comparison.agrees and len(comparison.rows) == len(exact)
    assert exact["llm.blk.0.l_out"].dtype == np.float64


def test_how_the_prompt_was_cut_makes_no_difference(pairs) -> None:
    whole, cut = (
        from_trace(trace(pairs.load("vicuna", n_batch=n), "Why?", attention=True, max_tokens=4)) for n in (512, 7)
    )
    comparison = compare_dumps(whole, cut, 1e-5)
    assert comparison.agrees and not comparison.notes
    assert all(row.shape == row.other_shape for row in comparison.rows)


def test_other_pictures_differ_in_length_at_their_tiles(pairs) -> None:
    llava = pairs.load("vicuna", "clip_16")
    wide, square = (from_trace(trace(llava, "What?", [pairs.picture(*size)])) for size in ((100, 30), (112, 112)))
    comparison = compare_dumps(wide, square)
    (note,) = comparison.notes
    assert note.startswith("first difference in length: picture 1, 3 tiles against 5, because of ")
    assert "1 x 2 tiles of 56 px and 2 x 2 tiles" in note and "100 x 30 px, or 112 x 112 px" in note
    assert comparison.first is not None and comparison.first.name == "pixels"
    assert comparison.first.verdict == "shape"


@pytest.mark.parametrize(
    "compat, size, words",
    [
        ("mtmd", (40, 30), ["picture 1", "3 tiles against 1,", "small_pictures"]),
        ("hf", (40, 30), ["picture 1", "pinpoint_order"]),
        ("mtmd", (100, 60), ["picture 1", "tokens", "merge"]),
    ],
)
def test_the_choice_that_makes_the_length_differ_is_named(pairs, compat: str, size, words: list[str]) -> None:
    traces = [
        from_trace(trace(pairs.load("vicuna", "clip_16", compat=name), "What?", [pairs.picture(*size)]))
        for name in ("llava", compat)
    ]
    comparison = compare_dumps(*traces)
    assert comparison.notes and all(word in comparison.notes[0] for word in words), comparison.notes


@pytest.mark.parametrize(
    "one, other, words",
    [
        ({"prompt": "What?"}, {"prompt": "What is it?"}, ["prompt", "the prompts are not the same"]),
        ({"template": "plain"}, {"template": "mistral"}, ["template plain against mistral"]),
        ({"max_tokens": 2}, {"max_tokens": 5}, ["answer, 2 tokens against 5", "limits of 2 and 5"]),
        ({"images": 1}, {"images": 2}, ["1 pictures against 2", "different pictures"]),
    ],
)
def test_other_reasons_for_another_length(pairs, one, other, words) -> None:
    llava, traces = pairs.load("vicuna", "clip_15"), []
    for changes in (one, other):
        given = {"prompt": "Who?", "template": "plain", "max_tokens": 2, **changes}
        pictures = [pairs.picture(56, 56)] * given.pop("images", 0)
        traces.append(from_trace(trace(llava, given.pop("prompt"), pictures, **given)))
    comparison = compare_dumps(*traces)
    assert all(word in " ".join(comparison.notes) for word in words), comparison.notes


def test_answers_of_different_length_are_compared_as_far_as_both_go(pairs) -> None:
    llava = pairs.load("vicuna")
    short, long = (from_trace(trace(llava, "Who?", max_tokens=n)) for n in (2, 5))
    comparison = compare_dumps(short, long)
    assert [row.name for row in comparison.rows if row.verdict != "equal"] == ["answer_ids"]


@pytest.mark.parametrize("compat", ["hf", "llava-cli", "mtmd"])
def test_every_profile_is_explained_where_it_first_differs(pairs, compat: str) -> None:
    traces = [
        from_trace(trace(pairs.load("vicuna", "clip_15", compat=name), "<image>Hi", [pairs.picture(100, 60)]))
        for name in ("llava", compat)
    ]
    comparison = compare_dumps(*traces)
    assert comparison.first is not None and comparison.first.name == "pixels"
    assert "one_tile" in comparison.first.known
    assert set(comparison.choices) == {name for row in comparison.rows for name in row.known}


def test_the_table_of_known_differences_is_where_compare_looks_for_it() -> None:
    golden = Path(__file__).parents[3] / "golden" / "known_differences.toml"
    assert differences.FILE.read_bytes() == golden.read_bytes()
    choices = {entry["choice"] for entry in differences.table()}
    values = {name: {str(vars(profile)[name]) for profile in PROFILES.values()} for name in differences.SHOWS}
    assert {name for name, found in values.items() if len(found) > 1} <= choices
    text = differences.describe("class_token", ("first", "last"))
    assert text.startswith("class_token: first against last. Place of the class embedding")


def test_a_choice_that_comes_to_the_same_here_explains_nothing(pairs) -> None:
    one, other = (
        from_trace(trace(pairs.load("vicuna", "clip_15", compat=name), "<image>Hi", [pairs.picture(100, 60)]))
        for name in ("llava", "mtmd")
    )
    found = set(differences.differing(one, other))
    assert {"one_tile", "class_token", "blocks", "projector_gelu"} <= found
    assert not found & {"pad_colour", "post_norm", "vit_gelu", "overview", "merge", "anyres_resample"}


def test_every_choice_of_a_profile_has_its_tap() -> None:
    from dataclasses import fields

    from tinyllava.profile import Profile

    # No tap shows what ends or draws the answer.
    without = {"name", "stop_texts", "temperature", "top_k", "top_p", "min_p", "max_tokens"}
    assert {item.name for item in fields(Profile)} - without == set(differences.SHOWS)
