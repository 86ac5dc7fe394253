"""What is missing for a GPU, each in one line that says what to do: with a fake CuPy, so that it runs anywhere."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.ops.fake_cupy import GIB, install
from tinyllava.errors import UsageError, in_gib
from tinyllava.ops.gpu.device import free_bytes, guard_memory, has_driver, held_bytes, open_cupy
from tinyllava.ops.select import select


def refused() -> str:
    with pytest.raises(UsageError) as caught:
        select("cupy")
    return str(caught.value)


def test_a_card_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch)
    assert open_cupy() is fake
    assert free_bytes() == 81 * GIB  # the device's and CuPy's own


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert refused() == "backend cupy: CuPy is not installed. Install it with: pip install 'tinyllava[gpu]'."
    assert select("auto").name == "numba"


def test_without_a_driver_cupy_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr("tinyllava.ops.gpu.device.has_driver", lambda: False)
    monkeypatch.setattr("tinyllava.ops.gpu.device._import", lambda: pytest.fail("imported"))
    wanted = "backend cupy: no CUDA driver here; wanted NVIDIA's driver. Without a GPU: -ngl 0."
    assert refused() == wanted
    monkeypatch.undo()
    install(monkeypatch, driver=0)  # a library that stands for one, as some containers have
    assert refused() == wanted


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"driver": 12040},
            "the driver is for CUDA 12.4, CuPy for CUDA 13.0; wanted a driver that is not older. "
            "Update the driver, or install cupy-cuda12x in the other's place.",
        ),
        ({"count": 0}, "no CUDA device is visible"),
        ({"capability": "75"}, "a GPU of compute capability 7.5; wanted 8.0 or more"),
    ],
)
def test_a_driver_or_a_card_that_will_not_do(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install(monkeypatch, **settings)
    assert refused() == f"backend cupy: {message}"
    assert select("auto").name == "numba"


def test_cards_that_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    install(monkeypatch, count=0)
    assert refused() == "backend cupy: no CUDA device is visible. CUDA_VISIBLE_DEVICES is ''."


@pytest.mark.parametrize("part", ["nvrtc", "cublas"])
def test_a_cupy_for_another_cuda(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch).broken = part
    assert refused() == (
        f"backend cupy: CuPy is for CUDA 13, whose libraries are not here (CuPy failed to load lib{part}.so.13: "
        f"OSError: lib{part}.so.13: cannot open). pip install 'cupy-cuda13x[ctk]' brings them; or install the "
        "CuPy for this machine's CUDA."
    )


def test_a_card_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch).broken = "device"
    wanted = "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy"
    assert refused() == f"backend cupy: the GPU does not answer ({wanted})"


LONG = """
================================================================
Failed to import CuPy.

If you installed CuPy via wheels (cupy-cudaXXX), make sure that the package matches with the version of CUDA.
================================================================
"""


@pytest.mark.parametrize(
    "code, message",
    [
        (
            f"raise ImportError('''{LONG}''') from ImportError('libcudart.so.12: cannot open shared object file')",
            "CuPy cannot be imported (libcudart.so.12: cannot open shared object file). "
            "Install it with: pip install 'tinyllava[gpu]'.",
        ),
        (
            "import warnings; warnings.warn('CuPy may not function: multiple CuPy packages are installed')",
            "CuPy is installed more than once. "
            "Uninstall all packages whose names begin with cupy, then install one.",
        ),
    ],
)
def test_a_cupy_that_is_broken(code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr("tinyllava.ops.gpu.device.has_driver", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused() == f"backend cupy: {message}"
    sys.modules.pop("cupy", None)


def test_the_driver_is_asked_for_by_the_systems_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("ctypes.CDLL", asked.append)
    for platform, name in (("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")):
        monkeypatch.setattr(sys, "platform", platform)
        assert has_driver()
        assert asked.pop() == name

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert not has_driver()


def test_memory_that_runs_out_while_running_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, missing = install(monkeypatch, free=GIB), []

    def hint(size: int) -> str:
        missing.append(size)
        return "-ngl 7 fits"

    guard_memory(hint)
    assert fake.allocate(GIB) == "memory"
    with pytest.raises(UsageError) as caught:
        fake.allocate(5 * GIB)
    assert str(caught.value) == "memory of the GPU: 5.0 GiB more are needed, 2.0 GiB are free. -ngl 7 fits."
    assert missing == [3 * GIB]


TENSORS = [("Q4_K", (2, 256), 288), ("Q2_K", (2, 256), 1024), ("F16", (8,), 32)]


@pytest.mark.parametrize("kind, shape, size", TENSORS)
def test_what_a_tensor_takes(kind: str, shape: tuple[int, ...], size: int) -> None:
    """By hand: 144 bytes for 256 numbers; no kernel, so 2 bytes for each; a vector, 4 for each."""
    tensor = SimpleNamespace(type=kind, shape=shape, nbytes=288, n_elements=int(np.prod(shape)))
    assert held_bytes(tensor) == size  # type: ignore[arg-type]


def test_sizes_for_people() -> None:
    sizes = (13 * GIB, GIB // 2, 100 << 20, 1)
    assert [in_gib(size) for size in sizes] == ["13.0 GiB", "0.5 GiB", "100 MiB", "0 MiB"]
