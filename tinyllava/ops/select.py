"""Which backend computes: the choice by name, or the fastest that is here."""

from __future__ import annotations

from tinyllava.errors import UsageError
from tinyllava.ops import Ops

BACKENDS = ("numpy", "numba", "cupy")
HOST = "numba"  # the fastest on the CPU
DEVICES = ("cupy",)  # those with a memory of their own, which offload.py shares out; "auto" tries the first


def select(name: str = "auto", *, dtype: str = "float32", threads: int | None = None) -> Ops:
    """The backend called ``name``: "numpy" (the reference), "numba", "cupy" (a GPU), or "auto".

    "auto" is the fastest that is here: cupy if CuPy imports and a device answers, else numba; for float64, numpy.
    ``threads`` bounds the backend's own threads; None means one for each physical core.
    Raises UsageError for a name or a dtype that does not exist, or that do not go together, and if "cupy" cannot
    be had.
    """
    if dtype not in ("float32", "float64"):
        raise UsageError("dtype", repr(dtype), wanted="float32 or float64")
    if threads is not None and threads < 1:
        raise UsageError("threads", str(threads), wanted="1 or more")
    if name == "auto" and dtype == "float32":
        try:
            return select(DEVICES[0])
        except UsageError:  # its package is not installed, or no device is there
            name = HOST
    name = "numpy" if name == "auto" else name
    if name not in BACKENDS:
        raise UsageError("backend", repr(name), wanted=" or ".join(("auto", *BACKENDS)))
    if name == "numpy":
        from tinyllava.ops.reference import NumpyOps

        return NumpyOps(dtype, threads)
    if dtype != "float32":
        hint = "The numpy backend computes in float64"
        raise UsageError(f"backend {name}", f"dtype {dtype}", wanted="float32", hint=hint)
    if name == "numba":
        from tinyllava.ops.cpu.ops import NumbaOps

        return NumbaOps(threads)
    from tinyllava.ops.gpu.device import open_cupy

    open_cupy()
    from tinyllava.ops.gpu.ops import CupyOps

    return CupyOps()
