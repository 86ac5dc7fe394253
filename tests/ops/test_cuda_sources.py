"""What can be told of the CuPy backend without a device: its operations, and what it shares with its kernels."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tinyllava.ops import Ops
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


def constants(text: str) -> dict[str, int]:
    """The whole numbers that a CUDA source names."""
    return {m[1]: int(m[2]) for m in re.finditer(r"^const(?:expr)? int (\w+) = (\d+);", text, re.MULTILINE)}


def python_constants(file: str) -> dict[str, int]:
    """Those that a Python module names, one or several on a line."""
    found: dict[str, int] = {}
    for node in ast.parse((OPS / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            names, values = (n.elts if isinstance(n, ast.Tuple) else [n] for n in (target, node.value))
            for name, value in zip(names, values, strict=True):
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant) and type(value.value) is int:
                    found[name.id] = value.value
    return found


def test_launches_and_kernels_agree() -> None:
    python = python_constants("gpu/ops.py")
    matvec = constants((OPS / "gpu" / "cuda" / "matvec.cu").read_text(encoding="utf-8"))
    token = constants((OPS / "gpu" / "cuda" / "attention_token.cu").read_text(encoding="utf-8"))
    block = constants((OPS / "gpu" / "cuda" / "attention.cu").read_text(encoding="utf-8"))
    assert python["ROWS_OF_BLOCK"] == matvec["WARPS"] * matvec["ROWS"]
    assert python["THREADS"] == 32 * matvec["WARPS"]
    assert python["CHUNK"] == token["CHUNK"] and token["TOKEN_THREADS"] == 128
    assert python["TILE"] == block["TILE"] and python["QUERIES"] == 2 * 16 * block["WARPS_OF_ATTENTION"]


def test_formats_are_the_files() -> None:
    text = (OPS / "gpu" / "cuda" / "blocks.cu").read_text(encoding="utf-8")
    (listed,) = re.findall(r"enum Format \{(.*?)\}", text)
    formats = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", listed)}
    assert formats == {name: TYPES[name].id for name in formats}
    for name, size in re.findall(r"struct Quant<(\w+)> \{\n[^\n]*SIZE = (\d+)", text):
        assert TYPES[name].block_size == int(size)


def kernels() -> dict[str, list[str]]:
    """The kernels' names and their arguments."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((OPS / "gpu" / "cuda").glob("*.cu")))
    found = re.findall(r"KERNEL (?:__launch_bounds__\(.*?\) )?void (\w+)\(\s*(.*?)\) \{", text, re.DOTALL)
    return {name: arguments.split(",") for name, arguments in found}


LAUNCHED = (
    "matvec", "embed", "dequantize", "rope", "append_kv", "advance", "attend_any", "swiglu", "halve", "add_bias",
)  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_is_launched_exists(name: str) -> None:
    assert name in kernels()
    assert f'"{name}"' in (OPS / "gpu/ops.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((OPS / "gpu" / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_no_kernel_needs_a_header_and_each_takes_its_turn(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "#include" not in text
    starts = len(re.findall(r"^\s*(?:KERNEL|extern \"C\" __global__)\s", text, re.MULTILINE))
    assert text.count("take_turn();") == starts
