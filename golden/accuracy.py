"""How far fast computation is from the truth, ours and llama.cpp's, on the same files.

The truth is the reference in float64 on the file's own weights, by the formula that llama.cpp follows on it, so
that only rounding differs. The error is the 2-norm of the difference over that of the truth: of the logits after
each of 200 random tokens (their mean taken away, which changes no probability), or of a picture's embeddings.

FOLDER also holds smollm2.gguf, a real model (see golden/fetch.py), which reads 200 tokens of English.

    python -m golden.accuracy FOLDER         writes the files, and our errors; where Numba is installed
    python -m golden.make accuracy FOLDER    llama.cpp's errors on them; where llama-cpp-python is
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import tinyllava
from golden.manifest import FOLDER, record, save_json
from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj
from golden.pictures import picture
from tinyllava.convert.requantize import requantize

FILE = FOLDER / "accuracy.json"
LANGUAGE_TYPES = (
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0"),
    *("Q4_K_M", "Q4_1", "Q4_0", "Q3_K_M", "Q2_K"),
)
VISION_TYPES = ("F16", "Q8_0", "Q5_1", "Q4_0")
BY_GGUF = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # written by gguf-py, the others by us
SPEC, TOWER = LANGUAGE["llama_gqa"], VISION["clip_15"]
REAL = "real Q4_1"
CASES = [*(f"text {name}" for name in LANGUAGE_TYPES), *(f"picture {name}" for name in VISION_TYPES), REAL]
TITLES = {"text": "language model", "picture": "image encoder", "real": "SmolLM2-135M"}
IDS = np.random.RandomState([1, SPEC.seed]).randint(0, SPEC.n_vocab, 200).tolist()  # frozen by NEP 19
PICTURE = picture(TOWER.image_size, TOWER.image_size)
TOLERANCE = "none: a fast mode of ours must not be further from the truth than llama.cpp is"

Values = np.ndarray[Any, Any]


def ids_of(case: str) -> list[int]:
    """The 200 tokens that a language model reads: random, or the text of golden/smollm2.npz."""
    if case != REAL:
        return IDS
    with np.load(FOLDER / "smollm2.npz") as stored:
        return [int(i) for i in stored["ids"][:200]]


def path_of(folder: str | Path, case: str) -> Path:
    """Where a case's model file stands."""
    return Path(folder) / ("smollm2.gguf" if case == REAL else f"{case.replace(' ', '-')}.gguf")


def write_case(folder: str | Path, case: str) -> Path:
    """The model file of a case. A real model's must be there."""
    what, dtype = case.split()
    path = path_of(folder, case)
    if what == "real":
        return path
    if what == "picture":
        write_mmproj(path, TOWER, dtype)
    elif dtype in BY_GGUF:
        write_language_model(path, SPEC, dtype)
    else:
        write_language_model(path.with_suffix(".f32"), SPEC, "F32")
        requantize(path.with_suffix(".f32"), path, dtype)
    return path


def compute(path: Path, case: str, **settings: Any) -> Values:
    """What one of our backends makes of the file."""
    if not case.startswith("picture"):
        logits = np.asarray(tinyllava.load(path, **settings).logits(ids_of(case)))
        return logits - logits.mean(axis=1, keepdims=True)
    llava = tinyllava.load(mmproj=path, compat="mtmd", **settings)
    return llava.vision_model.ops.numpy(llava.vision_model.encode(PICTURE))


def truth_of(path: Path, case: str) -> Values:
    """The reference in float64."""
    return compute(path, case, backend="numpy", dtype="float64")


def error(found: Values, truth: Values) -> float:
    """Relative, to four digits: what differs from machine to machine are sums in another order."""
    return float(f"{np.linalg.norm(found - truth) / np.linalg.norm(truth):.3e}")


def update(name: str, errors: dict[str, float], packages: dict[str, str]) -> None:
    """Write one column of accuracy.json."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for case in CASES:
        found.setdefault(case, {})[name] = errors[case]
    path = save_json(FILE.name, found)
    record(path, "accuracy FOLDER", packages, TOLERANCE)


def own_error(folder: str | Path, case: str) -> float:
    """Ours."""
    path = write_case(folder, case)
    return error(compute(path, case, backend="numba"), truth_of(path, case))


def sentence() -> str:
    """The result for README.md."""
    found = json.loads(FILE.read_text())
    ratios = [found[case]["ours"] / found[case]["llama.cpp"] for case in CASES]
    return (
        f"On {len(ratios)} files the fast path's error is {min(ratios):.2f} to {max(ratios):.2f} times "
        "llama.cpp's on the same file: [each of them](golden/rounding.md)."
    )


def table() -> str:
    """The table of golden/rounding.md."""
    found = json.loads(FILE.read_text())
    lines = ["| file | ours | llama.cpp | ratio |", "|---|---|---|---|"]
    for case in CASES:
        what, dtype = case.split()
        own, peer = found[case]["ours"], found[case]["llama.cpp"]
        lines.append(f"| {TITLES[what]}, {dtype} | {own:.1e} | {peer:.1e} | {own / peer:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    manifest = json.loads((FOLDER / "MANIFEST.json").read_text())
    before = manifest.get(FILE.name, {}).get("versions", {})
    update("ours", {case: own_error(sys.argv[1], case) for case in CASES}, before)
