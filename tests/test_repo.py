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

# The layers, the lowest first: a module imports from its own layer and from those below, never from above.
# It belongs to the longest name here that its own begins with; "tinyllava" alone is the list of public names.
LAYERS = [
    {"tinyllava.errors", "tinyllava.names", "tinyllava.version", "tinyllava.progress", "tinyllava.demo"},
    {"tinyllava.profile", "tinyllava.tap"},
    {"tinyllava.quant"},
    {"tinyllava.files"},
    {"tinyllava.ops", "tinyllava.weights"},
    {"tinyllava.text"},
    {"tinyllava.vision", "tinyllava.language"},
    {"tinyllava.generate", "tinyllava.offload"},
    {"tinyllava.llava"},
    {"tinyllava.study.tap_names", "tinyllava.study.inspect", "tinyllava.convert"},
    {"tinyllava.study.trace"},
    {"tinyllava.study"},
    {"tinyllava"},
    {"tinyllava.commands"},
    {"tinyllava.cli"},
    {"tinyllava.__main__"},
]
RANK = {prefix: i for i, layer in enumerate(LAYERS) for prefix in layer}
# What a folder's modules may not import, though the layers would let them.
BACKENDS = ("tinyllava.ops.reference", "tinyllava.ops.cpu", "tinyllava.ops.gpu")
FORBIDDEN = {
    "tinyllava.ops.cpu": ("tinyllava.ops.gpu",),
    "tinyllava.ops.gpu": ("tinyllava.ops.cpu",),
    "tinyllava.vision": (*BACKENDS, "tinyllava.language"),
    "tinyllava.language": (*BACKENDS, "tinyllava.vision"),
    "tinyllava.text": BACKENDS,
    # Converting runs no model: of vision and language it may read the configurations.
    "tinyllava.convert": ("tinyllava.ops", "tinyllava.weights", "tinyllava.generate", "tinyllava.llava"),
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_LINE_LENGTH = 115


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def rank(module: str) -> int:
    fits = [prefix for prefix in RANK if prefix == module or (prefix != "tinyllava" and within(module, prefix))]
    assert fits, f"name the layer of {module} in LAYERS"
    return RANK[max(fits, key=len)]


def within(module: str, folder: str) -> bool:
    return module == folder or module.startswith(folder + ".")


def imports(module: str) -> set[str]:
    """The modules of tinyllava that one imports anywhere: inside functions and for type checkers alone, too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are written with the full name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            if any(f"{node.module}.{alias.name}" in MODULES for alias in node.names):
                found.discard(node.module)  # `from tinyllava.study import tap_names` takes nothing of the package
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def test_the_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    tops = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in tops if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert not {name for name in imports(module) if rank(name) > rank(module)}


@pytest.mark.parametrize("module", MODULES)
def test_what_a_folder_may_not_import(module: str) -> None:
    forbidden = [name for folder, names in FORBIDDEN.items() if within(module, folder) for name in names]
    assert not {name for name in imports(module) if any(within(name, other) for other in forbidden)}


def test_no_module_imports_itself_by_way_of_others() -> None:
    arrows = {module: imports(module) for module in MODULES}
    while ends := {module for module, names in arrows.items() if not names}:  # they import nothing that is left
        arrows = {module: names - ends for module, names in arrows.items() if module not in ends}
    begins = set().union(*arrows.values())  # not those that only import from a circle
    assert not {module: names for module, names in arrows.items() if module in begins}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    assert max(map(len, text.split("\n"))) <= MAX_LINE_LENGTH
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
