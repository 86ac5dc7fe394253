"""One byte changed anywhere in a checkpoint: a pair of files or one line, never a crash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden.checkpoints import CHECKPOINTS, write_checkpoint
from tinyllava import cli

NAMES = ["llava15-one", "llava16-llama3", "hf-next"]  # a .bin, byte-level BPE, SentencePiece as JSON


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    for name in NAMES:
        write_checkpoint(root / name, CHECKPOINTS[name])
    return root


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_of_any_file(data: st.DataObject, pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pristine / data.draw(st.sampled_from(NAMES))
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    good = path.read_bytes()
    # Headers, directories and JSON are at the beginning and at the end; the rest is weights.
    ends = st.integers(0, min(6000, len(good) - 1))
    at = data.draw(ends | ends.map(lambda n: len(good) - 1 - n))
    out = pristine / "out"
    tower = ["--vision-tower", str(folder / "clip")] if (folder / "clip").exists() else []
    try:
        path.write_bytes(good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :])
        code = cli.main(["convert", str(folder), "-o", str(out), "-q", *tower])
    finally:
        path.write_bytes(good)
    said = capsys.readouterr().err
    assert (code, said.count("\n")) in ((0, 0), (2, 1)), said
    assert sorted(p.name.partition("-")[0] for p in out.glob("*")) == (["mmproj", "model"] if code == 0 else [])
    shutil.rmtree(out, ignore_errors=True)
