"""What can be checked of the GPU backend without a GPU: its operations, its layouts and its kernels' source."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinyllava.ops import Ops
from tinyllava.ops.gpu.constants import FILES, FOLDER, FORMATS, field_places, header, source
from tinyllava.ops.gpu.device import OLDEST
from tinyllava.quant.blocks import TYPES

OPS = Path(__file__).parents[2] / "tinyllava" / "ops"


def methods(file: str, name: str) -> dict[str, ast.FunctionDef]:
    """The methods of a class by their names, without importing it."""
    tree = ast.parse((OPS / file).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}


def test_it_has_all_operations_with_the_reference_s_arguments() -> None:
    reference, cupy = methods("reference.py", "NumpyOps"), methods("gpu/ops.py", "CupyOps")
    names = {name for name in vars(Ops) if not name.startswith("_")}
    assert names == {name for name in reference if not name.startswith("_")}
    assert names == {name for name in cupy if not name.startswith("_")}
    for name in names:
        assert ast.unparse(cupy[name].args) == ast.unparse(reference[name].args), name


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_is_uploaded_as_the_kernels_read_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy in CuPy's place: each field of each block is where the header says."""
    kind, n_rows, n_blocks = TYPES[name], 5, 3  # blocks of a row
    raw = np.random.default_rng(1).integers(0, 256, (n_rows, n_blocks * kind.nbytes), np.uint8)
    tensor = SimpleNamespace(type=name, shape=(n_rows, n_blocks * kind.block_size), raw=raw)
    monkeypatch.setitem(sys.modules, "cupy", np)
    monkeypatch.delitem(sys.modules, "tinyllava.ops.gpu.weights", raising=False)
    weights: Any = importlib.import_module("tinyllava.ops.gpu.weights")
    monkeypatch.delitem(sys.modules, "tinyllava.ops.gpu.weights")
    monkeypatch.setattr(weights, "UPLOAD_BYTES", 2 * raw.shape[1])  # two rows at a time
    data = weights.upload(tensor).data
    assert data.nbytes == raw.nbytes
    blocks = raw.reshape(-1).view(kind.dtype)
    for field, (plane, offset, stride) in field_places(kind).items():
        for i in range(len(blocks)):
            start = len(blocks) * plane + i * stride + offset
            assert data[start : start + kind.dtype[field].itemsize].tobytes() == blocks[i][field].tobytes()


def test_each_quantized_format_is_unpacked() -> None:
    text = source("blocks.cu")
    for name in FORMATS:
        if not TYPES[name].is_scalar:
            assert f"F({name})" in header() and f"struct Quant<{name}>" in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("capability", [OLDEST, 90])
def test_the_kernels_compile(capability: int, tmp_path: Path) -> None:
    (tmp_path / "all.cu").write_text(source(), encoding="utf-8")
    command = ["nvcc", "-ptx", f"-arch=sm_{capability}", "-std=c++17", "-Werror", "all-warnings", "all.cu"]
    subprocess.run(command, cwd=tmp_path, check=True)


LAUNCHED = (
    "matvec", "embed", "dequantize", "rope", "append_kv", "advance", "attend_any", "to_float16", "add_bias",
    "layer_norm", "rms_norm", "rms_norm_vec4", "activation", "swiglu", "swiglu_float16",
)  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_is_launched_exists(name: str) -> None:
    assert re.search(rf"KERNEL (__launch_bounds__\(.*?\) )?void {name}\(", source())
    assert f'"{name}"' in (OPS / "gpu/ops.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.cu")), ids=lambda path: path.name)
def test_no_kernel_needs_a_header_and_each_waits_for_the_previous_one(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.name in FILES
    assert "#include" not in text
    kernels = len(re.findall(r"^\s*KERNEL\s", text, re.MULTILINE))
    waits = text.count("await_previous_kernel();")
    assert waits == kernels
