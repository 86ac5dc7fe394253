"""Programs in processes of their own: their requests, their memory, their errors. Stubs stand in for llama.cpp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj
from tests.study.peers import stub_llama_cpp
from tinyllava.cli import main
from tinyllava.errors import UsageError
from tinyllava.study.peers.bench import Contest
from tinyllava.study.peers.own import Own
from tinyllava.study.peers.worker import OWN, Work, Worker, find_driver, rest, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "model.gguf"
    write_language_model(path, LANGUAGE["llama_gqa"], dtype="Q8_0")
    return path


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the workers' path with a package llama_cpp."""
    stub_llama_cpp.install(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("stub")
def test_a_peer_takes_turns(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"bench -m {model} -p 20 -n 3 -t 1 --repeat 2 --peer llama.cpp"
    assert main([*words.split(), "--json"]) == 0
    peer = json.loads(capsys.readouterr().out)["peers"]["llama.cpp"]
    assert peer["versions"] == {"llama-cpp-python": "1.2.3"} and peer["system"] == "stub"
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes", "load_s"):
        assert peer[name] > 0
    assert {"prefill_ratio", "decode_ratio", "peak_rss_ratio", "waited_cpu_s"} <= set(peer)
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["llama.cpp", "ratio"] and len(lines[2].split()) == 5


@pytest.mark.usefixtures("stub")
def test_ik_counts_positions_and_sees_no_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench -p 20 -n 3 -t 1 --repeat 2 --peer ik --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    peer = found["peers"]["ik"]
    assert peer["versions"] == {"ik-llama-cpp-python": "1.2.3"} and peer["system"] == "stub"
    assert {"prefill_ratio", "decode_ratio"} <= set(peer) and "encode_s" in found and "encode_s" not in peer


@pytest.mark.usefixtures("stub")
def test_what_a_peer_cannot_do_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    assert main(f"bench -m {other} -p 2 -n 1 -t 1 --peer llama.cpp".split()) == 2
    message = f"tinyllava: --peer: cannot load {other}; wanted a file that it knows"
    assert capsys.readouterr().err.startswith(message)


def test_a_peer_that_is_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ik_llama_cpp.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match="ik: none here; wanted the package ik_llama_cpp"):
        Worker("ik", Work(model, threads=1))
    with pytest.raises(UsageError, match="No such file"):
        Worker("ik", Work(model, threads=1), python=str(tmp_path / "python"))


def test_a_peer_that_dies_is_one_line_with_its_last_words(
    stub: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = "import os\ndef llama_decode(context, n):\n    print('out of luck', flush=True)\n    os._exit(3)\n"
    stub_llama_cpp.install(stub, end)
    assert main(f"bench -m {model} -p 2 -n 1 -t 1 --peer llama.cpp".split()) == 2
    assert "--peer: llama.cpp ended: out of luck, exit code 3; wanted an answer" in capsys.readouterr().err


def test_programs_work_in_turn_and_who_begins_changes(stub: Path, model: Path) -> None:
    del stub
    with Contest(Work(model, n_prompt=8, n_answer=2, threads=1), {"llama.cpp": None}) as contest:
        turns = [contest.turn({"do": "prefill", "n": 8}) for _ in range(2)]
        memory = contest.memory()
    assert [list(turn) for turn in turns] == [[OWN, "llama.cpp"], ["llama.cpp", OWN]]
    assert all(seconds > 0 for turn in turns for seconds in turn.values())
    if sys.platform == "linux":  # each has its own: the stub needs NumPy, not Numba
        own, peer = memory[OWN], memory["llama.cpp"]
        assert own is not None and peer is not None and 0 < peer < own


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_workers_memory_is_its_own_not_its_parents() -> None:
    code = "from tinyllava.study.peers.worker import peak_rss_bytes; print(peak_rss_bytes())"
    call = f"import subprocess, sys; large = bytearray(300 << 20); large[::4096] = b'x' * len(large[::4096]); \
        print(subprocess.run([sys.executable, '-c', {code!r}], capture_output=True, text=True).stdout)"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 100 << 20


def test_decode_begins_at_its_depth(model: Path) -> None:
    own = Own(Work(model, n_prompt=12, n_answer=3, threads=1))
    own.prefill(tokens(12))
    own.decode(tokens(3), 12)
    assert own.cache.length == 15
    own.decode(tokens(2), 0)
    assert own.cache.length == 2


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_one_thread_is_one_thread(backend: str, model: Path) -> None:
    """Processor seconds in a second: a busy machine only makes them fewer."""
    with Worker(OWN, Work(model, n_prompt=600, threads=1, backend=backend)) as worker:
        for _ in range(2):  # the first may compile
            used = worker.ask({"do": "prefill", "n": 600})
    assert 0 < used["cpu_s"] < 1.2 * used["s"] + 0.02


def test_pictures_are_one_tile_and_five(model: Path, tmp_path: Path) -> None:
    mmproj = tmp_path / "mmproj.gguf"
    write_mmproj(mmproj, VISION["clip_16"])
    own = Own(Work(model, mmproj, threads=1, compat="mtmd", pictures=((56, 56), (112, 112))))
    assert own.encode(0) == 16 and own.encode(1) == 5 * 16


def test_work_crosses_the_pipe_unchanged() -> None:
    for work in (Work(Path("a")), Work(Path("a"), Path("b"), 3, 4, 2, 1, "numpy", "mtmd", ((56, 56), (3, 4)))):
        assert Work.from_json(json.loads(json.dumps(work.to_json()))) == work


def test_rest_ends_when_no_thread_works(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.02, 0.02, 0.03, 0.03, 0.03])  # busy, half busy, idle
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    rest()
    assert list(clock) == []


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llama.cpp", "torch"])
def test_a_real_peer_does_the_same_work(name: str, model: Path, tmp_path: Path) -> None:
    mmproj = tmp_path / "mmproj.gguf"
    write_mmproj(mmproj, VISION["clip_16"], "F16")
    python = os.environ.get("TINYLLAVA_PEER_PYTHON")
    work = Work(model, mmproj, 20, 3, 1, compat="mtmd", pictures=((56, 56), (112, 112)))
    try:
        contest = Contest(work, {name: python})
    except UsageError as error:
        if "wanted the package" not in str(error):
            raise
        pytest.skip(str(error))
    with contest:
        for request in ({"do": "prefill", "n": 20}, {"do": "decode", "n": 3, "depth": 20}):
            assert contest.turn(request)[name] > 0
            used = contest.workers[1].ask(request)
            assert used["cpu_s"] < 1.2 * used["s"] + 0.02  # of one thread
        for picture in (0, 1):
            found = [worker.ask({"do": "encode", "picture": picture})["tokens"] for worker in contest.workers]
            assert found[0] == found[1]


def test_every_program_has_a_driver() -> None:
    assert find_driver(OWN) is Own
