"""`tinyllava bench`: what it prints, what it refuses, and that it would notice a wrong kernel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj
from tinyllava.cli import main
from tinyllava.errors import ModelError
from tinyllava.ops.select import select
from tinyllava.study.peers.bench import check, memory_ratio, ratios, requests, with_pictures
from tinyllava.study.peers.worker import Work

SPEEDS = {"prefill_tokens_per_s", "decode_tokens_per_s", "encode_s"}
KEYS = {*SPEEDS, "load_s", "peak_rss_bytes", "threads", "backend", "cpu", "versions", "check_error"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    write_language_model(folder / "model.gguf", LANGUAGE["llama_gqa"], dtype="Q8_0")
    write_mmproj(folder / "mmproj.gguf", VISION["clip_16"])
    return folder / "model.gguf", folder / "mmproj.gguf"


def json_of(words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["bench", *words.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_json_of_the_demo_pair_has_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of("-p 20 -n 3 -t 2 --repeat 2", capsys)
    assert set(found) >= KEYS and "peers" not in found
    assert found["threads"] == min(2, found["threads"]) and found["backend"] in ("numba", "numpy")
    for name in (*SPEEDS, "load_s", "peak_rss_bytes"):
        value = found[name]
        assert isinstance(value, int | float) and value > 0, name
    versions = found["versions"]
    assert isinstance(versions, dict) and {"tinyllava", "python", "numpy"} <= set(versions)


def test_a_1_6_encoder_is_timed_on_one_tile_and_on_all(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = json_of(f"-m {pair[0]} --mmproj {pair[1]} -p 20 -n 0 -t 1 --repeat 1", capsys)
    assert {"encode_s", "encode_tiles_s"} <= set(found) and "decode_tokens_per_s" not in found
    assert with_pictures(Work(*pair)).pictures == ((56, 56), (112, 112))


def test_the_answer_is_decoded_after_the_prompt() -> None:
    asked = requests(Work(Path("m"), n_prompt=2500, n_answer=32))
    assert asked["decode"] == {"do": "decode", "n": 32, "depth": 2500}


def test_the_reports_lines_hold_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench -p 9 -n 2 -t 1 --repeat 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].split("  ")[0] for line in lines[1:]] == [
        *("prompt", "answer", "one tile", "load", "peak memory", "check")
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        ("-p 0", "-p: 0; wanted 1 or more"),
        ("--repeat 0", "--repeat: 0; wanted 1 or more"),
        ("-n -1", "-n: -1; wanted 0 or more"),
        ("--peer ollama -p 2 -n 1", "--peer: ollama; wanted llama.cpp or ik or torch"),
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
    own = {"prefill": [1.0, 1.0, 4.0], "decode": [2.0], "encode": [1.0]}
    peer = {"prefill": [2.0, 3.0, 4.0], "decode": [1.0]}
    assert ratios(own, peer) == {"prefill_ratio": 2.0, "decode_ratio": 0.5}


def test_memory_is_ours_by_theirs() -> None:
    assert memory_ratio(30, 20) == {"peak_rss_ratio": 1.5}
    assert memory_ratio(30, None) == {}
