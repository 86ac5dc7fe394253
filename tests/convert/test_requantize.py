"""Whole files requantized: types, metadata, answers, and what a user can do wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest

from golden.clip_models import VISION, write_mmproj
from golden.models import LANGUAGE, write_language_model
from tinyllava import cli
from tinyllava.convert import requantize as module
from tinyllava.convert.mixture import MIXTURES
from tinyllava.convert.requantize import ordered_map, requantize
from tinyllava.errors import FileError, ModelError, UsageError
from tinyllava.files.gguf import open_gguf
from tinyllava.files.gguf_write import NewTensor, copy_metadata, encode, write_gguf
from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.language.llama import embed, forward, load_llama, unembed
from tinyllava.ops.select import select
from tinyllava.vision.clip import load_vision, tile_features
from tinyllava.vision.config import VisionConfig

Out = pytest.CaptureFixture[str]
IDS = [1, 17, 400, 33, 250, 8, 99, 301]

# How far answers may move, as a part of their length: about twice what two random models showed. Random weights
# are the worst case, for they have no redundancy; what matters is that more bits move them less.
MOVED = {
    "F32": 0, "BF16": 0.02, "F16": 0.003, "Q8_0": 0.03, "Q6_K": 0.1, "Q5_K_M": 0.15, "Q5_K_S": 0.15, "Q5_1": 0.2,
    "Q5_0": 0.2, "Q4_K_M": 0.3, "Q4_K_S": 0.3, "IQ4_NL": 0.3, "IQ4_XS": 0.3, "Q4_1": 0.4, "Q4_0": 0.4,
    "Q3_K_L": 0.6, "Q3_K_M": 0.6, "Q3_K_S": 0.7, "Q2_K": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requantize")
    write_language_model(folder / "llm.gguf", LANGUAGE["llama_gqa"])
    write_language_model(folder / "tied.gguf", LANGUAGE["llama_tied"], dtype="F16")
    write_language_model(folder / "q8.gguf", LANGUAGE["llama_gqa"], dtype="Q8_0")
    write_mmproj(folder / "mmproj.gguf", VISION["clip_16"])
    return folder


def logits(path: Path) -> np.ndarray:
    ops = select("numpy")
    file = open_gguf(path)
    llama = load_llama(file, read_config(file), ops)
    hidden = forward(embed(IDS, llama, ops), llama, KVCache(llama.config, len(IDS), ops), ops)
    return unembed(hidden, llama, ops)


def features(path: Path) -> np.ndarray:
    ops = select("numpy")
    file = open_gguf(path)
    config = VisionConfig.from_gguf(file)
    pixels = np.random.default_rng(0).standard_normal((3, config.image_px, config.image_px)).astype(np.float32)
    return tile_features(pixels, load_vision(file, config, ops), config, ops)


def moved(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


# ---- what comes out


@pytest.mark.parametrize("name", MIXTURES)
def test_a_language_model_still_answers(name: str, folder: Path, tmp_path: Path) -> None:
    summary = requantize(folder / "llm.gguf", tmp_path / "out.gguf", name.lower())
    assert moved(logits(folder / "llm.gguf"), logits(tmp_path / "out.gguf")) <= MOVED[name]
    assert summary.bytes_out == (tmp_path / "out.gguf").stat().st_size
    types = [t.type for t in open_gguf(tmp_path / "out.gguf").tensors.values()]
    assert summary.types == {kind: types.count(kind) for kind in types}


@pytest.mark.parametrize("name", MIXTURES)
def test_an_image_encoder_still_sees(name: str, folder: Path, tmp_path: Path) -> None:
    requantize(folder / "mmproj.gguf", tmp_path / "out.gguf", name)
    assert moved(features(folder / "mmproj.gguf"), features(tmp_path / "out.gguf")) <= MOVED[name]
    kinds = {t.name: t.type for t in open_gguf(tmp_path / "out.gguf").tensors.values()}
    before = {t.name: t.type for t in open_gguf(folder / "mmproj.gguf").tensors.values()}
    kept = [n for n in kinds if "embd" in n or "ln" in n or n.endswith(("bias", "newline"))]
    assert len(kept) > 20 and all(kinds[n] == before[n] for n in kept)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M"])
def test_weights_are_those_of_the_quantizer(name: str, folder: Path, tmp_path: Path) -> None:
    """And gguf reads the same ones: its types, its bytes."""
    requantize(folder / "tied.gguf", tmp_path / "out.gguf", name)
    source = open_gguf(folder / "tied.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        weights = source.tensors[tensor.name].dequantize().reshape(-1, source.tensors[tensor.name].shape[-1])
        assert np.array_equal(tensor.data.reshape(len(weights), -1).view(np.uint8),
                              module.quantize(tensor.tensor_type.name, weights))  # fmt: skip


def test_metadata_stays_but_for_two_keys(folder: Path, tmp_path: Path) -> None:
    requantize(folder / "llm.gguf", tmp_path / "out.gguf", "Q4_K_M")
    before, after = (copy_metadata(open_gguf(p)) for p in (folder / "llm.gguf", tmp_path / "out.gguf"))
    assert after.pop("general.file_type") == 15 and after.pop("general.quantization_version") == 2
    before.pop("general.file_type", None)
    before.pop("general.quantization_version", None)
    assert {k: encode(v) for k, v in before.items()} == {k: encode(v) for k, v in after.items()}
    assert list(before) == list(after)


@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_1"])
def test_bytes_do_not_depend_on_threads_and_chunks(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = set()
    for threads, chunk in ((1, 1 << 20), (2, 1 << 10), (3, 7777), (8, 1)):
        monkeypatch.setattr(module, "CHUNK", chunk)
        requantize(folder / "llm.gguf", tmp_path / "out.gguf", name, threads=threads)
        outputs.add((tmp_path / "out.gguf").read_bytes())
    assert len(outputs) == 1


def test_a_big_endian_file(folder: Path, tmp_path: Path) -> None:
    source = open_gguf(folder / "tied.gguf")
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_uint32("llama.block_count", source.metadata["llama.block_count"])
    for t in source.tensors.values():
        writer.add_tensor(t.name, t.dequantize())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    requantize(tmp_path / "big.gguf", tmp_path / "out.gguf", "Q4_0")
    requantize(folder / "tied.gguf", tmp_path / "wanted.gguf", "Q4_0")
    out, wanted = open_gguf(tmp_path / "out.gguf"), open_gguf(tmp_path / "wanted.gguf")
    assert out.byte_order == "little" and out.metadata["llama.block_count"] == source.metadata["llama.block_count"]
    for name, tensor in wanted.tensors.items():
        assert np.array_equal(tensor.dequantize(), out.tensors[name].dequantize())


def test_quantizing_again_warns_once(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    summary = requantize(folder / "q8.gguf", tmp_path / "out.gguf", "Q4_K_S", warn=said.append)
    assert summary.already == ("Q8_0",) and len(said) == 1 and "Q8_0 already" in said[0]
    said.clear()
    requantize(folder / "q8.gguf", tmp_path / "same.gguf", "Q8_0", warn=said.append)
    assert not said  # the same format is copied, byte for byte
    before, after = open_gguf(folder / "q8.gguf"), open_gguf(tmp_path / "same.gguf")
    assert all(np.array_equal(t.raw, after.tensors[t.name].raw) for t in before.tensors.values())


def test_a_few_chunks_are_in_memory_at_a_time() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(100):
            taken += 1
            yield i

    with ThreadPoolExecutor(2) as pool:
        for i, result in enumerate(ordered_map(pool, lambda v: v * v, items())):
            assert result == i * i and taken <= i + 6


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux reports it")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 256 MiB in far less: read from the file, not mapped, and written as it comes."""
    zeros = np.zeros((1024, 4096), np.float16)
    tensors = [NewTensor(f"blk.{i}.attn_q.weight", (16384, 4096), "F16", lambda: [zeros] * 16) for i in range(2)]
    write_gguf(tmp_path / "in.gguf", {"general.architecture": "llama"}, tensors)
    words = [str(tmp_path / "in.gguf"), str(tmp_path / "out.gguf"), "Q8_0", "-t", "2"]
    command = [sys.executable, "-m", "tinyllava", "quantize", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = re.search(r"peak memory (\d+) MiB", done.stdout)
    assert peak and int(peak[1]) < 192


# ---- what goes wrong


def a_model(path: Path, value: float = 0.0, **metadata: object) -> Path:
    rows = np.zeros((4, 256), np.float32)
    rows[2, 7] = value
    tensors = [NewTensor("blk.0.attn_q.weight", rows.shape, "F32", lambda: [rows])]
    write_gguf(path, {"general.architecture": "llama", "llama.block_count": 1, **metadata}, tensors)
    return path


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "F16"])
@pytest.mark.parametrize("value, said", [(np.nan, "NaN"), (np.inf, "infinite"), (1e30, "too large for")])
def test_weights_that_cannot_be_quantized(name: str, value: float, said: str, tmp_path: Path) -> None:
    source = a_model(tmp_path / "in.gguf", value)
    with pytest.raises(ModelError, match=rf"in\.gguf: blk\.0\.attn_q\.weight: .*{said}") as caught:
        requantize(source, tmp_path / "out.gguf", name)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["in.gguf"]


