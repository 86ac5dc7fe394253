"""A word to whoever waits: backends compile their kernels at the first run, and that takes some seconds.

    with watch(lambda: print("compiling, once")):
        ...                     # the callback is called at most once, before the first kernel is compiled here
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Callback = Callable[[], None]
_waiting: list[Callback] = []  # those who have not been told yet


@contextmanager
def watch(callback: Callback) -> Iterator[None]:
    """Call ``callback`` if anything is compiled inside, once."""
    _waiting.append(callback)
    try:
        yield
    finally:
        if callback in _waiting:
            _waiting.remove(callback)


def announce() -> None:
    """A backend is about to compile."""
    while _waiting:
        _waiting.pop()()
