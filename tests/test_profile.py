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
