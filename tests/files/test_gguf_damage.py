"""Files that are no GGUF, or a wrong one: any bytes give a file or one clear line, in bounded time and memory."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.files.raw_gguf import ARRAY, STRING, U8, U32, Info, array, gguf_bytes, key, string
from tinyllava.errors import FileError
from tinyllava.files import GGUFFile, open_gguf
from tinyllava.study.inspect import describe, format_report


def failure(path: Path) -> str:
    """The error's text: one line that begins with the path."""
    with pytest.raises(FileError) as caught:
        open_gguf(path)
    text = str(caught.value)
    assert text.startswith(str(path).replace("\0", "\\x00"))
    assert "\n" not in text
    return text


def failure_of(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    return failure(path)


# ---- no GGUF at all


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in failure(tmp_path / "a.gguf")


def test_path_that_cannot_be(tmp_path: Path) -> None:
    assert "cannot be read" in failure(Path(f"{tmp_path}/a\0b"))
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be read" in failure(tmp_path / "file" / "a.gguf")


def test_directory(tmp_path: Path) -> None:
    assert "a directory; wanted a GGUF file" in failure(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "a device or a pipe" in failure(tmp_path / "pipe")


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes())
    path.chmod(0)
    assert "cannot be read: Permission denied" in failure(path)


OTHER_FORMATS = {
    "an empty file": b"",
    "an old PyTorch checkpoint": pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2),
    "a safetensors file": struct.pack("<Q", 40) + b'{"x":{"dtype":"F32"',
    "before GGUF (unversioned)": b"lmgg" + bytes(60),
    "before GGUF (ggmf)": b"fmgg" + bytes(60),
    "before GGUF (ggjt)": b"tjgg" + bytes(60),
    "a ggml LoRA adapter": b"algg" + bytes(60),
    "a JSON file": b'{"architectures": ["LlavaLlamaForCausalLM"]}',
    "a PNG picture": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "a JPEG picture": b"\xff\xd8\xff\xe0" + bytes(50),
    "a GIF picture": b"GIF89a" + bytes(50),
    "a WebP picture": b"RIFF\x10\0\0\0WEBPVP8 ",
    "a web page": b"\n<!DOCTYPE html><html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "an unfinished download": bytes(1000),
    "a gzip archive": b"\x1f\x8b\x08" + bytes(50),
    "a text file": "Grüße: ÄÖÜ\n".encode() * 20,
    "starts with b'\\x01\\x02\\x03\\x04'": b"\x01\x02\x03\x04" + b"\xff" * 50,
}


@pytest.mark.parametrize("said", OTHER_FORMATS)
def test_other_formats_are_named(tmp_path: Path, said: str) -> None:
    text = failure_of(tmp_path, OTHER_FORMATS[said])
    assert said in text.replace("\\\\", "\\")
    assert "wanted a GGUF file" in text


def test_a_torch_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    text = failure(tmp_path / "a.bin")
    assert "a PyTorch checkpoint (.bin, .pth); wanted a GGUF file. Convert it to GGUF first." in text


# ---- a GGUF, but


X = Info("x", (2,))
FULL = 2**64 - 1
ARRAYS = array(ARRAY, 70_000, array(U8, 0, b"") * 70_000)
NO_AXES = gguf_bytes([], [Info("x", ())])
BROKEN: dict[str, bytes] = {
    "GGUF version 1; wanted version 2 or 3": b"GGUF" + struct.pack("<III", 1, 0, 0),
    "GGUF version 4;": gguf_bytes(version=4),
    "GGUF version 1;": gguf_bytes(version=1, order=">"),
    "GGUF version 0;": gguf_bytes(version=0),
    "truncated: 6 bytes": b"GGUF\x03\0",
    "truncated: a number of 8 bytes": gguf_bytes()[:20],
    f"{FULL} tensors in the": gguf_bytes(n_tensors=FULL),
    f"{2**60} metadata keys in the": gguf_bytes(n_keys=2**60),
    "100000 tensors; wanted": gguf_bytes([key("k", STRING, string(b"x" * 3_000_000))], n_tensors=100_000),
    f"{2**62} numbers in 'k'": gguf_bytes([key("k", ARRAY, array(U32, 2**62, b""))]),
    f"{2**40} strings in 'k'": gguf_bytes([key("k", ARRAY, array(STRING, 2**40, b""))]),
    f"{2**40} arrays in 'k'": gguf_bytes([key("k", ARRAY, array(ARRAY, 2**40, b""))]),
    "70000 arrays in 'k'; wanted": gguf_bytes([key("k", ARRAY, ARRAYS)]),
    "'k' has value type 13": gguf_bytes([key("k", 13, b"")]),
    "value type 77": gguf_bytes([key("k", ARRAY, array(77, 1, bytes(12)))]),
    "nested more than 4 deep": gguf_bytes([key("k", ARRAY, array(ARRAY, 1, b"") * 2000)]),
    f"truncated: k of {2**60} bytes": gguf_bytes([key("k", STRING, struct.pack("<Q", 2**60) + bytes(9))]),
    "truncated: k of 99 bytes": gguf_bytes([key("k", ARRAY, array(STRING, 1, struct.pack("<Q", 99)))]),
    "metadata key 'k' stands twice": gguf_bytes([key("k", U8, b"\0"), key("k", U8, b"\1")]),
    "general.alignment is 0": gguf_bytes([key("general.alignment", U32, bytes(4))]),
    "general.alignment is 48": gguf_bytes([key("general.alignment", U32, struct.pack("<I", 48))]),
    "general.alignment is '32'": gguf_bytes([key("general.alignment", STRING, string("32"))]),
    "tensor 'x' stands twice": gguf_bytes([], [X, X], bytes(8)),
    "x: starts at offset 8; wanted a multiple of": gguf_bytes([], [Info("x", (2,), 0, 8)], bytes(99)),
    "x: truncated: ends at byte": gguf_bytes([], [Info("x", (3,))], bytes(8)),
    "x: truncated: ends": gguf_bytes([], [Info("x", (2,), 0, 2**64 - 32)], bytes(8)),
    "x: 5 dimensions; wanted at most 4": gguf_bytes([], [Info("x", (1, 1, 1, 1, 1))], bytes(4)),
    "x: 4000000000 dimensions": NO_AXES.replace(b"x\0\0\0\0", b"x" + struct.pack("<I", 4_000_000_000)),
    "fits in memory": gguf_bytes([], [Info("x", (2**32, 2**32))]),
    "one that fits in memory": gguf_bytes([], [Info("x", (0, 2**62))]),
    "x: unknown block type 99": gguf_bytes([], [Info("x", (2,), 99)], bytes(99)),
    "x: block type 31 is Q4_0_4_4, which": gguf_bytes([], [Info("x", (32,), 31)], bytes(99)),
    "x: rows of 100 weights; wanted a multiple of 256": gguf_bytes([], [Info("x", (100,), 12)], bytes(999)),
    "x: one number of type Q4_0": gguf_bytes([], [Info("x", (), 2)], bytes(99)),
}  # fmt: skip


