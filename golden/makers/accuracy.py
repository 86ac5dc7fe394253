"""llama.cpp's rounding errors on the files of golden/accuracy.py."""

from pathlib import Path

from golden.accuracy import CASES, PICTURE, TOWER, Values, error, ids_of, path_of, truth_of, update
from golden.makers.llama_cpp_logits import Model
from golden.makers.mtmd import Mtmd
from golden.manifest import versions


def make(folder: str) -> None:
    """accuracy.json's column "llama.cpp": as it comes, its own choice of attention and of the cache's type."""
    errors = {}
    for case in CASES:
        path = path_of(folder, case)
        errors[case] = error(peer(folder, path, case), truth_of(path, case))
    update("llama.cpp", errors, versions("llama-cpp-python", "gguf", "numpy"))


def peer(folder: str, path: Path, case: str) -> Values:
    """llama.cpp's answer."""
    if not case.startswith("picture"):
        model = Model(path, exact=False)
        logits = model.logits(ids_of(case))
        model.close()
        return logits - logits.mean(axis=1, keepdims=True)
    mtmd = Mtmd(folder, TOWER, case.split()[1])
    rows = mtmd.embed_chunks(mtmd.chunks_of(PICTURE))
    mtmd.close()
    return rows
