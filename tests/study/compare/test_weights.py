"""A copy of a model with one number changed: compare names the block and the tensor of that number first."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinyllava
from tinyllava.files.gguf import open_gguf
from tinyllava.study.compare.compare import compare, compare_dumps
from tinyllava.study.compare.dumps import Dump, from_trace

MANY = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def with_one_weight_changed(path: Path, copy: Path, tensor_name: str, position: float, by: float) -> None:
    """A copy of an F32 model in which one number of one tensor is another."""
    shutil.copyfile(path, copy)
    with open_gguf(path) as file:
        tensor = file.tensors[tensor_name]
        assert tensor.type == "F32"
        index = int(position * (tensor.n_elements - 1))
        start = tensor.start + 4 * index
    with copy.open("r+b") as out:
        out.seek(start)
        value = np.frombuffer(out.read(4), "<f4")[0]
        out.seek(start)
        out.write(np.float32(value + by).tobytes())


_TRACES: dict[Path, Dump] = {}  # of the models that do not change


def reading(path: Path, *, cached: bool) -> Dump:
    """The trace of a language model that reads a question."""
    if not cached or path not in _TRACES:
        llava = tinyllava.load(path, backend="numpy")
        _TRACES[path] = from_trace(tinyllava.trace(llava, "What is this?", template="mistral", attention=True))
    return _TRACES[path]


def seeing(path: Path, picture: Path, *, cached: bool) -> Dump:
    """The trace of an image encoder that sees a picture."""
    if not cached or path not in _TRACES:
        llava = tinyllava.load(mmproj=path, backend="numpy")
        _TRACES[path] = from_trace(tinyllava.trace(llava, images=[picture], attention=True))
    return _TRACES[path]


LANGUAGE_TENSORS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
# By the names of 2023: ffn_down is the tensor whose result is the tap ffn_up.
VISION_TENSORS = {
    "ln1.weight": "ln1", "ln1.bias": "ln1", "attn_q.weight": "attn_q", "attn_k.bias": "attn_k",
    "attn_v.weight": "attn_v", "attn_out.weight": "attn_out", "ln2.weight": "ln2",
    "ffn_down.weight": "ffn_up", "ffn_down.bias": "ffn_up", "ffn_up.weight": "ffn_down", "ffn_up.bias": "ffn_down",
}  # fmt: skip


@MANY
@given(
    block=st.integers(0, 2),
    name=st.sampled_from(LANGUAGE_TENSORS),
    position=st.floats(0, 1),
    change=st.sampled_from([(4.0, None), (-4.0, None), (0.01, 0.0)]),
)
def test_one_weight_of_a_language_models_block_makes_that_block_the_first(
    pairs, block, name, position, change
) -> None:
    by, tolerance = change
    original, changed = pairs.file("mistral"), pairs.folder / "changed.gguf"
    tensor = f"blk.{block}.{name}.weight"
    with_one_weight_changed(original, changed, tensor, position, by)
    before, after = (reading(path, cached=path == original) for path in (original, changed))
    first = compare_dumps(before, after, *([] if tolerance is None else [tolerance])).first
    assert first is not None and first.name == f"llm.blk.{block}.{name}"
    models = compare(original, changed)
    assert [row.name for row in models.rows if row.diverges] == [tensor]
    assert math.isclose(models.first.max_abs, abs(by), rel_tol=1e-3)


@MANY
@given(block=st.integers(0, 2), name=st.sampled_from(sorted(VISION_TENSORS)), position=st.floats(0, 1))
def test_one_weight_of_the_vision_towers_block_makes_that_block_the_first(pairs, block, name, position) -> None:
    original, changed = pairs.file("clip_15"), pairs.folder / "changed-eye.gguf"
    tensor = f"v.blk.{block}.{name}"
    with_one_weight_changed(original, changed, tensor, position, 2.0)
    before, after = (seeing(path, pairs.picture(70, 30), cached=path == original) for path in (original, changed))
    first = compare_dumps(before, after).first
    assert first is not None and first.name == f"vit.blk.{block}.{VISION_TENSORS[name]}"
    models = compare(original, changed)
    assert [row.name for row in models.rows if row.diverges] == [tensor]