@pytest.mark.parametrize("said", BROKEN)
def test_damage_is_named(tmp_path: Path, said: str) -> None:
    assert said in failure_of(tmp_path, BROKEN[said])


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    text = failure_of(tmp_path, gguf_bytes([], [Info("\x1b[31mx\n", (100,), 12)], bytes(999)))
    assert "\x1b" not in text


# ---- any bytes

SMALL = gguf_bytes(
    [
        key("general.architecture", STRING, string("llama")),
        key("t", ARRAY, array(STRING, 2, string("ab") + string("c"))),
        key("n", ARRAY, array(U32, 2, bytes(8))),
        key("nested", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1"))),
    ],
    [Info("token_embd.weight", (2, 3)), Info("q", (32, 2), 2, 32)],
    bytes(32 + 36),
)


def try_open(data: bytes) -> GGUFFile | None:
    """The file, everything in it touched; None if it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.gguf")
        path.write_bytes(data)
        try:
            file = open_gguf(path)
        except FileError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            return None
        format_report(describe(file), tensors=True)
        for tensor in file.tensors.values():
            assert tensor.raw.nbytes == tensor.nbytes <= len(data)
            if tensor.type not in ("Q8_1", "Q8_K"):
                assert tensor.dequantize().shape == tensor.shape
        return file


def test_the_small_file_is_sound() -> None:
    file = try_open(SMALL)
    assert file is not None
    assert list(file.tensors) == ["token_embd.weight", "q"]


def test_every_beginning_of_a_file_is_refused() -> None:
    for length in range(len(SMALL)):
        assert try_open(SMALL[:length]) is None, length


def bounded(action: Callable[[], object], n_bytes: int) -> None:
    """Run with the bounds that hold for any file of ``n_bytes``."""
    tracemalloc.start()
    start = time.process_time()
    action()
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 20) + 64 * n_bytes
    assert seconds < 2 + 1e-6 * n_bytes  # while tracemalloc watches; ten times faster without


@settings(deadline=None)
@given(
    position=st.integers(0, len(SMALL) - 1),
    junk=st.binary(min_size=1, max_size=12),
    keep=st.integers(0, len(SMALL)),
    insert=st.booleans(),
)
def test_changed_bytes(position: int, junk: bytes, keep: int, insert: bool) -> None:
    data = SMALL[:position] + junk + SMALL[position + (0 if insert else len(junk)) :]
    bounded(lambda: try_open(data if keep < 50 else data[: keep + 50]), len(data))


@settings(deadline=None)
@given(
    position=st.integers(8, len(SMALL) - 8),
    number=st.sampled_from([0, 1, 3, 2**8, 2**16, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
)
def test_numbers_at_their_limits(position: int, number: int) -> None:
    data = SMALL[:position] + struct.pack("<Q", number) + SMALL[position + 8 :]
    bounded(lambda: try_open(data), len(data))


STARTS = [b"", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\0\0\0\3", SMALL[:24], SMALL[:60]]


@settings(deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_any_bytes(start: bytes, rest: bytes) -> None:
    bounded(lambda: try_open(start + rest), len(start + rest))


@pytest.mark.parametrize(
    "data",
    [
        gguf_bytes([key("k", ARRAY, array(STRING, 1_000_000, bytes(8_000_000)))]),
        gguf_bytes([key("k", ARRAY, array(STRING, 300_000, string("ж") * 300_000))]),
        gguf_bytes([key("k", ARRAY, array(ARRAY, 60_000, array(U8, 0, b"") * 60_000))]),
        gguf_bytes([key(f"k{i}", U8, b"\1") for i in range(60_000)]),
        gguf_bytes([], [Info(f"x{i}", (0,)) for i in range(60_000)]),
    ],
    ids=["empty strings", "short strings", "empty arrays", "keys", "tensors"],
)
def test_the_densest_files_stay_within_bounds(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    bounded(lambda: open_gguf(path), len(data))


def test_metadata_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([key("k", ARRAY, array(U8, 1 << 26, b""))]))
    with path.open("r+b") as opened:
        opened.truncate(1 << 27)
    assert f"{1 << 26} numbers in 'k'; wanted" in failure(path)
    path.write_bytes(gguf_bytes([key("k", STRING, struct.pack("<Q", 1 << 26))]))
    with path.open("r+b") as opened:
        opened.truncate(1 << 27)
    assert "more than 64 MiB of metadata" in failure(path)
