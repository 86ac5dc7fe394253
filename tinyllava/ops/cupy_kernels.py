"""The CUDA kernels in cuda/*.cu: compiled when first needed, and launched by name.

CuPy keeps what it has compiled in a folder of its own (~/.cupy), so that only the first run on a machine waits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from tinyllava import ops

FOLDER = Path(__file__).parent / "cuda"
FILES = ("common.cu", "blocks.cu", "matvec.cu", "rows.cu", "attention_token.cu", "attention.cu")
STATIC_SHARED = 48 << 10  # bytes of shared memory that a block gets without asking


def source() -> str:
    """All kernels as one text: what one file defines, the files after it use."""
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in FILES)


class Kernels:
    """The compiled kernels of one device."""

    def __init__(self, code: str | None = None) -> None:
        module = cupy.RawModule(code=code or source(), options=("--std=c++17",), backend="nvrtc")
        self._function = cache(module.get_function)
        attributes = cupy.cuda.Device().attributes
        self.processors: int = attributes["MultiProcessorCount"]
        self._most_shared: int = attributes["MaxSharedMemoryPerBlockOptin"]

    def launch(
        self, name: str, grid: int | tuple[int, ...], threads: int, *arguments: Any, shared: int = 0
    ) -> None:
        """Start a kernel on a grid of blocks of ``threads``, each with ``shared`` bytes of shared memory.

        Whole numbers go as C ints, floats as C floats, arrays as pointers and None as a null pointer; what has
        a NumPy type keeps it.
        """
        function = self._function(name)
        if shared > STATIC_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = self._most_shared - function.shared_size_bytes
        blocks = grid if isinstance(grid, tuple) else (grid,)
        function(blocks, (threads,), tuple(_as_c(value) for value in arguments), shared_mem=shared)


def _as_c(value: Any) -> Any:
    if type(value) is int or type(value) is bool:
        return np.int32(value)
    if type(value) is float:
        return np.float32(value)
    return np.uint64(0) if value is None else value


@cache
def kernels() -> Kernels:
    """The kernels, compiled now if they have not been."""
    ops.on_compile()
    return Kernels()