def test_the_input_is_never_the_output(folder: Path, tmp_path: Path) -> None:
    before = (folder / "llm.gguf").read_bytes()
    (tmp_path / "link.gguf").symlink_to(folder / "llm.gguf")
    for target in (folder / "llm.gguf", folder / ".." / folder.name / "llm.gguf", tmp_path / "link.gguf"):
        with pytest.raises(UsageError, match="the input itself"):
            requantize(folder / "llm.gguf", target, "Q4_0")
    requantize(folder / "llm.gguf", tmp_path / "out.gguf", "Q4_0")
    assert (folder / "llm.gguf").read_bytes() == before


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    source = a_model(tmp_path / "in.gguf", **{"split.count": np.uint16(3), "split.no": np.uint16(0)})
    with pytest.raises(ModelError, match="one of 3 parts of a model"):
        requantize(source, tmp_path / "out.gguf", "Q4_0")


def test_an_input_that_shrinks(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes((folder / "llm.gguf").read_bytes())
    with pytest.raises(FileError, match="has become shorter"):
        requantize(source, tmp_path / "out.gguf", "Q4_0", progress=lambda *_: os.truncate(source, 50_000))
    assert os.listdir(tmp_path) == ["in.gguf"]


# ---- the command


def test_the_command_says_what_it_wrote(folder: Path, tmp_path: Path, capsys: Out) -> None:
    assert cli.main(["quantize", str(folder / "q8.gguf"), str(tmp_path / "out.gguf"), "q4_k_m", "-t", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'out.gguf'}: Q4_K_M, ") and "bits a weight (13 Q4_K, 5 F32, 3 Q6_K)" in out
    assert out.count("\n") == 1 and err.count("\n") == 1 and err.startswith("note: the input is Q8_0 already")
    assert cli.main(["quantize", "-q", str(folder / "q8.gguf"), str(tmp_path / "out.gguf"), "Q2_K"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words, said",
    [
        (["{in}"], "OUT.gguf: not given"),
        (["{in}", "{out}"], "TYPE: not given"),
        (["{in}", "{out}", "Q4_K_P"], "The nearest is Q4_K"),
        (["{in}", "{in}", "Q4_0"], "the input itself"),
        (["{in}", "{out}/no/where", "Q4_0"], "no such directory"),
        (["{in}.none", "{out}", "Q4_0"], "no such file"),
        (["{in}", "{out}", "Q4_0", "-t", "0"], "wanted 1 or more"),
        (["{in}", "{out}", "Q4_0", "Q5_0"], "no option before it"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, folder: Path, tmp_path: Path, capsys: Out) -> None:
    places = {"in": folder / "llm.gguf", "out": tmp_path / "out.gguf"}
    assert cli.main(["quantize", *(word.format(**places) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and said in err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyllava.commands.report.Report.progress", interrupt)
    assert cli.main(["quantize", str(folder / "llm.gguf"), str(tmp_path / "out.gguf"), "Q4_0"]) == 130
    assert not list(tmp_path.iterdir()) and "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits and no terminals of its own")
def test_a_limit_on_the_files_size_is_a_full_disk(folder: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000));"
        "from tinyllava.cli import main; import sys; sys.exit(main())"
    )
    command = [sys.executable, "-B", "-c", code, "quantize", str(folder / "llm.gguf"), str(tmp_path / "o"), "F16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals to pretend")
def test_a_bar_on_a_terminal_and_none_in_a_pipe(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinyllava", "quantize", str(folder / "llm.gguf"), str(tmp_path / "o"), "F16"]
    piped = subprocess.run(command, capture_output=True, check=True)
    assert not piped.stderr and piped.stdout.count(b"\n") == 1
    import pty

    ours, theirs = pty.openpty()
    subprocess.run(command, stderr=theirs, stdout=subprocess.DEVNULL, check=True)
    shown = os.read(ours, 1 << 16)
    assert b"quantize[" in shown and b"MiB" in shown
    os.close(ours)
    os.close(theirs)
