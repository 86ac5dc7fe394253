"""Profiles are values, and a wrong name says which exist."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

import tinyllava
from tinyllava.errors import UsageError
from tinyllava.profile import PROFILES, Profile, profile


def test_profiles_by_name() -> None:
    assert list(PROFILES) == ["llava", "hf", "llava-cli", "mtmd"]
    assert profile() is PROFILES["llava"]
    assert all(name == value.name for name, value in PROFILES.items())
    with pytest.raises(UsageError, match="profile: 'hf2'; wanted llava"):
        profile("hf2")


def test_a_profile_cannot_be_changed() -> None:
    name = fields(profile())[1].name
    with pytest.raises(FrozenInstanceError):
        setattr(profile(), name, "other")


def test_nothing_asks_which_profile_it_is_in() -> None:
    """The code reads a profile's choices; its name is for people only."""
    package = Path(tinyllava.__file__).parent
    asking = re.compile(r"profile\.name\s*(==|!=|in\b)|compat\s*(==|!=|in\b)")
    assert [path.name for path in package.rglob("*.py") if asking.search(path.read_text())] == []


def test_every_choice_is_made_by_some_profile_and_read_somewhere() -> None:
    package = Path(tinyllava.__file__).parent
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "profile.py")
    for field in fields(Profile)[1:]:
        assert f".{field.name}" in code, field.name
        values = {getattr(value, field.name) for value in PROFILES.values()}
        assert len(values) > 1 or field.name == "anyres_pad_colour"


# Each value as it stands in the pinned source that golden/known_differences.toml names.
DRAWN = {
    "llava": {"temperature": 0.2, "top_k": 50, "top_p": 1.0, "min_p": 0.0},
    "hf": {"temperature": 0.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0},
    "llava-cli": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "mtmd": {"temperature": 0.2, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_run_samples_by_its_profiles_defaults(name: str) -> None:
    from tinyllava.commands.run import read_sampling
    from tinyllava.commands.run_options import make_parser
    from tinyllava.text.sampling import Sampling

    def read(*words: str) -> Sampling:
        return read_sampling(make_parser("run").parse(["--compat", name, *words]))

    assert read() == Sampling(**DRAWN[name])
    chosen = read("--temp", "1.5", "--top-k", "0", "--min-p", "0.1", "--seed", "3")
    assert chosen == Sampling(**{**DRAWN[name], "temperature": 1.5, "top_k": 0, "min_p": 0.1, "seed": 3})
