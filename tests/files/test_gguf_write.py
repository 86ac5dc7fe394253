"""Written files: gguf's own bytes, read back as they were, and never half there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.clip_models import VISION, write_mmproj
from golden.models import LANGUAGE, write_language_model
from tinyllava.errors import FileError
from tinyllava.files import gguf_write
from tinyllava.files.gguf import open_gguf
from tinyllava.files.gguf_write import NewTensor, copy_metadata, encode, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.alignment": 64,
    "a.bool": True,
    "a.negative": -5,
    "a.large": 1 << 40,
    "a.real": 1e-5,
    "a.u8": np.uint8(200),
    "a.f64": np.float64(0.1),
    "a.bytes": b"\xff\x00",
    "a.strings": ["one", "zwei", ""],
    "a.ids": np.arange(5, dtype=np.int32),
    "a.numbers": [1, -2, 3],
    "a.reals": [0.5, 1],
    "a.flags": [True, False],
    "a.lists": [np.arange(2, dtype=np.uint8), np.arange(3, dtype=np.uint8)],
    "a.none": [],
}


def a_tensor(name: str = "x", rows: int = 3) -> NewTensor:
    values = np.arange(rows * 5, dtype=np.float32).reshape(rows, 5)
    return NewTensor(name, (rows, 5), "F32", lambda: iter(np.split(values, rows)))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    size = write_gguf(tmp_path / "x.gguf", METADATA, [a_tensor(), a_tensor("y", 1)])
    assert size == (tmp_path / "x.gguf").stat().st_size
    with open_gguf(tmp_path / "x.gguf") as file:
        assert list(file.metadata) == list(METADATA)
        assert file.metadata["a.strings"] == METADATA["a.strings"]
        assert file.metadata["a.negative"] == -5 and file.metadata["a.large"] == 1 << 40
        assert file.metadata["a.numbers"].dtype == np.int32 and file.metadata["a.reals"].dtype == np.float32
        assert file.alignment == 64
        assert np.array_equal(file.tensors["x"].dequantize(), np.arange(15).reshape(3, 5))
        copied = copy_metadata(file)
    assert copied["a.bytes"] == b"\xff\x00"
    assert {key: encode(value) for key, value in copied.items()} == {k: encode(v) for k, v in METADATA.items()}


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "clip_16"])
def test_the_bytes_are_those_of_ggufs_own_writer(name: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "in.gguf", tmp_path / "out.gguf"
    if name in LANGUAGE:
        write_language_model(source, LANGUAGE[name])
    else:
        write_mmproj(source, VISION[name])
    with open_gguf(source) as file:
        tensors = [NewTensor(t.name, t.shape, t.type, lambda t=t: [t.raw]) for t in file.tensors.values()]
        write_gguf(copy, copy_metadata(file), tensors)
    assert copy.read_bytes() == source.read_bytes()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_tensors_are_read_by_gguf(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "x.gguf"
    dims = st.lists(st.integers(1, 4), min_size=1, max_size=4)
    kinds = st.sampled_from(["F32", "F16", "I32", "Q8_0", "Q4_K"])
    made = {}
    for i, (kind, shape) in enumerate(data.draw(st.lists(st.tuples(kinds, dims), max_size=5))):
        columns = {"Q8_0": 32, "Q4_K": 256}.get(kind, shape[-1])
        made[f"t{i}"] = NewTensor(f"t{i}", (*shape[:-1], columns), kind, lambda: iter(()))
    bytes_of = {name: np.random.default_rng(0).bytes(t.nbytes) for name, t in made.items()}
    tensors = [
        NewTensor(t.name, t.shape, t.type, lambda t=t: [np.frombuffer(bytes_of[t.name], np.uint8)])
        for t in made.values()
    ]
    write_gguf(path, {"general.architecture": "llama"}, tensors)
    reader = gguf.GGUFReader(path)
    assert {t.name: t.data.tobytes() for t in reader.tensors} == bytes_of
    assert {t.name: tuple(t.shape[::-1].tolist()) for t in reader.tensors} == {n: t.shape for n, t in made.items()}


def test_progress_goes_from_start_to_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    total = write_gguf(tmp_path / "x.gguf", {}, [a_tensor(), a_tensor("y")], lambda *now: seen.append(now))
    assert seen == sorted(seen) and seen[-1] == (total, total) and len(seen) == 7


# ---- what goes wrong leaves nothing


class Interrupted(BaseException):
    """Stands in for Ctrl-C."""


def broken_off() -> Iterator[np.ndarray]:
    yield np.zeros(5, np.float32)
    raise Interrupted


@pytest.mark.parametrize("there_before", [False, True])
def test_an_interruption_leaves_what_was(there_before: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if there_before:
        path.write_bytes(b"precious")
    with pytest.raises(Interrupted):
        write_gguf(path, {}, [NewTensor("x", (3, 5), "F32", broken_off)])
    assert sorted(tmp_path.iterdir()) == [path] * there_before
    assert not there_before or path.read_bytes() == b"precious"


def test_too_small_a_disk_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(gguf_write.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(FileError, match=r"MiB to write, but the disk has 0\.0 MiB left"):
        write_gguf(tmp_path / "x.gguf", {}, [a_tensor(rows=1000)])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a part of a chunk first; the next write fails."""

    class Full(gguf_write.io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 100:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:50])

    monkeypatch.setattr(gguf_write.io, "FileIO", Full)
    with pytest.raises(FileError, match=r"x\.gguf: cannot be written: No space left on device"):
        write_gguf(tmp_path / "x.gguf", METADATA, [a_tensor()])
    assert not list(tmp_path.iterdir())


def test_no_such_directory_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such directory"):
        write_gguf(tmp_path / "nowhere" / "x.gguf", {}, [])
    with pytest.raises(FileError, match="a directory"):
        write_gguf(tmp_path, {}, [])
    with pytest.raises(FileError, match="a device"):
        write_gguf("/dev/null", {}, [])


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "x.gguf").symlink_to(tmp_path / "real" / "x.gguf")
    write_gguf(tmp_path / "x.gguf", {}, [a_tensor()])
    assert (tmp_path / "x.gguf").is_symlink()
    assert open_gguf(tmp_path / "real" / "x.gguf").tensors


@pytest.mark.parametrize("rows", [2, 4])
def test_chunks_must_be_what_was_declared(rows: int, tmp_path: Path) -> None:
    chunks = np.zeros((rows, 5), np.float32)
    with pytest.raises(ValueError, match=f"x: {rows * 20} bytes; declared 60"):
        write_gguf(tmp_path / "x.gguf", {}, [NewTensor("x", (3, 5), "F32", lambda: [chunks])])
    with pytest.raises(ValueError, match="a chunk of float64, but the tensor is declared F32"):
        write_gguf(tmp_path / "x.gguf", {}, [NewTensor("x", (3, 5), "F32", lambda: [chunks.astype(np.float64)])])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, {}, [1, "two"], np.complex64(1), object()])
def test_what_gguf_cannot_hold(value: object) -> None:
    with pytest.raises(TypeError, match="some key"):
        encode(value, "some key")
