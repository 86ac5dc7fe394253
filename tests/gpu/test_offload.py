"""-ngl on a real card: the answers of the CPU wherever the border is, and one line when the memory is used up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllava
from tinyllava import demo
from tinyllava.errors import UsageError
from tinyllava.ops.select import select
from tinyllava.text.sampling import Sampling

pytestmark = pytest.mark.gpu
PICTURE = Path(tinyllava.__file__).parent / "demo" / "demo.png"
QUESTIONS = ("Describe the picture.", "How many dogs are there?", "What is to the left of the dog?")
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(autouse=True)
def cupy() -> Iterator[Any]:
    """The module, once there is a card; its allocator as it was, in the end."""
    try:
        select("cupy")
    except UsageError as error:
        pytest.skip(str(error))
    import cupy

    yield cupy
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


N_ALL = tinyllava.load(backend="numpy").language.llama.config.n_layer + 1


@pytest.mark.parametrize("n", range(N_ALL + 1))
def test_the_demo_pair_answers_as_on_the_cpu(n: int) -> None:
    alone, shared = tinyllava.load(backend="numba"), tinyllava.load(n_gpu_layers=n)
    assert shared.placement.n_layers == n
    assert shared.ops.name == {0: "numba", N_ALL: "cupy"}.get(n, "numba+cupy")
    for question in QUESTIONS:
        one, other = (llava.generate(question, PICTURE, 48, GREEDY).text for llava in (alone, shared))
        assert one == other
    ids = alone.tokenizer.encode("Describe the picture.")
    found, wanted = (llava.logits(ids).astype(np.float64) for llava in (shared, alone))
    # Both round activations, the CPU to 8 bits and the GPU to half precision.
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


def test_memory_is_seen_and_its_end_is_one_line(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = cupy.cuda.runtime.memGetInfo()
    tinyllava.load(backend="cupy")
    with pytest.raises(UsageError, match=r"memory of the GPU: .* more are needed, .* are free\. -ngl \d+ "):
        cupy.empty(total + (1 << 30), cupy.uint8)
    assert free <= total
    monkeypatch.setattr("tinyllava.ops.gpu.device.free_bytes", lambda: 1 << 20)
    with pytest.raises(UsageError, match=rf"-ngl {N_ALL}: .* of the GPU's memory are needed; .* -ngl 0 "):
        tinyllava.load(demo.MODEL, demo.MMPROJ, backend="cupy")
    llava = tinyllava.load()  # nobody promised a GPU
    assert llava.ops.name == "numba" and "0 of" in llava.placement.notes[0]
