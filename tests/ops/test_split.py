"""A model that two backends share gives what one alone gives, wherever the border is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden.models import LANGUAGE, write_language_model
from tests.ops.far import FarArray, FarNumba, FarNumpy, far
from tinyllava.files.gguf import open_gguf
from tinyllava.language.cache import KVCache
from tinyllava.language.config import read_config
from tinyllava.language.llama import embed, forward, load_llama, unembed
from tinyllava.ops import Ops
from tinyllava.ops.select import select
from tinyllava.ops.split import split
from tinyllava.tap import NULL, Recorder, Tap


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("split")
    for name in ("llama_gqa", "qwen2", "llama_bias"):
        write_language_model(folder / f"{name}.gguf", LANGUAGE[name])
    return {name: folder / f"{name}.gguf" for name in ("llama_gqa", "qwen2", "llama_bias")}


def logits(path: Path, ids: list[int], first: int, ops: Any, tap: Tap = NULL) -> np.ndarray[Any, Any]:
    """The logits of ``ids``, the first ``first`` of them read at once and the others one by one."""
    file = open_gguf(path)
    config = read_config(file)
    ops = ops(config.n_layer) if callable(ops) else ops
    llama, rows = load_llama(file, config, ops), []
    cache = KVCache(config, len(ids), ops)
    for piece in (ids[:first], *([i] for i in ids[first:])):
        hidden = forward(embed(piece, llama, ops), llama, cache, ops, tap)
        rows.append(ops.numpy(unembed(hidden, llama, ops, tap)))
    return np.concatenate(rows)


@given(data=st.data())
def test_logits_do_not_depend_on_the_border(data: st.DataObject, files: dict[str, Path]) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    n_device = data.draw(st.integers(-1, LANGUAGE[name].n_layer + 2))
    ids = data.draw(st.lists(st.integers(0, LANGUAGE[name].n_vocab - 1), min_size=1, max_size=6))
    first = data.draw(st.integers(1, len(ids)))
    alone = logits(files[name], ids, first, select("numpy", dtype="float64"))

    def shared(n_layer: int) -> Ops:
        return split(wide(), FarNumpy("float64"), n_layer=n_layer, n_device=n_device)

    together = logits(files[name], ids, first, shared)
    assert type(together) is np.ndarray
    np.testing.assert_array_equal(together, alone)


def wide() -> Ops:
    return select("numpy", dtype="float64")


@pytest.mark.parametrize("n_device", range(5))
def test_two_teams_of_threads_share_a_model(n_device: int, files: dict[str, Path]) -> None:
    alone = logits(files["llama_gqa"], [5, 6, 7, 8], 3, select("numba", threads=2))
    shared = lambda n: split(select("numba", threads=2), FarNumba(1), n_layer=n, n_device=n_device)  # noqa: E731
    np.testing.assert_array_equal(logits(files["llama_gqa"], [5, 6, 7, 8], 3, shared), alone)


def test_a_shared_step_is_repeated_as_it_is() -> None:
    """The host would record its own half alone."""

    def step(ids: list[int]) -> Any:
        return ids

    assert split(select("numba"), FarNumba(1), n_layer=3, n_device=2).capture(step) is step


def test_each_block_is_where_llama_cpp_would_put_it() -> None:
    """By hand: of 4 blocks, 3 are the last three; 5 are all of them and the head, 4 are all but the head."""
    host, device = select("numpy"), FarNumpy()
    ops = split(host, device, n_layer=4, n_device=3)
    assert [ops.layer(i) is device for i in range(4)] == [False, True, True, True]
    assert ops.name == "numpy+far" and ops.dtype == host.dtype and ops.threads == host.threads
    assert split(host, device, n_layer=4, n_device=0) is host
    assert split(host, device, n_layer=4, n_device=5) is device
    all_but_head = split(host, device, n_layer=4, n_device=4)
    assert all_but_head.layer(0) is device and all_but_head.embed.__self__ is host  # type: ignore[attr-defined]


def test_taps_see_the_same_on_both_sides(files: dict[str, Path]) -> None:
    found = []
    for n_device in (0, 2):
        ops = split(wide(), FarNumpy("float64"), n_layer=3, n_device=n_device)
        tap = Recorder(copy=lambda value, ops=ops: np.array(ops.numpy(value)))
        logits(files["llama_gqa"], [5, 6, 7], 3, ops, tap)
        found.append(tap.values)
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        np.testing.assert_array_equal(values[0], found[1][name][0])
        assert type(found[1][name][0]) is np.ndarray


def test_the_stand_in_refuses_to_mix_memories() -> None:
    x = far([1.0, 2.0])
    for wrong in (lambda: x + np.ones(2), lambda: x.__setitem__(0, np.ones(1)), lambda: FarNumpy().array(x)):
        with pytest.raises(AssertionError):
            wrong()
    assert isinstance(x + x, FarArray) and isinstance(2.0 * x, FarArray)
