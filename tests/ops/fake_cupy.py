"""A module ``cupy`` with just what tinyllava asks of CuPy before it computes, for machines without a GPU."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

GIB = 1 << 30


class CUDARuntimeError(RuntimeError):
    """What CuPy raises for an error of the runtime."""


class OutOfMemoryError(MemoryError):
    """What CuPy raises when the device's memory is used up."""


class FakeCupy(ModuleType):
    """CuPy 14 for CUDA 13.0; the driver's version and the device are the arguments."""

    def __init__(
        self, *, driver: int = 13000, count: int = 1, capability: str = "90", free: int = 80 * GIB
    ) -> None:
        super().__init__("cupy")
        self.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
        self.free, self.count, self.broken = free, count, ""
        self.allocate: Any = None
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: 13000,
            getDeviceCount=self._devices,
            memGetInfo=lambda: (self.free, 80 * GIB),
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            nvrtc=SimpleNamespace(getVersion=lambda: self._work("nvrtc")),
            device=SimpleNamespace(get_cublas_handle=lambda: self._work("cublas")),
            Device=lambda: SimpleNamespace(compute_capability=capability),
            set_allocator=lambda allocate: setattr(self, "allocate", allocate),
        )

    def _devices(self) -> int:
        if self.count == 0:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return self.count

    def _work(self, part: str) -> int:
        if self.broken == part:
            raise RuntimeError(f"CuPy failed to load lib{part}.so.13: OSError: lib{part}.so.13: cannot open")
        return 1

    def zeros(self, _n: int) -> Any:
        if self.broken == "device":
            raise CUDARuntimeError("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy")
        return SimpleNamespace(get=lambda: 0.0)

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_bytes=lambda: 1 * GIB, malloc=self._malloc)

    def _malloc(self, size: int) -> str:
        if size > self.free + GIB:
            raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
        return "memory"


def install(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> FakeCupy:
    """Make ``import cupy`` give a fake, on a machine that has a driver."""
    fake = FakeCupy(**settings)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr("tinyllava.ops.gpu.device.has_driver", lambda: True)
    return fake
