"""Readers of checkpoints: safetensors, PyTorch's zip files, folders of shards; and what they must refuse."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.torch_file import Global, TensorRef, dumps, save, write_zip
from tinyllava.errors import FileError
from tinyllava.files.checkpoint import open_checkpoint, open_shard
from tinyllava.files.safetensors import open_safetensors, write_safetensors
from tinyllava.files.stored import StoredArray, stored
from tinyllava.files.torch_zip import open_torch_zip

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
RNG = np.random.default_rng(5)
SAMPLE = {
    "a.weight": RNG.standard_normal((3, 4)).astype(np.float32),
    "b": RNG.standard_normal(7).astype(np.float16),
    "empty": np.zeros((0, 5), np.float32),
    "scalar": np.array(3, np.int64),
}


def arrays() -> st.SearchStrategy[dict[str, np.ndarray]]:
    dtypes = st.sampled_from(["<f4", "<f2", "<f8", "<i8", "|u1"])
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    return st.dictionaries(names, dtypes.flatmap(lambda d: hnp.arrays(d, shapes)), min_size=1, max_size=4)


def same(found: dict[str, StoredArray] | Any, wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        read = found[name].read()
        assert (read.dtype, read.shape, read.tobytes()) == (values.dtype, values.shape, values.tobytes())


# ---- written, then read


@SAME_FOLDER
@given(tensors=arrays())
def test_safetensors_come_back(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: stored(name, values) for name, values in tensors.items()}, {"format": "np"})
    same(open_safetensors(path), tensors)


@SAME_FOLDER
@given(tensors=arrays())
def test_torch_tensors_come_back(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    save(tmp_path / "x.bin", tensors)
    same(open_torch_zip(tmp_path / "x.bin"), tensors)


def test_bfloat16_is_the_upper_half_of_a_float(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000, 0x7F80], np.uint16)  # 1, -2, infinity
    save(tmp_path / "x.bin", {"w": bits.astype("<u2")}, bf16=("w",))
    write_safetensors(tmp_path / "x.safetensors", {"w": stored("w", bits, "BF16")})
    for path in (tmp_path / "x.bin", tmp_path / "x.safetensors"):
        array = open_shard(path)["w"]
        assert array.dtype == "BF16"
        np.testing.assert_array_equal(array.float32(), [1.0, -2.0, np.inf])


def test_a_window_on_a_storage_is_read_with_its_strides(tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.float32)
    refs = {
        "transposed": TensorRef("0", "FloatStorage", 12, (4, 3), (1, 4)),
        "row": TensorRef("0", "FloatStorage", 12, (4,), (1,), offset=8),
    }
    write_zip(tmp_path / "x.bin", dumps(refs), {"0": data.tobytes()})
    found = open_torch_zip(tmp_path / "x.bin")
    np.testing.assert_array_equal(found["transposed"].read(), data.reshape(3, 4).T)
    np.testing.assert_array_equal(found["row"].read(), [8, 9, 10, 11])


def test_nested_dictionaries_join_their_names(tmp_path: Path) -> None:
    tensor = TensorRef("0", "FloatStorage", 1, (1,), (1,))
    write_zip(tmp_path / "x.pth", dumps({"model": {"w": tensor}, "step": 5}), {"0": b"\0\0\x80\x3f"})
    assert open_torch_zip(tmp_path / "x.pth")["model.w"].read() == [1.0]


# ---- folders


def test_shards_are_found_with_and_without_an_index(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        save(tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin", {name: SAMPLE["b"]})
    save(tmp_path / "training_args.bin", {"junk": SAMPLE["b"]})
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == {"a", "b"} and checkpoint.config["model_type"] == "llava"
    index = {"weight_map": {n: f"pytorch_model-0000{i + 1}-of-00002.bin" for i, n in enumerate(("a", "b"))}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path)) == {"a", "b"}


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"w": stored("w", SAMPLE["b"])})
    save(tmp_path / "pytorch_model.bin", {"w": SAMPLE["b"]})
    assert [path.name for path in open_checkpoint(tmp_path).files] == ["model.safetensors"]


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"a": "one.bin", "b": "two.bin"}}, "1 of 2 shards are missing, first two.bin"),
        ({"weight_map": {"a": "one.bin", "zz": "one.bin"}}, "names 1 arrays that no shard holds, first zz"),
        ({"weight_map": {"a": "../one.bin"}}, "outside the folder"),
        ({"metadata": {}}, "no weight_map"),
        ([], "wanted an object"),
    ],
)
def test_an_index_that_is_wrong(index: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path / "one.bin", {"a": SAMPLE["b"]})
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match=message):
        open_checkpoint(tmp_path)


def test_a_wrong_folder_names_the_nearest(tmp_path: Path) -> None:
    inner = tmp_path / "snapshot"
    inner.mkdir()
    save(inner / "pytorch_model.bin", {"a": SAMPLE["b"]})
    with pytest.raises(FileError, match=r"no \*.safetensors.*Did you mean .*snapshot"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(FileError, match="a file; wanted a folder"):
        open_checkpoint(inner / "pytorch_model.bin")


def test_one_array_in_two_shards_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "one.bin", {"a": SAMPLE["b"]})
    save(tmp_path / "two.bin", {"a": SAMPLE["b"]})
    with pytest.raises(FileError, match=r"two.bin: a: also in .*one.bin"):
        open_checkpoint(tmp_path)


# ---- what a pickle may not do


@pytest.mark.parametrize(
    "module, name", [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("posix", "system")]
)
def test_a_pickle_that_asks_for_anything_else_runs_nothing(module: str, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickled = b"\x80\x02" + f"c{module}\n{name}\n".encode() + b"X" + struct.pack("<I", 20 + len(str(canary)))
    pickled += f"touch {canary} #############".encode()[: 20 + len(str(canary))] + b"\x85R."
    write_zip(tmp_path / "x.bin", pickled, {})
    with pytest.raises(FileError, match=rf"asks for {module}.{name}; wanted tensors.*Nothing was run"):
        open_torch_zip(tmp_path / "x.bin")
    assert not canary.exists()


@pytest.mark.parametrize(
    "value, message",
    [
        ({"w": TensorRef("0", "FloatStorage", 3, (5,), (1,))}, "reaches to element 4 of a storage of 3"),
        ({"w": TensorRef("0", "FloatStorage", 3, (1 << 40,), (0,))}, "on a storage of 3 elements"),
        ({"w": TensorRef("0", "FloatStorage", 3, (2,), (-1,))}, "damaged pickle"),
        ({"w": TensorRef("0", "FloatStorage", 3, (2,), (1, 1))}, "damaged pickle"),
        ({"w": TensorRef("9", "FloatStorage", 3, (2,), (1,))}, "no entry data/9"),
        ({"w": TensorRef("0", "QInt8Storage", 3, (2,), (1,))}, "asks for torch.QInt8Storage"),
        ({"w": 5}, "no tensors in it"),
        ([1, 2], "no tensors in it"),
        ({"w": Global("torch._utils", "_rebuild_qtensor")}, "asks for torch._utils._rebuild_qtensor"),
    ],
)
def test_descriptions_that_make_no_sense(value: Any, message: str, tmp_path: Path) -> None:
    write_zip(tmp_path / "x.bin", dumps(value), {"0": bytes(12)})
    with pytest.raises(FileError, match=message):
        for array in open_torch_zip(tmp_path / "x.bin").values():
            array.read()


def test_attributes_cannot_be_set_on_a_checked_tensor(tmp_path: Path) -> None:
    """BUILD would write into the description behind the checks' back."""
    tensor = dumps(TensorRef("0", "FloatStorage", 3, (2,), (1,)))
    pickled = b"\x80\x02}X\x01\0\0\0w" + tensor[2:-1] + dumps({"shape": (1 << 40,)})[2:-1] + b"bs."
    write_zip(tmp_path / "x.bin", pickled, {"0": bytes(12)})
    with pytest.raises(FileError, match="attributes for a Description"):
        open_torch_zip(tmp_path / "x.bin")


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100))
    (tmp_path / "text.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save(tmp_path / "good.bin", SAMPLE)
    with zipfile.ZipFile(tmp_path / "zip.bin", "w") as archive:
        archive.writestr("readme", "hello")
    write_zip(tmp_path / "deflated.bin", dumps({}), {}, zipfile.ZIP_DEFLATED)
    (tmp_path / "short.bin").write_bytes((tmp_path / "good.bin").read_bytes()[:-40])
    for name, message in {
        "old.bin": "before version 1.6.*Save it again",
        "text.bin": "not a zip archive",
        "empty.safetensors": "an empty file",
        "zip.bin": "0 entries named data.pkl",
        "deflated.bin": "compressed",
        "short.bin": "damaged zip archive",
        "absent.bin": "No such file",
    }.items():
        with pytest.raises(FileError, match=message):
            open_shard(tmp_path / name)


# ---- damage


def outcome(path: Path) -> dict[str, bytes] | None:
    """All bytes of all arrays, or None for our error; anything else is a failure of the test."""
    try:
        return {name: array.read().tobytes() for name, array in open_shard(path).items()}
    except FileError as error:
        assert "\n" not in str(error)
        return None


@SAME_FOLDER
@given(data=st.data())
def test_any_byte_of_a_torch_file_changed_gives_the_same_tensors_or_our_error(
    data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / "x.bin"
    save(path, SAMPLE)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    found = outcome(path)
    assert found is None or found == {name: values.tobytes() for name, values in SAMPLE.items()}


@SAME_FOLDER
@given(data=st.data())
def test_a_damaged_safetensors_file_gives_arrays_or_our_error_in_bounded_memory(
    data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: stored(name, values) for name, values in SAMPLE.items()})
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    tracemalloc.start()
    outcome(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@SAME_FOLDER
@given(pickled=st.binary(max_size=60))
def test_any_bytes_as_a_pickle_give_tensors_or_our_error(pickled: bytes, tmp_path: Path) -> None:
    write_zip(tmp_path / "x.bin", b"\x80\x02" + pickled + b".", {"0": bytes(12)})
    outcome(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "header, message",
    [
        (b"[]", "not an object"),
        (b"{{", "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', "a name stands twice"),
        (b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', "type 'F99'; wanted"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', r"4 bytes; wanted 8 for F32 \[2\]"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}', "truncated: ends at byte 12 of 8"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}', "wanted whole numbers"),
        (b'{"a":5}', "has no data_offsets"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            "overlaps",
        ),
    ],
)
def test_a_header_that_makes_no_sense(header: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(FileError, match=message):
        open_safetensors(tmp_path / "x.safetensors")


# ---- the formats' own libraries


@pytest.mark.peers
def test_torch_and_safetensors_read_and_write_the_same(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    tensors = {
        "f32": torch.randn(3, 4),
        "f16": torch.randn(5).half(),
        "bf16": torch.randn(2, 2).bfloat16(),
        "t": torch.arange(6).reshape(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(tensors, tmp_path / "x.bin")
    library.save_file({name: t.detach().contiguous() for name, t in tensors.items()}, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.bin", tmp_path / "x.safetensors"):
        found = open_shard(path)
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            bits = tensor.detach().contiguous().view(torch.int16 if name == "bf16" else tensor.dtype)
            assert found[name].read().tobytes() == bits.numpy().tobytes()
    write_safetensors(tmp_path / "ours.safetensors", open_shard(tmp_path / "x.bin"))
    theirs = library.load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
