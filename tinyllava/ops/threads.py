"""How many threads NumPy's own matrix product uses: the library behind it decides when it is loaded, unless told.

NumPy has no function for it. Its wheels bring OpenBLAS, other builds OpenBLAS or MKL; each has a C function that
sets the number for the whole process. Where none is found (Apple's Accelerate), the environment variables that the
library reads at its start remain (VECLIB_MAXIMUM_THREADS).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

#: Names of (setter, getter): NumPy's wheels, OpenBLAS with 64-bit and 32-bit indices, MKL.
NAMES = (
    ("scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_"),
    ("scipy_openblas_set_num_threads", "scipy_openblas_get_num_threads"),
    ("openblas_set_num_threads64_", "openblas_get_num_threads64_"),
    ("openblas_set_num_threads", "openblas_get_num_threads"),
    ("MKL_Set_Num_Threads", "MKL_Get_Max_Threads"),
)


def processors() -> int:
    """The logical processors that this process may use: more threads than these only wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def physical_cores() -> int:
    """The physical cores that this process may use, at least 1."""
    available = processors()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            ids = [line.split(":")[1] for line in file if line.startswith(("physical id", "core id"))]
        cores = len(set(zip(ids[::2], ids[1::2], strict=True)))  # (socket, core) of each logical processor
    except (OSError, ValueError, IndexError):
        cores = 0
    return max(1, min(available, cores or available))


def limit_blas(threads: int) -> None:
    """Let NumPy's matrix products use ``threads`` threads, in the whole process from now on."""
    found = _functions()
    if found is not None:
        found[0](threads)


def blas_threads() -> int | None:
    """How many threads NumPy's matrix products use; None where the library does not say."""
    found = _functions()
    return None if found is None else int(found[1]())


@cache
def _functions() -> tuple[Any, Any] | None:
    """The library's setter and getter."""
    for library in _libraries():
        for setter, getter in NAMES:
            if hasattr(library, setter) and hasattr(library, getter):
                return getattr(library, setter), getattr(library, getter)
    return None


def _libraries() -> Iterator[ctypes.CDLL]:
    """Where the functions may be: behind NumPy's extension, or in a library that lies beside the package."""
    package = Path(np.__file__).parent
    places = [(package / "_core", "_multiarray_umath*"), (package / "core", "_multiarray_umath*")]
    places += [(package.parent / "numpy.libs", "*blas*"), (package / ".dylibs", "*blas*")]
    for folder, pattern in places:
        for path in folder.glob(pattern):
            try:
                yield ctypes.CDLL(str(path))
            except OSError:  # no library
                continue
