"""The outside oracle: llama.cpp's own samplers, through ctypes in the interpreter that has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tinyllava.text import sampling as S
from tinyllava.text.sampling import Candidates, Sampling


def everyone(logits: np.ndarray) -> Candidates:
    return Candidates(np.arange(logits.size), logits.astype(np.float64))


PEER = Path(__file__).with_name("peer_sampling.py")


@pytest.fixture(scope="module")
def peer_python() -> str:
    """The interpreter that has llama-cpp-python: TINYLLAVA_PEER_PYTHON, or the one that runs the tests."""
    python = os.environ.get("TINYLLAVA_PEER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"{python} has no llama-cpp-python")
    return python


def ask_llama_cpp(python: str, jobs: Sequence[object]) -> list[dict[str, list[float]]]:
    done = subprocess.run([python, str(PEER)], input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


CHAINS: list[dict[str, object]] = [
    {"temperature": 0.3},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.07},
    {"typical_p": 0.6},
    {"repeat_penalty": 1.4},
    {"presence_penalty": 0.6, "frequency_penalty": 0.3, "repeat_last_n": 20},
    {"logit_bias": [[3, 2.5], [7, -50.0]]},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.5, "typical_p": 0.9, "repeat_penalty": 1.1, "min_p": 0.01},
]


@pytest.mark.peers
@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_every_stage_agrees_with_llama_cpp(peer_python: str, scale: float) -> None:
    """Same survivors and, to float32's rounding, the same probabilities."""
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal(300) * scale).astype(np.float32)
    recent = rng.integers(0, 300, 90)
    chains = [{"temperature": 1.0, **changes} for changes in CHAINS]
    jobs = [{"logits": logits.tolist(), "recent": recent.tolist(), "settings": chain} for chain in chains]
    for chain, theirs in zip(chains, ask_llama_cpp(peer_python, jobs), strict=True):
        settings = Sampling(**chain)  # type: ignore[arg-type]
        ours = S.run_chain(everyone(logits), recent[-settings.repeat_last_n :], settings)
        order = np.argsort(theirs["ids"])
        assert ours.ids.tolist() == np.array(theirs["ids"])[order].tolist(), chain
        np.testing.assert_allclose(S.softmax(ours.logits), np.array(theirs["p"])[order], rtol=2e-5, atol=1e-9)


@pytest.mark.peers
@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_agrees_with_llama_cpp(peer_python: str, version: int) -> None:
    """The tokens that the first step keeps, at many targets."""
    logits = (np.random.default_rng(6).standard_normal(500) * 3).astype(np.float32)
    taus = [0.5, 1.0, 2.0, 3.0, 4.0]
    settings = [{"mirostat": version, "mirostat_ent": tau} for tau in taus]
    jobs = [{"logits": logits.tolist(), "recent": [], "settings": one} for one in settings]
    for tau, theirs in zip(taus, ask_llama_cpp(peer_python, jobs), strict=True):
        if version == 1:
            ours = S.top_k(everyone(logits), S.mirostat_k(everyone(logits), 2 * tau, 500))
        else:
            ours = S.mirostat_cut(everyone(logits), 2 * tau)
        assert ours.ids.tolist() == sorted(theirs["ids"])
