"""The language model against transformers and llama.cpp, and what must hold for any weights."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.models import LANGUAGE, write_language_model
from tinyllava.errors import ContextError, ModelError
from tinyllava.files.gguf import open_gguf
from tinyllava.language.cache import KVCache
from tinyllava.language.config import LlamaConfig, read_config
from tinyllava.language.llama import TAPS, Llama, embed, forward, load_llama, rope_angles, unembed
from tinyllava.ops import Ops
from tinyllava.ops.select import select
from tinyllava.tap import NULL, Recorder, Tap
from tinyllava.weights import evaluate

GOLDEN = Path(__file__).parents[2] / "golden"
HF = np.load(GOLDEN / "hf-language.npz")
LLAMA_CPP = np.load(GOLDEN / "llama-cpp-language.npz")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("language")
    for name, spec in LANGUAGE.items():
        write_language_model(folder / f"{name}.gguf", spec)
    return {name: folder / f"{name}.gguf" for name in LANGUAGE}


def load(path: Path, ops: Ops) -> Llama:
    file = open_gguf(path)
    return load_llama(file, read_config(file), ops)


def run(llama: Llama, ids: list[int], ops: Ops, pieces: list[int] | None = None, tap: Tap = NULL) -> np.ndarray:
    """Logits of ``ids``, read in pieces of the given lengths."""
    cache = KVCache(llama.config, len(ids), ops)
    x, start, rows = embed(ids, llama, ops), 0, []
    for n in pieces or [len(ids)]:
        hidden = forward(x[start : start + n], llama, cache, ops, tap)
        rows.append(unembed(hidden, llama, ops, tap))
        start += n
    return np.concatenate(rows)


@pytest.mark.parametrize("backend, dtype", [("numpy", "float32"), ("numpy", "float64"), ("numba", "float32")])
@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_and_hidden_states_are_those_of_transformers(
    name: str, backend: str, dtype: str, files: dict[str, Path]
) -> None:
    ops = select(backend, dtype=dtype)
    llama, tap = load(files[name], ops), Recorder(["blk.*.l_out", "result_norm"])
    logits = run(llama, HF[f"{name}.ids"].tolist(), ops, tap=tap)
    positions = HF[f"{name}.positions"]
    span = np.ptp(HF[f"{name}.logits"])
    assert np.abs(logits[positions] - HF[f"{name}.logits"]).max() < 1e-4 * span  # the issue allows 1e-3
    for i in range(llama.config.n_layer - 1):  # transformers reports the last layer after the final norm
        error = np.abs(tap[f"blk.{i}.l_out"][positions] - HF[f"{name}.hidden"][i + 1])
        assert error.max() < 1e-4 * np.abs(HF[f"{name}.hidden"][i + 1]).max()
    assert np.abs(tap["result_norm"][positions] - HF[f"{name}.hidden"][-1]).max() < 1e-4 * span


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_are_those_of_llama_cpp(name: str, backend: str, files: dict[str, Path]) -> None:
    ops = select(backend)
    logits = run(load(files[name], ops), HF[f"{name}.ids"].tolist(), ops)[HF[f"{name}.positions"]]
    theirs = LLAMA_CPP[f"{name}.logits"]
    assert np.linalg.norm(logits - theirs) < 1e-4 * np.linalg.norm(theirs)


@given(data=st.data())
def test_prefill_at_once_in_chunks_and_token_by_token_agree(data: st.DataObject, files: dict[str, Path]) -> None:
    ops = select("numpy", dtype="float64")
    llama = load(files["llama_gqa"], ops)
    ids = data.draw(st.lists(st.integers(0, llama.config.n_vocab - 1), min_size=2, max_size=12))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1))))
    pieces = np.diff([0, *cuts, len(ids)]).tolist()
    np.testing.assert_allclose(run(llama, ids, ops, pieces), run(llama, ids, ops), rtol=0, atol=1e-10)
    np.testing.assert_allclose(run(llama, ids, ops, [1] * len(ids)), run(llama, ids, ops), rtol=0, atol=1e-10)


def test_what_comes_later_changes_nothing_before(files: dict[str, Path]) -> None:
    ops = select("numpy", dtype="float64")
    llama = load(files["mistral"], ops)
    a, b = run(llama, [5, 6, 7, 8], ops), run(llama, [5, 6, 7, 9], ops)
    assert np.array_equal(a[:3], b[:3])
    assert np.abs(a[3] - b[3]).max() > 0.1


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "llama_bias"])
def test_each_tap_fires_once_a_layer_with_its_registered_shape(name: str, files: dict[str, Path]) -> None:
    ops = select("numpy")
    llama, tap = load(files[name], ops), Recorder()
    n = 5
    run(llama, list(range(n)), ops, tap=tap)
    config = llama.config
    seen = {**vars(config), "n": n, "m": n, "head_dim": config.head_dim}
    expected = {}
    for tap_name, shape in TAPS.items():
        for i in range(config.n_layer if "{i}" in tap_name else 1):
            expected[tap_name.format(i=i)] = tuple(evaluate(d, SimpleNamespace(**seen)) for d in shape)
    assert {key: values[0].shape for key, values in tap.values.items()} == expected
    assert {len(values) for values in tap.values.values()} == {1}
    assert {values[0].dtype for values in tap.values.values()} == {np.dtype(np.float32)}


def test_rope_turns_pair_i_by_position_times_its_frequency() -> None:
    """By hand: base 100, two pairs: frequencies 1 and 1/10; positions 3 and 4, divided by the scale 2."""
    config = SimpleNamespace(n_rot=4, n_pair=2, rope_base=100.0, rope_scale=2.0)
    llama = SimpleNamespace(config=config, rope_freqs=None)
    cos, sin = rope_angles(3, 2, llama, select("numpy", dtype="float64"))  # type: ignore[arg-type]
    np.testing.assert_allclose(cos, np.cos([[1.5, 0.15], [2.0, 0.2]]))
    np.testing.assert_allclose(sin, np.sin([[1.5, 0.15], [2.0, 0.2]]))


def test_a_full_cache_says_which_context_would_do(files: dict[str, Path]) -> None:
    ops = select("numpy")
    llama = load(files["llama_gqa"], ops)
    cache = KVCache(llama.config, 3, ops)
    with pytest.raises(ContextError, match=r"5 tokens; wanted at most 3\. Use -c 5"):
        forward(embed([1, 2, 3, 4, 5], llama, ops), llama, cache, ops)


# ---- the configuration


def metadata_file(path: Path, **changes: object) -> SimpleNamespace:
    """An opened model with some metadata changed; None removes a key."""
    file = open_gguf(path)
    metadata = {**file.metadata}
    for key, value in changes.items():
        key = key.replace("__", ".")
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value
    return SimpleNamespace(path=file.path, metadata=metadata, tensors=file.tensors)


def test_missing_keys_are_inferred_from_shapes(files: dict[str, Path]) -> None:
    whole: LlamaConfig = read_config(open_gguf(files["llama_tied"]))
    names = ("llama__block_count", "llama__embedding_length", "llama__feed_forward_length", "llama__vocab_size")
    sparse = metadata_file(files["llama_tied"], **dict.fromkeys(names))
    assert read_config(sparse) == whole  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general__architecture": "gemma"}, "architecture gemma; wanted a language model .llama or qwen2."),
        ({"general__architecture": "clip"}, "image encoder .* Give this file as --mmproj"),
        ({"llama__attention__head_count": None}, "llama.attention.head_count: is missing"),
        ({"llama__attention__head_count": "four"}, "is 'four'; wanted a whole number"),
        ({"llama__attention__head_count_kv": 3}, "4 heads on 3 kv heads; wanted a multiple"),
        ({"llama__attention__head_count_kv": [4, 2]}, "differs from layer to layer"),
        ({"llama__embedding_length": 64}, "is 64; wanted 128"),
        ({"llama__rope__scaling__type": "yarn"}, "is 'yarn'; wanted none or linear"),
        ({"llama__rope__dimension_count": 7}, "is 7; wanted an even number of at most 48"),
        ({"llama__expert_count": 8}, "mixture of experts"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_named(
    changes: dict[str, object], message: str, files: dict[str, Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        read_config(metadata_file(files["llama_tied"], **changes))  # type: ignore[arg-type]


def test_a_tensor_of_another_shape_is_named_with_the_contract(files: dict[str, Path]) -> None:
    file = metadata_file(files["llama_gqa"], llama__attention__head_count_kv=4)
    text = "blk.0.attn_k.weight: shape (192, 256); wanted (n_head_kv * head_dim, n_embd) = (384, 256)"
    with pytest.raises(ModelError, match=re.escape(text)):
        load_llama(file, read_config(file), select("numpy"))  # type: ignore[arg-type]


def test_a_missing_tensor_is_named(files: dict[str, Path]) -> None:
    file = metadata_file(files["llama_gqa"])
    file.tensors = {k: v for k, v in file.tensors.items() if k != "blk.1.ffn_up.weight"}
    with pytest.raises(ModelError, match=r"tensor blk.1.ffn_up.weight is missing"):
        load_llama(file, read_config(file), select("numpy"))  # type: ignore[arg-type]
