"""`tinyllava explain`: what it says is what happened."""

from __future__ import annotations

import ast
import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tinyllava
from golden.pictures import picture
from tests.study.explain.explained import Page, make
from tinyllava import cli
from tinyllava.errors import UsageError
from tinyllava.files.gguf import n_parameters, open_gguf
from tinyllava.study.explain.explain import Explanation, explain, steady
from tinyllava.study.explain.figures import compose
from tinyllava.study.explain.maps import NOWHERE, choose_maps, make_panels, quantise, token_of_patch
from tinyllava.study.explain.page import render
from tinyllava.study.explain.walk import HOME, PARTS, canonical, make_walk
from tinyllava.study.explain.watch import Event
from tinyllava.tap import Recorder
from tinyllava.text.sampling import Sampling, softmax
from tinyllava.vision.anyres import merge
from tinyllava.vision.clip import split_patches

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def recorder(explained: Explanation) -> Recorder:
    """The same run, recorded whole by the tap that everyone uses."""
    tap = Recorder()
    for _ in explained.llava.answer(explained.plan, GREEDY, tap=tap):
        pass
    return tap


def attention(recorder: Recorder, e: Explanation) -> np.ndarray[Any, Any]:
    """(n_tokens, n_layer, n_head, tokens of the picture), from the recorded taps."""
    n_layer = e.llava.language.llama.config.n_layer
    start = len(e.plan.parts[0])
    layers = [recorder.values[f"llm.blk.{i}.attn_weights"] for i in range(n_layer)]
    steps = zip(*layers, strict=True)
    return np.array([[w[:, -1, start : start + e.plan.image_tokens] for w in step] for step in steps])


# ---- the numbers are the trace's


def test_tokens_and_probabilities_are_the_traces(explained: Explanation, recorder: Recorder) -> None:
    page = Page(render(explained))
    logits = recorder.values["llm.result_output"]
    assert len(page.data["tokens"]) == len(logits) == 8
    for said, row in zip(page.data["tokens"], logits, strict=True):
        p = softmax(row[0].astype(np.float64))
        order = np.argsort(-p, kind="stable")
        assert said["id"] == order[0] and said["rank"] == 1
        assert said["probability"] == pytest.approx(p[order[0]], rel=1e-6)
        assert [best[2] for best in said["best"]] == order[1:6].tolist()
        assert [best[1] for best in said["best"]] == pytest.approx(p[order[1:6]], rel=1e-6)
    assert [said["id"] for said in page.data["tokens"]] == explained.result.tokens


def test_maps_are_the_traces_attention(explained: Explanation, recorder: Recorder) -> None:
    data = Page(render(explained)).data["maps"]
    n_tokens, n_layers, n_heads, n = explained.maps.shape
    assert (len(data["layers"]), len(data["heads"]), data["n"]) == (n_layers, n_heads, n)
    values = np.frombuffer(base64.b64decode(data["values"]), np.uint8).reshape(explained.maps.shape)
    peaks = np.frombuffer(base64.b64decode(data["peaks"]), "<f4").reshape(n_tokens, n_layers, n_heads)
    shown = values / 255 * peaks[..., None]
    truth = attention(recorder, explained)
    allowed = peaks[..., None] * 0.51 / 255
    assert (np.abs(shown[:, 1:, 1:] - truth) <= allowed[:, 1:, 1:]).all()
    assert (np.abs(shown[:, 0, 0] - truth.mean(axis=(1, 2))) <= allowed[:, 0, 0]).all()
    assert (np.abs(shown[:, 1:, 0] - truth.mean(axis=2)) <= allowed[:, 1:, 0]).all()
    assert (np.abs(shown[:, 0, 1:] - truth.mean(axis=1)) <= allowed[:, 0, 1:]).all()
    assert np.allclose(explained.shares.sum(axis=-1), 1, atol=1e-5)
    assert np.allclose(explained.shares[:, 1:, 1:, 2], truth.sum(axis=-1), atol=1e-6)


def test_the_lens_ends_in_the_models_own_probabilities(explained: Explanation) -> None:
    for step in explained.tokens:
        assert len(step.lens) == 1 + explained.llava.language.llama.config.n_layer
        assert step.lens[-1][0].id == step.chosen.id
        assert step.lens[-1][0].probability == pytest.approx(step.chosen.probability, rel=1e-4)
        assert step.lens_chosen[-1] == pytest.approx(step.chosen.probability, rel=1e-4)


def test_the_walk_has_the_taps_shapes(explained: Explanation, recorder: Recorder) -> None:
    n_layer = explained.llava.language.llama.config.n_layer
    for row in explained.walk:
        name = row.tap.replace("mm.{i}", "mm.0").replace("{i}", f"{n_layer - 1}")
        if name in recorder.values:
            assert row.shape == recorder.values[name][0].shape, name
    seen = {row.tap for row in explained.walk}
    assert {"decode", "pixels", "vit.patch_embd", "mm.{i}.linear", "llm.inp_embd", "token"} <= seen
    assert all(row.seconds > 0 for row in explained.walk)
    assert all(row.title and row.stage for row in explained.walk)


