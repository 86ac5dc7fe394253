"""`tinyllava bench`: what it prints, what it refuses, and that it would notice a wrong kernel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj
from tinyllava.cli import main
from tinyllava.errors import ModelError
from tinyllava.ops import select
from tinyllava.study.bench import Times, Work, check, ratios

SPEEDS = {"prefill_tokens_per_s", "decode_tokens_per_s", "encode_s"}
KEYS = {*SPEEDS, "load_s", "peak_rss_bytes", "threads", "backend"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    write_language_model(folder / "model.gguf", LANGUAGE["llama_gqa"], dtype="Q8_0")
    write_mmproj(folder / "mmproj.gguf", VISION["clip_15"])
    return folder / "model.gguf", folder / "mmproj.gguf"


def test_json_has_the_numbers(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = f"bench -m {pair[0]} --mmproj {pair[1]} -p 20 -n 3 -t 2 --repeat 2 --json"
    assert main(words.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert {*KEYS, "cpu", "versions"} <= set(found)
    assert found["threads"] == 2 and found["backend"] == "numba" and found["prefill_tokens_per_s"] > 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("-p 0", "-p: 0; wanted 1 or more"),
        ("--repeat 0", "--repeat: 0; wanted 1 or more"),
        ("-n -1", "-n: -1; wanted 0 or more"),
        ("--peer torch -p 2 -n 1", "--peer: torch; wanted llama.cpp or ik"),
    ],
)
def test_bad_input(words: str, message: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-m", str(pair[0]), *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_kernel_is_noticed(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ops = select("numba", threads=1)
    assert check(Work(pair[0]), ops) < 0.05
    monkeypatch.setattr(ops, "swiglu", lambda gate, up: np.tanh(gate) * up)
    with pytest.raises(ModelError, match="differs from the reference"):
        check(Work(pair[0]), ops)


def test_ratios_are_medians_of_pairs() -> None:
    own, peer = Times([1.0, 1.0, 4.0], [2.0]), Times([2.0, 3.0, 4.0], [1.0])
    assert ratios(own, peer) == {"prefill_ratio": 2.0, "decode_ratio": 0.5}
