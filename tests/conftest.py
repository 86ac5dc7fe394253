"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import settings

# A shared machine may take seconds over what takes milliseconds: time is bounded by pytest-timeout alone.
settings.register_profile("tinyllava", deadline=None)
settings.load_profile("tinyllava")
