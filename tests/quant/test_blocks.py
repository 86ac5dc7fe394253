"""The block formats against their declarations, against gguf, and against themselves."""

from __future__ import annotations

import tracemalloc
import warnings

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllava.errors import FileError
from tinyllava.quant import TYPES, BlockType, by_id, dequantize
from tinyllava.quant.blocks import CHUNK, REMOVED, swap_bytes
from tinyllava.quant.grids import GRIDS, points

READABLE = [name for name, kind in TYPES.items() if kind.dequantize is not None]
KNOWN_TO_GGUF = [name for name in READABLE if name in gguf.GGMLQuantizationType.__members__]


def gguf_weights(name: str, raw: np.ndarray) -> np.ndarray | None:
    """The oracle's answer; None where it has none."""
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    except NotImplementedError:
        return None


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bit for bit, so also in the sign of zero; any NaN equals any NaN."""
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), np.argwhere(~same)[:5]


# ---- declarations


@pytest.mark.parametrize("member", list(gguf.GGMLQuantizationType), ids=lambda m: m.name)
def test_every_type_of_gguf_is_declared_with_its_size(member: gguf.GGMLQuantizationType) -> None:
    kind = by_id(int(member))
    assert kind.name == member.name
    size, nbytes = GGML_QUANT_SIZES[member]
    if member.name == "Q8_1":
        nbytes = 36  # gguf's table is of before its scales became float16; ggml-common.h asserts 36
    assert (kind.block_size, kind.nbytes) == (size, nbytes)


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_fields_fill_the_block(kind: BlockType) -> None:
    assert kind.dtype.itemsize == kind.nbytes
    assert kind.offset(kind.fields[0][0]) == 0
    assert kind.bits_per_weight == 8 * kind.nbytes / kind.block_size


def test_offsets_and_row_bytes() -> None:
    assert TYPES["Q4_1"].offset("qs") == 4
    assert TYPES["Q6_K"].offset("d") == 208
    assert TYPES["Q4_K"].row_bytes(512) == 288
    with pytest.raises(ValueError, match="no multiple of 256"):
        TYPES["Q4_K"].row_bytes(300)


def test_removed_and_unknown_types_are_refused_by_name() -> None:
    for number, (name, successor) in REMOVED.items():
        with pytest.raises(FileError, match=rf"is {name}, which GGUF has dropped.*as {successor}"):
            by_id(number)
    with pytest.raises(FileError, match=r"x\.gguf: unknown block type 999"):
        by_id(999, "x.gguf")


def test_internal_formats_and_broken_rows_are_refused() -> None:
    with pytest.raises(FileError, match="intermediate"):
        dequantize("Q8_1", np.zeros((1, 36), np.uint8))
    with pytest.raises(ValueError, match="rows of 19 bytes"):
        dequantize("Q4_0", np.zeros((2, 19), np.uint8))


@pytest.mark.parametrize(
    ("name", "n"),
    [("IQ2_XXS", 256), ("IQ2_XS", 512), ("IQ2_S", 1024), ("IQ3_XXS", 256), ("IQ3_S", 512), ("IQ1_S", 2048)],
)
def test_grids_have_as_many_points_as_their_indices_can_name(name: str, n: int) -> None:
    assert points(name).shape == (n, GRIDS[name].n_coordinates)


# ---- the oracle


def test_gguf_answers_for_all_types_but_plain_numbers() -> None:
    """So that the comparisons below cannot pass by comparing nothing."""
    one = {name: np.zeros((1, TYPES[name].nbytes), np.uint8) for name in KNOWN_TO_GGUF}
    silent = {name for name, raw in one.items() if gguf_weights(name, raw) is None}
    assert silent <= {"F64", "I8", "I16", "I32", "I64", "Q1_0"}


@pytest.mark.parametrize("name", KNOWN_TO_GGUF)
def test_random_bytes_give_what_gguf_gives(name: str) -> None:
    rng = np.random.default_rng(20)
    raw = rng.integers(0, 256, (40, 25 * TYPES[name].nbytes), dtype=np.uint8)
    theirs = gguf_weights(name, raw)
    if theirs is not None:
        assert_same_bits(dequantize(name, raw), theirs)


SPECIAL_HALVES = np.array(
    [0, 0x8000, 1, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF], "<u2"
)  # zeros, subnormals, the smallest normal, the largest, infinities, NaN


@pytest.mark.parametrize("name", [n for n in KNOWN_TO_GGUF if ("d", "<f2") in TYPES[n].fields])
def test_zero_subnormal_infinite_and_nan_scales_give_what_gguf_gives(name: str) -> None:
    rng = np.random.default_rng(21)
    kind = TYPES[name]
    blocks = rng.integers(0, 256, (len(SPECIAL_HALVES), 3, kind.nbytes), dtype=np.uint8).view(kind.dtype)
    blocks["d"][..., 0] = SPECIAL_HALVES.view("<f2")[:, None]
    raw = blocks.view(np.uint8).reshape(len(SPECIAL_HALVES), -1)
    theirs = gguf_weights(name, raw)
    if theirs is not None:
        assert_same_bits(dequantize(name, raw), theirs)


@settings(deadline=None)
@given(data=st.data())
def test_any_bytes_give_what_gguf_gives(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(KNOWN_TO_GGUF))
    nbytes = TYPES[name].nbytes
    raw = np.frombuffer(data.draw(st.binary(min_size=nbytes, max_size=nbytes)), np.uint8)[None]
    theirs = gguf_weights(name, raw)
    if theirs is not None:
        assert_same_bits(dequantize(name, raw), theirs)


# ---- properties


@pytest.mark.parametrize("name", READABLE)
def test_blocks_are_independent_of_their_neighbours_and_of_chunks(name: str) -> None:
    """Row by row, in one go over several chunks, and from a strided view: the same weights."""
    kind = TYPES[name]
    n_rows, n_blocks = 7, CHUNK // kind.block_size // 4 + 1  # 7/4 chunks
    raw = np.random.default_rng(22).integers(0, 256, (n_rows, n_blocks * kind.nbytes), dtype=np.uint8)
    whole = dequantize(name, raw)
    assert whole.shape == (n_rows, n_blocks * kind.block_size)
    rows = np.concatenate([dequantize(name, row[None]) for row in raw])
    wide = np.concatenate([raw, raw], axis=1)[:, : raw.shape[1]]  # rows not next to each other in memory
    for other in (rows, dequantize(name, wide)):
        assert_same_bits(whole, other)


@pytest.mark.parametrize("name", READABLE)
def test_float64_holds_the_float32_values(name: str) -> None:
    raw = np.random.default_rng(23).integers(0, 256, (2, 2 * TYPES[name].nbytes), dtype=np.uint8)
    single, double = dequantize(name, raw), dequantize(name, raw, np.float64)
    assert double.dtype == np.float64
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(double.astype(np.float32), single)


@pytest.mark.parametrize("name", READABLE)
def test_no_blocks_give_no_weights(name: str) -> None:
    assert dequantize(name, np.zeros((0, TYPES[name].nbytes), np.uint8)).shape == (0, TYPES[name].block_size)
    assert dequantize(name, np.zeros((3, 0), np.uint8)).shape == (3, 0)


@pytest.mark.parametrize("name", list(TYPES))
def test_swapping_twice_changes_nothing_and_single_bytes_stay(name: str) -> None:
    kind = TYPES[name]
    raw = np.random.default_rng(24).integers(0, 256, (3, 2 * kind.nbytes), dtype=np.uint8)
    swapped = swap_bytes(kind, raw)
    np.testing.assert_array_equal(swap_bytes(kind, swapped), raw)
    for field, (dtype, offset, *_) in (kind.dtype.fields or {}).items():
        ours, theirs = raw[0, offset : offset + dtype.itemsize], swapped[0, offset : offset + dtype.itemsize]
        wide = dtype.base.itemsize  # bytes of one number in the field
        np.testing.assert_array_equal(theirs, ours.reshape(-1, wide)[:, ::-1].ravel(), err_msg=field)


def test_memory_is_bounded_by_the_result() -> None:
    raw = np.zeros((64, 144 * 128), np.uint8)  # 2 M weights, 8 MB as float32
    dequantize("Q4_K", raw[:1])
    tracemalloc.start()
    weights = dequantize("Q4_K", raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < weights.nbytes + 64 * CHUNK
