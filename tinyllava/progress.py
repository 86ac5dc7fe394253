"""The callback that long work reports its progress to."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """The callback of a caller that does not want to know."""
