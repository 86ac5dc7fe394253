"""The same numbers on processors without AVX-512 and without AVX2, and from the cache of an earlier process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
x86_only = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 features")
OLDER = {
    "x86-64-v3": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2,+ssse3,+popcnt,-avx512f",
    "x86-64": "+sse2",
}


def start(words: list[str], cache: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **variables}
    command, pipe = [sys.executable, *words], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def output(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    return out


def run(words: list[str], cache: Path, **variables: str) -> str:
    return output(start(words, cache, **variables))


@x86_only
@pytest.mark.timeout(600)
def test_parity_on_older_processors(tmp_path: Path) -> None:
    """All at once: each compiles for a minute, on one core."""
    words = ["-m", "pytest", "-q", "tests/ops/test_parity.py", "-k", "linear or attention or levels"]
    processes = [
        start(words, tmp_path / name, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
        for name, features in OLDER.items()
    ]
    for out in [output(process) for process in processes]:
        assert "passed" in out and "failed" not in out


COMPILES = """
import numpy as np
from tinyllava.ops.compiling import watch
from tinyllava.ops.select import select
with watch(lambda: print("compiling")):
    backend = select("numba", threads=1)
    print(backend.swiglu(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)).sum())
"""


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert run(["-c", COMPILES], tmp_path).split()[0] == "compiling"
    assert run(["-c", COMPILES], tmp_path).split()[0] != "compiling"


SAME_BITS = """
import hashlib
import numpy as np
import tinyllava
from tinyllava.quant.quantize import quantize
llava = tinyllava.load(backend="numba")
prompt, steps = llava.logits(range(3, 120)), tinyllava.load(backend="numba", n_batch=1).logits(range(3, 8))
picture = llava.encode_image("tinyllava/demo/demo.png")
weights = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
blocks = [quantize(kind, weights) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")]
for array in (prompt, steps, picture, *blocks):
    print(hashlib.sha256(np.ascontiguousarray(array)).hexdigest())
"""


@pytest.mark.timeout(600)
def test_the_process_that_compiles_computes_what_later_ones_do(tmp_path: Path) -> None:
    assert run(["-c", SAME_BITS], tmp_path) == run(["-c", SAME_BITS], tmp_path)


def test_another_version_of_any_file_here_is_compiled_again(tmp_path: Path) -> None:
    run(["-c", COMPILES], tmp_path)
    older = "import tinyllava.ops.cpu.compile as c; c.STAMP = (('llvm.py', 0.0, 0),)\n" + COMPILES
    assert run(["-c", older], tmp_path).split()[0] == "compiling"


SPECIALIZED = """
from tinyllava.ops.compiling import watch
from tinyllava.ops.cpu.compile import kernel, specialize, task

COMBINE, FACTOR = max, 0  # which the copies replace

@kernel
def total(x, y):
    return x + y

@kernel
def product(x, y):
    return x * y

def scaled(x, y):
    return FACTOR * COMBINE(x, y)

scaled_total = kernel(specialize(scaled, "scaled_total", COMBINE=total, FACTOR=10))
scaled_product = kernel(specialize(scaled, "scaled_product", COMBINE=product, FACTOR=100))

def chunk_of(args, chunk, thread_id):
    COMBINE(args, chunk + thread_id)

tasks = [task(specialize(chunk_of, f"chunk_{c.__name__}", COMBINE=c)) for c in (total, product)]

if __name__ == "__main__":
    with watch(lambda: print("compiling")):
        print(scaled_total(3, 4), scaled_product(3, 4), tasks[0].address != tasks[1].address)
"""


def test_specialized_copies_are_found_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "copies.py").write_text(SPECIALIZED)
    for first_word in (["compiling"], []):
        words = run([str(tmp_path / "copies.py")], tmp_path, PYTHONPATH=str(ROOT)).split()
        assert words == [*first_word, "70", "1200", "True"]
