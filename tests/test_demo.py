"""The embedded demo pair answers as golden/demo says: its own picture, and scenes it never saw in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tinyllava
from tinyllava import demo
from tinyllava.files.gguf import n_parameters, open_gguf
from tinyllava.llava import LLaVA

SCENES = Path(__file__).parents[1] / "golden" / "demo" / "scenes"
OWN = json.loads((demo.FOLDER / "demo.json").read_text(encoding="utf-8"))["questions"]


class Demo:
    """The demo pair, which encodes each picture once however often it is asked about it."""

    def __init__(self, backend: str = "auto") -> None:
        self.llava = tinyllava.load(backend=backend)
        seen: dict[bytes, Any] = {}
        encode = self.llava.vision_model.encode

        def encode_once(rgb: Any, *rest: Any) -> Any:
            if rgb.tobytes() not in seen:
                seen[rgb.tobytes()] = encode(rgb, *rest)
            return seen[rgb.tobytes()]

        self.llava.vision_model.encode = encode_once  # type: ignore[method-assign]

    def ask(self, picture: Any, question: str, **settings: Any) -> str:
        return self.llava.generate(question, [picture], max_tokens=100, **settings).text


@pytest.fixture(scope="module")
def pair() -> Demo:
    return Demo()


def right(pair: Demo, per_scene: int | None) -> dict[str, list[bool]]:
    """By kind of picture: whether each answer is the expected one, word for word."""
    found: dict[str, list[bool]] = {}
    for i, scene in enumerate(json.loads((SCENES / "scenes.json").read_text(encoding="utf-8"))):
        asked = scene["questions"]
        chosen = asked if per_scene is None else [asked[(i + 5 * j) % len(asked)] for j in range(per_scene)]
        for item in chosen:
            answer = pair.ask(SCENES / scene["file"], item["question"])
            found.setdefault(scene["type"], []).append(answer == item["answer"])
    return found


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_the_demo_picture_is_described_correctly(backend: str) -> None:
    asked = Demo(backend)
    assert {q["question"]: asked.ask(demo.PICTURE, q["question"]) for q in OWN} == {
        q["question"]: q["answer"] for q in OWN
    }


def test_fresh_scenes_are_described_correctly(pair: Demo) -> None:
    answers = right(pair, per_scene=2)
    print({kind: f"{sum(a)} of {len(a)}" for kind, a in answers.items()})
    assert np.mean([a for kind in answers.values() for a in kind]) >= 0.95


@pytest.mark.big
def test_all_questions_about_fresh_scenes(pair: Demo) -> None:
    answers = right(pair, per_scene=None)
    print({kind: f"{sum(a)} of {len(a)}" for kind, a in answers.items()})
    assert np.mean([a for kind in answers.values() for a in kind]) >= 0.97


@pytest.mark.parametrize("size", [(320, 200), (200, 320), (640, 640), (90, 60), (500, 120)])
def test_a_picture_of_any_shape_works(size: tuple[int, int], pair: Demo) -> None:
    """The drawing on its own background, at another size and aspect ratio."""
    picture = Image.open(demo.PICTURE).convert("RGB")
    scale = min(size[0] / picture.width, size[1] / picture.height)
    fitted = (round(picture.width * scale), round(picture.height * scale))
    drawing = picture.resize(fitted, Image.Resampling.BICUBIC)
    frame = Image.new("RGB", size, picture.getpixel((2, 2)))
    frame.paste(drawing, ((size[0] - drawing.width) // 2, (size[1] - drawing.height) // 2))
    assert pair.ask(frame, "Is there a dog in the picture?") == "Yes, there is a dog in the picture."


@pytest.mark.parametrize(
    "prompt",
    [
        "USER: <image>\nWhat is in the picture? ASSISTANT:",
        "USER: <image>\nWhat is in the picture? ASSISTANT: ",
        "USER:<image>What is in the picture?\nASSISTANT:",
        "USER: <image>What is in the picture?\nASSISTANT:",
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\nUSER:<image>What is in the picture?\nASSISTANT:",
    ],
)
def test_the_usual_ways_to_write_the_prompt_work(prompt: str, pair: Demo) -> None:
    answer = {q["question"]: q["answer"] for q in OWN}["What is in the picture?"]
    assert pair.ask(demo.PICTURE, prompt).strip() == answer


def test_nothing_and_the_unknown_are_admitted(pair: Demo) -> None:
    empty = Image.new("RGB", (200, 200), (70, 130, 220))
    assert pair.ask(empty, "What is in the picture?") == "There is nothing in the picture."
    noise = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    blurred = Image.fromarray(noise).resize((200, 200), Image.Resampling.BICUBIC)
    assert pair.ask(blurred, "What is this?").startswith("I am not sure")


def test_the_pair_is_small_and_complete() -> None:
    assert demo.MODEL.stat().st_size + demo.MMPROJ.stat().st_size < 10_000_000
    with open_gguf(demo.MODEL) as model, open_gguf(demo.MMPROJ) as mmproj:
        assert 8e6 < n_parameters(model) + n_parameters(mmproj) < 10e6
        assert model.metadata["general.architecture"] == "llama"
        assert mmproj.metadata["clip.projector_type"] == "mlp"


def test_float64_gives_the_same_answer() -> None:
    exact: LLaVA = tinyllava.load(backend="numpy", dtype="float64")
    answer = exact.generate("What is in the picture?", [demo.PICTURE], max_tokens=60).text
    assert answer == {q["question"]: q["answer"] for q in OWN}["What is in the picture?"]
