"""Whether there is a GPU that CuPy can use, in one line if not; and its memory, as ops.DeviceMemory.

CuPy is imported here and nowhere earlier, so that a machine without it or without a driver loses no time.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinyllava.errors import UsageError, in_gib
from tinyllava.ops.gpu.constants import FORMATS

if TYPE_CHECKING:
    from tinyllava.files.gguf import Tensor

BACKEND = "backend cupy"
INSTALL = "Install it with: pip install 'tinyllava[gpu]'"
OLDEST = 80  # compute capability 8.0 (Ampere): the first with cp.async and the mma shapes of cuda/attention.cu


def open_cupy() -> Any:
    """The module ``cupy``, with a device that answers. UsageError, in one line, that says what is missing."""
    if importlib.util.find_spec("cupy") is None:
        raise UsageError(BACKEND, "CuPy is not installed", hint=INSTALL)
    if not has_driver():
        raise _no_driver()
    cupy = _import()
    _check_driver(cupy)
    _check_device(cupy)
    _check_libraries(cupy)
    return cupy


def has_driver() -> bool:
    """Whether the system finds the driver's library. Checked first, as importing CuPy takes half a second."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _import() -> Any:
    """CuPy, which may be there and yet not load. Its own message has twenty lines: the last cause is the one."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cupy = importlib.import_module("cupy")
    except Exception as error:  # ImportError, and whatever a broken installation raises
        cause = error.__cause__ or error
        raise UsageError(BACKEND, f"CuPy cannot be imported ({_short(cause)})", hint=INSTALL) from None
    if any("multiple CuPy packages" in str(warning.message) for warning in caught):
        hint = "Uninstall all packages whose names begin with cupy, then install one"
        raise UsageError(BACKEND, "CuPy is installed more than once", hint=hint)
    return cupy


def _check_driver(cupy: Any) -> None:
    """The driver must know the CUDA that CuPy was made for. Minor versions do not matter."""
    driver, wanted = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    if driver == 0:
        raise _no_driver()
    if driver // 1000 < wanted // 1000:
        found = f"the driver is for CUDA {_version(driver)}, CuPy for CUDA {_version(wanted)}"
        hint = f"Update the driver, or install cupy-cuda{driver // 1000}x in the other's place"
        raise UsageError(BACKEND, found, wanted="a driver that is not older", hint=hint)


def _check_libraries(cupy: Any) -> None:
    """CuPy compiles and multiplies with CUDA's own libraries, of the version it was made for."""
    version = cupy.cuda.runtime.runtimeGetVersion() // 1000
    try:
        cupy.cuda.nvrtc.getVersion()
        cupy.cuda.device.get_cublas_handle()
    except Exception as error:  # RuntimeError or ImportError, by CuPy's version
        found = f"CuPy is for CUDA {version}, whose libraries are not here ({_short(error)})"
        hint = f"pip install 'cupy-cuda{version}x[ctk]' brings them; or install the CuPy for this machine's CUDA"
        raise UsageError(BACKEND, found, hint=hint) from None


def _check_device(cupy: Any) -> None:
    """At least one device, new enough, that does some work."""
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError:  # no device counts as an error
        count = 0
    if count == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f"CUDA_VISIBLE_DEVICES is '{visible}'"
        raise UsageError(BACKEND, "no CUDA device is visible", hint=hint)
    capability = int(cupy.cuda.Device().compute_capability)
    if capability < OLDEST:
        old, oldest = (f"{n // 10}.{n % 10}" for n in (capability, OLDEST))
        raise UsageError(BACKEND, f"a GPU of compute capability {old}", wanted=f"{oldest} or more")
    try:
        cupy.zeros(1).get()
    except Exception as error:  # whatever the driver says: in use by another, out of memory, to be reset
        raise UsageError(BACKEND, f"the GPU does not answer ({_short(error)})") from None


# ---- memory


def free_bytes() -> int:
    """Bytes of the device's memory that can still be had, CuPy's own reserve included."""
    cupy = importlib.import_module("cupy")
    free, _total = cupy.cuda.runtime.memGetInfo()
    return int(free) + int(cupy.get_default_memory_pool().free_bytes())


def held_bytes(tensor: Tensor) -> int:
    """Bytes on the GPU: a vector in float32, a matrix in its blocks if a kernel reads them, else in float16."""
    if len(tensor.shape) == 1:
        return 4 * tensor.n_elements
    return tensor.nbytes if tensor.type in FORMATS else 2 * tensor.n_elements


def guard_memory(hint: Callable[[int], str]) -> None:
    """From now on, when the device's memory is used up, raise our own line.

    ``hint`` says what to do, given how many bytes were missing.
    """
    cupy = importlib.import_module("cupy")
    pool = cupy.get_default_memory_pool()

    def allocate(size: int) -> Any:
        try:
            return pool.malloc(size)
        except cupy.cuda.memory.OutOfMemoryError:
            free = free_bytes()
            found = f"{in_gib(size)} more are needed, {in_gib(free)} are free"
            raise UsageError("memory of the GPU", found, hint=hint(max(size - free, 1))) from None

    cupy.cuda.set_allocator(allocate)


def _no_driver() -> UsageError:
    return UsageError(BACKEND, "no CUDA driver here", wanted="NVIDIA's driver", hint="Without a GPU: -ngl 0")


def _version(number: int) -> str:
    """12040 -> 12.4"""
    return f"{number // 1000}.{number % 1000 // 10}"


def _short(error: BaseException) -> str:
    """An error's first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =")]
    return lines[0][:200] if lines else type(error).__name__
