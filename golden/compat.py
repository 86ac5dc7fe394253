"""The pictures and models on which the four profiles are held to the four implementations."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from golden.clip_models import VISION, ClipSpec

Tiles = list[np.ndarray[Any, np.dtype[np.uint8]]]  # each (tile_px, tile_px, 3)

PINPOINTS_336 = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # LLaVA-1.6's own
# LLaVA-1.6's real tile and pinpoints on a tower that costs nothing.
REAL_16 = replace(VISION["clip_16"], name="real_16", image_size=336, n_block=2, pinpoints=PINPOINTS_336)
SPECS: dict[str, ClipSpec] = {"clip_15": VISION["clip_15"], "clip_16": VISION["clip_16"], "real_16": REAL_16}

PIXELS_EVERY = {"clip_15": 1, "clip_16": 1, "real_16": 12}  # pixels are compared for each n-th size
EMBEDDINGS_EVERY = {"clip_15": 5, "clip_16": 6}  # and these embeddings are stored
COLUMN_STEP = 32  # of an embedding's 256 numbers each 32nd is stored
DIGEST_BYTES = 8

SMALL = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 3), (3, 1), (1, 3), (5, 3), (3, 5), (4, 7), (8, 8), (13, 9), (9, 27)]
COMMON = [
    *[(640, 480), (480, 640), (800, 600), (1024, 768), (1280, 720), (720, 1280), (1920, 1080), (500, 375)],
    *[(375, 500), (4000, 3000), (3000, 4000), (2000, 2000), (4000, 640), (512, 512), (224, 224), (1600, 500)],
]
THIN = [
    *[(1, 50), (50, 1), (1, 56), (56, 1), (1, 57), (2, 300), (300, 2), (20, 300), (300, 20), (3, 1000)],
    *[(1000, 3), (7, 2000), (2000, 7), (30, 4000), (4000, 30), (12, 700), (700, 12), (5, 333), (333, 5)],
]
BORDERS = [55, 56, 57, 111, 112, 113, 167, 168, 169, 335, 336, 337, 671, 672, 673, 1008]


def sizes() -> list[tuple[int, int]]:
    """(width, height) of 217 pictures: tiny, thin, common, around the tiles' borders, and any."""
    random = np.random.RandomState(11)  # frozen by NEP 19
    borders = [(BORDERS[i], BORDERS[j]) for i, j in random.randint(0, len(BORDERS), (60, 2)).tolist()]
    borders += [(side, side) for side in BORDERS]
    anything = np.exp(random.uniform(np.log(16), np.log(1100), (93, 2))).astype(int).tolist()
    return [*SMALL, *COMMON, *THIN, *borders, *((width, height) for width, height in anything)]


def digest(tiles: Tiles) -> bytes:
    """What identifies the pixels of all tiles, in order."""
    return hashlib.sha256(b"".join(tile.tobytes() for tile in tiles)).digest()[:DIGEST_BYTES]


def wanted(every: dict[str, int], spec: str, index: int) -> bool:
    """Whether the picture of that index is one of those stored."""
    return spec in every and index % every[spec] == 0


# ---- answers

ANSWER_TOKENS = 32
# (vision spec, picture size, question); the language model is golden "vicuna"
RANDOM_ANSWERS = [
    (spec, size, question)
    for spec in ("clip_15", "clip_16")
    for size in ((100, 60), (57, 333), (40, 30))
    for question in ("What is it?", "Where is the cat, and why?")
]
# (picture of demo/scenes, or the demo's own, question), for the embedded pair
DEMO_ANSWERS = [
    ("demo.png", "What is in the picture?"),
    ("demo.png", "Describe the picture."),
    ("demo.png", "Is there a cat in the picture?"),
    ("demo.png", "What is to the left of the dog?"),
    ("00.png", "What is this?"),
    ("03.png", "What objects are in the picture?"),
    ("06.png", "What is in the picture?"),
    ("12.png", "Describe the picture."),
    ("16.png", "How many objects are there?"),
    ("22.png", "Describe the picture."),
    ("23.png", "What do you see here?"),
    ("25.png", "What is this?"),
    ("27.png", "What objects are in the picture?"),
    ("29.png", "What is in the picture?"),
    ("31.png", "What color is the background?"),
    ("33.png", "What color is the background?"),
    ("35.png", "What is this?"),
    ("38.png", "Describe the picture."),
    ("40.png", "What is in the picture?"),
    ("41.png", "What objects are in the picture?"),
    ("45.png", "What is in the picture?"),
    ("49.png", "Describe the picture."),
    ("51.png", "Is there a dog in the picture?"),
    ("52.png", "What objects are in the picture?"),
]


def picture_path(name: str) -> Path:
    """Where a picture of DEMO_ANSWERS lies, or a file of the demo."""
    folder = Path(__file__).parent
    demo = folder.parent / "tinyllava" / "demo" / name
    return demo if name.startswith("demo") else folder / "demo" / "scenes" / name


# Token ids around a picture (IMAGE) for the two implementations on PyTorch, whatever they mean.
IMAGE = -200
TORCH_PROMPTS = ([1, 300, 290, IMAGE, 310, 320, 305, 288], [1, 278, IMAGE, 412, 99, 7])
TORCH_SIZES = ((100, 60), (57, 333), (40, 30))
# Questions in transformers' wording, for the ids of a real vocabulary. None has two spaces together: see
# "space-runs" in known_differences.toml.
HUB_QUESTIONS = (
    "What is in this picture?",
    "Describe the image.\nBe brief.",
    " a space and a tab\t",
    "Où est le chat ? 🙂",
    "图片里有什么？",
    "",
)
