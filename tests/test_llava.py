"""The whole walk, from a picture and a question to logits and words, against the original LLaVA."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyllava
from golden.models import LANGUAGE, VISION, write_language_model, write_mmproj
from golden.pictures import picture
from tinyllava.errors import ContextError, ModelError, PictureError, TinyLLaVAError, UsageError
from tinyllava.llava import LLaVA
from tinyllava.tap import Recorder
from tinyllava.text.prompt import ImageSlot
from tinyllava.text.sampling import Sampling

GOLDEN = Path(__file__).parents[1] / "golden"
ANSWERS = np.load(GOLDEN / "original-answers.npz")
CASES = sorted(key.removesuffix(".logits") for key in ANSWERS.files if key.endswith(".logits"))
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    for name in ("vicuna", "llama_tied"):
        write_language_model(path / f"{name}.gguf", LANGUAGE[name])
    for name in ("clip_15", "clip_16"):
        write_mmproj(path / f"{name}.gguf", VISION[name])
    return path


def pair(folder: Path, vision: str = "clip_15", **settings: object) -> LLaVA:
    return tinyllava.load(folder / "vicuna.gguf", folder / f"{vision}.gguf", **settings)


def image(width: int, height: int) -> Image.Image:
    return Image.fromarray(picture(width, height))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_the_originals(case: str, backend: str, folder: Path) -> None:
    vision, _, size = case.split(".")  # for one: clip_16.anyres.100x60, width before height
    ids, theirs = ANSWERS["ids"].tolist(), ANSWERS[f"{case}.greedy"].tolist()
    llava, tap = pair(folder, vision, backend=backend), Recorder(["llm.result_output"])
    split = ids.index(-200)  # the original's mark for the picture
    plan = plan_of(llava, [ids[:split], ImageSlot(0), ids[split + 1 :]], image(*map(int, size.split("x"))))
    stream = llava.answer(plan, GREEDY, tap=tap)
    assert len("".join(stream)) > 0
    logits = tap.values["llm.result_output"][0][0]
    expected = ANSWERS[f"{case}.logits"]
    assert np.abs(logits - expected).max() < 1e-3 * np.ptp(expected)
    assert stream.result.tokens == theirs[: len(stream.result.tokens)]
    assert len(stream.result.tokens) == len(theirs) or theirs[len(stream.result.tokens)] in llava.tokenizer.end_ids


def plan_of(llava: LLaVA, parts: list[object], *pictures: Image.Image) -> tinyllava.generate.Plan:
    """A plan for given token ids, whatever their text."""
    plan = llava.plan("<image>" * len(pictures) + "x", pictures, max_tokens=12)
    return tinyllava.generate.Plan(**{**vars(plan), "parts": tuple(parts), "stop_texts": ()})


def test_the_plan_counts_what_the_run_uses(folder: Path) -> None:
    llava = pair(folder, "clip_16")
    plan = llava.plan("What?", [image(100, 60), image(40, 30)], max_tokens=5)
    result = llava.generate("What?", [image(100, 60), image(40, 30)], max_tokens=5)
    assert plan.family == "LLaVA-1.6"
    assert plan.image_tokens == result.image_tokens == sum(p.n_tokens for p in plan.pictures) == 52 + 36
    assert plan.prompt_tokens == result.prompt_tokens
    assert plan.context_needed == plan.prompt_tokens + 5
    assert len(result.tokens) <= 5


def test_streaming_gives_the_text_in_pieces_and_the_result_at_the_end(folder: Path) -> None:
    llava = pair(folder)
    stream = llava.stream("What?", [image(30, 50)], 20)
    with pytest.raises(UsageError, match="not finished"):
        _ = stream.result
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text == llava.generate("What?", [image(30, 50)], 20).text
    assert len(pieces) > 1


def test_chunks_of_a_prompt_do_not_change_the_answer(folder: Path) -> None:
    whole, chunked = pair(folder, n_batch=512), pair(folder, n_batch=7)
    question, pictures = "What is this, and why?", [image(60, 40)]
    assert whole.generate(question, pictures, 12).tokens == chunked.generate(question, pictures, 12).tokens


def test_a_picture_stands_where_the_prompt_says(folder: Path) -> None:
    llava = pair(folder)
    plan = llava.plan("before <image> after", [image(9, 9)], max_tokens=1)
    assert plan.template == "none"
    before, slot, after = plan.parts
    assert slot == ImageSlot(0)
    assert before == llava.tokenizer.encode("before ")
    assert after == llava.tokenizer.encode(" after", add_bos=False)


def test_another_picture_b_leaves_picture_a_alone(folder: Path) -> None:
    llava, runs = pair(folder, "clip_16"), []
    for other in (image(50, 20), image(21, 90)):
        tap = Recorder(["image_tokens"])
        list(llava.answer(llava.plan("Which?", [image(64, 64), other], max_tokens=1), tap=tap))
        runs.append(tap.values["image_tokens"])
    assert np.array_equal(runs[0][0], runs[1][0])
    assert runs[0][1].shape != runs[1][1].shape


def test_progress_is_reported_for_every_tile_and_chunk(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    pair(folder, "clip_16", n_batch=50).generate(
        "What?", [image(100, 60)], 2, progress=lambda *step: seen.append(step)
    )
    assert [step for step in seen if step[0] == "picture"] == [("picture", i, 5) for i in range(6)]
    prompt = [step for step in seen if step[0] == "prompt"]
    assert prompt[0][1] == 0 and prompt[-1][1] == prompt[-1][2] and len(prompt) > 3


def test_a_language_model_alone_answers_text_and_refuses_pictures(folder: Path) -> None:
    llava = tinyllava.load(folder / "vicuna.gguf")
    assert llava.generate("hello", max_tokens=3).image_tokens == 0
    assert llava.logits([1, 5, 9]).shape == (3, 512)
    with pytest.raises(UsageError, match="mmproj: none given"):
        llava.generate("hello", [image(5, 5)])


def test_an_mmproj_alone_encodes_pictures_and_refuses_text(folder: Path) -> None:
    llava = tinyllava.load(mmproj=folder / "clip_15.gguf")
    embeddings = llava.encode_image(image(70, 30))
    assert embeddings.shape == (16, 256) and embeddings.dtype == np.float32
    with pytest.raises(UsageError, match="model: none given"):
        llava.generate("hello")


def test_one_picture_may_come_without_a_list(folder: Path, tmp_path: Path) -> None:
    llava, path = pair(folder), tmp_path / "one.png"
    image(30, 50).save(path)
    expected = llava.generate("What?", [path], 4).tokens
    for one in (path, str(path), path.read_bytes(), image(30, 50)):
        assert llava.generate("What?", one, 4).tokens == expected


def test_more_threads_than_processors_are_not_taken(folder: Path) -> None:
    assert pair(folder, threads=10_000).ops.threads <= (os.cpu_count() or 1)


def test_float64_agrees_with_float32(folder: Path) -> None:
    exact = pair(folder, backend="numpy", dtype="float64").encode_image(image(70, 30))
    for backend, limit in (("numpy", 1e-5), ("numba", 2e-4)):  # numba rounds what meets 16-bit weights to 15 bits
        found = pair(folder, backend=backend).encode_image(image(70, 30))
        assert np.linalg.norm(found - exact) < limit * np.linalg.norm(exact)


def test_sampling_with_a_seed_repeats_itself(folder: Path) -> None:
    llava, sampling = pair(folder), Sampling(temperature=1.5, seed=7)
    first, second = (llava.generate("Tell me", max_tokens=16, sampling=sampling) for _ in range(2))
    assert first.tokens == second.tokens and first.seed == 7
    other = llava.generate("Tell me", max_tokens=16, sampling=Sampling(temperature=1.5, seed=8))
    assert other.tokens != first.tokens


@pytest.mark.parametrize(
    "prompt, n_images, settings, error, message",
    [
        ("", 0, {}, UsageError, "prompt: empty"),
        ("  \n", 1, {}, UsageError, "prompt: empty"),
        ("<image> and <image>", 1, {}, UsageError, "<image> twice, but 1 picture"),
        ("hello", 0, {"template": "alpaca"}, UsageError, "template: 'alpaca'; wanted auto, vicuna"),
        ("hello", 0, {"max_tokens": 5000}, ContextError, r"Use -c \d+ or more"),
        ("hello", 0, {"max_tokens": 0}, UsageError, "max_tokens: 0; wanted 1 or more"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    prompt: str, n_images: int, settings: dict[str, object], error: type, message: str, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        pair(folder).stream(prompt, [image(8, 8)] * n_images, **settings)


def test_the_context_that_is_named_would_do(folder: Path) -> None:
    with pytest.raises(ContextError) as caught:
        pair(folder, n_ctx=40).plan("What?", [image(8, 8)], max_tokens=10)
    needed = int(str(caught.value).split("Use -c ")[1].split()[0])
    assert pair(folder, n_ctx=needed).plan("What?", [image(8, 8)], max_tokens=10).context_needed == needed


def test_files_in_the_wrong_places_are_told_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Give this file as --mmproj"):
        tinyllava.load(folder / "clip_15.gguf")
    with pytest.raises(ModelError, match="This is the language model"):
        tinyllava.load(mmproj=folder / "vicuna.gguf")
    with pytest.raises(ModelError, match=r"projects to 256 features, but .* reads 128"):
        tinyllava.load(folder / "llama_tied.gguf", folder / "clip_15.gguf")
    with pytest.raises(TinyLLaVAError, match="no such file"):
        tinyllava.load(tmp_path / "absent.gguf")
    with pytest.raises(PictureError):
        pair(folder).encode_image(b"not a picture")


@pytest.mark.parametrize("n_batch", [1, 3, 4, 100])
def test_a_prompt_in_pieces_is_the_prompt(n_batch: int) -> None:
    llava = tinyllava.load(backend="numpy")
    model = llava.language
    model.n_batch = n_batch
    width = model.llama.config.n_embd
    picture = np.arange(5 * width, dtype=np.float32).reshape(5, width)
    ids = [3, 9, 27], [81, 7]
    whole = np.concatenate([*model.pieces(ids[0]), picture, *model.pieces(ids[1])])
    pieces = list(model.pieces(ids[0], picture, [], ids[1]))
    assert [len(piece) for piece in pieces[:-1]] == [n_batch] * (len(pieces) - 1)
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
