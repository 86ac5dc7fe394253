"""Taps: named places in the forward passes where a value can be observed.

A forward pass is written once, with lines such as

    q = tap("attn_q_rope", ops.rope(q, ...))        # (n_tokens, n_head, head_dim)

A tap passes its value through. The null tap does nothing else; a :class:`Recorder` keeps a copy under
the tap's full name, e.g. ``llm.blk.3.attn_q_rope``. Which names exist, with their shapes, is the
registry in study/tap_names.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinyllava.errors import UsageError

Array = npt.NDArray[Any]
Taps = Mapping[str, tuple[str, ...]]  # names below a prefix, each with its value's shape in letters


class Tap(Protocol):
    """What the forward passes ask of a tap."""

    def __call__(self, name: str, value: Array) -> Array:
        """Return ``value`` itself, unchanged."""
        ...

    def at(self, prefix: str) -> Tap:
        """The same tap, one level down: ``tap.at("blk.3")("attn_q", q)`` is named ``blk.3.attn_q``."""
        ...

    def wants(self, name: str) -> bool:
        """Whether ``name`` is observed. The forward pass asks before it computes what only a tap needs."""
        ...


class NullTap:
    """The tap of a run that is not observed: it does nothing. A call costs about 0.1 µs."""

    def __call__(self, name: str, value: Array) -> Array:  # noqa: ARG002 (a recorder uses the name)
        return value

    def at(self, prefix: str) -> NullTap:  # noqa: ARG002
        return self

    def wants(self, name: str) -> bool:  # noqa: ARG002
        return False


NULL: Tap = NullTap()


class Recorder:
    """A tap that keeps what passes: ``recorder.values[full_name]`` is a list, one array for each firing.

    ``only`` holds shell patterns on full names (``"llm.blk.0.*"``); None keeps everything. ``copy`` turns
    a value into the NumPy array that is kept; a GPU backend gives its own.
    """

    def __init__(
        self,
        only: list[str] | None = None,
        *,
        copy: Callable[[Array], Array] = np.array,
        _prefix: str = "",
        _values: dict[str, list[Array]] | None = None,
    ) -> None:
        self.only = only
        self.copy = copy
        self.prefix = _prefix
        self.values: dict[str, list[Array]] = {} if _values is None else _values

    def __call__(self, name: str, value: Array) -> Array:
        if self.wants(name):
            self.values.setdefault(self.prefix + name, []).append(self.copy(value))
        return value

    def at(self, prefix: str) -> Recorder:
        return Recorder(self.only, copy=self.copy, _prefix=f"{self.prefix}{prefix}.", _values=self.values)

    def wants(self, name: str) -> bool:
        full = self.prefix + name
        return self.only is None or any(fnmatchcase(full, pattern) for pattern in self.only)

    def __getitem__(self, name: str) -> Array:
        """The one value recorded under ``name``. UsageError if it fired never or more than once."""
        values = self.values.get(name, [])
        if len(values) != 1:
            raise UsageError(f"tap {name}", f"recorded {len(values)} times", wanted="exactly one")
        return values[0]


def of_blocks(taps: Taps, prefix: str, n_block: int) -> dict[str, tuple[str, ...]]:
    """The full names of a forward pass's taps in a model of so many blocks.

    >>> of_blocks({"blk.{i}.q": ("n",), "out": ("n",)}, "llm", 2)
    {'llm.blk.0.q': ('n',), 'llm.blk.1.q': ('n',), 'llm.out': ('n',)}
    """
    names = ((f"{prefix}.{name}", shape, n_block if "{i}" in name else 1) for name, shape in taps.items())
    return {name.replace("{i}", str(i)): shape for name, shape, n in names for i in range(n)}
