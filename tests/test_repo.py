"""The house rules as tests: what lies where, who imports whom, how long things may get, what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "tinyllava").rglob("*.py"))
TOP_LEVEL = {"pyproject.toml", "tinyllava", "tests", "golden", "README.md", "LICENSE"}

# Lower layers may not import from higher ones. A module belongs to the longest prefix that fits its name.
LAYERS = [
    {"tinyllava.errors", "tinyllava.names", "tinyllava.trace", "tinyllava.profile", "tinyllava.demo"},
    {"tinyllava.quant"},
    {"tinyllava.files"},
    {"tinyllava.ops", "tinyllava.weights"},
    {"tinyllava.vision", "tinyllava.language", "tinyllava.text"},
    {"tinyllava.llava", "tinyllava.generate", "tinyllava.offload", "tinyllava.taps"},
    {"tinyllava.study", "tinyllava.convert"},
    {"tinyllava.commands", "tinyllava.cli", "tinyllava.__main__"},
]
# What looks upwards on purpose, from inside a function: a method that stands for a module of a higher layer.
TRACING = "tinyllava.study.trace"
UPWARD = {"tinyllava.llava": {TRACING, f"{TRACING}.trace", f"{TRACING}.Trace"}}
RANK = {prefix: i for i, layer in enumerate(LAYERS) for prefix in layer}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank(module: str) -> int | None:
    fits = [prefix for prefix in RANK if module == prefix or module.startswith(prefix + ".")]
    return RANK[max(fits, key=len)] if fits else None


def imports(path: Path) -> set[str]:
    """The tinyllava modules that a file imports, those for type checkers alone excepted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("tinyllava.")}


def test_the_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    tops = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in tops if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    own = rank(module_name(path))
    if own is None:
        assert module_name(path) == "tinyllava", "name the module's layer in LAYERS"
        return
    upward = {name for name in imports(path) if (rank(name) or 0) > own}
    assert not upward - UPWARD.get(module_name(path), set())


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_models_import_no_backend(path: Path) -> None:
    if path.relative_to(ROOT).parts[1] not in ("vision", "language", "text"):
        return
    backends = ("tinyllava.ops.reference", "tinyllava.ops.cpu", "tinyllava.ops.gpu")
    assert not {name for name in imports(path) if name.startswith(backends)}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_public_functions_and_classes_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_tinyllava_loads_no_heavy_package() -> None:
    heavy = {"numpy", "numba", "llvmlite", "cupy", "PIL", "gguf", "torch", "transformers", "hypothesis"}
    assert not loaded_after("import tinyllava") & heavy
    assert not loaded_after("import tinyllava.cli") & heavy


def test_a_run_never_imports_what_only_makes_goldens() -> None:
    code = "import tinyllava; tinyllava.load; tinyllava.Tokenizer; tinyllava.Sampling; tinyllava.open_gguf"
    forbidden = {"torch", "transformers", "sentencepiece", "llama_cpp", "gguf", "safetensors", "regex"}
    assert not loaded_after(code) & forbidden


def test_nothing_is_left_undone() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|raise NotImplementedError)\b")
    assert not [path.name for path in SOURCES if marks.search(path.read_text(encoding="utf-8"))]