def test_every_tap_belongs_to_a_step_with_a_title(recorder: Recorder) -> None:
    known = {tap for part in PARTS for tap in part.taps}
    watched = {canonical(name) for name in recorder.values if not name.endswith("attn_weights")}
    assert watched <= known


def test_parameters_add_up_to_the_files(explained: Explanation) -> None:
    llava = explained.llava
    with open_gguf(llava.language.path) as text, open_gguf(llava.vision_model.path) as eye:
        assert sum(row.parameters for row in explained.walk) == n_parameters(text) + n_parameters(eye)


def test_places_in_the_code_are_where_the_step_is(explained: Explanation) -> None:
    for row in explained.walk:
        lines = (HOME / row.file).read_text(encoding="utf-8").splitlines()
        assert row.source == lines[row.line - 1].strip()
        name = row.function.split(".")[-1]
        functions = [
            range(node.lineno - len(node.decorator_list), (node.end_lineno or 0) + 1)
            for node in ast.walk(ast.parse("\n".join(lines)))
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert any(row.line in lines_of for lines_of in functions), row.place


def test_the_walk_on_the_page_is_the_walk(explained: Explanation) -> None:
    page = Page(render(explained))
    cells = [attributes["data-label"] for attributes in page.all("td") if "data-label" in attributes]
    assert len(cells) == 5 * len(explained.walk)
    for row in explained.walk:
        shape, ms = " × ".join(map(str, row.shape)), f"{1e3 * row.seconds:.2f}"
        parameters = f"{row.parameters:,}" if row.parameters else ""
        assert f"{row.place} in {row.function}{row.source}{shape}{row.times}{parameters}{ms}" in page.text


def test_a_prompt_in_pieces_tells_the_same(folder: Path) -> None:
    whole = make(folder)
    llava = tinyllava.load(folder / "vicuna.gguf", folder / "clip_15.gguf", backend="numpy", n_batch=7)
    pieces = explain(llava, "What is this?", folder / "picture.png", max_tokens=8)
    assert np.allclose(whole.maps, pieces.maps, atol=1e-6)
    assert [row.shape for row in whole.walk if row.tap.endswith("l_out")] == [
        row.shape for row in pieces.walk if row.tap.endswith("l_out")
    ]
    by_tap = {row.tap: row.shape for row in pieces.walk}
    assert by_tap["llm.inp_embd"] == (whole.plan.prompt_tokens, 256)


def test_times_are_medians_of_runs_that_went_alike() -> None:
    def run(*seconds: float, names: str = "ab") -> list[Event]:
        code = render.__code__
        return [Event("prompt", name, (1,), s, code, 1) for name, s in zip(names, seconds, strict=True)]

    looked_at = Event("prompt", "llm.blk.0.attn_weights", (1,), 9.0, render.__code__, 1)
    other = run(7, 7, names="ac")
    first, second = steady([[*run(5, 1), looked_at], run(2, 3), run(3, 8), other])
    assert (first.seconds, second.seconds) == (3, 3)


# ---- maps lie where the picture is


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (56, 56), (300, 20), (9, 9)])
def test_each_patch_of_a_map_lies_over_its_own_pixels(size: tuple[int, int], folder: Path) -> None:
    """Tokens made of the patches' own colours must match the pixels that the panels show at their places."""
    llava = tinyllava.load(folder / "vicuna.gguf", folder / "clip_16.gguf", backend="numpy")
    tap = Recorder(["pixels"])
    llava.encode_image(Image.fromarray(picture(*size)), tap=tap)
    plan = llava.vision_model.plan(picture(*size))
    pixels, config = tap["pixels"], llava.vision_model.config
    features = np.stack([split_patches(tile, config) for tile in pixels])  # (n_tiles, n_patches, 588)
    tokens = merge(features, plan, np.zeros(features.shape[-1]))
    seen = 0
    for panel in make_panels(plan):
        shown = compose(pixels.transpose(0, 2, 3, 1), panel)  # (rows * px, columns * px, 3)
        p = config.patch_px
        for (row, column), token in np.ndenumerate(panel.tokens):
            if token != NOWHERE:
                cell = shown[row * p : (row + 1) * p, column * p : (column + 1) * p]
                assert np.array_equal(cell.transpose(2, 0, 1).reshape(-1), tokens[token])
                seen += 1
    newlines = plan.unpadded.height if plan.merge == "spatial_unpad" else 0
    assert seen == plan.n_tokens - newlines


