"""The block formats against ggml's own C functions, as llama-cpp-python ships them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllava.quant import TYPES, dequantize

pytestmark = pytest.mark.peers

# Formats of plain numbers have no such function, and the two for activations are never stored.
IN_BLOCKS = [name for name, kind in TYPES.items() if kind.block_size > 1 and kind.dequantize is not None]


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """The library of the llama-cpp-python in TINYLLAVA_PEER_PYTHON, or in the interpreter that runs the tests."""
    python = os.environ.get("TINYLLAVA_PEER_PYTHON", sys.executable)
    find = "import importlib.util as u; s = u.find_spec('llama_cpp'); print(s.origin if s else '')"
    origin = subprocess.run([python, "-c", find], capture_output=True, text=True).stdout.strip()
    library = Path(origin).parent / "lib" / "libggml-base.so"
    if not origin or not library.exists():
        pytest.skip(f"{python} has no llama-cpp-python with its libggml-base.so")
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_random_bytes_give_what_ggml_gives(ggml: ctypes.CDLL, name: str) -> None:
    function = getattr(ggml, "dequantize_row_" + name.lower().replace("_k", "_K"), None)
    if function is None:
        pytest.skip("this version of ggml has no such format")
    raw = np.random.default_rng(25).integers(0, 256, (500, TYPES[name].nbytes), dtype=np.uint8)
    theirs = np.empty((500, TYPES[name].block_size), np.float32)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(raw.ctypes.data, theirs.ctypes.data, theirs.size)
    ours = dequantize(name, raw)
    assert ((ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))).all()
