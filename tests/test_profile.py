"""Profiles are values, and a wrong name says which exist."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from tinyllava.errors import UsageError
from tinyllava.profile import PROFILES, profile


def test_profiles_by_name() -> None:
    assert profile() is PROFILES["llava"]
    assert all(name == value.name for name, value in PROFILES.items())
    with pytest.raises(UsageError, match="profile: 'hf2'; wanted llava"):
        profile("hf2")


def test_a_profile_cannot_be_changed() -> None:
    name = fields(profile())[1].name
    with pytest.raises(FrozenInstanceError):
        setattr(profile(), name, "other")