def test_the_places_of_a_small_tiled_picture_worked_by_hand(folder: Path) -> None:
    llava = tinyllava.load(folder / "vicuna.gguf", folder / "clip_16.gguf", backend="numpy")
    plan = llava.vision_model.plan(picture(100, 60))  # 2 x 2 tiles of 4 x 4 patches, rows 1 to 6 of the 8 are kept
    tokens = token_of_patch(plan)
    assert tokens[0].tolist() == np.arange(16).reshape(4, 4).tolist()
    top = plan.unpadded.top
    assert (tokens[1][:top] == NOWHERE).all()
    assert tokens[1][top].tolist() == [16, 17, 18, 19]
    assert tokens[2][top].tolist() == [20, 21, 22, 23]  # the tile on the right goes on in the same row
    assert tokens[1][top + 1].tolist() == [25, 26, 27, 28]  # 24 is the newline


def test_reports_stay_small() -> None:
    demo = choose_maps(n_layer=4, n_head=4, n_patches=144, n_steps=64)
    assert demo.heads == 4 and demo.layers == (0, 1, 2, 3) and not demo.note
    vicuna = choose_maps(n_layer=32, n_head=32, n_patches=576, n_steps=64)
    assert vicuna.heads == 0 and len(vicuna.layers) == 32 and "averaged" in vicuna.note
    tiled = choose_maps(n_layer=32, n_head=32, n_patches=2880, n_steps=64)
    assert 0 < len(tiled.layers) < 32 and tiled.layers[-1] == 31 and "layers are kept" in tiled.note
    assert choose_maps(32, 32, 2880, 4096).layers == ()


def test_a_report_with_averaged_heads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = make(folder)
    monkeypatch.setattr("tinyllava.study.explain.maps.MAX_BYTES", 0)
    few = lambda *sizes: choose_maps(*sizes, room=2 * 16 * 8)  # noqa: E731
    monkeypatch.setattr("tinyllava.study.explain.explain.choose_maps", few)
    small = make(folder)
    assert small.maps.shape == (8, 2, 1, 16)
    assert np.allclose(small.maps[:, 0, 0], full.maps[:, 0, 0], atol=1e-7)
    assert np.allclose(small.maps[:, 1, 0], full.maps[:, 2, 0], atol=1e-7)
    assert "1 of 2 layers are kept" in Page(render(small)).text


def test_quantising_keeps_the_peak() -> None:
    values, peaks = quantise(np.array([[0.0, 0.1, 0.2], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[0, 128, 255], [0, 0, 0]]
    assert peaks.tolist() == [np.float32(0.2), 0.0]


# ---- the command


def words(folder: Path, *more: object, vision: str = "clip_15") -> list[str]:
    pair = ["-m", folder / "vicuna.gguf", "--mmproj", folder / f"{vision}.gguf", "--backend", "numpy"]
    return [str(word) for word in ["explain", *pair, "--image", folder / "picture.png", "-n", 4, *more]]


def test_the_command_writes_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.html"
    assert cli.main(words(folder, "-p", "What?", "-o", out)) == 0
    assert "open it in a browser" in capsys.readouterr().err
    assert Page(out.read_text(encoding="utf-8")).data["question"] == "What?"
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_the_command_prints_the_walk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(folder, "-p", "What?", "--text", vision="clip_16")) == 0
    out = capsys.readouterr().out
    assert "tinyllava/vision/clip.py:" in out and "Language model" in out and "5x3x56x56" in out
    assert str(folder) not in out


def test_without_options_the_demo_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert cli.main(["explain", "-o", str(out)]) == 0
    assert out.stat().st_size < 500_000
    page = Page(out.read_text(encoding="utf-8"))
    assert page.data["answer"].strip() in capsys.readouterr().err
    assert len(page.data["maps"]["layers"]) == len(page.data["maps"]["heads"]) == 5
    assert not re.search(r"/(home|root|tmp|usr|work)/", page.text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-p", "?", "-o", "nowhere/out.html"], "no such directory"),
        (["-p", "?", "-o", "x.html", "--text"], "-o/--output"),
        (["-p", "<image>?", "--image", "SAME"], "<image> once, but 2 pictures"),
        (["-p", "?", "--max-layers", "3"], "not an option"),
        (["-p", "?", "--json"], "given to explain"),
    ],
)
def test_what_cannot_be_explained_is_said_in_a_line(
    more: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [str(folder / "picture.png") if word == "SAME" else word for word in more]
    more = [str(tmp_path / word) if word.endswith(".html") else word for word in more]
    assert cli.main(words(folder, *more)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_as_many_pictures_as_the_prompt_has_places_for(folder: Path) -> None:
    llava = tinyllava.load(folder / "vicuna.gguf", folder / "clip_15.gguf", backend="numpy")
    with pytest.raises(UsageError, match="<image> twice, but 1 picture"):
        explain(llava, "<image> and <image>", folder / "picture.png")
    with pytest.raises(UsageError, match="no picture"):
        explain(llava, "What?", [])


def test_no_walk_without_events(folder: Path) -> None:
    llava = tinyllava.load(folder / "vicuna.gguf", folder / "clip_15.gguf", backend="numpy")
    assert make_walk([], llava) == []
