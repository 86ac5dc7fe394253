"""Draw the committed evaluation pictures, golden/demo/scenes/, and the demo's own picture.

    python golden/demo/make_scenes.py sprites.npz golden/demo/scenes tinyllava/demo

Scenes of every shape, from icons that the demo was trained with but in arrangements that it never saw, some
empty, some with a thing that it must not know, two painted photo-like ones.  Boxes are pixels of the
stored picture: left, top, right, bottom.  The held-out style is in none of them.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from batches import empty_spec, write_spec
from compose import Brush, contrast_table, draw, load_sprites, make_atlas
from fetch_icons import read_pins
from photos import paint_pool, pick_from
from PIL import Image
from questions import IDS, ask
from scenes import MAX_OBJECTS, UNKNOWN, Item, Library, Scene, invent
from score import PINNED
from torch import Tensor
from vocabulary import COLOR_NAMES, PATTERNS, read_nouns

NOUNS = read_nouns()
SIDES_PX = (168, 200, 224, 256, 260, 301, 320)
ODD_SHAPES = ((1.0, 173 / 301), (211 / 260, 1.0), (1.0, 0.36), (0.41, 1.0))
# (how many, what is invented); `letterbox` 1 is never square
PLAN = (
    (22, {"letterbox": 0.0, "unknown": 0.0, "empty": 0.0}),
    (22, {"letterbox": 1.0, "unknown": 0.0, "empty": 0.0}),
    (4, {"letterbox": 0.5, "empty": 1.0}),
    (6, {"letterbox": 0.4, "unknown": 1.0, "objects": 1}),
    (2, {"photo": True}),
)
PINNED_KINDS = ("what", "list", "describe", "background", "is there", "how many", "side")


class Studio:
    """Draws whole pictures on the CPU, without their padding."""

    def __init__(self, pixels: np.ndarray, facts: list[dict]) -> None:
        """All sprites and their facts."""
        self.pixels, self.facts = pixels, facts

    def picture(self, scene: Scene, side_px: int, rng: random.Random) -> Image.Image:
        """The scene with its longer side of side_px pixels."""
        spec = empty_spec(1)
        write_spec(spec, 0, scene, rng)
        used = spec["sprite"][0]
        atlas = make_atlas(self.pixels[used], "cpu")
        spec["sprite"][0] = np.arange(MAX_OBJECTS)
        tensors = {name: torch.from_numpy(value) for name, value in spec.items()}
        canvas = draw(tensors, atlas, side_px, MAX_OBJECTS, Brush(False))
        if scene.photo:
            canvas = self.photo(rng, side_px)
        (left, width), (top, height) = (span(extent, side_px) for extent in (scene.width, scene.height))
        part = canvas[0, :, top : top + height, left : left + width].round().clamp(0, 255)
        return Image.fromarray(part.byte().permute(1, 2, 0).numpy())

    def photo(self, rng: random.Random, side_px: int) -> Tensor:
        """A painted photo-like picture."""
        rows = [rng.randrange(len(self.pixels)) for _ in range(60)]
        torch.manual_seed(rng.randrange(1 << 30))
        pool = paint_pool(4, make_atlas(self.pixels[rows], "cpu"), len(rows), "cpu", 4)
        return pick_from(pool, torch.tensor([rng.randrange(1 << 30)]), side_px)


def span(extent: float, side_px: int) -> tuple[int, int]:
    """Where a picture's side starts on its square canvas, and its length; as compose.inside_picture has it."""
    length = max(1, round(extent * side_px))
    return (side_px - length) // 2, length


def box_px(item: Item, scene: Scene, side_px: int) -> list[int]:
    """The object's box in pixels of the stored picture."""
    (left, width), (top, height) = (span(extent, side_px) for extent in (scene.width, scene.height))
    x0, y0, x1, y1 = (value * side_px for value in item.box)
    return [
        max(0, round(x0) - left),
        max(0, round(y0) - top),
        min(width, round(x1) - left),
        min(height, round(y1) - top),
    ]


def describe_objects(scene: Scene, facts: list[dict], side_px: int) -> list[dict]:
    """What is where, and from which icon it was drawn."""
    licenses = {pin["name"]: pin["license"] for pin in read_pins()} | {"shapes": "none needed"}
    objects = []
    for item in scene.items:
        fact = facts[item.sprite]
        noun = "unknown" if item.noun == UNKNOWN else NOUNS[item.noun].name
        color = {"color": COLOR_NAMES[item.color]} if item.color >= 0 else {}
        objects.append(
            {
                "noun": noun,
                "box": box_px(item, scene, side_px),
                **color,
                "icon": f"{fact['icon_set']}:{fact['icon']}",
                "license": licenses[fact["icon_set"]],
            }
        )
    return objects


