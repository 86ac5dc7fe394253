"""Which layers go to the GPU, and that a model which is there in part answers the same. NumPy stands in for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tinyllava
from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj
from golden.pictures import picture
from tests.ops.fake_cupy import GIB, FakeCupy, install
from tests.ops.far import FarNumpy
from tinyllava import cli
from tinyllava.commands.report import layers_on_gpu
from tinyllava.errors import UsageError
from tinyllava.files.gguf import open_gguf
from tinyllava.offload import ALL, SCRATCH_BYTES, TOKENS, Need, estimate, place, read_layers
from tinyllava.ops.gpu import device
from tinyllava.ops.reference import NumpyOps

N_LAYER = LANGUAGE["vicuna"].n_layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload")
    write_language_model(path / "model.gguf", LANGUAGE["vicuna"])
    write_mmproj(path / "mmproj.gguf", VISION["clip_16"])
    Image.fromarray(picture(40, 30)).save(path / "picture.png")
    return path


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """A machine with a GPU: NumPy's own numbers in arrays that cannot be mixed with the host's."""
    fake = install(monkeypatch)

    def select(name: str = "auto", *, dtype: str = "float32", threads: int | None = None) -> Any:
        return FarNumpy() if name == "cupy" else NumpyOps(dtype, threads)

    monkeypatch.setattr("tinyllava.offload.select", select)
    return fake


def load(folder: Path, **settings: Any) -> tinyllava.LLaVA:
    return tinyllava.load(folder / "model.gguf", folder / "mmproj.gguf", **settings)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("n", [*range(N_LAYER + 2), 99, "all", None])
def test_every_number_of_layers_gives_the_same_answer(n: Any, folder: Path) -> None:
    alone, shared = load(folder, backend="numpy"), load(folder, n_gpu_layers=n)
    path, ids = folder / "picture.png", [1, 5, 6, 7, 8]
    found, wanted = (llava.encode_image(path) for llava in (shared, alone))
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(shared.logits(ids), alone.logits(ids))
    one, other = (llava.generate("What is it?", path, 8) for llava in (alone, shared))
    assert (one.text, one.tokens) == (other.text, other.tokens)
    on_gpu = min(n, N_LAYER + 1) if isinstance(n, int) else N_LAYER + 1
    assert shared.placement.n_layers == on_gpu and not shared.placement.notes
    assert shared.vision_model.ops.name == ("far" if on_gpu else "numpy")
    assert shared.ops.name == {0: "numpy", N_LAYER + 1: "far"}.get(on_gpu, "numpy+far")


@pytest.mark.usefixtures("card")
def test_a_trace_looks_at_both_sides(folder: Path) -> None:
    one, other = (tinyllava.trace(load(folder, **on), "Hi") for on in ({"backend": "numpy"}, {"n_gpu_layers": 1}))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.usefixtures("card")
def test_an_image_encoder_alone(folder: Path) -> None:
    llava = tinyllava.load(None, folder / "mmproj.gguf", n_gpu_layers=1)
    assert llava.ops.name == "far" and layers_on_gpu(llava) == "on the GPU: the image encoder"
    wanted = tinyllava.load(None, folder / "mmproj.gguf", backend="numpy").encode_image(folder / "picture.png")
    np.testing.assert_array_equal(llava.encode_image(folder / "picture.png"), wanted)


# ---- what fits

BY_HAND = Need(blocks=(10, 20, 30), rest=5, work=100)


def test_what_layers_take_by_hand() -> None:
    """The last block is the first to go, the head the last."""
    assert [BY_HAND.bytes(n) for n in (-1, 0, 1, 2, 3, 4, 99)] == [0, 0, 130, 150, 160, 165, 165]
    assert [BY_HAND.most(free) for free in (0, 129, 130, 159, 160, 164, 165, 1000)] == [0, 0, 1, 2, 3, 3, 4, 4]


SIZES = st.integers(0, 100)


@given(st.builds(Need, st.lists(SIZES).map(tuple), SIZES, SIZES), st.integers(0, 9000))
def test_the_most_that_fits_fits_and_one_more_does_not(need: Need, free: int) -> None:
    most = need.most(free)
    assert need.bytes(most) <= free
    assert most == need.all_layers or need.bytes(most + 1) > free


def test_what_a_file_takes(folder: Path) -> None:
    model, mmproj = open_gguf(folder / "model.gguf"), open_gguf(folder / "mmproj.gguf")
    need, more = (estimate(model, mmproj, n, device) for n in (100, 101))
    spec = LANGUAGE["vicuna"]
    assert need.all_layers == spec.n_layer + 1
    assert more.bytes(ALL) - need.bytes(ALL) == 2 * 4 * spec.n_head_kv * spec.head_dim * spec.n_layer  # float32
    cache = 100 * (more.bytes(ALL) - need.bytes(ALL))
    work = SCRATCH_BYTES + 4 * TOKENS * (8 * spec.n_embd + 4 * spec.n_ff)
    weights = need.bytes(ALL) - cache - work
    in_file = sum(tensor.nbytes for file in (model, mmproj) for tensor in file.tensors.values())
    assert weights == in_file  # all of these files' matrices have a kernel, and their vectors are float32
    assert estimate(None, mmproj, None, device).bytes(ALL) < need.bytes(1)
    trained = estimate(model, None, None, device)
    assert trained.blocks == estimate(model, None, min(spec.n_ctx, 4096), device).blocks


def gibs(*, free: float, card: FakeCupy, **settings: Any) -> Any:
    """The placement of a model of 4 blocks, 2 GiB each, on a card with so much free."""
    card.free = int((free - 1) * GIB)  # CuPy has 1 GiB of its own, free
    need = Need((2 * GIB,) * 4, GIB, GIB // 2)
    return place(settings.pop("backend", "auto"), settings.pop("layers", None), lambda _: need, **settings)


def test_auto_takes_what_fits_and_says_so(card: FakeCupy) -> None:
    everything = gibs(free=9.5, card=card)
    assert everything.n_layers == 5 and not everything.notes
    assert everything.language.name == everything.vision.name == "far"
    part = gibs(free=5, card=card)
    assert part.n_layers == 2 and part.language.name == "numpy+far" and part.vision.name == "far"
    wanted = "9.5 GiB of the GPU's memory are needed for all, 5.0 GiB are free: 2 of 5 layers are on the GPU"
    assert part.notes == (wanted,)
    nothing = gibs(free=2, card=card)
    assert nothing.n_layers == 0 and nothing.language.name == nothing.vision.name == "numpy"
    assert gibs(free=5, card=card, layers="auto", backend="cupy").n_layers == 2


@pytest.mark.parametrize(
    "settings, free, message",
    [
        ({"backend": "cupy"}, 5, ("-ngl 5: 9.5", "5.0", "-ngl 2 fits.")),
        ({"layers": 3}, 5, ("-ngl 3: 6.5", "5.0", "-ngl 2 fits.")),
        ({"layers": "all", "backend": "cupy"}, 2, ("-ngl 5: 9.5", "2.0", "-ngl 0 computes on the CPU.")),
    ],
)
def test_a_promise_that_does_not_fit(settings: Any, free: int, message: Any, card: FakeCupy) -> None:
    with pytest.raises(UsageError) as caught:
        gibs(free=free, card=card, **settings)
    needed, there, hint = message
    wanted = f"{needed} GiB of the GPU's memory are needed; wanted at most the {there} GiB that are free. {hint}"
    assert str(caught.value) == wanted


def test_memory_that_runs_out_later_says_what_would_have_fitted(card: FakeCupy) -> None:
    assert gibs(free=9.5, card=card).n_layers == 5
    card.free = GIB
    with pytest.raises(UsageError, match=r"5\.0 GiB more are needed, 2\.0 GiB are free\. -ngl 3 fits"):
        card.allocate(5 * GIB)  # 3 GiB are missing: two blocks


# ---- what is asked for


def test_what_ngl_says() -> None:
    wanted = {"0": 0, 7: 7, "99": 99, "all": ALL, "auto": None, "-1": None, -1: None, None: None}
    assert {value: read_layers(value) for value in wanted} == wanted
    with pytest.raises(UsageError, match="n_gpu_layers: 'some'; wanted a number, 'all' or 'auto'"):
        read_layers("some")


def test_no_layers_is_the_cpu_whoever_asks(card: FakeCupy) -> None:
    for backend in ("auto", "cupy"):
        assert gibs(free=80, card=card, layers=0, backend=backend).language.name == "numpy"
    assert card.allocate is None  # not a byte was taken


def test_layers_without_a_gpu_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, count=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    for settings, note in (
        (("auto", 9), "-ngl 9 has no effect: no CUDA device is visible. CUDA_VISIBLE_DEVICES is '-1'"),
        (("numpy", "all"), "-ngl all has no effect: numpy computes on the CPU"),
    ):
        assert place(*settings, lambda _: BY_HAND).notes == (note,)
    assert place("auto", 9, lambda _: BY_HAND, dtype="float64").notes == (
        "-ngl 9 has no effect: numpy computes on the CPU",
    )
    for quiet in (("auto", None), ("auto", 0), ("numba", "auto")):
        assert place(*quiet, lambda _: BY_HAND).notes == ()
    with pytest.raises(UsageError, match="no CUDA device is visible"):
        place("cupy", None, lambda _: BY_HAND)


@pytest.mark.usefixtures("card")
def test_the_command_line_says_what_is_on_the_gpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", folder / "model.gguf", "--mmproj", folder / "mmproj.gguf", "--image", folder / "picture.png"]
    said = []
    for n in (0, 2):
        assert cli.main([*map(str, words), "-n", "4", "--temp", "0", "-p", "What?", "-ngl", str(n)]) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out
    assert "GPU" not in said[0].err
    assert f"on the GPU: 2 of {N_LAYER + 1} layers, the image encoder\n" in said[1].err
