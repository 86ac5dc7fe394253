"""A real language model, SmolLM2-135M-Instruct in Q4_1, against transformers and llama.cpp."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

import tinyllava
from tinyllava.llava import LLaVA

GOLDEN = Path(__file__).parents[1] / "golden"
SEEN = np.load(GOLDEN / "smollm2.npz")
MANIFEST = json.loads((GOLDEN / "MANIFEST.json").read_text(encoding="utf-8"))["smollm2.npz"]

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def path() -> Path:
    folder = os.environ.get("TINYLLAVA_MODELS")
    if folder is None:
        pytest.skip("set TINYLLAVA_MODELS to the folder that golden/fetch.py filled")
    path = Path(folder) / "smollm2.gguf"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == MANIFEST["model"]["sha256"]
    return path


@pytest.fixture(scope="module", params=["numpy", "numba"])
def model(request: pytest.FixtureRequest, path: Path) -> LLaVA:
    return tinyllava.load(path, backend=request.param)


# The share of positions at which the most probable token is the peer's. A fast backend rounds activations to
# 8 bits, as llama.cpp does: it may be no further from the truth than llama.cpp is.
LLAMA_CPP_AND_TRUTH = (SEEN["default.best"][:, 0] == SEEN["truth.best"][:, 0]).mean()
WANTED = {
    ("default", "numpy"): 0.95,
    ("default", "numba"): 0.95,
    ("truth", "numpy"): 0.99,
    ("truth", "numba"): LLAMA_CPP_AND_TRUTH,
}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# Which of two nearly equal tokens wins is chance once activations are rounded: reading in other pieces moves
# the share by up to 1.4 %. So it is that of several ways of reading; all else holds for each.
BATCHES = {"numpy": (512,), "numba": (512, 200, 100, 64, 50, 33)}


def readings(model: LLaVA, ids: list[int]) -> list[np.ndarray]:
    """Log-probabilities (n, n_vocab), the text read in pieces of several lengths."""
    usual, found = model.n_batch, []
    for n_batch in BATCHES[model.ops.name]:
        model.language.n_batch = n_batch
        found.append(log_softmax(model.logits(ids)))
    model.language.n_batch = usual
    return found


def test_teacher_forced_it_agrees_with_llama_cpp_and_with_the_truth(model: LLaVA) -> None:
    ids = SEEN["ids"].tolist()
    ways = readings(model, ids)
    for peer in ("default", "truth"):  # llama.cpp as it comes; transformers in float32
        agreement = np.mean([(log_p.argmax(axis=-1) == SEEN[f"{peer}.best"][:, 0]).mean() for log_p in ways])
        print(f"{model.ops.name} and {peer}: top-1 {agreement:.4f}")
        assert agreement >= WANTED[peer, model.ops.name]
    llama_cpp_error = np.sqrt(np.mean((SEEN["default.next_log_p"] - SEEN["truth.next_log_p"]) ** 2))
    for log_p in ways:
        next_log_p = log_p[np.arange(len(ids) - 1), ids[1:]]
        perplexity = np.exp(-next_log_p.mean())
        for peer in ("default", "truth"):
            theirs = np.exp(-SEEN[f"{peer}.next_log_p"].mean())
            print(f"{model.ops.name} and {peer}: perplexity {perplexity:.3f} and {theirs:.3f}")
            assert abs(perplexity / theirs - 1) < 0.03
        error = np.sqrt(np.mean((next_log_p - SEEN["truth.next_log_p"]) ** 2))
        print(f"{model.ops.name}: rms error of log-probabilities {error:.2e}, llama.cpp's {llama_cpp_error:.2e}")
        assert error <= llama_cpp_error


@pytest.mark.parametrize("i", [0, 1, 2])
def test_greedy_answers_are_llama_cpps(i: int, model: LLaVA) -> None:
    """At least to the first near tie: llama.cpp rounds activations to 8 bits."""
    ids, theirs = SEEN[f"prompt{i}.ids"].tolist(), SEEN[f"prompt{i}.greedy"].tolist()
    log_p = log_softmax(model.logits([*ids, *theirs])[len(ids) - 1 : -1])  # (24, n_vocab)
    chosen, best = log_p[np.arange(len(theirs)), theirs], log_p.max(axis=-1)
    assert (best - chosen).max() < 0.5
    assert (chosen == best).mean() >= 0.8
