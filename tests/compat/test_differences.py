"""golden/known_differences.toml: complete, true to the profiles, and its figures measured again."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from golden import differences
from tinyllava.profile import LLAVA, PROFILES, Profile

ENTRIES = differences.read()["difference"]
UNSEEN = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "stop_texts")  # by a greedy answer
MEASURED = [entry for entry in ENTRIES if "flip" in entry]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_each_entry_says_what_who_and_where(entry: dict[str, Any]) -> None:
    assert entry["what"] and entry["source"]
    assert all(entry[name] for name in PROFILES)
    assert entry["choice"] in ("", *(field.name for field in fields(Profile)))
    assert bool(entry["choice"]) or entry["note"]


def test_our_reader_of_toml_reads_the_same_as_pythons() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    assert differences.read() == tomllib.loads(differences.FILE.read_text())


def test_ids_are_unique() -> None:
    assert len({entry["id"] for entry in ENTRIES}) == len(ENTRIES)


def test_every_value_of_every_profile_is_measured() -> None:
    """Each departure of a profile from the original is some entry's flip, but for what ends or draws an answer."""
    flips = {(entry["choice"], getattr(differences.flipped(entry), entry["choice"])) for entry in MEASURED}
    for profile in PROFILES.values():
        for field in fields(Profile)[1:]:
            value = getattr(profile, field.name)
            if value == getattr(LLAVA, field.name) or field.name in UNSEEN:
                continue
            if value in ("feature_layer_or_count_less_one", "pad_then_resize"):
                continue  # what count_less_one and by_file are for most files
            assert (field.name, value) in flips


SEEN = [entry for entry in MEASURED if entry["choice"] not in differences.TEXT]


@pytest.mark.parametrize("entry", SEEN, ids=lambda entry: entry["id"])
def test_the_figures_are_what_is_measured(entry: dict[str, Any]) -> None:
    marked = entry["choice"] == "exif"
    effect, tokens = differences.embeddings(entry["model"], differences.flipped(entry), marked)
    assert tokens == entry.get("tokens")
    if tokens is None:
        assert effect == pytest.approx(entry["effect"], rel=0.02, abs=1e-6)


def test_every_difference_says_what_it_does_to_the_answers() -> None:
    for entry in MEASURED:
        assert ("answers" in entry) is (entry["model"] == "demo")
        assert ("answers-note" in entry) is (entry["model"] != "demo")


def test_the_table_has_a_row_for_each() -> None:
    lines = differences.table().splitlines()
    assert len(lines) == len(ENTRIES) + 2
    assert all(line.count(" | ") == len(differences.HEADER) - 1 for line in lines)
