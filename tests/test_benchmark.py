"""The benchmark runs from end to end, at tiny shapes; the tables of its results say what its file says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import benchmark, speed_table
from tests.study.peers import stub_llama_cpp

ROW = {"model": "7B Q4_0", "peer": "ik", "pairs": [1.25], "ratio": 1.25, "own_s": [1.0], "peer_s": [1.25]}
FOUND = {
    "cpu": "a processor",
    "threads": 2,
    "date": "2026-01-02",
    "versions": {"tinyllava": {"versions": {"tinyllava": "1"}}, "ik": {"versions": {"ik-llama-cpp-python": "3"}}},
    "rows": [
        {**ROW, "work": "prefill 2500"},
        {**ROW, "work": "prefill 512"},
        {**ROW, "work": "prefill 512", "peer": "llama.cpp", "ratio": 1.5},
        {**ROW, "work": "encode 1 tile", "model": "ViT", "peer": "torch", "ratio": 1.0},
    ],
}


@pytest.mark.skipif(shutil.which("true") is None, reason="needs a program that does nothing")
def test_it_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(stub_llama_cpp.install(tmp_path)))
    results = tmp_path / "speed.json"
    words = ["--folder", str(tmp_path), "--tiny", "--repeat", "2", "--threads", "1", "--results", str(results)]
    one = ["--models", "1.26B Q4_0", "--peer", "llama.cpp", "--llava-cli", str(shutil.which("true"))]
    benchmark.main([*words, *one, "--only", "prefill", "decode", "memory", "whole"])
    benchmark.main([*words, "--only", "encode"])
    found = json.loads(results.read_text())
    assert [row["work"] for row in found["rows"]] == [
        *("prefill 32", "decode at 0", "memory 32", "prefill 156", "decode at 156", "memory 156", "whole process")
    ]
    for row in found["rows"]:
        assert row["ratio"] > 0 and len(row["pairs"]) == (1 if "own_bytes" in row else 2)
    assert {"cpu", "date", "threads"} <= set(found) and set(found["versions"]) == {"tinyllava", "llama.cpp"}
    lines = speed_table.table(results).splitlines()
    assert lines[0].count("|") == 8 and lines[2].startswith("| 1.26B Q4_0 | ")


def test_a_slice_replaces_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"rows": [{**ROW, "work": "a"}, {**ROW, "work": "b"}], "versions": {"ik": 1}}))
    new = benchmark.Benchmark(tmp_path, benchmark.TINY, {}, None, 1, 2)
    turns = [{"tinyllava": 2.0, "ik": 3.0}, {"tinyllava": 1.0, "ik": 3.0}, {"tinyllava": 1.0, "ik": 1.0}]
    new.add("a", "7B Q4_0", turns)
    new.save(path, {})
    found = json.loads(path.read_text())
    assert [(row["work"], row["ratio"]) for row in found["rows"]] == [("a", 1.5), ("b", 1.25)]
    assert found["rows"][0]["pairs"] == [1.5, 3.0, 1.0] and found["versions"] == {"ik": 1}


def test_start_is_timed_with_and_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    def wall(words: list[str], **environment: str) -> float:
        calls.append((words[-1], "NUMBA_CACHE_DIR" in environment))
        return 9.0 if environment else 1.0

    monkeypatch.setattr(benchmark, "wall", wall)
    found = benchmark.Benchmark(tmp_path, benchmark.TINY, {}, None, 1, 2).start()
    assert found == {"demo_s": 1.0, "demo_first_s": 9.0, "help_s": 1.0}
    assert calls == [("demo", False), ("demo", True), ("demo", False), ("--help", False)]


def test_a_command_that_fails_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"exit code 2.*--nothing"):
        benchmark.wall([sys.executable, "-m", "tinyllava", "--nothing"])


def test_the_table_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(FOUND))
    assert speed_table.table(path) == (
        "| beside llama.cpp / ik_llama.cpp | prompt of 512 | prompt of 2,500 |\n"
        "|---|---|---|\n"
        "| 7B Q4_0 | 1.50 / 1.25 | – / 1.25 |\n"
        "\n"
        "| beside | torch, bfloat16 |\n"
        "|---|---|\n"
        "| encode 1 tile, ViT | 1.00 |\n"
        "\n"
        "a processor, 2 threads, 2026-01-02; medians of 1 turns. ik-llama-cpp-python 3; all with their defaults.\n"
    )


def test_the_summary_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    rows = [*FOUND["rows"], {**ROW, "work": "prefill 512", "model": "7B Q6_K", "ratio": 2.0}]
    path.write_text(json.dumps({**FOUND, "rows": rows}))
    assert speed_table.summary(path).splitlines()[:5] == [
        "| beside | llama.cpp | ik_llama.cpp | torch, bfloat16 |",
        "|---|---|---|---|",
        "| prompt of 512, 2 files | 1.50 | 1.25 to 2.00 | – |",
        "| prompt of 2,500, 7B Q4_0 | – | 1.25 | – |",
        "| encode 1 tile, ViT | – | – | 1.00 |",
    ]


def test_ratios_of_the_stored_file_are_medians_of_its_pairs() -> None:
    found = json.loads(speed_table.RESULTS.read_text(encoding="utf-8"))
    assert found["cpu"] and found["versions"]["tinyllava"]
    for row in found["rows"]:
        pairs = sorted(row["pairs"])
        middle = (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2
        assert row["ratio"] == pytest.approx(middle, rel=1e-4)
        if "own_s" in row:
            computed = [theirs / own for own, theirs in zip(row["own_s"], row["peer_s"], strict=True)]
            assert row["pairs"] == pytest.approx(computed, rel=1e-3)
