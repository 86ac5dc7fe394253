"""Fast computation must not be further from the truth than llama.cpp is on the same file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from golden import accuracy

STORED = json.loads(accuracy.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", [c for c in accuracy.CASES if c != accuracy.REAL])
def test_our_error_is_at_most_llama_cpps(case: str, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.models
def test_our_error_is_at_most_llama_cpps_on_a_real_model() -> None:
    folder = os.environ.get("TINYLLAVA_MODELS")
    if folder is None:
        pytest.skip("set TINYLLAVA_MODELS to the folder that golden/fetch.py filled")
    check(accuracy.REAL, Path(folder))


def check(case: str, folder: Path) -> None:
    own = accuracy.own_error(folder, case)
    assert own <= STORED[case]["llama.cpp"]
    assert own == pytest.approx(STORED[case]["ours"], rel=0.1)  # what golden/rounding.md says


def test_every_stored_case_is_tested() -> None:
    assert sorted(STORED) == sorted(accuracy.CASES)


@pytest.mark.peers
@pytest.mark.parametrize("case", ["text Q8_0", "picture F16"])
def test_llama_cpps_error_is_the_stored_one(case: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from golden.makers.accuracy import peer

    path = accuracy.write_case(tmp_path, case)
    found = accuracy.error(peer(str(tmp_path), path, case), accuracy.truth_of(path, case))
    assert found == pytest.approx(STORED[case]["llama.cpp"], rel=0.1)
