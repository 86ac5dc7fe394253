"""Reading sound GGUF files: by hand, written by gguf in every variation, and compared with gguf's reader."""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.files.raw_gguf import ARRAY, BOOL, F32, STRING, U8, U32, Info, array, gguf_bytes, key, string
from tinyllava.files import n_parameters, open_gguf
from tinyllava.quant import TYPES, dequantize

ORDERS = {"little": gguf.GGUFEndian.LITTLE, "big": gguf.GGUFEndian.BIG}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- by hand


@pytest.mark.parametrize(("order", "byte_order"), [("<", "little"), (">", "big")])
@pytest.mark.parametrize("version", [2, 3])
def test_a_file_written_by_hand(tmp_path: Path, order: str, byte_order: str, version: int) -> None:
    inner = array(U8, 2, b"\1\2", order) + array(U8, 0, b"", order)
    keys = [
        key("name", STRING, string("Σ", order), order),
        key("general.alignment", U32, struct.pack(order + "I", 64), order),
        key("eps", F32, struct.pack(order + "f", 0.5), order),
        key("yes", BOOL, b"\x01", order),
        key("words", ARRAY, array(STRING, 2, string("a", order) + string("", order), order), order),
        key("flags", ARRAY, array(BOOL, 3, b"\x00\x01\x02", order), order),
        key("pairs", ARRAY, array(ARRAY, 2, inner, order), order),
    ]
    weights = struct.pack(order + "6f", *range(6))
    data = gguf_bytes(keys, [Info("x", (3, 2))], weights, version=version, order=order, alignment=64)
    with open_gguf(write(tmp_path / "a.gguf", data)) as file:
        assert (file.version, file.byte_order, file.alignment) == (version, byte_order, 64)
        assert file.metadata["name"] == "Σ"
        assert (file.metadata["eps"], file.metadata["yes"]) == (0.5, True)
        assert file.metadata["words"] == ["a", ""]
        assert file.metadata["flags"].tolist() == [False, True, True]
        assert [pair.tolist() for pair in file.metadata["pairs"]] == [[1, 2], []]
        x = file.tensors["x"]
        assert (x.shape, x.type, x.n_elements, x.nbytes) == ((2, 3), "F32", 6, 24)
        assert x.dequantize().tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        assert x.raw.view("<f4").tolist() == x.dequantize().tolist()


def test_bytes_that_are_not_utf8_do_not_hide_a_model(tmp_path: Path) -> None:
    data = gguf_bytes([key("name", STRING, string(b"a\xff"))])
    assert open_gguf(write(tmp_path / "a.gguf", data)).metadata == {"name": "a\ufffd"}


def test_tensors_without_elements_and_without_axes(tmp_path: Path) -> None:
    infos = [Info("empty", (0,)), Info("rows", (0, 3)), Info("one", ()), Info("q", (0, 2), type=12)]
    file = open_gguf(write(tmp_path / "a.gguf", gguf_bytes([], infos, struct.pack("<f", 7))))
    assert file.tensors["empty"].dequantize().shape == (0,)
    assert file.tensors["rows"].dequantize().shape == (3, 0)
    assert file.tensors["q"].raw.shape == (2, 0)
    assert file.tensors["one"].dequantize() == np.float32(7)
    assert file.tensors["one"].dequantize().shape == ()
    assert n_parameters(file) == 1


# ---- everything that gguf can write

NUMBERS = {
    "uint8": st.integers(0, 2**8 - 1), "int8": st.integers(-(2**7), 2**7 - 1),
    "uint16": st.integers(0, 2**16 - 1), "int16": st.integers(-(2**15), 2**15 - 1),
    "uint32": st.integers(0, 2**32 - 1), "int32": st.integers(-(2**31), 2**31 - 1),
    "uint64": st.integers(0, 2**64 - 1), "int64": st.integers(-(2**63), 2**63 - 1),
    "float32": st.floats(width=32), "float64": st.floats(), "bool": st.booleans(),
}  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)  # the writer leaves out empty strings
SCALARS = st.one_of(*(st.tuples(st.just(kind), values) for kind, values in NUMBERS.items()))
ARRAYS = st.one_of(
    st.lists(TEXT, min_size=1, max_size=5),
    st.lists(NUMBERS["int32"], min_size=1, max_size=5),
    st.lists(NUMBERS["float32"], min_size=1, max_size=5),
    st.lists(NUMBERS["bool"], min_size=1, max_size=5),
    st.lists(st.lists(NUMBERS["int32"], min_size=1, max_size=3), min_size=1, max_size=3),
)
VALUES = SCALARS | st.tuples(st.just("string"), TEXT) | st.tuples(st.just("array"), ARRAYS)
KEYS = st.dictionaries(TEXT.map("x.".__add__), VALUES, max_size=6)
TENSORS = st.dictionaries(
    TEXT,
    st.tuples(
        st.sampled_from([m.name for m in gguf.GGMLQuantizationType if m.name != "Q8_1"]),
        st.lists(st.integers(1, 3), max_size=3),  # the slower axes
        st.integers(1, 2),  # blocks in a row
    ),
    max_size=5,
)  # fmt: skip


