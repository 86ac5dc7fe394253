"""two_checkouts.py finds what it is made to find, in checkouts made up for it; and this one equals itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import two_checkouts

ROOT = Path(__file__).parents[1]

# A package with the names that the worker uses. Its numbers depend on SHIFT, and in a checkout whose cache matters
# on whether the folder of kernels is empty; its seconds on SECONDS.
PACKAGE = """
import os
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from tinyllava.text.sampling import Sampler

SHIFT, CACHE_MATTERS, SECONDS = {shift}, {cache_matters}, {seconds}

class Sampling:
    def __init__(self, temperature): pass

class LLaVA:
    def logits(self, ids):
        kernel = Path(os.environ["NUMBA_CACHE_DIR"]) / "kernel"
        compiled = CACHE_MATTERS and not kernel.exists()
        kernel.parent.mkdir(exist_ok=True)
        kernel.touch()
        return np.arange(len(ids), dtype=np.float32) + np.float32(SHIFT + 0.5 * compiled)

    def encode_image(self, source):
        return np.ones((2, 3), np.float32)

    def generate(self, prompt, images=(), max_tokens=1, sampling=None):
        tokens = [Sampler().sample(np.array([0.0, 1.0])) for _ in range(max_tokens)]
        timings = {{"prefill_s": SECONDS, "decode_s": 1.0}}
        return SimpleNamespace(text="yes", tokens=tokens, prompt_tokens=len(prompt) + 4, timings=timings)

def load(*files, **settings):
    return LLaVA()
"""
SAMPLER = """
class Sampler:
    def sample(self, logits):
        return int(logits.argmax())
"""
DEMO = ["--formats", "--backend", "numba"]


def checkout(folder: Path, shift: float = 0.0, cache_matters: bool = False, seconds: float = 1.0) -> str:
    """A checkout that computes these numbers in this time."""
    package = folder / "tinyllava"
    (package / "text").mkdir(parents=True)
    made_up = PACKAGE.format(shift=shift, cache_matters=cache_matters, seconds=seconds)
    (package / "__init__.py").write_text(made_up)
    (package / "__main__.py").write_text("")
    (package / "text" / "__init__.py").write_text("")
    (package / "text" / "sampling.py").write_text(SAMPLER)
    return str(folder)


def test_this_checkout_computes_the_bits_that_it_computes(capsys: pytest.CaptureFixture[str]) -> None:
    assert two_checkouts.main([str(ROOT), "--formats", "--backend", "numpy", "--profiles", "llava"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 + 1 and lines[-1] == "verdict: same"
    assert all("same bits" in line for line in lines[:-1])


def test_other_numbers_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [checkout(tmp_path / "a"), checkout(tmp_path / "b", shift=1.16)]
    assert two_checkouts.main([*words, *DEMO]) == 1
    lines = capsys.readouterr().out.splitlines()
    wanted = "numba demo llava: logits DIFFERENT by 1.0e-02 of the range, 117 of 117 numbers"
    assert lines[2].split() == wanted.split()
    assert [line for line in lines if "DIFFERENT" in line] == [*lines[2:-1:6], "verdict: DIFFERENT"]
    assert two_checkouts.main([*words, *DEMO, "--tolerance", "0.011"]) == 0


def test_models_are_written_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [checkout(tmp_path / "a"), checkout(tmp_path / "b", shift=1.0), "--folder", str(tmp_path), "--tiny"]
    assert two_checkouts.main([*words, "--formats", "Q4_0", "F16", "--backend", "numba"]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("numba Q4_0", "numba F16"))]
    assert [("DIFFERENT" in line) for line in found] == [True, True, False, False, False] * 2
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"tiny-Q4_0.gguf", "tiny-F16.gguf"}


def test_a_cache_that_matters_is_found(tmp_path: Path) -> None:
    good, bad = checkout(tmp_path / "a"), checkout(tmp_path / "b", cache_matters=True)
    assert two_checkouts.main([good, bad, *DEMO]) == 0  # both have filled theirs
    assert two_checkouts.main([good, "--cache", *DEMO]) == 0
    assert two_checkouts.main([good, bad, "--cache", *DEMO]) == 1


@pytest.mark.parametrize(("seconds", "code"), [(1.0, 0), (1.1, 1)])
def test_times_are_compared(seconds: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_checkouts, "first_runs", lambda *_: {side: [1.0] for side in two_checkouts.SIDES})
    monkeypatch.setattr(two_checkouts, "ALLOWED", 0.05)
    real = two_checkouts.turns

    def without_pictures(asked: object, loaded: dict[str, object], do: str, **request: object) -> object:
        if do == "encode":  # a made-up picture takes no time, so its ratio is noise
            return {}
        return real(asked, loaded, do, **request)  # type: ignore[arg-type]

    monkeypatch.setattr(two_checkouts, "turns", without_pictures)
    words = [checkout(tmp_path / "a"), checkout(tmp_path / "b", seconds=seconds), "--time", "--repeat", "2"]
    assert two_checkouts.main([*words, "--folder", str(tmp_path), "--tiny", "--formats", "Q4_0"]) == code


def test_a_first_run_starts_with_an_empty_cache(tmp_path: Path) -> None:
    asked = two_checkouts.argparse.Namespace(before=tmp_path / "a", after=tmp_path / "b", repeat=1)
    ran: list[tuple[str, list[Path]]] = []
    times = two_checkouts.first_runs(asked, lambda where, cache: ran.append((where.name, list(cache.iterdir()))))
    assert ran == [("a", []), ("b", []), ("a", [])] and [len(turns) for turns in times.values()] == [1, 1, 1]
    two_checkouts.first_demo(Path(checkout(tmp_path / "a")), tmp_path)


def test_a_line_of_times_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"before": [2.0, 3.0], "after": [2.2, 9.0], "before again": [2.1, 2.1]}
    assert not two_checkouts.tell("numba Q4_0", {"prompt": times})  # 1.1 > 1 + 0.02 + 0.05
    assert two_checkouts.tell("numba Q4_0", {"prompt": {**times, "after": [2.13]}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["numba", "Q4_0:", "prompt", "2.0000", "2.2000", "1.100", "0.050", "SLOWER"]
    assert lines[1][-1] == "ok"


def test_what_is_said_of_two_arrays() -> None:
    a = np.array([0.0, 1.0, 4.0], np.float32)
    assert two_checkouts.compare(a, a.copy(), 0.0).startswith("same bits")
    assert two_checkouts.compare(a, a + np.float32([0, 0, 0.5]), 0.0) == (
        "DIFFERENT by   1.2e-01 of the range, 1 of 3 numbers"
    )
    assert two_checkouts.compare(a, a + np.float32([0, 0, 0.5]), 0.125).startswith("same to")
    assert two_checkouts.compare(a, a * np.float32(np.nan), 9.0).startswith("DIFFERENT")
    assert two_checkouts.compare(a * np.float32(np.nan), a * np.float32(np.nan), 9.0).startswith("NOT FINITE")
    assert two_checkouts.compare(np.array([1, 2]), np.array([1, 3]), 9.0).startswith("DIFFERENT")  # tokens
    assert two_checkouts.compare(a, a[:2], 9.0).startswith("DIFFERENT")


def test_a_worker_that_fails_is_an_error(tmp_path: Path) -> None:
    with two_checkouts.Worker(Path(checkout(tmp_path / "a")), tmp_path) as worker:
        with pytest.raises(RuntimeError, match="encode: the worker ended with exit code 1"):
            worker.ask("encode", nothing=1)


def test_models_need_a_folder() -> None:
    with pytest.raises(SystemExit):
        two_checkouts.main([str(ROOT)])
