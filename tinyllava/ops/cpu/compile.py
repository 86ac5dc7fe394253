"""How kernels are compiled: once for each processor and version of ops/, then read from Numba's cache.

Numba's cache notices when the file of a kernel changes, but not when a function that it calls does, be it a
kernel of another file or an intrinsic that writes LLVM code. So every cached kernel here carries a stamp of all
Python files of ops/ and quant/. (Numba has no public way to say that; where the attribute is missing, its own
stamp remains.) Kernels must be functions of a module: Numba does not find closures over other kernels in its
cache.

Floating-point arithmetic is strict (no ``fastmath``): LLVM may neither fuse a product with a sum nor reorder sums.
With such freedom the numbers would depend on how often a function has been optimised: a kernel that another one
calls exists twice, by itself and as a copy in its caller's module that is optimised once more, and the dynamic
linker takes whichever was loaded first. That is another one in the process that compiles than in those that read
the cache. So sums that shall use vector registers, and fused products, are written out (simd/).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any

from numba import njit, types
from numba.core import event
from numba.core.ccallback import CFunc

from tinyllava.ops import compiling

TASK = types.void(types.int64, types.int64, types.int64)


def _stamp() -> tuple[tuple[str, float, int], ...]:
    ops = Path(__file__).parents[1]
    files = sorted([*ops.rglob("*.py"), *ops.with_name("quant").glob("*.py")])  # fields' offsets are constants
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)


STAMP = _stamp()


def cached(function: Any) -> Any:
    """Let a dispatcher or C function use the cache, if there is a folder that can be written."""
    try:
        function.enable_caching()
    except RuntimeError:  # no place for it: compile at each start
        return function
    file: Any = getattr(function._cache, "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = STAMP
    return function


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a function that other kernels, or Python, call; it releases the GIL."""
    return cached(njit(nogil=True, error_model="numpy", boundscheck=False)(function))


placeholder: Any = None  # what a module's names mean that ``specialize`` gives another meaning


def specialize(function: Callable[..., Any], name: str, **names: Any) -> Callable[..., Any]:
    """A copy of a plain function, called ``name``, in which some of its module's names mean something else.

    One loop then serves many variants, and each is compiled as if it had been written out:

        def row(w, x):  # a dot product; UNPACK is some kernel of this module
            return dot(UNPACK(w), x)

        row_q4_0 = kernel(specialize(row, "row_q4_0", UNPACK=unpack_q4_0))
        row_q8_0 = kernel(specialize(row, "row_q8_0", UNPACK=unpack_q8_0))

    A kernel passed as an argument or held by a closure would defeat Numba's disk cache; module-level names do not.
    The cache files a function under its module, name and first line, so each copy needs a name of its own. A copy
    knows the names that its module has when it is made: make it below everything that the function uses.
    """
    assert isinstance(function, FunctionType)
    copy = FunctionType(function.__code__, {**function.__globals__, **names}, name, function.__defaults__)
    copy.__module__, copy.__qualname__, copy.__doc__ = function.__module__, name, function.__doc__
    return copy


class Task:
    """A function task(arguments, chunk, thread_id), compiled or read from the cache when first needed."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.python = function
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self) -> Any:
        """The C function."""
        options = {"nopython": True, "error_model": "numpy", "boundscheck": False}
        function = cached(CFunc(self.python, (TASK.args, TASK.return_type), {}, options))
        function.compile()
        return function

    @cached_property
    def address(self) -> int:
        """Where its machine code stands."""
        return int(self.compiled.address)


task = Task  # the decorator


class _Report(event.Listener):
    """Tells whoever waits that something has to be compiled."""

    def on_start(self, event: Any) -> None:
        del event
        compiling.announce()

    def on_end(self, event: Any) -> None:
        del event


event.register("numba:run_pass", _Report())  # type: ignore[no-untyped-call]