def write_with_gguf(
    path: Path,
    order: str,
    alignment: int | None,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray],
    types: dict[str, str],
) -> None:
    """``keys``: name -> (what follows add_ in the writer's methods, value); ``tensors``: blocks as bytes."""
    writer = gguf.GGUFWriter(path, "llama", endianess=ORDERS[order])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, (kind, value) in keys.items():
        getattr(writer, f"add_{kind}")(name, value)
    for name, raw in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[types[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def plain(value: Any) -> Any:
    """Arrays as lists, so that == compares all of it; NaN as text, so that it equals itself."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(v) for v in value]
    return "nan" if value != value else value


@settings(deadline=None)
@given(
    order=st.sampled_from(["little", "big"]),
    alignment=st.sampled_from([None, 8, 32, 64, 4096]),
    keys=KEYS,
    layout=TENSORS,
)
def test_what_gguf_writes_is_read_back(
    order: str, alignment: int | None, keys: dict[str, Any], layout: dict[str, tuple[str, list[int], int]]
) -> None:
    rng = np.random.default_rng(30)
    raws = {
        name: rng.integers(0, 256, (*slower, n_blocks * TYPES[kind].nbytes), dtype=np.uint8)
        for name, (kind, slower, n_blocks) in layout.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.gguf")
        # gguf writes arrays of bytes as they are, in either byte order.
        write_with_gguf(path, order, alignment, keys, raws, {name: kind for name, (kind, *_) in layout.items()})
        file = open_gguf(path)
        assert (file.byte_order, file.alignment) == (order, alignment or 32)
        expected = {name: value for name, (_, value) in keys.items()}
        got = {name: value for name, value in file.metadata.items() if name.startswith("x.")}
        assert plain(got) == plain(expected)
        assert list(file.tensors) == list(layout)
        for name, (kind, slower, n_blocks) in layout.items():
            tensor = file.tensors[name]
            assert (tensor.type, tensor.shape) == (kind, (*slower, n_blocks * TYPES[kind].block_size))
            np.testing.assert_array_equal(tensor.stored, raws[name].reshape(tensor.n_rows, -1))
            if order == "little":
                np.testing.assert_array_equal(tensor.raw, tensor.stored)
        file.close()


def test_types_survive(tmp_path: Path) -> None:
    """Not only equal: an int is an int, a bool a bool, and arrays have the file's type."""
    keys = {"x.u": ("uint64", 2**63), "x.f": ("float32", 1.0), "x.b": ("bool", True), "x.a": ("array", [1, 2])}
    write_with_gguf(tmp_path / "a.gguf", "big", None, keys, {}, {})
    metadata = open_gguf(tmp_path / "a.gguf").metadata
    assert [type(metadata[f"x.{letter}"]) for letter in "ufb"] == [int, float, bool]
    assert metadata["x.a"].dtype == np.int32
    assert metadata["x.a"].dtype.isnative


@pytest.mark.parametrize("order", ["little", "big"])
def test_numbers_in_either_byte_order(tmp_path: Path, order: str) -> None:
    """Here gguf's writer knows the type, and swaps."""
    dtypes = ("float32", "float16", "float64", "int8", "int16", "int32", "int64")
    arrays = [np.arange(-3, 3, dtype=dtype).reshape(2, 3) for dtype in dtypes]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=ORDERS[order])
    for array_ in arrays:
        writer.add_tensor(array_.dtype.name, array_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    for array_ in arrays:
        np.testing.assert_array_equal(file.tensors[array_.dtype.name].dequantize(np.float64), array_)


def test_big_endian_blocks_as_gguf_converts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle turns a little-endian file into a big-endian one in place, the scales inside blocks included."""
    from gguf.scripts import gguf_convert_endian

    rng = np.random.default_rng(31)
    types = ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4"]
    raws = {name: rng.integers(0, 256, (3, 2 * TYPES[name].nbytes), dtype=np.uint8) for name in types}
    keys = {"x.words": ("array", ["a", "bc"]), "x.n": ("uint32", 7)}
    for name in ("little.gguf", "big.gguf"):
        write_with_gguf(tmp_path / name, "little", None, keys, raws, dict(zip(types, types, strict=True)))
    monkeypatch.setattr("builtins.input", lambda _: "YES")
    monkeypatch.setattr(gguf_convert_endian, "tqdm", lambda items, **_: Silent(items))
    reader = gguf.GGUFReader(tmp_path / "big.gguf", "r+")
    gguf_convert_endian.convert_byteorder(reader, type("Args", (), {"order": "big", "dry_run": False}))
    reader.data.flush()
    little, big = open_gguf(tmp_path / "little.gguf"), open_gguf(tmp_path / "big.gguf")
    assert big.byte_order == "big"
    assert plain(big.metadata) == plain(little.metadata)
    for name in types:
        assert not np.array_equal(big.tensors[name].stored, little.tensors[name].stored) or name == "MXFP4"
        np.testing.assert_array_equal(big.tensors[name].raw, little.tensors[name].raw)
        np.testing.assert_array_equal(big.tensors[name].dequantize(), little.tensors[name].dequantize())
        np.testing.assert_array_equal(big.tensors[name].rows([2, 0]), little.tensors[name].rows([2, 0]))


class Silent(list[Any]):
    """tqdm without its output."""

    def set_description(self, text: str) -> None:
        pass


# ---- memory, time, and the life of the mapping


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """A file with a Q4_0 matrix ``m`` of 8 rows of 64 weights."""
    raw = np.random.default_rng(32).integers(0, 256, (8, 36), dtype=np.uint8)
    write_with_gguf(tmp_path / "m.gguf", "little", None, {}, {"m": raw}, {"m": "Q4_0"})
    return tmp_path / "m.gguf"


def test_raw_is_a_read_only_view_of_the_file(matrix: Path) -> None:
    file = open_gguf(matrix)
    raw = file.tensors["m"].raw
    assert not raw.flags.writeable
    assert np.shares_memory(raw, file.tensors["m"].raw)
    np.testing.assert_array_equal(file.tensors["m"].dequantize(), dequantize("Q4_0", raw))


def test_rows_are_those_of_the_whole(matrix: Path) -> None:
    tensor = open_gguf(matrix).tensors["m"]
    np.testing.assert_array_equal(tensor.rows([3, 0, 3]), tensor.dequantize()[[3, 0, 3]])
    np.testing.assert_array_equal(tensor.rows(np.array([7])), tensor.dequantize()[[7]])
    assert tensor.rows([]).shape == (0, 64)
    for wrong in ([8], [-1]):
        with pytest.raises(IndexError, match="of 8"):
            tensor.rows(wrong)


def test_a_matrix_view_has_the_same_weights(tmp_path: Path) -> None:
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    write_with_gguf(tmp_path / "a.gguf", "little", None, {}, {"k": kernel.view(np.uint8)}, {"k": "F32"})
    tensor = open_gguf(tmp_path / "a.gguf").tensors["k"].as_matrix()
    assert tensor.raw.shape == (2, 48)
    np.testing.assert_array_equal(tensor.dequantize(), kernel.reshape(2, 12))


def test_a_closed_file_gives_nothing_more_but_what_it_gave_stays(matrix: Path) -> None:
    with open_gguf(matrix) as file:
        tensor, raw = file.tensors["m"], file.tensors["m"].raw
        copy = raw.copy()
    with pytest.raises(ValueError, match="closed"):
        tensor.dequantize()
    np.testing.assert_array_equal(raw, copy)
    file.close()  # twice is allowed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_close_unmaps_the_file_and_leaves_no_descriptor(matrix: Path) -> None:
    def mapped() -> bool:
        return str(matrix) in Path("/proc/self/maps").read_text()

    def opened() -> list[str]:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if link.is_symlink()]

    with open_gguf(matrix) as file:
        file.tensors["m"].dequantize()
        assert mapped()
    assert not mapped()
    assert str(matrix) not in opened()


def test_a_vocabulary_of_152_000_tokens_is_read_fast(tmp_path: Path) -> None:
    keys = {
        "t": ("array", [f"Ġtoken{i}" for i in range(152_000)]),
        "m": ("array", [f"Ġ{i} b" for i in range(151_000)]),
        "s": ("array", [0.5] * 152_000),
    }
    write_with_gguf(tmp_path / "a.gguf", "little", None, keys, {}, {})
    start = time.process_time()
    metadata = open_gguf(tmp_path / "a.gguf").metadata
    assert time.process_time() - start < 1.0  # s; about 0.08 on one core of 2020
    assert metadata["t"][151_999] == "Ġtoken151999"
    assert metadata["s"].shape == (152_000,)


def test_opening_takes_no_memory_for_the_weights(tmp_path: Path) -> None:
    n = 1 << 29
    path = write(tmp_path / "a.gguf", gguf_bytes([], [Info("x", (n,))]))
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size + 4 * n)  # 2 GiB of zeros, which take no room on the disk
    tracemalloc.start()
    file = open_gguf(path)
    assert file.tensors["x"].raw[0, -1] == 0
    assert n_parameters(file) == n
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