def question_list(scene: Scene, rng: random.Random) -> list[dict]:
    """The pinned wordings that suit the scene, then up to four other questions in any wording."""
    kinds = PINNED_KINDS if scene.items or not scene.photo else PINNED_KINDS[:3]
    found: dict[str, dict] = {}
    for kind in kinds:
        for _ in range(60):
            asked = ask(scene, rng, kind)
            if asked and PINNED.fullmatch(asked[1]):
                found.setdefault(
                    asked[1], {"kind": asked[0], "variant": "pinned", "question": asked[1], "answer": asked[2]}
                )
                if (
                    kind not in ("list", "side", "is there")
                    or len([q for q in found.values() if q["kind"] == kind]) > 1
                ):
                    break
    for _ in range(4):
        asked = ask(scene, rng)
        if asked and asked[1] not in found:
            found[asked[1]] = {"kind": asked[0], "variant": "paraphrase", "question": asked[1], "answer": asked[2]}
    return list(found.values())


def make_scenes(studio: Studio, libraries: dict[str, Library], folder: Path) -> None:
    """All evaluation pictures and scenes.json."""
    rng = random.Random(20261122)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for count, invention in PLAN:
        for _ in range(count):
            library = libraries["held out unknown" if invention.get("unknown") else "train"]
            scene = invent(rng, library, **invention)
            side_px = rng.choice(SIDES_PX)
            name = f"{len(entries):02d}.png"
            studio.picture(scene, side_px, rng).save(folder / name, optimize=True)
            kind = "photo-like" if scene.photo else "scene"
            background = (
                None
                if scene.photo
                else {"color": COLOR_NAMES[scene.background], "pattern": PATTERNS[scene.pattern]}
            )
            entries.append({"file": name, "type": kind, "objects": describe_objects(scene, studio.facts, side_px),
                            "background": background, "questions": question_list(scene, rng)})  # fmt: skip
    (folder / "scenes.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf8")
    questions = sum(len(entry["questions"]) for entry in entries)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{len(entries)} pictures, {questions} questions, {size:,} bytes")


def find(facts: list[dict], icon: str) -> int:
    """The sprite of "set:icon", without outline."""
    name, icon = icon.split(":")
    return next(i for i, f in enumerate(facts) if (f["icon_set"], f["icon"], f["outlined"]) == (name, icon, False))


def demo_scene(facts: list[dict]) -> Scene:
    """An apple, a dog and a car on blue; 320 x 200."""
    scene = Scene(1.0, 0.625, COLOR_NAMES.index("blue"), PATTERNS.index("gradient"))
    for noun, icon, x, y, size in (
        ("red apple", "fluent-emoji-flat:red-apple", 0.14, 0.505, 0.22),
        ("dog", "noto:dog", 0.5, 0.5, 0.42),
        ("car", "noto:automobile", 0.85, 0.505, 0.25),
    ):
        sprite = find(facts, icon)
        fact = facts[sprite]
        scene.items.append(
            Item(
                IDS[noun], sprite, -1, x, y, size * fact["width"] / 2, size * fact["height"] / 2, size, 0, 0, False
            )
        )
    return scene


def demo_questions(scene: Scene) -> list[dict]:
    """Every wording that the README suggests, with its answer."""
    wanted = [
        "What is this?",
        "What objects are in the picture?",
        "What is in the picture?",
        "Describe the picture.",
        "What color is the background?",
        "Is there a dog in the picture?",
        "Is there a cat in the picture?",
        "How many dogs are there?",
        "How many objects are there?",
        "What is to the left of the dog?",
        "What is to the right of the dog?",
        "What is above the dog?",
        "What is below the dog?",
        "Where is the dog?",
    ]
    rng, found = random.Random(0), {}
    for _ in range(200_000):
        asked = ask(scene, rng)
        if asked and asked[1] in wanted:
            found[asked[1]] = {"kind": asked[0], "question": asked[1], "answer": asked[2]}
            if len(found) == len(wanted):
                break
    return [found[question] for question in wanted]


def make_demo(studio: Studio, folder: Path) -> None:
    """demo.png and demo.json."""
    scene, rng = demo_scene(studio.facts), random.Random(5)
    studio.picture(scene, 320, rng).save(folder / "demo.png", optimize=True)
    facts = {"picture": "demo.png", "objects": describe_objects(scene, studio.facts, 320),
             "background": {"color": COLOR_NAMES[scene.background], "pattern": PATTERNS[scene.pattern]},
             "questions": demo_questions(scene)}  # fmt: skip
    (folder / "demo.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf8")


def main() -> None:
    """Everything; or, with "-" in place of the scenes' folder, the demo's picture alone."""
    pixels, facts = load_sprites(Path(sys.argv[1]))
    contrast = contrast_table(pixels)
    libraries = {role: Library(facts, NOUNS, contrast, role) for role in ("train", "held out unknown")}
    studio = Studio(pixels, facts)
    if sys.argv[2] != "-":
        make_scenes(studio, libraries, Path(sys.argv[2]))
    make_demo(studio, Path(sys.argv[3]))


if __name__ == "__main__":
    main()
